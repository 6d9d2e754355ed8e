"""The signs of a sick run, by rows of numbers."""

import pytest

from config import PPOConfig
from support.alarms import Alarms

HEALTHY = {  # a step of a run with the default settings
    "env/reward_mean": 0.7,
    "env/reward_std": 0.35,
    "ppo/policy/approxkl": 9e-4,
    "ppo/policy/clipfrac": 0.01,
    "objective/kl": 0.4,
    "objective/entropy": 2.0,
    "tokens/unique_share": 1.0,
}


def told(*changes: dict, kl_limit=0.4, **config) -> list[tuple[int, str]]:
    """The steps and names of the alarms of a run whose rows are healthy but for these changes, a step each."""
    alarms = Alarms(PPOConfig(**config), kl_limit)
    new = [alarms.look({"step": step, **HEALTHY, **change}) for step, change in enumerate(changes, 1)]
    assert [alarm for of_step in new for alarm in of_step] == alarms.found
    return [(alarm["step"], alarm["alarm"]) for alarm in alarms.found]


def test_a_healthy_run_raises_none():
    late = {"ppo/policy/approxkl": 4e-5, "env/reward_std": 0.0, "objective/entropy": 1.1, "tokens/unique_share": 0.5}
    assert told({}, {}, *[late] * 10) == []


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        ({"env/reward_std": 0.0}, "no spread"),
        ({"env/reward_std": 1e-4, "env/reward_mean": -1000.0}, "no spread"),  # rounding of numbers of this size
        ({"ppo/policy/approxkl": 2.9e-5}, "no movement"),
        ({"ppo/policy/approxkl": 0.011}, "too fast"),
        ({"ppo/policy/clipfrac": 0.11}, "too fast"),
    ],
)
def test_the_first_step_tells(change, alarm):
    assert told(change) == [(1, alarm)]


def test_an_alarm_is_told_once_and_another_after_it():
    fast = {"ppo/policy/approxkl": 0.02}
    assert told({}, fast, fast, {**fast, "objective/kl": 20.0}) == [(2, "too fast"), (4, "far away")]


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        ({"objective/kl": 2.1}, "far away"),
        ({"objective/entropy": 0.99}, "narrow"),
        ({"tokens/unique_share": 0.39}, "alike"),
    ],
)
def test_what_comes_by_chance_is_a_mean_over_five_steps(change, alarm):
    assert told({}, *[change] * 4) == []
    assert told({}, *[change] * 5) == [(6, alarm)]


def test_a_distance_that_pays_is_not_far():
    assert told({}, *[{"objective/kl": 5.9}] * 9, kl_limit=4.0) == []
    assert told({}, *[{"objective/kl": 6.1}] * 9, kl_limit=4.0) == [(6, "far away")]
    assert told({}, *[{"objective/kl": 2.1}] * 9, kl_limit=None) == [(6, "far away")]


def test_shares_are_of_the_first_step():
    assert told(*[{"objective/entropy": 0.1, "tokens/unique_share": 0.5}] * 9) == []


def test_one_optimiser_step_a_batch_is_no_movement_yet():
    """Its ratio is 1 by definition."""
    still = {"ppo/policy/approxkl": 0.0}
    assert told(still, ppo_epochs=1) == []
    assert told(still, ppo_epochs=1, minibatch_size=64) == [(1, "no movement")]


def test_rows_without_the_share_of_unique_texts_tell_nothing_of_it():
    """Those of an earlier version of this program."""
    alarms, old = Alarms(PPOConfig(), 0.4), {name: HEALTHY[name] for name in HEALTHY if name != "tokens/unique_share"}
    assert [alarms.look({"step": step, **old}) for step in (1, 2)] == [[], []]
    assert [alarms.look({"step": step, **HEALTHY, "tokens/unique_share": 0.1}) for step in range(3, 9)] == [[]] * 6
