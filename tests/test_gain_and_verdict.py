"""The limit, the gain and the verdict, checked against closed forms, exact sums and numbers computed by hand."""

import dataclasses
import functools
import itertools
import json
import math
import random
import zlib
from statistics import NormalDist

import numpy as np
import pytest
import torch

from config import PPOConfig
from support.common.errors import UserError
from support.run import limit
from support.run.evaluation import Evaluation, Results, change_since, check_reward, distinct
from support.run.results import before_after_table, results_table, verdict
from tests.helpers import as_rewards, evaluation, example_results


def evaluated(scores, kls=None, prompts=None, **figures) -> Evaluation:
    prompts = prompts or ["a"] * len(scores)
    return evaluation([(prompt, "x", score) for prompt, score in zip(prompts, scores)], kls, **figures)


def limit_of(groups: list[np.ndarray], beta: float) -> dict:
    """Return the limit from the rewards of each prompt, with a plain jackknife that leaves out each sample once."""

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
    """The weights are 1/4 and 3/4, and the jackknife leaves out the second sample with a weight of only 1/2. With one
    sample per prompt, the best policy is the reference. A plain exp(1000 / 0.01) would overflow."""
    best = limit.gibbs_policy(torch.tensor([0.0, 2 * math.log(3)]), torch.zeros(2), 2.0)
    assert (best["reward"], best["J"]) == pytest.approx((1.5 * math.log(3), math.log(8 / 3)))
    best = limit.gibbs_policy(torch.tensor([0.2, 0.7]), torch.tensor([0, 1]), 0.5)
    assert (best["reward"], best["kl"], best["J"]) == pytest.approx((0.45, 0, 0.45))
    best = limit.gibbs_policy(torch.arange(1000.0), torch.zeros(1000), 0.01)
    assert 998 < best["J"] < best["reward"] < 1000 and best["effective_samples"] == pytest.approx(1)


@pytest.mark.parametrize("beta", [1.2, 50.0])
def test_gibbs_policy_matches_a_plain_jackknife_for_prompts_with_different_counts(beta):
    rng = np.random.default_rng(3)
    groups = [rng.uniform(-2, 2, size=size) for size in (9, 30, 17)]
    index, shuffle = np.repeat([4, 0, 2], [9, 30, 17]), rng.permutation(56)
    rewards, prompt_index = torch.tensor(np.concatenate(groups)[shuffle]), torch.tensor(index[shuffle])
    best = limit.gibbs_policy(rewards, prompt_index, beta)
    ratios = best.pop("ratios")
    assert best == pytest.approx(limit_of(groups, beta))
    expected = np.concatenate([np.exp(group / beta) / np.exp(group / beta).mean() for group in groups])
    assert ratios.tolist() == pytest.approx(expected[shuffle].tolist())


def test_gain_and_its_standard_error_match_repeated_draws():
    """Rewards are uniform from 0 to 1, plus a constant per prompt, so J* = beta log E exp(r / beta) is known.
    The standard deviation of 100 gains has a relative standard error of 1 / sqrt(200) = 7%."""
    rng, beta, prompts = np.random.default_rng(2), 0.2, ["a", "b", "c", "d"] * 100
    better, gains = np.arange(400) % 4 / 2, []
    for _ in range(100):
        before = evaluated((rng.uniform(size=400) + better).tolist(), prompts=prompts)
        kls = rng.exponential(0.2, size=400).tolist()
        after = evaluated((rng.beta(4, 2, size=400) + better).tolist(), kls, prompts)
        gains.append(limit.gain(before, after, beta))
    found, errors = (np.array([each[name] for each in gains]) for name in ("gain", "gain_se"))
    assert errors.mean() == pytest.approx(found.std(), rel=0.21)
    expected = (4 / 6 - beta * 0.2 - 0.5) / (beta * math.log(beta * (math.exp(1 / beta) - 1)) - 0.5)
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / math.sqrt(100))


@pytest.mark.parametrize("unit", [1.0, 1e4])
def test_gain_and_its_standard_error_by_hand_in_any_unit(unit):
    """The two prompts are in random order, so their samples must be grouped. J* comes from sums over the samples."""
    rng = np.random.default_rng(4)
    prompts = rng.choice(["a", "b"], p=[0.6, 0.4], size=600).tolist()
    scores = unit * (rng.uniform(size=600) + (np.array(prompts) == "b"))
    scores_after, kls, beta = unit * rng.uniform(0.5, 1.8, size=500), rng.exponential(0.3, size=500), 0.25 * unit
    before = evaluated(scores.tolist(), rng.uniform(size=600).tolist(), prompts)
    after = evaluated(scores_after.tolist(), kls.tolist(), ["a", "b"] * 250)
    result = limit.gain(before, after, beta)

    own = [np.array(prompts) == prompt for prompt in "ab"]
    best = limit_of([scores[of] for of in own], beta)
    j_before, j_after = scores.mean(), scores_after.mean() - beta * kls.mean()
    share = (j_after - j_before) / (best["J"] - j_before)
    squares = 0.0
    for of in own:
        moves = beta * np.exp(scores[of] / beta) / np.exp(scores[of] / beta).mean()  # each sample's effect on J*
        mixed = (1 - share) * scores[of] + share * moves
        squares += ((mixed - mixed.mean()) ** 2).sum()
    values = (scores_after - beta * kls).reshape(250, 2)
    error = math.sqrt(((values - values.mean(0)) ** 2).sum() / 498 / 500 + squares / 598 / 600)
    assert result.pop("limit") == pytest.approx(best)
    expected = {"beta": beta, "J_before": j_before, "J": j_after, "gain": share}
    assert result == pytest.approx(expected | {"gain_se": error / (best["J"] - j_before)}, rel=1e-5)


def binary(n_best: int, n: int, n_prompts: int = 1) -> Evaluation:
    """Score n_best of each prompt's n completions 1 and the others 0. At a small beta, the best determine the limit."""
    prompts = [f"prompt {i % n_prompts}" for i in range(n * n_prompts)]
    return evaluated([float(i < n_best * n_prompts) for i in range(n * n_prompts)], prompts=prompts)


def two_valued(high: float) -> Evaluation:
    """At beta 1, J* - J_ref is log cosh(high / 2), or about high / 4 times the standard deviation, high / 2."""
    return evaluated([0.0, high] * 10_000)


FEW, HANDFUL, DEAR = "sample size is too small", "a handful of texts", "hardly better than the reference"


@pytest.mark.parametrize(
    ("before", "beta", "why"),
    [
        (binary(99, 1000), 0.02, FEW),
        (binary(101, 1000), 0.02, None),
        (binary(4, 20, 50), 0.02, FEW),
        (binary(6, 20, 50), 0.02, None),
        (binary(9, 2000), 0.02, "only 9 of 2,000 rewards differ"),
        (binary(19, 2000), 0.02, HANDFUL),
        (binary(21, 2000), 0.02, FEW),
        (binary(150, 20_000), 0.02, None),
        (binary(1, 20, 50), 0.02, HANDFUL),
        (binary(1, 19, 50), 0.02, FEW),
        (two_valued(0.118), 1.0, DEAR),
        (two_valued(0.122), 1.0, None),
        (evaluated([0.0, 1.0] * 500, noise=0.021), 0.5, "2% of the rewards' variance is noise"),
        (evaluated([0.0, 1.0] * 500, noise=0.019), 0.5, None),
        (evaluated([0.1, 0.2, 0.7] * 100, prompts=["a", "b", "c"] * 100), 0.2, "only 0 of 300 rewards differ"),
        (evaluated([0.0, 1.0] * 500), 0.0, "the KL coefficient is 0"),
    ],
)
def test_gain_is_unknown_beyond_each_threshold_and_known_within_it(before, beta, why):
    unit, prompts = 1e4, [prompt for prompt, *_ in before.samples]  # the thresholds hold in any unit
    scores = [unit * score for *_, score in before.samples]
    before = evaluated(scores, prompts=prompts, noise=before.noise)
    result = limit.gain(before, before, beta * unit)
    if why is None:
        assert result["gain"] == pytest.approx(0, abs=1e-6) and result["gain_se"] > 0 and "why" not in result
    else:
        assert result["gain"] is None and why in result["why"] and "gain_se" not in result
    assert ("J" in result) == (beta > 0) and json.dumps(result)
    if why == FEW:  # twice the number needed, rounded up to a power of 2
        effective, least = result["limit"]["effective_samples"], max(100, 5 * len(set(prompts)))
        assert 1 <= result["samples_needed"] * effective / (2 * len(scores) * least) < 2


def test_noise_is_half_the_variance_of_score_changes_over_the_variance_of_scores():
    """Scores of 0 and 2 have variance 1. The second time, every other score is 0.4 higher, so the noise is 0.04 / 2."""
    calls = []

    def again(batch):
        calls.append(batch)
        return [0.4, 2.0] * (len(batch) // 2)

    before = evaluated([0.0, 2.0] * 50)
    check_reward(as_rewards(again), before)
    assert before.noise == pytest.approx(0.02)
    assert calls == [["ax"] * 64, ["ax"] * 32]


def counted(text: str) -> float:
    """Return a number between 0 and 1 for a text, roughly uniformly distributed."""
    return zlib.crc32(text.encode()) / 2**32


def each(texts: list[str]) -> torch.Tensor:
    return torch.tensor([counted(text) for text in texts])


class Calls:
    """A reward with a state: the number of calls, the texts seen so far, and a running mean."""

    def __init__(self, score):
        self.score, self.n, self.seen, self.mean = score, 0, set(), 0.0

    def __call__(self, texts):
        self.n += 1
        scores = self.score(self, texts)
        self.seen.update(texts)
        return scores


def running_mean(state, texts):
    state.mean = 0.8 * state.mean + 0.2 * each(texts).mean()
    return each(texts) - state.mean


def by_eights(texts):
    """Return z-scores within groups of eight, as in GRPO."""
    groups = each(texts).reshape(-1, 8)
    return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)).flatten()


def noisy(deviation, seed=0):
    draw = random.Random(seed)
    return lambda texts: [counted(text) + draw.gauss(0, deviation) for text in texts]


def first_and_second(reward, n=200) -> Evaluation:
    """Return the Evaluation of n different texts, after scoring them and checking the reward on them."""
    texts = [str(i) for i in range(n)]
    before = evaluation([("", text, score) for text, score in zip(texts, torch.as_tensor(reward(texts)).tolist())])
    check_reward(as_rewards(reward), before)
    return before


DRIFT, COMPANY = (
    "the reward changes from call to call: the same 64 texts score",
    "depends on the other texts in its call",
)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (each, None),
        (lambda texts: 1e6 + 100 * each(texts), None),
        (noisy(0.03), None),
        (
            noisy(0.3),
            None,
        ),  # half of the variance is noise, so the texts with the best first scores do worse the second time
        (Calls(lambda state, texts: each(texts) + 0.02 * state.n), f"{DRIFT} 0.02 higher"),
        (Calls(lambda state, texts: each(texts) - 0.05 * state.n), f"{DRIFT} 0.05 lower"),
        (Calls(lambda state, texts: [text not in state.seen for text in texts]), f"{DRIFT} 1 lower"),
        (Calls(lambda state, texts: each(texts) if state.n > 1 else torch.ones(len(texts))), f"{DRIFT} 0."),
        (Calls(lambda state, texts: each(texts) if state.n > 1 else torch.full((len(texts),), 0.5)), None),
        (Calls(running_mean), f"{DRIFT} 0.0"),
        (lambda texts: each(texts) - each(texts).mean(), COMPANY),
        (lambda texts: (each(texts) - each(texts).mean()) / each(texts).std(), COMPANY),
        (lambda texts: each(texts).argsort().argsort() / len(texts), COMPANY),
        (lambda texts: each(texts) > each(texts).median(), COMPANY),
        (by_eights, COMPANY),
        (lambda texts: each(texts) / each(texts).sum(), DRIFT),
    ],
)
def test_a_reward_that_drifts_or_compares_its_texts_is_distinguished_from_a_noisy_one(reward, said):
    before = first_and_second(reward)
    result = limit.gain(before, before, 0.3)
    if said is None:
        assert before.unsteady == "" and "call" not in result.get("why", "")
    else:
        assert said in before.unsteady and result["gain"] is None
        assert result["why"] == limit.possible(before, 0.0)["why"] == before.unsteady


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scores: scores, ""),
        (lambda scores: scores + 0.005, ""),
        (lambda scores: scores + 1.5, "64 texts score 1.5 higher (standard error "),
        (lambda scores: scores - 0.04, "64 texts score 0.04 lower (standard error "),
        (lambda scores: 2 * scores - scores.mean(), "64 texts score 0.29 higher or lower now"),
        (lambda scores: scores.flip(0), "higher or lower now"),
        (lambda scores: scores + 0.25 * (scores > 0.95), "higher or lower now"),  # only a few of the texts change
    ],
)
def test_the_gain_is_unknown_if_the_reward_changed_during_training(change, said):
    """The reward changes with training steps, not from call to call within an evaluation."""
    before = first_and_second(each)
    after = dataclasses.replace(before, unsteady=change_since(as_rewards(lambda texts: change(each(texts))), before))
    assert said in after.unsteady and bool(said) == bool(after.unsteady)
    results = Results(before, after)
    results.measure(0.3)
    assert (results.gain["gain"] is None) == bool(said)
    if said:
        assert verdict(results, PPOConfig()) == f"gain unknown: {after.unsteady}"


def test_noise_is_not_mistaken_for_a_change_after_training():
    for seed in range(20):
        before = first_and_second(noisy(0.035, seed))  # 1.5% of the variance
        assert before.unsteady == change_since(as_rewards(noisy(0.035, -1 - seed)), before) == ""


@pytest.mark.parametrize(("good", "first"), [(19, 9), (21, 0)])
def test_the_frontier_by_hand(good, first):
    """`good` of 1,000 texts score 1e4 and the others 0. At the lowest betas, at least 20 good ones are needed."""
    scores = np.array([1e4] * good + [0.0] * (1000 - good))
    points = limit.frontier(*evaluated(scores.tolist()).rewards())
    assert len(points) == 22 - first
    for power in (first, first + 4, 21):
        best = limit_of([scores], beta := 0.15 * 1.25**power * scores.std(ddof=1))
        expected = {"beta": beta, "reward": best["reward"], "kl": best["kl"]}
        assert points[power - first] == pytest.approx(expected)


def test_the_frontier_needs_five_effective_samples_per_prompt():
    for best, there in ((4, False), (6, True)):
        points = limit.frontier(*binary(best, 40, 10).rewards())
        assert (points[0]["beta"] < 0.1) == there and points[-1]["beta"] > 4


def test_best_of_n_matches_all_combinations_within_a_prompt():
    """Two prompts have eight samples each. The best of two has a KL of log 2 - 1/2."""
    rng = np.random.default_rng(0)
    first, second = rng.uniform(size=8).round(1), 10 + rng.uniform(size=8).round(1)
    before = evaluated(np.stack([first, second], 1).ravel().tolist(), prompts=["a", "b"] * 8)
    known = {"gain": 0.5, "beta": 0.2, "J_before": 0.5, "limit": {"J": 0.9}}
    for n in (2, 3, 8):
        brute = [np.mean([max(choice) for choice in itertools.combinations(scores, n)]) for scores in (first, second)]
        best = limit.best_of_n(*before.rewards(), n, known)
        assert best["reward"] == pytest.approx(np.mean(brute))
        assert best["kl"] == pytest.approx({2: math.log(2) - 1 / 2, 3: math.log(3) - 2 / 3, 8: math.log(8) - 7 / 8}[n])
        assert best["gain"] == pytest.approx((best["reward"] - 0.2 * best["kl"] - 0.5) / 0.4)
    assert limit.best_of_n(*before.rewards(), 2, {"gain": None})["gain"] is None


def test_gain_frontier_and_best_of_n_are_measured_on_the_policy_before_training():
    before = evaluated([0.1, 0.6, 0.3, 0.9, 0.2, 0.5, 0.8] * 20, prompts=["a", "b"] * 70)
    results = Results(before, evaluated([0.4] * 140, [0.25] * 140, ["a", "b"] * 70))
    results.measure(0.5)
    assert results.gain == limit.gain(before, results.after, 0.5)
    assert results.frontier == limit.frontier(*before.rewards())
    assert [each["n"] for each in results.best_of_n] == [2, 3, 4, 8]
    few = Results(evaluated([0.1] * 7, prompts=["a"] * 4 + ["b"] * 3), evaluated([0.2] * 16, prompts=["a", "b"] * 8))
    few.measure(0.2)
    assert [each["n"] for each in few.best_of_n] == [2, 3]  # prompt b has three samples


@functools.cache
def normal(unit):
    """Return an evaluation with normally distributed rewards, and its frontier, which is R = sqrt(2 KL)."""
    scores = [unit * NormalDist().inv_cdf((i + 0.5) / 2000) for i in range(2000)]
    before = evaluated(scores, unique=0.8)
    return before, limit.frontier(*before.rewards())


def verdict_on(reward, kl, beta=1.0, unit=1.0, noise=0.0, unique=0.7, **settings):
    """Return the verdict on a run that starts from `normal` rewards and ends at this reward and KL."""
    after = evaluated([unit * (reward + noise), unit * (reward - noise)] * 1000, [kl] * 2000, unique=unique)
    before, frontier = normal(unit)
    found = limit.gain(before, after, unit * beta)
    return verdict(Results(before, after, gain=found, frontier=frontier), PPOConfig(**settings))


@pytest.mark.parametrize(
    ("reward", "kl", "sentence"),
    [  # J is R - KL, so the limit is R 1 at KL 1/2
        (0.86, 0.5, "good: 72% of what is possible"),
        (0.84, 0.5, "short: 68% of what is possible; continue with more --episodes"),
        (1.0, 0.74, "short: 52% of what is possible; continue with more --episodes"),
        (1.0, 0.76, "wasted KL: KL 0.76, compared with 0.5 at the limit; try a lower --lr"),
        (0.15, 0.1, "wasted KL: KL 0.1, compared with 0.5 at the limit; try a lower --lr"),  # KL 0.1 allows R 0.45
        (0.21, 0.1, "short: 22% of what is possible; continue with more --episodes"),  # within 2 errors of half of 0.45
        (1.3, 1.1, "hacked: KL 1.1, compared with 0.5 at the limit; try a lower --lr"),
        (1.3, 0.9, "good: 80% of what is possible"),
        (1.9, 1.1, "hacked: KL 1.1, compared with 0.5 at the limit; try a higher --init_kl_coef"),  # R > sqrt(2 KL)
        (0.05, 0.004, "unmoved: KL 0.004, compared with 0.5 at the limit; try a higher --lr"),
        (0.05, 0.006, "short: 9% of what is possible; continue with more --episodes"),
    ],
)
def test_the_verdict_is_the_same_in_any_unit_of_the_reward(reward, kl, sentence):
    assert [verdict_on(reward, kl, unit=unit) for unit in (1.0, 1e-3, 1e4)] == [sentence] * 3


def test_the_verdict_depends_on_unique_texts_minibatch_size_and_number_of_samples():
    assert verdict_on(0.95, 1.1, unique=0.39).startswith("hacked")  # over half of the unique texts are gone
    assert verdict_on(0.95, 1.1, unique=0.41).startswith("wasted KL")
    assert verdict_on(0.95, 0.9, unique=0.39).startswith("wasted KL")
    small = dict(batch_size=64, minibatch_size=8)
    assert verdict_on(0.9, 1.0, **small).endswith("try --minibatch_size 64")
    # The gain has a standard error of 0.2, because that of J is 0.1: over 2000 * (2 * 0.2 / 0.15)^2 samples are needed
    assert verdict_on(0.9, 0.5, noise=4.5).endswith("evaluate again with --eval_only and --eval_samples 16384")
    assert verdict_on(0.9, 0.5, noise=2.5).startswith("good")
    assert verdict_on(0.2, 0.5, noise=4.5).startswith("wasted")  # a gain of -0.6 is far below 0.7
    assert verdict_on(0.9, 0.5, beta=0.0).startswith("gain unknown: the KL coefficient is 0")


def test_a_gain_more_than_three_standard_errors_above_1_is_impossible():
    """J - J_ref has a standard error of 0.04, and at most 1/2 is possible."""
    assert verdict_on(1.11, 0.5, noise=1.8).startswith("good")
    said = verdict_on(1.3, 0.5, noise=1.8)
    assert said.startswith("impossible: 160% of what is possible, more than 3 standard errors (")
    assert "the reward isn't the same before and after" in said


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


@pytest.mark.parametrize(("unit", "digits"), [(1, 3), (1e4, 0)])
def test_the_spread_before_training_sets_the_decimals_of_rewards_in_tables(unit, digits):
    """The spread is 0.4 units before training. Afterwards all rewards are equal."""
    found = example_results(unit)
    found.after.samples = found.after.samples[:1] * 2

    def of_rewards(*values, digits=digits):
        return [f"{value * unit:.{digits}f}" for value in values]

    header, _, *rows = cells(results_table(found))
    assert header == ["", "before", "after", "the limit"] and len(rows) == 11
    assert rows[0][1:] == of_rewards(0.25449, 0.87551, 0.9317)
    assert rows[2][1:] == ["1.235", "1.235", "1.358"] and rows[5][1:] == ["98.8%", "98.8%", ""]
    assert rows[-2][1:] == of_rewards(0.2546, 0.6904, 0.7284)
    assert rows[-1] == ["gain", "0", "0.92 (standard error 0.02)", "1"]
    was, now = of_rewards(0.1, 0.876, digits=max(0, digits - 1))
    assert cells(before_after_table(found.before.samples, found.after.samples, 1))[2:] == [
        ["p\\|", "old 1", was, "new1", now]
    ]
    found.gain |= {"gain": None, "why": "few"}
    assert [row[3:] for row in cells(results_table(found))[2:]] == [[""]] * 10


def test_distinct_n_by_hand():
    """a, b, a, b, c: three of five differ. ab, ba, ab: two of three differ, and no pair spans two texts."""
    assert distinct(["abab", "c"], 1) == pytest.approx(3 / 5)
    assert distinct(["abab", "c"], 2) == pytest.approx(2 / 3)
    assert distinct(["a", ""], 2) == 0


def test_results_are_written_as_readable_json_and_read_back(tmp_path):
    path = tmp_path / "evaluation.json"
    assert Results.read(path) is None
    found = Results(evaluated([0.25, 0.5], prompts=["感觉", "衣服"], noise=0.1))
    found.write(path)
    assert "感觉" in path.read_text(encoding="utf-8") and Results.read(path) == found
    found = dataclasses.replace(example_results(), steps=3, alarms=[{"step": 1}])
    found.write(path)
    assert Results.read(path) == found
    content = json.loads(path.read_text(encoding="utf-8"))
    without = {when: content.pop(when) for when in ("before", "after")}
    for each in without.values():
        del each["samples"], each["kls"], each["parts"]
    assert found.without_samples() == content | without
    for content in ("{", '{"after": 1}', '{"before": {"n": 1}}'):
        path.write_text(content)
        with pytest.raises(UserError, match="evaluation.json is damaged .*remove it; --resume will create it again"):
            Results.read(path)
