"""The evaluation: the Gibbs limit against exact sums and numbers worked out by hand."""

import itertools
import json
import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from config import PPOConfig
from support import evaluation


def judged(scores, kls=None, prompts=None):
    prompts = prompts or ["a"] * len(scores)
    return {
        "samples": [[p, "x", s] for p, s in zip(prompts, scores)],
        "kls": kls or [0.0] * len(scores),
        "reward": float(np.mean(scores)),
        "kl": float(np.mean(kls or [0.0])),
    }


def limit_of(groups: list[np.ndarray], beta: float) -> dict:
    """The limit from the rewards of each prompt: sums over them, and over all but one of them, for each."""

    def sums(rewards):
        odds = np.exp((rewards - rewards.max()) / beta)
        return np.array([odds @ rewards / odds.sum(), beta * np.log(odds.mean()) + rewards.max()])

    n = sum(map(len, groups))
    each = [
        len(group) * sums(group) - (len(group) - 1) * np.mean([sums(np.delete(group, i)) for i in range(len(group))], 0)
        for group in groups
    ]
    reward, best = sum(len(group) / n * found for group, found in zip(groups, each))
    weights = np.concatenate([len(g) / n * np.exp(g / beta) / np.exp(g / beta).sum() for g in groups])
    return {"reward": reward, "J": best, "kl": (reward - best) / beta, "effective_samples": 1 / (weights**2).sum()}


def test_gibbs_policy_by_hand():
    """Half the samples score 0, half log(3) * beta: weights 1/4 and 3/4 of each half."""
    beta, n = 0.5, 200_000
    best = evaluation.gibbs_policy(torch.tensor([0.0, math.log(3) * beta] * (n // 2)), torch.zeros(n), beta)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reward = 0.75 * math.log(3) * beta
    assert best["reward"] == pytest.approx(reward, rel=1e-4) and best["kl"] == pytest.approx(kl, rel=1e-4)
    # J* = beta log mean exp(r / beta)
    assert best["J"] == pytest.approx(reward - beta * kl, rel=1e-4) == pytest.approx(beta * math.log(2), rel=1e-4)
    assert best["effective_samples"] == pytest.approx(n / 2 / (0.25**2 + 0.75**2))
    assert best["ratios"].tolist() == pytest.approx([0.5, 1.5] * (n // 2))


def test_gibbs_policy_of_two_samples_by_hand():
    """Weights 1/4 and 3/4. Without one of the two, J* is the other's reward, 0 or 2 log 3, and so is R*."""
    best = evaluation.gibbs_policy(torch.tensor([0.0, 2 * math.log(3)]), torch.zeros(2), 2.0)
    heavy = 2 * math.log(3)
    # 2 * all - mean of both, where the sample of 3/4 is left out as if it weighed 1/2
    left_out = 2 * math.log(2) + 2 * math.log(2 * (3 / 4)), 2 * math.log(2) + 2 * math.log(2 * (1 / 2))
    assert best["J"] == pytest.approx(2 * 2 * math.log(2) - sum(left_out) / 2)
    reward = 3 / 4 * heavy
    assert best["reward"] == pytest.approx(2 * reward - (heavy + reward - (heavy - reward)) / 2)


@pytest.mark.parametrize("beta", [1.2, 2.0, 50.0])
def test_the_limit_is_without_the_bias_of_few_samples(beta):
    """As left out one by one, prompts of different sizes in any order; in the mean over draws it is the exact one."""
    rng = np.random.default_rng(3)
    groups = [rng.uniform(-2, 2, size=size) for size in (9, 30, 17)]
    index, shuffle = np.repeat([4, 0, 2], [9, 30, 17]), rng.permutation(56)
    rewards, prompt_index = torch.tensor(np.concatenate(groups)[shuffle]), torch.tensor(index[shuffle])
    best = evaluation.gibbs_policy(rewards, prompt_index, beta)
    assert {name: best[name] for name in ("reward", "J", "kl", "effective_samples")} == pytest.approx(
        limit_of(groups, beta)
    )

    draws = torch.tensor(rng.normal(size=100_000))
    best = evaluation.gibbs_policy(draws, torch.arange(100_000) // 20, beta)  # 5,000 prompts of 20 samples
    exact = 1 / (2 * beta)  # of normally distributed rewards
    assert best["J"] - draws.mean().item() == pytest.approx(exact, rel=0.03)
    assert best["kl"] == pytest.approx(1 / (2 * beta**2), rel=0.06)


@pytest.mark.parametrize("prompts", [1, 50])
def test_rewards_of_any_size_give_numbers_and_their_unit_does_not_matter(prompts):
    rewards = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    index = torch.arange(1000) % prompts
    extreme = evaluation.gibbs_policy(1000 * rewards, index, 0.2)
    assert 900 < extreme["J"] < extreme["reward"] < 1000
    assert extreme["effective_samples"] < 2 * prompts
    small, large = evaluation.gibbs_policy(rewards, index, 0.2), evaluation.gibbs_policy(1e4 * rewards, index, 2e3)
    for name, factor in {"reward": 1e4, "J": 1e4, "kl": 1, "effective_samples": 1}.items():
        assert large[name] == pytest.approx(factor * small[name])
    equal = evaluation.gibbs_policy(torch.full((1000,), 0.1), index, 0.2)
    assert equal["J"] == pytest.approx(0.1) and equal["kl"] == pytest.approx(0, abs=1e-9)


def test_gibbs_policy_is_the_best_of_many_policies():
    """On an enumerable space: no distribution has a higher J, and sampling from the reference finds the same limit."""
    rng = np.random.default_rng(0)
    reference, reward, beta = rng.dirichlet(np.ones(12)), rng.uniform(size=12), 0.3
    optimum = beta * np.log((reference * np.exp(reward / beta)).sum())
    for _ in range(200):
        p = rng.dirichlet(np.ones(12) * rng.uniform(0.1, 10))
        assert p @ reward - beta * (p * np.log(np.maximum(p, 1e-300) / reference)).sum() <= optimum + 1e-12
    draws = torch.tensor(reward[rng.choice(12, size=200_000, p=reference)])
    assert evaluation.gibbs_policy(draws, torch.zeros(200_000), beta)["J"] == pytest.approx(optimum, abs=2e-3)


def test_several_prompts_are_normalised_each_by_itself():
    first, second = torch.rand(300), 0.5 * torch.rand(100)
    index = torch.cat([torch.zeros(300), torch.ones(100)]).long()
    shuffle = torch.randperm(400)
    both = evaluation.gibbs_policy(torch.cat([first, second])[shuffle], index[shuffle], 0.2)
    alone = [evaluation.gibbs_policy(r, torch.zeros(len(r)), 0.2) for r in (first, second)]
    for name in ("reward", "kl", "J"):
        assert both[name] == pytest.approx((3 * alone[0][name] + alone[1][name]) / 4, rel=1e-5)
    squares = 3 * 300 / alone[0]["effective_samples"] + 100 / alone[1]["effective_samples"]
    assert both["effective_samples"] == pytest.approx(4 * 400 / squares, rel=1e-5)


def test_gain_is_0_for_the_reference_1_at_the_limit_and_negative_for_harm():
    rng = np.random.default_rng(1)
    scores = rng.uniform(size=1000).tolist()
    before = judged(scores)
    assert evaluation.gain(before, judged(scores), ["a"], 0.2)["gain"] == pytest.approx(0, abs=1e-6)
    limit = evaluation.gain(before, judged(scores), ["a"], 0.2)["limit"]
    at_limit = judged([limit["reward"]] * 1000, [limit["kl"]] * 1000)
    assert evaluation.gain(before, at_limit, ["a"], 0.2)["gain"] == pytest.approx(1, abs=1e-5)
    assert evaluation.gain(before, judged([0.9] * 1000, [5.0] * 1000), ["a"], 0.2)["gain"] < 0


@pytest.mark.parametrize("n_prompts", [1, 25])
def test_the_gain_and_its_standard_error_against_repeated_draws(n_prompts):
    """500 rewards from 0 to 1, and of 25 prompts, which have 20 each, some far better than others: J* is known."""
    rng, beta = np.random.default_rng(2), 0.2
    prompts = [str(i % n_prompts) for i in range(500)]
    better = np.arange(500) % n_prompts / n_prompts
    gains, errors = [], []
    for _ in range(200):
        before = judged((rng.uniform(size=500) + better).tolist(), prompts=prompts)
        kls = rng.exponential(0.2, size=500)
        after = judged((rng.beta(4, 2, size=500) + better).tolist(), kls.tolist(), prompts)
        result = evaluation.gain(before, after, prompts[:n_prompts], beta)
        gains.append(result["gain"])
        errors.append(result["gain_se"])
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.15)
    possible = beta * math.log(beta * (math.exp(1 / beta) - 1)) - 0.5  # J* = beta log E exp(r / beta)
    assert np.mean(gains) == pytest.approx((4 / 6 - beta * 0.2 - 0.5) / possible, rel=0.03)


def test_the_gain_and_its_standard_error_by_hand():
    """Two prompts in uneven order, so that the samples of each must be found again; J* from sums over its samples."""
    rng = np.random.default_rng(4)
    prompts = rng.choice(["a", "b"], p=[0.6, 0.4], size=600).tolist()
    scores, scores_after = rng.uniform(size=600) + (np.array(prompts) == "b"), rng.uniform(0.5, 1.8, size=500)
    kls, beta = rng.exponential(0.3, size=500), 0.25
    before = judged(scores.tolist(), rng.uniform(size=600).tolist(), prompts)
    after = judged(scores_after.tolist(), kls.tolist(), (["a", "b"] * 250))
    result = evaluation.gain(before, after, ["b", "a"], beta)

    own = [np.array(prompts) == prompt for prompt in "ab"]
    limit = limit_of([scores[of] for of in own], beta)
    j_before, j_after = scores.mean(), scores_after.mean() - beta * kls.mean()
    share = (j_after - j_before) / (limit["J"] - j_before)
    squares = 0.0
    for of in own:
        moves = beta * np.exp(scores[of] / beta) / np.exp(scores[of] / beta).mean()  # of J*, by each sample
        mixed = (1 - share) * scores[of] + share * moves
        squares += ((mixed - mixed.mean()) ** 2).sum()
    values = (scores_after - beta * kls).reshape(250, 2)
    errors = [((values - values.mean(0)) ** 2).sum() / 498 / 500, squares / 598 / 600]
    assert result.pop("limit") == pytest.approx(limit)
    assert result == pytest.approx(
        {
            "beta": beta,
            "J_before": j_before,
            "J": j_after,
            "gain": share,
            "gain_se": math.sqrt(sum(errors)) / (limit["J"] - j_before),
        },
        rel=1e-5,
    )


def test_the_gain_is_unknown_where_the_limit_rests_on_fewer_than_100_samples():
    """At a beta this small the limit is all but uniform over the best scores."""
    few, enough = judged([1.0] * 99 + [0.0] * 901), judged([1.0] * 101 + [0.0] * 899)
    result = evaluation.gain(few, judged([0.5] * 100, [0.1] * 100), ["a"], 0.02)
    assert result["gain"] is None and "gain_se" not in result
    assert result["why"] == "too few samples" and result["samples_needed"] == 2048  # 2 * 1000 * 100 / 99 and more
    assert [result[name] for name in ("beta", "J_before", "J")] == pytest.approx([0.02, 0.099, 0.498])
    assert result["limit"]["effective_samples"] == pytest.approx(99)
    assert evaluation.gain(enough, few, ["a"], 0.02)["gain"] == pytest.approx((0.099 - 0.101) / (1 - 0.101), abs=0.06)


@pytest.mark.parametrize(("best", "known"), [(4, False), (6, True)])
def test_the_gain_is_unknown_where_the_limit_rests_on_fewer_than_five_samples_a_prompt(best, known):
    """Of 50 prompts with 20 samples, so 200 or 300 in all."""
    prompts = [f"prompt {i % 50}" for i in range(1000)]
    scores = [float(i < 50 * best) for i in range(1000)]
    result = evaluation.gain(judged(scores, prompts=prompts), judged(scores, prompts=prompts), prompts[:50], 0.02)
    assert result["limit"]["effective_samples"] == pytest.approx(50 * best)
    assert (result["gain"] is not None) == known
    if not known:
        assert result["why"] == "too few samples" and result["samples_needed"] == 4096  # 2 * 1000 * 250 / 200 and more


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(("high", "known"), [(0.059, False), (0.062, True)])
def test_the_gain_is_unknown_where_hardly_a_standard_deviation_can_be_gained(unit, high, known):
    """Half the scores are 0 and half `high` betas: J* is beta log cosh(high / 2) above J_ref, about high / 4 of their
    standard deviation, beta high / 2: 0.03 of it where high is 0.06 * 2."""
    beta, high = unit, 2 * high
    scores = [0.0, beta * high] * 20_000
    result = evaluation.gain(judged(scores), judged([0.3 * unit] * 400, [0.5] * 400), ["a"], beta)
    possible = beta * math.log(math.cosh(high / 2))
    assert result["limit"]["J"] - result["J_before"] == pytest.approx(possible, rel=1e-3)
    assert (possible > 0.03 * beta * high / 2) == known
    if known:
        assert result["gain"] == pytest.approx((0.3 * unit - 0.5 * beta - beta * high / 2) / possible, rel=1e-3)
    else:
        assert result["gain"] is None and "gain_se" not in result and result["why"] == "beta is too high"


def test_nothing_can_be_gained_where_the_rewards_of_each_prompt_are_equal():
    prompts = ["a", "b", "c"] * 100
    constant = judged([{"a": 0.1, "b": 0.2, "c": 0.7}[prompt] for prompt in prompts], prompts=prompts)
    result = evaluation.gain(constant, constant, ["a", "b", "c"], 0.2)
    assert result["gain"] is None and result["why"] == "the rewards are equal"
    assert evaluation.frontier(constant, ["a", "b", "c"]) == []


@pytest.mark.parametrize(
    ("n_prompts", "m", "best", "why"),
    [  # each prompt's limit rests on its best samples
        (1, 1000, 9, "beta is too low"),
        (1, 1000, 11, "too few samples"),
        (50, 20, 1, "beta is too low"),
        (50, 20, 3, "too few samples"),
        (50, 19, 1, "too few samples"),
    ],
)
def test_a_limit_on_a_handful_of_many_samples_is_a_matter_of_beta(n_prompts, m, best, why):
    prompts = [f"prompt {i % n_prompts}" for i in range(n_prompts * m)]
    before = judged([float(i < best * n_prompts) for i in range(n_prompts * m)], prompts=prompts)
    assert evaluation.gain(before, before, prompts[:n_prompts], 0.02)["why"] == why


def test_without_a_price_there_is_no_limit():
    result = evaluation.gain(judged([0.0, 1.0] * 500), judged([1.0] * 1000), ["a"], 0.0)
    assert result == {"gain": None, "why": "beta is 0"}


@pytest.mark.parametrize("unit", [1.0, 1e4])
@pytest.mark.parametrize(("good", "first"), [(19, 9), (21, 0)])
def test_the_frontier_by_hand(good, first, unit):
    """`good` of 1,000 score 1, the others 0. At the lowest betas the limit rests on these alone: on 20 at least."""
    points = evaluation.frontier(judged([unit] * good + [0.0] * (1000 - good)), ["a"])
    scores = np.array([unit] * good + [0.0] * (1000 - good))
    expected = []
    for beta in (0.15 * 1.25**i * scores.std(ddof=1) for i in range(22)):
        limit = limit_of([scores], beta)
        if limit["effective_samples"] >= 20:
            expected.append({"beta": beta, "reward": limit["reward"], "kl": limit["kl"]})
    assert points[0]["beta"] == pytest.approx(0.15 * 1.25**first * scores.std(ddof=1))
    assert points[-1]["beta"] == pytest.approx(16.26 * scores.std(ddof=1), rel=1e-3)
    assert len(points) == len(expected)
    for point, wanted in zip(points, expected):
        assert point == pytest.approx(wanted)


def test_the_frontier_of_several_prompts_needs_five_effective_samples_of_each():
    prompts = [f"prompt {i % 10}" for i in range(400)]
    for best, there in ((4, False), (6, True)):
        points = evaluation.frontier(judged([float(i < 10 * best) for i in range(400)], prompts=prompts), prompts[:10])
        assert (points[0]["beta"] < 0.1) == there and points[-1]["beta"] > 4


def with_gain(scores, prompts=None, gain=None):
    result = {"gain": gain, "beta": 0.2, "J_before": 0.5, "limit": {"J": 0.9}}
    return {"before": judged(scores, prompts=prompts), "gain": result}


def test_best_of_n_by_hand_and_by_trying_all():
    """Of 1, 2, 4 the best of two is 2, 4 or 4; and all choices of n of eight."""
    assert evaluation.best_of_n(with_gain([4.0, 1.0, 2.0]), ["a"], 2)["reward"] == pytest.approx(10 / 3)
    scores = np.random.default_rng(0).uniform(size=8).round(1)
    for n in (2, 3, 8):
        brute = np.mean([max(choice) for choice in itertools.combinations(scores, n)])
        assert evaluation.best_of_n(with_gain(scores.tolist()), ["a"], n)["reward"] == pytest.approx(brute)


def test_best_of_n_ranks_within_a_prompt_and_has_its_price():
    results = with_gain([0.0, 10.0, 1.0, 10.0], prompts=["a", "b", "a", "b"], gain=0.5)
    result = evaluation.best_of_n(results, ["a", "b"], 2)
    assert result["reward"] == pytest.approx(5.5)
    assert result["kl"] == pytest.approx(0.193147, abs=1e-6)  # log 2 - 1/2
    assert result["gain"] == pytest.approx((5.5 - 0.2 * 0.193147 - 0.5) / 0.4, rel=1e-6)
    assert evaluation.best_of_n(with_gain([0.0, 1.0]), ["a"], 2)["gain"] is None


def test_the_yardsticks_are_of_the_policy_before_and_each_prompt_by_itself():
    rng = np.random.default_rng(5)
    prompts = ["b", "a", "c"] * 300 + ["b"]
    scores = rng.uniform(size=901) + [{"a": 0.0, "b": 0.5, "c": -1.0}[prompt] for prompt in prompts]
    before, after = judged(scores.tolist(), prompts=prompts), judged([0.4] * 901, [0.25] * 901, prompts)
    results = {"before": before, "after": after}
    evaluation.add_yardsticks(results, ["a", "b", "c"], 0.2)
    assert list(results) == ["before", "after", "gain", "frontier", "best_of_n"]

    own = [scores[np.array(prompts) == prompt] for prompt in "abc"]
    gain = (0.4 - 0.2 * 0.25 - scores.mean()) / (limit_of(own, 0.2)["J"] - scores.mean())
    assert results["gain"]["gain"] == pytest.approx(gain) and results["gain"]["beta"] == 0.2
    for point in results["frontier"]:
        assert point["reward"] - point["beta"] * point["kl"] == pytest.approx(limit_of(own, point["beta"])["J"])
    assert [best["n"] for best in results["best_of_n"]] == [2, 3, 4, 8]
    of_two = np.mean([np.mean([max(pair) for pair in itertools.combinations(rewards, 2)]) for rewards in own])
    assert results["best_of_n"][0]["reward"] == pytest.approx(of_two)


def test_best_of_n_needs_n_samples_of_each_prompt():
    results = {"before": judged([0.1] * 7, prompts=["a"] * 4 + ["b"] * 3), "after": judged([0.2] * 16)}
    evaluation.add_yardsticks(results, ["a", "b"], 0.2)
    assert [best["n"] for best in results["best_of_n"]] == [2, 3]


# ----------------------------------------------------------------------------------------------
# The verdict


NORMAL = [NormalDist().inv_cdf((i + 0.5) / 2000) for i in range(2000)]


def verdict_on(reward, kl, beta=1.0, before=NORMAL, unit=1.0, noise=0.0, unique=0.7, **settings):
    """Of a run from normally distributed rewards, whose frontier is R = sqrt(2 KL), to this reward and KL."""
    after = [reward + noise, reward - noise] * (len(before) // 2)
    results = {"before": judged([unit * score for score in before])}
    results["after"] = judged([unit * score for score in after], [kl] * len(after)) | {"unique": unique}
    results["before"]["unique"] = 0.8
    evaluation.add_yardsticks(results, ["a"], unit * beta)
    return evaluation.verdict(results, PPOConfig(**settings))


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    ("reward", "kl", "sentence"),
    [  # where J = R - KL, the limit is R 1 at KL 1/2
        (0.9, 0.5, "good: 80% of what is possible"),
        (0.86, 0.5, "good: 72% of what is possible"),
        (0.84, 0.5, "short: 68% of what is possible; go on with more --episodes"),
        (0.4, 0.1, "short: 60% of what is possible; go on with more --episodes"),
        (0.24, 0.1, "short: 28% of what is possible; go on with more --episodes"),
        (1.0, 0.74, "short: 52% of what is possible; go on with more --episodes"),
        (1.0, 0.76, "wasted KL: KL 0.76 where 0.5 is worth it; try a lower --lr"),
        (0.15, 0.1, "wasted KL: KL 0.1 where 0.5 is worth it; try a lower --lr"),  # it buys 0.45
        (0.21, 0.1, "short: 22% of what is possible; go on with more --episodes"),  # half of that, but for luck
        (0.9, 1.0, "wasted KL: KL 1 where 0.5 is worth it; try a lower --lr"),
        (0.95, 1.1, "wasted KL: KL 1.1 where 0.5 is worth it; try a lower --lr"),
        (1.3, 1.1, "hacked: KL 1.1 where 0.5 is worth it; try a lower --lr"),
        (1.3, 0.9, "good: 80% of what is possible"),
        (1.9, 1.1, "hacked: KL 1.1 where 0.5 is worth it; try a higher --init_kl_coef"),  # more than R = sqrt(2 KL)
        (0.95, 60.0, "wasted KL: KL 60 where 0.5 is worth it; try a lower --lr"),
        (3.0, 60.0, "hacked: KL 60 where 0.5 is worth it; try a lower --lr"),
        (1.1, 123.4, "hacked: KL 120 where 0.5 is worth it; try a lower --lr"),
        (0.05, 0.004, "unmoved: KL 0.004 where 0.5 is worth it; try a higher --lr"),
        (-0.5, 0.1, "wasted KL: KL 0.1 where 0.5 is worth it; try a lower --lr"),
    ],
)
def test_the_verdict_tells_the_kind_of_a_run_in_any_unit(reward, kl, sentence, unit):
    assert verdict_on(reward, kl, unit=unit) == sentence


def test_far_away_few_texts_are_a_hack_whatever_they_earn():
    assert verdict_on(0.95, 1.1, unique=0.39) == "hacked: KL 1.1 where 0.5 is worth it; try a lower --lr"
    assert verdict_on(0.95, 1.1, unique=0.41).startswith("wasted KL")
    assert verdict_on(0.95, 0.9, unique=0.39).startswith("wasted KL")


def test_rewards_that_were_equal_and_are_no_more_are_not_nothing_to_learn():
    said = "gain unknown: all rewards before training were equal; some are higher now"
    assert verdict_on(0.07, 0.3, before=[0.0] * 2000) == said


def test_few_texts_are_a_hack_where_the_limit_is_not_known():
    few = [0.0, 1.0] * 25
    said = "hacked: KL 6.1, and 8% of the texts are unique; try --kl_budget 0.4"
    assert verdict_on(0.95, 6.08, before=few, unique=0.083) == said
    assert verdict_on(0.95, 6.08, before=few, unique=0.41).startswith("gain unknown")


def test_small_minibatches_are_what_wastes_kl():
    settings = dict(batch_size=64, minibatch_size=8)
    assert verdict_on(0.9, 1.0, **settings) == "wasted KL: KL 1 where 0.5 is worth it; try --minibatch_size 64"
    assert verdict_on(3.0, 60.0, **settings) == "hacked: KL 60 where 0.5 is worth it; try --minibatch_size 64"


def test_a_verdict_waits_for_samples_where_a_good_run_and_a_short_one_look_alike():
    more = "good or short, which these samples cannot tell: --eval_only with --eval_samples 16384 would"
    assert verdict_on(0.9, 0.5, noise=4.5) == more  # a standard error of 0.1 in J, of 1/2: 2 * 0.2 / 0.15 squared
    assert verdict_on(0.9, 0.5, noise=2.5).startswith("good")
    assert verdict_on(0.2, 0.5, noise=4.5).startswith("wasted")  # 0.7 is far from -0.6


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize(
    ("beta", "before", "sentence"),
    [
        (0.05, NORMAL, "hacked, or about to be: at this --init_kl_coef the best policy writes a handful of texts; "
         "KL is 11; try --kl_budget 0.4"),
        (100.0, NORMAL, "unmoved: at this --init_kl_coef hardly any KL is worth it; try --kl_budget 0.4"),
        (1.0, [50.0] * 2000, "nothing to learn: all completions of a prompt have the same reward; change --reward"),
        (1.0, [0.0, 1.0] * 25, "gain unknown: judge again by more samples, with --eval_only and --eval_samples 256"),
        (0.0, NORMAL, "no limit: KL, 11 now, has no price; try --kl_budget 0.4"),
    ],
)  # fmt: skip
def test_the_verdict_where_the_gain_is_unknown(beta, before, sentence, unit):
    assert verdict_on(8.4, 10.8, beta, before, unit) == sentence


# ----------------------------------------------------------------------------------------------
# What is printed and written

FIGURES = {
    "reward": (0.25449, 0.87551),
    "reward_ci95": (0.0114, 0.0226),
    "kl": (0.0004, 1.2346),
    "distinct_1": (0.1006, 0.0904),
    "distinct_2": (0.5006, 0.4004),
    "unique": (0.98765, 0.87654),
    "length": (12.34, 9.87),
    "ended": (0.1234, 0.4567),
    "ref_logprob": (-2.345, -3.456),
}
TABLE = """\
                                        before     after
mean reward                              0.254     0.876
  95% interval, plus or minus            0.011     0.023
KL to the reference, nats                0.000     1.235
distinct-1, characters                   0.101     0.090
distinct-2, pairs of characters          0.501     0.400
unique completions                       98.8%     87.7%
mean length, tokens                       12.3       9.9
ended by [SEP]                           12.3%     45.7%
log-probability a token, reference       -2.35     -3.46
"""


def figures(gain: dict) -> dict:
    samples = [["", "", 0.1], ["", "", 0.9]]  # of a standard deviation of 0.4
    before, after = ({name: pair[i] for name, pair in FIGURES.items()} | {"samples": samples} for i in range(2))
    return {"before": before, "after": after, "gain": gain, "verdict": "good: a sentence"}


def test_the_table_holds_each_figure_before_and_after_with_the_gain():
    limit = {"reward": 0.9317, "kl": 1.3579, "J": 0.7284, "effective_samples": 300.0}
    gain = {"beta": 0.15, "limit": limit, "J_before": 0.2546, "J": 0.6904, "gain": 0.9177, "gain_se": 0.0234}
    assert evaluation.summary(figures(gain)) == TABLE + (
        "J = reward - 0.15 KL                     0.255     0.690\n"
        "gain 0.92 (standard error 0.02, of judging alone; seeds differ, too) of what is possible: the limit is\n"
        "J* 0.728, with reward 0.932 at KL 1.36\n"
        "good: a sentence"
    )


def test_the_table_without_a_gain():
    known = {"beta": 0.2, "J_before": 0.1234, "J": 0.5678}
    assert evaluation.summary(figures({**known, "gain": None, "why": "too few"})) == TABLE + (
        "J = reward - 0.2 KL                      0.123     0.568\ngood: a sentence"
    )
    assert evaluation.summary(figures({"gain": None, "why": "no price"})) == TABLE + "good: a sentence"


def test_completions_are_shown_as_common_from_a_hundredth_of_all():
    rare = {"n": 1000, "commonest": [["ax", 9], ["ay", 8]]}
    common = {"n": 1000, "commonest": [["a好", 10], ["ab", 3]]}
    shown = ["    10  a好", "     3  ab"]
    for when, judged in (("after", (rare, common)), ("before", (common, rare))):
        told = evaluation.commonest(dict(zip(("before", "after"), judged))).splitlines()
        assert told == [f"commonest completions {when}, of 1000:", *shown]
    assert evaluation.commonest({"before": rare, "after": rare}) == ""


def test_the_first_five_completions_stand_before_and_after_in_a_table():
    before = {"samples": [[f"p{i}", f"old{i}", 0.1 * i + 0.024] for i in range(7)]}
    after = {"samples": [[f"p{i}", f"new{i}", 0.876 - 0.1 * i] for i in range(7)]}
    assert evaluation.before_after_table({"before": before, "after": after}).splitlines() == [
        "| prompt | before | score | after | score |",
        "| --- | --- | --- | --- | --- |",
        *(f"| p{i} | old{i} | 0.{i}2 | new{i} | 0.{8 - i}8 |" for i in range(5)),
    ]


def test_scores_are_printed_in_their_own_unit():
    """With two decimals where they differ by tenths, with none where they differ by thousands."""
    for unit, shown in (
        (1, ("0.24", "0.10")),
        (1e4, ("2400", "1000")),
        (1e-3, ("0.00024", "0.00010")),
    ):
        scores = [unit * score for score in (0.24, 0.1, 0.9)]
        results = figures({"gain": None, "why": "no price"})
        for when in ("before", "after"):
            judged = results[when] | {"samples": [["p", "x", score] for score in scores]}
            results[when] = judged | {"n": 3, "reward": unit * 0.25449}
        lines = evaluation.before_after_table(results).splitlines()[2:4]
        assert [line.split(" | ")[2] for line in lines] == list(shown[:2])
    assert "mean reward                           0.000254  0.000254\n" in evaluation.summary(results)


def test_bars_and_new_lines_in_a_completion_do_not_break_the_table():
    samples = {"samples": [["a|b", "\n好|坏\\\n差", 0.5]]}
    row = evaluation.before_after_table({"before": samples, "after": samples}).splitlines()[2]
    assert row == r"| a\|b | 好\|坏\\ 差 | 0.50 | 好\|坏\\ 差 | 0.50 |"


def test_distinct_n_by_hand():
    """a, b, a, b, c: three of five. ab, ba, ab: two of three; the short text has no pair."""
    assert evaluation.distinct(["abab", "c"], 1) == pytest.approx(3 / 5)
    assert evaluation.distinct(["abab", "c"], 2) == pytest.approx(2 / 3)
    assert evaluation.distinct(["ab", "cd"], 2) == 1  # no pair across texts
    assert evaluation.distinct(["a", ""], 2) == 0


def test_an_evaluation_is_written_whole_and_in_readable_chinese(tmp_path):
    results = {"before": judged([0.25] * 200, prompts=["感觉"] * 200), "after": judged([0.5] * 200)}
    evaluation.add_yardsticks(results, ["感觉"], 0.2)
    path = tmp_path / "evaluation.json"
    path.write_text("an older one")
    with path.open() as reader:
        evaluation.write_json(path, results)
        assert reader.read() == "an older one"
    text = path.read_text(encoding="utf-8")
    assert "感觉" in text and text.endswith("\n") and len(text.splitlines()) > 1000
    assert json.loads(text) == results
    assert list(tmp_path.iterdir()) == [path]


def test_among_few_completions_one_or_two_of_a_kind_are_not_common():
    for count, common in ((1, False), (2, False), (3, True)):
        judged = {"n": 64, "commonest": [["ax", count]] * 10}
        text = evaluation.commonest({"before": judged, "after": judged})
        assert text.startswith("commonest completions before, of 64:") == common
