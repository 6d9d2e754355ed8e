"""The signs of a sick run, by rows of numbers."""

import json

import pytest

from config import PPOConfig
from support.run.warnings import Alarms
from tests.helpers import rows, tiny_run

# A step of a run with the default settings
HEALTHY = {"env/reward_mean": 0.7, "env/reward_std": 0.35, "ppo/policy/approxkl": 9e-4, "ppo/policy/clipfrac": 0.01}
HEALTHY |= {"objective/kl": 0.4, "objective/entropy": 2.0, "tokens/unique_share": 1.0}
LARGE = {"env/reward_mean": -1e3}


def told(*changes: dict, kl_limit=0.4, **config) -> list[tuple[int, str]]:
    """The steps and names of the alarms of a run whose rows are healthy except for these changes, one per step."""
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
def test_the_first_step_raises_an_alarm_beyond_a_limit_only(within, beyond, alarm):
    assert told(within) == []
    assert told(beyond, beyond) == [(1, alarm)]
    if alarm != "too fast":
        assert told({}, *[beyond] * 9) == []  # of the first step only


@pytest.mark.parametrize(
    ("within", "beyond", "alarm"),
    [
        ({"objective/kl": 1.99}, {"objective/kl": 2.01}, "far away"),
        ({"objective/entropy": 1.01}, {"objective/entropy": 0.99}, "narrow"),
        ({"tokens/unique_share": 0.41}, {"tokens/unique_share": 0.39}, "alike"),
    ],
)
def test_numbers_that_vary_from_batch_to_batch_count_as_a_mean_over_five_steps(within, beyond, alarm):
    assert told({}, *[within] * 9) == told({}, *[beyond] * 4) == []
    assert told({}, *[beyond] * 5) == [(6, alarm)]
    if alarm != "far away":  # a share of the first step's
        assert told(*[beyond] * 9) == []


def test_a_distance_is_far_at_one_and_a_half_times_the_limits_kl():
    assert told({}, *[{"objective/kl": 5.9}] * 9, kl_limit=4.0) == []
    assert told({}, *[{"objective/kl": 6.1}] * 9, kl_limit=4.0) == [(6, "far away")]
    assert told({}, *[{"objective/kl": 2.1}] * 9, kl_limit=None) == [(6, "far away")]


def test_one_optimiser_step_per_batch_may_not_move_and_each_alarm_is_raised_once():
    """Its ratio is 1 by definition."""
    still = {"ppo/policy/approxkl": 0.0}
    assert told(still, ppo_epochs=1) == []
    assert told(still, ppo_epochs=1, minibatch_size=64) == [(1, "no movement")]
    fast = {"ppo/policy/approxkl": 0.02}
    assert told({}, fast, fast, {**fast, "objective/kl": 20.0}) == [(2, "too fast"), (4, "far away")]


def test_equal_completions_of_two_prompts_are_two_unique_texts(tmp_path, policy, without_pictures):
    """Completions of one token, of which many are equal."""
    assert tiny_run(tmp_path / "run", policy, gen_len=1, episodes=64, batch_size=64) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text("utf-8").splitlines()]
    texts = {(sample["prompt"], sample["completion"]) for sample in samples}
    assert len({completion for _, completion in texts}) < len(texts) < 64
    assert float(rows(tmp_path / "run")[0]["tokens/unique_share"]) == len(texts) / 64
