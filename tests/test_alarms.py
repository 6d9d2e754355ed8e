"""The alarms that a run raises when training goes wrong, tested on made-up rows of metrics.csv."""

import json

import numpy as np
import pytest

from config import PPOConfig
from support.run import warnings
from support.run.command_line import read_command_line
from support.run.warnings import Alarms
from tests.helpers import checkpoints, rows, tiny_run

# One step of a healthy run with the default settings
HEALTHY = {"env/reward_mean": 0.7, "env/reward_std": 0.35, "ppo/policy/approxkl": 9e-4, "ppo/policy/clipfrac": 0.01}
HEALTHY |= {"objective/kl": 0.4, "objective/entropy": 2.0, "tokens/unique_share": 1.0}
LARGE = {"env/reward_mean": -1e3}


def told(*changes: dict, kl_limit=0.4, **config) -> list[tuple[int, str]]:
    """Return the step and name of each alarm of a run. Each step's row is HEALTHY except for its `changes`."""
    alarms = Alarms(PPOConfig(**config), kl_limit)
    new = [alarms.look({"step": step, **HEALTHY, **change}) for step, change in enumerate(changes, 1)]
    assert [alarm for of_step in new for alarm in of_step] == alarms.found
    return [(alarm["step"], alarm["alarm"]) for alarm in alarms.found]


@pytest.mark.parametrize(
    ("within", "beyond", "alarm"),
    [
        ({"env/reward_std": 2e-4} | LARGE, {"env/reward_std": 9e-5} | LARGE, "no spread"),
        ({"env/reward_std": 0.01}, {"env/reward_std": 0.0, "env/reward_mean": 0.0}, "no spread"),
        ({"ppo/policy/approxkl": 3.1e-5}, {"ppo/policy/approxkl": 2.9e-5}, "no movement"),
        ({"ppo/policy/approxkl": 0.0099}, {"ppo/policy/approxkl": 0.0101}, "too fast"),
        ({"ppo/policy/clipfrac": 0.099}, {"ppo/policy/clipfrac": 0.101}, "too fast"),
    ],
)
def test_the_first_step_raises_an_alarm_only_beyond_a_threshold(within, beyond, alarm):
    assert told(within) == []
    assert told(beyond, beyond) == [(1, alarm)]
    if alarm != "too fast":
        assert told({}, *[beyond] * 9) == []  # only checked in the first step


@pytest.mark.parametrize(
    ("within", "beyond", "alarm"),
    [
        ({"objective/kl": 1.99}, {"objective/kl": 2.01}, "far away"),
        ({"objective/entropy": 1.01}, {"objective/entropy": 0.99}, "narrow"),
        ({"tokens/unique_share": 0.41}, {"tokens/unique_share": 0.39}, "alike"),
    ],
)
def test_noisy_statistics_are_averaged_over_five_steps(within, beyond, alarm):
    assert told({}, *[within] * 9) == told({}, *[beyond] * 4) == []
    assert told({}, *[beyond] * 5) == [(6, alarm)]
    if alarm != "far away":  # these limits are relative to the first step
        assert told(*[beyond] * 9) == []


def test_ten_steps_of_negative_explained_variance_raise_an_alarm():
    bad, fair, none = ({"ppo/val/explained_variance": value} for value in (-0.02, 0.01, -0.009))
    assert told(*[bad] * 9, fair, *[bad] * 9, *[none] * 20) == []
    assert told({}, *[bad] * 12) == [(11, "bad values")]


def test_a_kl_above_1_5_times_the_kl_at_the_limit_raises_an_alarm():
    assert told({}, *[{"objective/kl": 5.9}] * 9, kl_limit=4.0) == []
    assert told({}, *[{"objective/kl": 6.1}] * 9, kl_limit=4.0) == [(6, "far away")]
    assert told({}, *[{"objective/kl": 2.1}] * 9, kl_limit=None) == [(6, "far away")]


def test_the_movement_alarm_needs_several_optimiser_steps_and_each_alarm_is_raised_once():
    """With one optimiser step per batch, the ratio is 1 by definition."""
    still = {"ppo/policy/approxkl": 0.0}
    assert told(still, ppo_epochs=1) == []
    assert told(still, ppo_epochs=1, minibatch_size=64) == [(1, "no movement")]
    fast = {"ppo/policy/approxkl": 0.02}
    assert told({}, fast, fast, {**fast, "objective/kl": 20.0}) == [(2, "too fast"), (4, "far away")]


def rises(curve, n=240) -> list[int]:
    """Return the steps at which a plateau is reported, over five noisy runs whose mean reward is curve(step)."""
    found = []
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(0, 0.35 / 128**0.5, n)
        changes = [{"episodes": 128 * t, "env/reward_mean": curve(t) + noise[t - 1]} for t in range(1, n + 1)]
        found += [step for step, alarm in told(*changes) if alarm == "plateau"]
    return found


def test_the_plateau_alarm_needs_a_reward_that_rose_and_then_stopped_rising():
    """It is raised if neither of the last two quarters of the run is better than the second. The mean reward of a batch
    has a standard error of 0.03."""
    assert all(40 <= step <= 240 for step in rises(lambda t: 0.7 + 0.2 * (t > 5)))
    assert len(rises(lambda t: 0.7 + 0.2 * (t > 5))) == 5
    assert len(rises(lambda t: 0.7 + min(t, 60) / 300 - max(0, t - 60) / 600)) == 5  # rises, then falls
    assert rises(lambda t: 0.7 + 0.04 * np.log(t)) == []  # a healthy run
    assert rises(lambda t: 0.7) == rises(lambda t: 0.7 + 0.2 * (t > 180)) == []  # never rose, or only rose recently
    steps = [{"episodes": 128 * t, "env/reward_mean": 0.7 + 0.2 * (t > 5) - 1e-6 * t} for t in range(1, 81)]
    assert told(*steps[:39]) == [] and told(*steps) == [(40, "plateau")]


def test_stop_on_alarm_ends_a_run_at_the_first_collapse_alarm(tmp_path, policy, monkeypatch, without_pictures, capsys):
    """The first step already has too few unique texts. `--resume` only continues if the flag is turned off."""
    monkeypatch.setattr(warnings, "ALIKE", 2.0)
    run, settings = tmp_path / "run", dict(stop_on_alarm=True, save_every=0, save_every_minutes=0)
    assert tiny_run(run, policy, **settings) == 0
    out = capsys.readouterr().out
    command = f"python train_ppo.py --resume {run.as_posix()} --stop_on_alarm False"
    assert f"stopped because of that warning; continue with: {command}" in out
    report = (run / "report.md").read_text(encoding="utf-8")
    assert "`--stop_on_alarm` ended the run after step 1 of 3." in report
    assert len(rows(run)) == 1 and checkpoints(run) == ["step-000001"] and (run / "model").exists()
    assert tiny_run(run, policy, resume=True, **settings) == 0 and len(rows(run)) == 1
    config, *_ = read_command_line(["--resume", str(run), "--stop_on_alarm", "False"])
    assert not config.stop_on_alarm
    assert tiny_run(run, policy, resume=True, **settings | {"stop_on_alarm": False}) == 0 and len(rows(run)) == 3
    assert "ended the run" not in (run / "report.md").read_text(encoding="utf-8")


def test_stop_on_alarm_ignores_alarms_that_do_not_mean_collapse():
    for row, stops in ({"ppo/policy/approxkl": 0.02}, False), ({"objective/kl": 99.0}, True):
        alarms = Alarms(PPOConfig(stop_on_alarm=True), 0.4)
        assert alarms.look({"step": 1, **HEALTHY, **row}) and alarms.stop == stops
        alarms.look({"step": 2, **HEALTHY})
        assert alarms.stop == stops


def test_equal_completions_of_different_prompts_count_as_different_texts(tmp_path, policy, without_pictures):
    """Completions are one token long, so many of them are equal."""
    assert tiny_run(tmp_path / "run", policy, gen_len=1, episodes=64, batch_size=64) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    texts = {(sample["prompt"], sample["completion"]) for sample in samples}
    assert len({completion for _, completion in texts}) < len(texts) < 64
    assert float(rows(tmp_path / "run")[0]["tokens/unique_share"]) == len(texts) / 64
