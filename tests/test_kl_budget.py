"""The KL coefficient for a KL budget, and the warnings before training."""

import math

import pytest
import torch

from support.common.errors import UserError
from support.run.limit import kl_coef_for
from support.run.warnings import prospect
from tests.helpers import evaluation

ONE = torch.zeros(1000, dtype=torch.int64)


def gaussian(n=1000, deviation=1.0):
    """Return quantiles of a normal distribution, whose KL* is deviation^2 / (2 beta^2)."""
    return deviation * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize(("unit", "budget"), [(0.001, 0.05), (1.0, 0.4), (10_000.0, 1.0)])
def test_the_coefficient_for_a_budget_matches_the_formula_for_normal_rewards(unit, budget):
    assert kl_coef_for(gaussian() * unit, ONE, budget) == pytest.approx(unit / math.sqrt(2 * budget), rel=0.03)


def test_the_coefficient_for_a_budget_matches_the_formula_for_two_rewards():
    """A policy that writes the better of two equally likely texts with probability p has KL log 2 - entropy(p)."""
    p = 0.9
    budget = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    scores = torch.tensor([0.0, 1.0] * 500, dtype=torch.float64)
    assert kl_coef_for(scores, ONE, budget) == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-3)


def test_the_budget_is_a_mean_over_prompts():
    """All scores of one prompt are equal, so the other prompt can use twice the KL."""
    scores = torch.cat([gaussian(), torch.full((1000,), 3.0)]).double()
    prompt_index = torch.cat([ONE, ONE + 1])
    assert kl_coef_for(scores, prompt_index, 0.2) == pytest.approx(kl_coef_for(gaussian(), ONE, 0.4), rel=1e-3)


@pytest.mark.parametrize(
    ("scores", "budget", "said"),
    [
        ([0.0] * 991 + [1.0] * 9, 0.4, "10 scores before training must differ from the rest, but only 9 of 1,000 do"),
        ([0.0, 1.0] * 500, 0.7, "--kl_budget 0.7 is too high for these scores: .* at most 0.69 nats from"),
    ],
)
def test_a_budget_that_no_coefficient_meets_is_rejected(scores, budget, said):
    with pytest.raises(UserError, match=said):
        kl_coef_for(torch.tensor(scores, dtype=torch.float64), ONE, budget)
    kl_coef_for(torch.tensor([0.0] * 990 + [1.0] * 10, dtype=torch.float64), ONE, 0.4)


def lines(scores, kl_coef, prompts=("好",), noise=0.0) -> list[str]:
    samples = [[prompts[i % len(prompts)], "", score] for i, score in enumerate(scores)]
    return prospect(evaluation(samples, noise=noise), list(prompts), kl_coef)


def test_the_best_possible_reward_is_printed_in_the_unit_of_the_scores():
    """R* is mean + deviation^2 / beta."""
    told = "at a KL coefficient of 100 the best possible policy gets a reward of 599 at KL 0.5; the reference gets 500"
    assert lines((500 + gaussian(deviation=100)).tolist(), 100.0) == [told]
    assert len(lines(gaussian(10_000).tolist(), 0.513)) == 1  # KL 1.9 isn't far away


@pytest.mark.parametrize(
    ("scores", "kl_coef", "before", "said"),
    [
        (gaussian().tolist(), 0.01, {}, "writes only a handful of texts; try --kl_budget 0.4"),
        (gaussian(10_000).tolist(), 0.45, {}, "nats, expect collapse"),  # 1 / (2 * 0.45^2) = 2.5
        (gaussian().tolist(), 100.0, {}, "hardly better than the reference; try --kl_budget 0.4"),
        (gaussian().tolist(), 1.0, {"noise": 0.87}, "87% of the rewards' variance is noise"),
    ],
)
def test_unsuitable_kl_coefficients_and_noisy_rewards_cause_a_warning(scores, kl_coef, before, said):
    *_, last = lines(scores, kl_coef, **before)
    assert last.startswith("warning: ") and said in last


@pytest.mark.parametrize(("unit", "share", "flat"), [(1.0, 0.008, False), (1000.0, 0.006, True)])
def test_prompts_with_nothing_to_learn_cause_a_warning(unit, share, flat):
    """Relative to the first prompt, the standard deviation is `share` for the second prompt and 0.7 for all scores."""
    first = (unit * gaussian(500)).tolist()
    second = (unit * share * gaussian(500)).tolist()
    *_, last = lines([score for pair in zip(first, second) for score in pair], unit, prompts=("好", "坏"))
    assert ("1 of 2 prompts (for example '坏')" in last) == flat
