"""Rewards of any kind in whole runs: the KL budget, what is said before training, and alarms during it."""

import json
import sys

import pytest

from config import PPOConfig
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import read_json, rows, small_run

pytestmark = pytest.mark.usefixtures("without_pictures", "demo")
REWARDS = """
import random
draw = random.Random(1)
def length(texts): return [100.0 * len(text) for text in texts]
def rare(texts): return [float(i == 0) for i in range(len(texts))]
def chance(texts): return [draw.random() for _ in texts]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A small run with a reward of the module above: its exit code, folder, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "any_reward.py").write_text(REWARDS)

    def run(reward, *flags):
        code, folder = small_run(tmp_path, "--reward", f"any_reward:{reward}", "--eval_samples", "64", *flags)
        return code, folder, "".join(capsys.readouterr())

    yield run
    sys.modules.pop("any_reward", None)


def test_a_budget_finds_the_coefficient_of_a_run_and_of_a_loop_of_ones_own(run):
    code, folder, said = run("length", "--kl_budget", "0.3", "--episodes", "32")
    coefficient, results = read_json(folder / "config.json")["init_kl_coef"], read_json(folder / "evaluation.json")
    assert code == 0 and coefficient != PPOConfig(preset="demo").init_kl_coef
    assert results["gain"]["beta"] == coefficient and results["gain"]["limit"]["kl"] == pytest.approx(0.3, rel=1e-3)
    assert {float(row["objective/kl_coef"]) for row in rows(folder)} == {coefficient}
    assert f"{coefficient:.3g}" in said

    import any_reward

    trainer = TextPPOTrainer.from_pretrained("demo", PPOConfig(preset="demo", device="cpu", eval_samples=64))
    assert trainer.fit_kl_coef(["刚收到货,感觉"], any_reward.length, 0.3) == coefficient


@pytest.mark.parametrize(("reward", "budget"), [("rare", "0.3"), ("length", "60")])
def test_a_budget_that_cannot_be_met_ends_the_run_before_training(run, reward, budget):
    code, folder, printed = run(reward, "--kl_budget", budget)
    assert code == 2 and "error: --kl_budget" in printed.splitlines()[-1] and "Traceback" not in printed
    assert not (folder / "model").exists()


def test_a_reward_that_is_chance_is_told_and_its_gain_is_unknown(run):
    code, folder, said = run("chance", "--episodes", "16")
    results = read_json(folder / "evaluation.json")
    assert code == 0 and results["before"]["noise"] == pytest.approx(1, abs=0.5) and "is chance" in said
    assert results["gain"]["gain"] is None and "twice" in results["verdict"]


def test_an_alarm_is_printed_once_and_stays_in_the_evaluation(run):
    flags = ["--lr", "0.01", "--gen_len", "2", "--prompts", "刚收到货,感觉", "收到货,感觉"]
    code, folder, said = run("length", *flags)
    assert code == 0 and said.count("the policy moves too fast") == 1
    alarms = read_json(folder / "evaluation.json")["alarms"]
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    first = [line for line in lines if line["step"] == 1]
    texts = {line["prompt"] + line["completion"] for line in first}
    assert len(texts) > len({line["completion"] for line in first})  # both prompts got some of the same completions
    assert float(rows(folder)[0]["tokens/unique_share"]) == len(texts) / 16
    code, _, said = run("length", "--resume", str(folder), "--episodes", "64", *flags)
    assert code == 0 and "moves too fast" not in said
    assert [alarm for alarm in read_json(folder / "evaluation.json")["alarms"] if alarm in alarms] == alarms != []
