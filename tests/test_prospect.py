"""What is told before training, and the KL coefficient for a budget."""

import math

import pytest
import torch

from support.prospect import kl_coef_for, prospect

ONE = torch.zeros(1000, dtype=torch.int64)


def gaussian(n=1000, deviation=1.0):
    """Scores of a normal distribution's quantiles: of them KL* is deviation^2 / (2 beta^2)."""
    return deviation * torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


@pytest.mark.parametrize("unit", [0.001, 1.0, 10_000.0])
@pytest.mark.parametrize("budget", [0.05, 0.4, 1.0])
def test_of_normal_scores_the_coefficient_is_known(unit, budget):
    assert kl_coef_for(gaussian() * unit, ONE, budget) == pytest.approx(unit / math.sqrt(2 * budget), rel=0.03)


def test_of_two_scores_the_coefficient_is_known():
    """The policy that writes the better of two equally likely texts with probability p: KL log 2 - entropy(p)."""
    p = 0.9
    budget = math.log(2) + p * math.log(p) + (1 - p) * math.log(1 - p)
    scores = torch.tensor([0.0, 1.0] * 500, dtype=torch.float64)
    assert kl_coef_for(scores, ONE, budget) == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-3)


def test_the_budget_is_a_mean_over_prompts():
    """Of two prompts, one with nothing to choose, the other goes twice as far."""
    scores = torch.cat([gaussian(), torch.full((1000,), 3.0)]).double()
    prompt_index = torch.cat([ONE, ONE + 1])
    assert kl_coef_for(scores, prompt_index, 0.2) == pytest.approx(kl_coef_for(gaussian(), ONE, 0.4), rel=1e-3)


@pytest.mark.parametrize(
    ("scores", "budget", "said"),
    [
        ([0.5] * 1000, 0.4, "of 1,000 completions before training 0 differ in score from the rest, and 10 must"),
        ([0.0] * 991 + [1.0] * 9, 0.4, "of 1,000 completions before training 9 differ in score"),
        ([0.0, 1.0] * 500, 0.7, "--kl_budget 0.7 is more than these scores can use: .* at most 0.69 nats away"),
    ],
)
def test_where_there_is_none_it_says_why(scores, budget, said):
    with pytest.raises(ValueError, match=said):
        kl_coef_for(torch.tensor(scores, dtype=torch.float64), ONE, budget)


def judged(scores, prompts=("好",), noise=0.0) -> dict:
    return {"samples": [[prompts[i % len(prompts)], "", score] for i, score in enumerate(scores)], "noise": noise}


def lines(scores, kl_coef, prompts=("好",), noise=0.0) -> list[str]:
    return prospect(judged(scores, prompts, noise), list(prompts), kl_coef)


def test_what_is_possible_is_told_in_the_unit_of_the_scores():
    """J* is mean + deviation^2 / (2 beta), R* mean + deviation^2 / beta."""
    scores = (500 + gaussian(deviation=100)).tolist()
    assert lines(scores, 100.0) == [
        "at a KL coefficient of 100 the best possible policy gets a reward of 599 at KL 0.5; now it is 500"
    ]


def test_a_coefficient_far_too_low_is_told_with_the_way_out():
    told = "warning: at a KL coefficient of 0.01 the best possible policy lies 7.21 nats away"
    carried = "(1 of 1,000 samples carry it): expect collapse; --kl_budget 0.4 would take 1.11"
    assert lines(gaussian().tolist(), 0.01) == [f"{told} {carried}"]
    told = "warning: at --init_kl_coef 0 nothing keeps the policy near the language; --kl_budget 0.4 would take 1.11"
    assert lines(gaussian().tolist(), 0.0) == [told]


def test_a_coefficient_far_too_high_is_told_with_the_way_out():
    told = "warning: at a KL coefficient of 100 the best possible policy gets 5.01 where there is 5 now: too dear"
    assert lines((5 + gaussian()).tolist(), 100.0) == [f"{told}; --kl_budget 0.4 would take 1.11"]
    (told,) = lines((1000 * gaussian()).tolist(), 100_000.0)
    assert "too dear; --kl_budget 0.4 would take 1.11e+03" in told


def test_scores_of_which_hardly_any_differ_are_told():
    nothing = "there is nothing, or next to nothing, to learn from"
    same = "warning: all 1,000 completions before training have the same score as others of their prompt"
    assert lines([0.0] * 1000, 0.2) == lines([0.0, 1.0] * 500, 0.2, prompts=("好", "坏")) == [f"{same}: {nothing}"]
    few = "warning: 9 of 1,000 completions before training differ in score from the rest"
    assert lines([0.0] * 991 + [1.0] * 9, 0.2) == [f"{few}: {nothing}"]


def test_scores_that_are_chance_in_part_are_told():
    assert len(lines(gaussian().tolist(), 1.0, noise=0.02)) == 1
    (told,) = lines(gaussian().tolist(), 1.0, noise=0.87)
    assert told.startswith("warning: 87% of the scores' variance is chance") and "--kl_budget finds too high" in told


def test_prompts_that_teach_nothing_are_told():
    scores = [x for score in gaussian(500).tolist() for x in (score, 0.3)]
    *_, told = lines(scores, 1.0, prompts=("好", "坏"))
    assert told == "warning: whatever follows 1 of 2 prompts, as '坏', gets much the same score: they teach nothing"
    nearly = [score for pair in zip((1000 * gaussian(500)).tolist(), gaussian(500).tolist()) for score in pair]
    assert lines(nearly, 1000.0, prompts=("好", "坏"))[-1] == told
