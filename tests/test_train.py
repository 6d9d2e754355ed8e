"""The loop of train_ppo.py: what it draws, scores, logs and says."""

import json
import math
import time

import numpy as np
import pytest

from ppo import PPOTrainer
from support import evaluation
from support.alarms import Alarms
from support.evaluation import gibbs_policy, scores_and_prompts
from support.figures import duration
from tests.helpers import PROMPTS, read_json, rows, tiny_run
from train_ppo import draw_prompts

pytestmark = pytest.mark.usefixtures("without_pictures")


def samples_of(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def test_prompts_come_in_turn_in_a_new_order_each_time():
    """Five prompts in batches of three: each pass over them has each once, and depends on the seed."""
    drawn = [prompt for step in range(1, 11) for prompt in draw_prompts(5, 7, step, 3)]
    passes = [drawn[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(each) == [0, 1, 2, 3, 4] for each in passes) and len(set(map(tuple, passes))) > 2
    assert passes[1] == np.random.default_rng([7, 1]).permutation(5).tolist()
    assert draw_prompts(5, 8, 1, 5) != draw_prompts(5, 7, 1, 5)
    assert sorted(draw_prompts(2, 1, 1, 6)) == [0, 0, 0, 1, 1, 1]


def test_texts_are_prompt_and_completion_and_rows_follow_from_the_samples(policy, tmp_path):
    """A reward in a large unit, which tells the prompts apart."""
    texts = []

    def reward(batch):
        texts.extend(batch)
        return [1000.0 * (sum(map(ord, text)) % 97) for text in batch]

    assert tiny_run(tmp_path / "run", policy, reward, episodes=16) == 0
    samples, both = samples_of(tmp_path / "run"), texts[-8 - 16 : -8]
    assert [sample["prompt"] + sample["completion"] for sample in samples] == both
    assert {sample["prompt"] for sample in samples} == set(PROMPTS[1:])
    for step, row in enumerate(rows(tmp_path / "run")):
        mine = samples[8 * step : 8 * step + 8]
        scores = np.array([sample["score"] for sample in mine])
        assert {sample["step"] for sample in mine} == {step + 1} == {int(row["step"])}
        expected = [scores.mean(), scores.std(), *np.quantile(scores, [0.1, 0.9])]
        assert [float(row[f"env/reward_{name}"]) for name in ("mean", "std", "p10", "p90")] == pytest.approx(expected)
        unique = {(sample["prompt"], sample["completion"]) for sample in mine}
        assert float(row["tokens/unique_share"]) == len(unique) / 8


def test_alarms_get_the_limits_kl_whatever_the_unit_of_the_reward(policy, tmp_path, monkeypatch):
    """The limit's J is a thousand times as large here. No coefficient, no limit."""
    limits = []

    def alarms(config, limit):
        limits.append(limit)
        return Alarms(config, limit)

    monkeypatch.setattr("support.run_folder.Alarms", alarms)

    def reward(texts):
        return [1000.0 * len(set(text)) for text in texts]

    for name, kl_coef in (("run", 3000.0), ("free", 0.0)):
        tiny_run(tmp_path / name, policy, reward, episodes=8, eval_samples=64, init_kl_coef=kl_coef)
    before = read_json(tmp_path / "run" / "evaluation.json")["before"]
    expected = gibbs_policy(*scores_and_prompts(before, PROMPTS[1:]), 3000.0)["kl"]
    assert limits == [pytest.approx(expected), None]
    assert 0 < expected < math.log(64)  # which no policy over 64 samples exceeds


def test_a_run_tells_each_step_and_now_and_then_completions(policy, tmp_path, capsys):
    """By lines that also make sense in a log."""
    assert tiny_run(tmp_path / "run", policy, log_samples_every=2, episodes=24) == 0
    out = capsys.readouterr().out
    assert "\r" not in out
    steps = [line for line in out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"] and steps[-1].endswith(" 0 s left")
    for line, row in zip(steps, rows(tmp_path / "run")):
        words = line.split()
        assert float(words[words.index("reward") + 1]) == pytest.approx(float(row["env/reward_mean"]), abs=0.006)
        assert float(words[words.index("KL") + 1]) == pytest.approx(float(row["objective/kl"]), abs=0.006)
    second = [sample for sample in samples_of(tmp_path / "run") if sample["step"] == 2]
    shown = out[out.index("step 2/3") : out.index("step 3/3")]
    assert all(sample["prompt"] + sample["completion"] in shown for sample in second[:5])


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min")],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


def test_the_time_of_a_step_and_what_is_left_are_told(policy, tmp_path, monkeypatch, capsys):
    """By a clock that stands still except for 2 seconds of sampling, 3 of scoring and 4 of PPO."""
    now = [0.0]

    def takes(seconds, function):
        def timed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(PPOTrainer, "generate", takes(2, PPOTrainer.generate))
    monkeypatch.setattr(PPOTrainer, "step", takes(4, PPOTrainer.step))
    tiny_run(tmp_path / "run", policy, takes(3, lambda texts: [0.1 * i for i in range(len(texts))]))
    for row in rows(tmp_path / "run"):
        assert [float(row[f"time/{part}"]) for part in ("sample", "score", "ppo", "step")] == [2, 3, 4, 9]
    ends = [line.rpartition("  ")[2] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert ends == ["9.00 s a step, 18 s left", "9.00 s a step, 9 s left", "9.00 s a step, 0 s left"]


def test_the_policy_before_is_the_reference_and_the_one_after_is_the_saved_average(policy, tmp_path, monkeypatch):
    judged, evaluate = [], evaluation.evaluate

    def judging(trainer, model, *rest):
        judged.append((trainer, model))
        return evaluate(trainer, model, *rest)

    monkeypatch.setattr(evaluation, "evaluate", judging)
    tiny_run(tmp_path / "run", policy)
    (trainer, before), (_, after) = judged
    assert before is trainer.ref_model
    assert all(a.equal(b) for a, b in zip(after.parameters(), trainer.policy_for_saving.parameters()))
    assert not all(a.equal(b) for a, b in zip(after.parameters(), trainer.model.parameters()))
