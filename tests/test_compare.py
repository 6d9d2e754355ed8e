"""support/run/compare.py: which runs form one curve, the labels of the curves, and the table, checked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from config import PPOConfig
from support.common.errors import UserError
from support.compute import devices
from support.run.compare import Run, comparison, curves, read_run, short
from tests.helpers import MEAN, STD, write_run


def run(name="run", at=(128, 256), after=None, gain=None, **settings) -> Run:
    """Return a demo run in the folder `name`, with these settings changed. after: (R, KL, unique)."""
    episodes = np.array(at, dtype=float)
    ones = np.ones(len(at))
    metrics = {"step": episodes / 128, "episodes": episodes, MEAN: episodes / 1000, STD: ones, "time/step": ones}
    evaluation = {"after": dict(zip(("reward", "kl", "unique"), after)), "gain": gain} if after else {}
    return Run(name, metrics, evaluation, vars(PPOConfig(preset="demo")) | {"run_name": name} | settings)


def labels(*runs, by=None) -> list[str]:
    return [curve.label for curve in curves(list(runs), by)]


def test_runs_that_differ_only_in_the_seed_form_one_curve():
    runs = [run(f"{lr} {seed}", lr=lr, seed=seed) for lr in (1.41e-5, 0.5) for seed in (1, 2, 3)]
    found = curves(runs)
    assert [curve.label for curve in found] == ["lr 1.41e-05, 3 runs", "lr 0.5, 3 runs"]
    assert [r.name for r in found[1].runs] == ["0.5 1", "0.5 2", "0.5 3"]
    assert labels(*runs[:3]) == ["all, 3 runs"] and labels(runs[0]) == ["1.41e-05 1"]
    silent = dict(log_samples_every=1, save_every=1, save_every_minutes=1, keep_checkpoints=1, process_timeout=1)
    silent |= dict(device="cuda:1", micro_batch_size=8, eval_samples=512)
    assert labels(run("a"), run("b", seed=2, run_name="b", runs_dir="x", **silent)) == ["all, 2 runs"]


def test_curves_that_would_have_the_same_label_show_the_names_of_their_runs():
    """Runs share a seed if the program was changed between them, and shortened values can look the same."""
    assert labels(run("old"), run("new")) == ["old", "new"]
    assert labels(run("a"), run("b"), run("c", lr=0.5)) == ["lr 0.0001 (a)", "lr 0.0001 (b)", "lr 0.5"]
    far = "x" * 30
    assert labels(run("a", reward=f"1{far}"), run("b", reward=f"2{far}")) == [f"reward …{far[:23]} ({n})" for n in "ab"]
    assert short("models/the-long-name-of-a-model") == "…he-long-name-of-a-model"
    older = run("older", lr=0.5)
    del older.settings["average_power"]
    assert labels(older, run("a")) == ["lr 0.5, average_power unknown", "lr 0.0001, average_power 3"]


def test_the_by_option_groups_runs_that_differ_in_other_settings():
    runs = [run(f"{lr} {beta}", lr=lr, init_kl_coef=beta) for lr in (0.5, 0.1) for beta in (0.2, 0.1)]
    assert labels(*runs) == [f"init_kl_coef {beta}, lr {lr}" for lr in (0.5, 0.1) for beta in (0.2, 0.1)]
    assert labels(*runs, by=["lr"]) == ["lr 0.5, 2 runs", "lr 0.1, 2 runs"]
    assert labels(run("a", seed=2), run("b"), by=["seed"]) == ["seed 2", "seed 1"]


def test_a_curve_ends_where_its_shortest_run_ends():
    first, second = run("a", [128, 256, 384]), run("b", [128, 256], seed=2)
    first.metrics["more"] = first.metrics["step"]
    (curve,) = curves([first, second])
    assert "more" not in curve.metrics and MEAN in curve.metrics  # only columns that both runs have
    assert curve.metrics["episodes"].tolist() == [[128, 256]] * 2
    (curve,) = curves([run("a", [128]), run("b", [100], batch_size=100)], ["lr"])
    with pytest.raises(UserError, match="the runs of lr 0.0001, 2 runs differ in their episodes per step"):
        curve.metrics


def test_runs_with_different_versions_of_a_reward_file_form_different_curves(tmp_path, monkeypatch):
    for name in "ab":
        folder = write_run(tmp_path / name, 2, settings={"reward": "my:score", "seed": ord(name)})
        hashes = {"the hash of the file of --reward my:score": name * 12, "the hash of the prompts": name}
        (folder / "inputs.json").write_text(json.dumps(hashes))
    runs = [read_run(tmp_path / name) for name in "ab"]
    assert labels(*runs) == [f"reward my:score {name * 12}" for name in "ab"]
    monkeypatch.chdir(tmp_path / "a")
    assert read_run(Path(".")).name == "a"


def test_runs_with_different_code_form_different_curves(tmp_path):
    """A run that was resumed with edited code belongs to neither version. Older runs don't record their code."""
    starts = {"a": ["1"], "b": ["1", "1"], "c": ["2"], "d": ["1", "2"], "e": []}
    for name, codes in starts.items():
        folder = write_run(tmp_path / name, 2, settings={"seed": ord(name)})
        (folder / "environment.jsonl").write_text("".join(f'{{"code": "{code}"}}\n' for code in codes))
    runs = [read_run(tmp_path / name) for name in starts]
    assert labels(*runs) == ["code 1, 2 runs", "code 2", "code 1, 2", "code unknown"]


def test_the_code_hash_covers_the_files_that_affect_results(tmp_path, monkeypatch):
    """Settings in config.py are compared separately, and so is a reward file next to the program."""
    monkeypatch.setattr(devices, "ROOT", tmp_path)
    decides = ["gpt2_value_head.py", "ppo.py", "reward.py", "train_ppo.py", "support/x.py", "support/run/limit.py"]
    others = ["config.py", "plot_rewards.py", "my_reward.py", "tests/test_x.py", "support/notes.md"]
    for name in decides + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"a\nb\n")
    before = devices.code_hash.__wrapped__()
    for name in decides + others:
        (tmp_path / name).write_bytes(b"a\nc\n")
        assert (devices.code_hash.__wrapped__() != before) == (name in decides), name
        (tmp_path / name).write_bytes(b"a\r\nb\r\n")
        assert devices.code_hash.__wrapped__() == before  # git's line endings on Windows
    (tmp_path / "support" / "x.py").rename(tmp_path / "support" / "y.py")
    assert devices.code_hash.__wrapped__() != before


def test_eval_samples_is_taken_from_the_evaluation(tmp_path):
    """One run was evaluated again, with more samples than its config.json says."""
    for seed, n in (1, 128), (2, 512):
        folder = write_run(tmp_path / str(seed), 2, settings={"seed": seed, "eval_samples": 128})
        (folder / "evaluation.json").write_text(json.dumps({"after": {"n": n}}))
    runs = [read_run(tmp_path / name) for name in "12"]
    assert labels(*runs) == ["all, 2 runs"]
    assert labels(*runs, by=["eval_samples"]) == ["eval_samples 128", "eval_samples 512"]


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_comparison_table_by_hand():
    """With beta 0.15, rewards of 0.9 and 0.7 at 0.5 and 0.3 nats give J of 0.825 and 0.655. Gains of 0.8 and 0.6 have a
    standard deviation of sqrt(0.02), and their mean has a standard error of 0.1. A standard deviation of 0.4 in the
    first step needs two decimals, and the table adds one."""
    unknown = {"gain": None, "why": "too few samples", "gain_se": 9.0}
    runs = [
        run("a", after=(0.9, 0.5, 0.9), gain={"gain": 0.8, "gain_se": 0.02}),
        run("b", seed=2, after=(0.7, 0.3, 1.0), gain={"gain": 0.6, "gain_se": 0.04}),
        run("c", [128 * i for i in range(1, 11)], lr=0.5, after=(0.9, 0.5, 0.9), gain=unknown),
        run("d", lr=0.7),
    ]
    for number, each in enumerate(runs):
        each.metrics["time/step"] = number + 0 * each.metrics["step"]
        each.metrics[STD] = 0.4 + number - 0.399 * (each.metrics["step"] > 1)
    runs[2].metrics["time/step"][0] = 99  # a slow first step doesn't change the median
    header, _, *rows, _, _, _, _, _, first, _, second = cells(comparison(runs, curves(runs)))
    assert header == ",runs,episodes,R,KL,J,gain,standard error,SD,evaluation error,unique,seconds per step".split(",")
    assert rows == [
        ["lr 0.0001", "2", "256", "0.800", "0.400", "0.740", "0.70", "0.100", "0.14", "0.03", "95.0%", "0.50"],
        ["lr 0.5", "1", "1,280", "0.900", "0.500", "0.825", "-", "-", "-", "-", "90.0%", "2.00"],
        ["lr 0.7", "1", "256", "-", "-", "-", "-", "-", "-", "-", "-", "3.00"],
    ]
    assert first == ["The gain of c is unknown: too few samples."]
    assert second == ["The gain of d is unknown: not evaluated yet."]


def told_apart(*gains: tuple, error=0.02) -> list[list[str]]:
    """Return the table of pairs for curves with these gains, one gain per seed."""
    runs = [
        run(f"{i} {seed}", lr=0.1 * i, seed=seed, after=(0.9, 0.5, 0.9), gain={"gain": gain, "gain_se": error})
        for i, of_curve in enumerate(gains, 1)
        for seed, gain in enumerate(of_curve)
    ]
    text = comparison(runs, curves(runs))
    assert ("these differences may be noise" in text) == (max(map(len, gains)) == 1)
    return [row for row in cells(text) if row[-1].startswith(("yes", "no: "))]


def test_two_settings_are_compared_by_the_spread_over_their_seeds():
    """0.8 and 0.6 have mean 0.7 with standard error 0.1; 0.95 and 0.85 have mean 0.9 with standard error 0.05. Their
    difference of 0.2 has standard error 0.112. With 4 (0.02 + 0.005) / 0.04 = 2.5 seeds each, it would be twice its
    standard error."""
    assert told_apart((0.8, 0.6), (0.95, 0.85)) == [["lr 0.1", "lr 0.2", "-0.200", "0.112", "no: needs 3 seeds each"]]
    assert told_apart((0.8, 0.6), (0.45, 0.35)) == [["lr 0.1", "lr 0.2", "+0.300", "0.112", "yes"]]
    assert [row[:2] + row[3:] for row in told_apart((0.8, 0.6), (0.7, 0.7), (0.1, 0.2))] == [
        ["lr 0.1", "lr 0.2", "0.101", "no: needs over 100 seeds each"],
        ["lr 0.1", "lr 0.3", "0.112", "yes"],
        ["lr 0.2", "lr 0.3", "0.052", "yes"],
    ]


def test_the_standard_error_over_seeds_is_at_least_that_of_the_evaluations():
    """Each gain has a standard error of 0.1, so a mean of two has 0.1 / sqrt(2), and a difference of means has 0.1."""
    assert told_apart((0.7, 0.7), (0.6, 0.6), error=0.1)[0][2:4] == ["+0.100", "0.100"]


def test_a_setting_with_one_seed_is_assumed_to_vary_like_the_others():
    """Its standard error is the others' SD, 0.141. sqrt(0.1^2 + 0.141^2) is 0.173. Without an SD, no pair is listed."""
    assert told_apart((0.8, 0.6), (0.2,)) == [["lr 0.1", "lr 0.2", "+0.500", "0.173", "yes"]]
    assert told_apart((0.8,), (0.2,)) == []


def test_the_table_notes_different_limits_and_rows_with_mixed_settings():
    of_the_limit = "model_name reward_model_name positive_label reward prompts prompts_file gen_len".split()
    for name in (*of_the_limit, "temperature", "init_kl_coef"):
        runs = [run("a"), run("b", **{name: 0.7})]
        assert f"These runs differ in {name}, so their limits differ" in comparison(runs, curves(runs))
    runs = [run("a"), run("b", batch_size=4)]
    assert "These" not in comparison(runs, curves(runs)) and "Runs in" not in comparison(runs, curves(runs))
    assert "Runs in the same row also differ in batch_size" in comparison(runs, curves(runs, ["lr"]))
