"""Rewards of any kind: the price for a budget, what is told before training and while it runs, in whole runs."""

import csv
import json
import sys

import pytest

from config import PPOConfig
from support.text_trainer import TextPPOTrainer
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")

SMALL = "--preset demo --device cpu --episodes 48 --batch_size 16 --minibatch_size 8 --eval_samples 64".split()
REWARDS = """
import random
def length(texts): return [100.0 * len(text) for text in texts]
def same(texts): return [0.5] * len(texts)
def rare(texts): return [float(i == 0) for i in range(len(texts))]
def chance(texts): return [random.random() for _ in texts]
"""


@pytest.fixture
def run(tmp_path, demo, monkeypatch, capsys):
    """A small run with a reward of the module above: its exit code, folder, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "any_reward.py").write_text(REWARDS)

    def run(reward, *flags, name="run"):
        code = main([*SMALL, "--run_name", name, "--reward", f"any_reward:{reward}", *flags])
        printed = capsys.readouterr()
        return code, tmp_path / "runs" / name, printed.out + printed.err

    yield run
    sys.modules.pop("any_reward", None)


def column(folder, name: str) -> list[float]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def read(folder, name: str):
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_a_budget_finds_the_coefficient_that_the_run_trains_with_and_goes_on_with(run, tmp_path):
    code, folder, said = run("length", "--kl_budget", "0.3")
    config, results = read(folder, "config.json"), read(folder, "evaluation.json")
    assert code == 0 and config["kl_budget"] == 0.3 and config["init_kl_coef"] != 0.15
    assert results["gain"]["beta"] == config["init_kl_coef"]
    assert results["gain"]["limit"]["kl"] == pytest.approx(0.3, rel=1e-3)
    assert column(folder, "objective/kl_coef") == [config["init_kl_coef"]] * 3
    assert f"at a KL coefficient of {config['init_kl_coef']:.3g} the best possible policy gets a reward of" in said
    code, _, said = run("length", "--resume", str(folder), "--episodes", "64")
    assert code == 0 and column(folder, "objective/kl_coef") == [config["init_kl_coef"]] * 4


def test_a_loop_of_ones_own_finds_the_same_coefficient(run, demo):
    _, folder, _ = run("length", "--kl_budget", "0.3", "--episodes", "16")
    import any_reward

    trainer = TextPPOTrainer.from_pretrained("demo", PPOConfig(preset="demo", device="cpu", eval_samples=64))
    found = trainer.fit_kl_coef(["刚收到货,感觉"], any_reward.length, 0.3)
    assert found == trainer.config.init_kl_coef == read(folder, "config.json")["init_kl_coef"]
    queries = trainer.encode(["刚收到货,感觉"] * 2)
    assert trainer.step(queries, trainer.generate(queries), [1.0, 0.0])["objective/kl_coef"] == found
    with pytest.raises(
        ValueError, match=r"kl_budget is .* in your own loop, trainer.fit_kl_coef\(prompts, reward, 0.3\)"
    ):
        TextPPOTrainer.from_pretrained("demo", PPOConfig(preset="demo", device="cpu", kl_budget=0.3))
    for prompts, budget in ((["刚收到货,感觉"], 0), (["刚收到货,感觉"], "0.4"), ([], 0.4)):
        with pytest.raises(ValueError, match="fit_kl_coef.. takes one prompt or more, and a budget above 0"):
            trainer.fit_kl_coef(prompts, any_reward.length, budget)
    with pytest.raises(ValueError, match="before the first step alone"):
        trainer.fit_kl_coef(["刚收到货,感觉"], any_reward.length, 0.3)


@pytest.mark.parametrize(
    ("reward", "flags", "said"),
    [
        ("same", ["--kl_budget", "0.3"], "error: --kl_budget: of 64 completions before training 0 differ in score"),
        ("rare", ["--kl_budget", "0.3"], "error: --kl_budget: of 64 completions before training 1 differ in score"),
        ("length", ["--kl_budget", "60"], "error: --kl_budget 60 is more than these scores can use"),
        ("length", ["--kl_budget", "0.3", "--init_kl_coef", "0.1"], "--kl_budget finds the value of --init_kl_coef"),
    ],
)
def test_a_budget_that_cannot_be_met_ends_the_run_before_training(run, reward, flags, said):
    code, folder, printed = run(reward, *flags)
    assert code == 2 and said in printed.splitlines()[-1] and "Traceback" not in printed
    assert not folder.exists()  # so that the same name starts again


def test_a_reward_that_is_chance_is_told_and_its_gain_is_unknown(run):
    code, folder, said = run("chance")
    results = read(folder, "evaluation.json")
    assert code == 0 and results["before"]["noise"] == pytest.approx(1, abs=0.5)
    assert "of the rewards' variance is chance" in said
    assert results["gain"]["gain"] is None and results["verdict"].endswith("as scoring the same texts twice shows")
    assert "noise" not in results["after"]


def test_an_alarm_is_on_the_screen_once_and_in_the_evaluation_and_stays_told_after_a_stop(run):
    flags = ["--lr", "0.01", "--log_samples_every", "0"]
    code, folder, said = run("length", *flags)
    assert code == 0 and said.count("the policy moves too fast") == 1
    assert "warning: step 1: the policy moves too fast (approxkl" in said
    alarms = read(folder, "evaluation.json")["alarms"]
    assert [alarm["step"] for alarm in alarms if alarm["alarm"] == "too fast"] == [1]
    code, _, said = run("length", "--resume", str(folder), "--episodes", "64")
    assert code == 0 and "moves too fast" not in said
    assert [alarm for alarm in read(folder, "evaluation.json")["alarms"] if alarm in alarms] == alarms


def test_a_run_without_signs_has_none(run):
    code, folder, said = run("length", "--init_kl_coef", "300", "--lr", "2e-5")
    assert code == 0 and read(folder, "evaluation.json")["alarms"] == [] and "warning" not in said
    assert column(folder, "tokens/unique_share") == [len(set(texts)) / 16 for texts in texts_by_step(folder)]


def texts_by_step(folder) -> list[list[str]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return [[line["completion"] for line in lines if line["step"] == step] for step in (1, 2, 3)]
