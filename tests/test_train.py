"""The loop of train_ppo.py: what it samples, scores, logs and prints."""

import json
import math
import time

import numpy as np
import pytest

from ppo import PPOTrainer
from support.common.figures import decimals
from support.run.evaluation import Results
from support.run.limit import gibbs_policy
from support.run.warnings import Alarms
from tests.helpers import PROMPTS, count_characters, rows, tiny_run

pytestmark = pytest.mark.usefixtures("without_pictures")


def samples_of(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompt_and_completion_are_scored_together_and_metrics_match_the_samples(policy, tmp_path):
    """The reward has a large unit and differs between prompts."""
    texts = []

    def reward(batch):
        texts.extend(batch)
        return [1000.0 * (sum(map(ord, text)) % 97) for text in batch]

    assert tiny_run(tmp_path / "run", policy, reward, episodes=16) == 0
    samples, both = samples_of(tmp_path / "run"), texts[-16 - 16 : -16]
    assert [sample["prompt"] + sample["completion"] for sample in samples] == both
    assert {sample["prompt"] for sample in samples} == set(PROMPTS[1:])
    for step, row in enumerate(rows(tmp_path / "run")):
        mine = samples[8 * step : 8 * step + 8]
        scores = np.array([sample["score"] for sample in mine])
        assert {sample["step"] for sample in mine} == {step + 1} == {int(row["step"])}
        assert int(row["episodes"]) == 8 * (step + 1)
        expected = [scores.mean(), scores.std(), *np.quantile(scores, [0.1, 0.9])]
        assert [float(row[f"env/reward_{name}"]) for name in ("mean", "std", "p10", "p90")] == pytest.approx(expected)
        unique = {(sample["prompt"], sample["completion"]) for sample in mine}
        assert float(row["tokens/unique_share"]) == len(unique) / 8


def test_alarms_get_the_limits_kl_in_any_unit_of_the_reward(policy, tmp_path, monkeypatch):
    """Rewards are in thousands, which doesn't affect the KL at the limit. Without a KL coefficient, there is none."""
    limits = []

    def alarms(config, limit):
        limits.append(limit)
        return Alarms(config, limit)

    monkeypatch.setattr("support.run.warnings.Alarms", alarms)

    def reward(texts):
        return [1000.0 * len(set(text)) for text in texts]

    for name, kl_coef in (("run", 3000.0), ("free", 0.0)):
        tiny_run(tmp_path / name, policy, reward, episodes=8, eval_samples=64, init_kl_coef=kl_coef)
    before = Results.read(tmp_path / "run" / "evaluation.json").before
    expected = gibbs_policy(*before.rewards(), 3000.0)["kl"]
    assert limits == [pytest.approx(expected), None]
    assert 0 < expected < math.log(64)  # the largest possible KL over 64 samples


def test_a_run_prints_each_step_with_its_time_and_completions_every_few_steps(policy, tmp_path, monkeypatch, capsys):
    """The fake clock only advances during sampling (2 seconds), scoring (3) and PPO (4)."""
    now = [0.0]

    def takes(seconds, function):
        def timed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(PPOTrainer, "generate", takes(2, PPOTrainer.generate))
    monkeypatch.setattr(PPOTrainer, "step", takes(4, PPOTrainer.step))
    tiny_run(tmp_path / "run", policy, takes(3, count_characters), log_samples_every=2)
    out = capsys.readouterr().out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    for line, row, left in zip(steps, rows(tmp_path / "run"), ("00:18", "00:09", "00:00"), strict=True):
        assert [float(row[f"time/{part}"]) for part in ("sample", "score", "ppo", "step")] == [2, 3, 4, 9]
        assert line.startswith(f"step {row['step']}/3 ") and line.endswith(f"  9.00 s per step, {left} left")
        words = line.split()
        for name, column in (("reward", "env/reward_mean"), ("KL", "objective/kl")):
            assert float(words[words.index(name) + 1]) == pytest.approx(float(row[column]), abs=0.006)
    second = [sample for sample in samples_of(tmp_path / "run") if sample["step"] == 2]
    shown = out[out.index("step 2/3") : out.index("step 3/3")]
    assert all(sample["prompt"] + sample["completion"] in shown for sample in second[:5])
    assert shown.count("\n  ") == 5
    digits = decimals(float(rows(tmp_path / "run")[1]["env/reward_std"]))  # enough to distinguish rewards
    assert all(f"\n  {sample['score']:.{digits}f}  {sample['prompt']}" in shown for sample in second[:5])
