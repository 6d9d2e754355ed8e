"""The evaluation: the Gibbs limit against exact sums and numbers worked out by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from support import evaluation


def judged(scores, kls=None, prompts=None):
    prompts = prompts or ["a"] * len(scores)
    return {
        "samples": [[p, "x", s] for p, s in zip(prompts, scores)],
        "kls": kls or [0.0] * len(scores),
        "reward": float(np.mean(scores)),
        "kl": float(np.mean(kls or [0.0])),
    }


def test_gibbs_policy_by_hand():
    """Half the samples score 0, half log(3) * beta: weights 1/4 and 3/4 of each half."""
    beta = 0.5
    rewards = torch.tensor([0.0, math.log(3) * beta] * 100)
    best = evaluation.gibbs_policy(rewards, torch.zeros(200, dtype=torch.long), beta)
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    reward = 0.75 * math.log(3) * beta
    assert best["reward"] == pytest.approx(reward) and best["kl"] == pytest.approx(kl)
    assert (
        best["J"] == pytest.approx(reward - beta * kl) == pytest.approx(beta * math.log(2))
    )  # J* = beta log mean exp(r / beta)
    assert best["effective_samples"] == pytest.approx(1 / (100 * (0.25 / 100) ** 2 + 100 * (0.75 / 100) ** 2))


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
        assert both[name] == pytest.approx((alone[0][name] + alone[1][name]) / 2, rel=1e-5)
    assert both["effective_samples"] == pytest.approx(min(a["effective_samples"] for a in alone), rel=1e-5)


def test_gain_is_0_for_the_reference_1_at_the_limit_and_negative_for_harm():
    rng = np.random.default_rng(1)
    scores = rng.uniform(size=1000).tolist()
    before = judged(scores)
    assert evaluation.gain(before, judged(scores), ["a"], 0.2)["gain"] == pytest.approx(0, abs=1e-6)
    limit = evaluation.gain(before, judged(scores), ["a"], 0.2)["limit"]
    at_limit = judged([limit["reward"]] * 1000, [limit["kl"]] * 1000)
    assert evaluation.gain(before, at_limit, ["a"], 0.2)["gain"] == pytest.approx(1, abs=1e-5)
    assert evaluation.gain(before, judged([0.9] * 1000, [5.0] * 1000), ["a"], 0.2)["gain"] < 0


def test_standard_error_of_the_gain_against_repeated_draws():
    rng = np.random.default_rng(2)
    gains, errors = [], []
    for _ in range(300):
        before = judged(rng.uniform(size=500).tolist())
        kls = rng.exponential(0.2, size=500)
        after = judged(rng.beta(4, 2, size=500).tolist(), kls.tolist())
        result = evaluation.gain(before, after, ["a"], 0.2)
        gains.append(result["gain"])
        errors.append(result["gain_se"])
    assert np.mean(errors) == pytest.approx(np.std(gains), rel=0.15)


def test_gain_is_null_with_the_reason():
    few = judged([0.0] * 950 + [1.0] * 50)
    assert evaluation.gain(few, few, ["a"], 0.05)["gain"] is None
    assert "50 samples" in evaluation.gain(few, few, ["a"], 0.05)["why"]
    flat = judged([0.5] * 1000)
    assert "nothing to gain" in evaluation.gain(flat, flat, ["a"], 0.2)["why"]
    assert "beta is 0" in evaluation.gain(flat, flat, ["a"], 0.0)["why"]


def test_frontier_rises_with_kl_and_ends_where_samples_do():
    points = evaluation.frontier(judged(np.random.default_rng(3).uniform(size=1000).tolist()), ["a"])
    assert len(points) > 10
    kls, rewards = [p["kl"] for p in points], [p["reward"] for p in points]
    assert kls == sorted(kls, reverse=True) and rewards == sorted(rewards, reverse=True)


def test_evaluate_against_counting_by_hand(policy):
    """The statistics of a judged policy, recomputed from what it sampled."""
    from config import PPOConfig
    from ppo import PPOTrainer
    from support.models import encode_prompt

    model, tokenizer = policy
    prompts = ["衣服", "刚收到货,感觉"]
    trainer = PPOTrainer(PPOConfig(dtype="float32", device="cpu", gen_len=5, eval_samples=40), model, model, tokenizer)
    queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    result = evaluation.evaluate(
        trainer, model, tokenizer, lambda texts: [len(text) / 20 for text in texts], prompts, queries
    )
    texts = [text for _, text, _ in result["samples"]]
    assert [prompt for prompt, _, _ in result["samples"]] == prompts * 20
    assert result["reward"] == pytest.approx(np.mean([len(p + t) / 20 for p, t, _ in result["samples"]]), rel=1e-5)
    assert result["kl"] == pytest.approx(0, abs=1e-6)
    assert result["distinct_1"] == len(set("".join(texts))) / len("".join(texts))
    pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1)]
    assert result["distinct_2"] == len(set(pairs)) / len(pairs)
    assert result["reward_ci95"] == pytest.approx(
        1.96 * np.std([s for *_, s in result["samples"]], ddof=1) / math.sqrt(40), rel=1e-5
    )
    assert result == evaluation.evaluate(
        trainer, model, tokenizer, lambda texts: [len(text) / 20 for text in texts], prompts, queries
    )


def test_kl_to_the_reference_is_the_sum_over_tokens_of_the_exact_kl(policy):
    import copy

    from config import PPOConfig
    from ppo import PPOTrainer
    from support.models import encode_prompt

    model, tokenizer = policy
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    trainer = PPOTrainer(PPOConfig(dtype="float32", device="cpu", gen_len=5, frozen_share=0), moved, model, tokenizer)
    query, response = encode_prompt(tokenizer, "衣服"), torch.tensor([9, 7, 3])
    kls, ref_logprobs, mask = trainer.kl_to_reference(moved, [query], [response])
    ids = torch.cat([query, response])[None]
    logps = []
    for network in (moved, model):
        with torch.no_grad():
            logits = network(ids).logits[0, len(query) - 1 : -1].double()
        logits[:, [0, 1, 2, 4]] = -1e30
        logps.append(logits.log_softmax(-1))
    expected = (logps[0].exp() * (logps[0] - logps[1]).clamp(-100, 100)).sum()
    assert kls.item() == pytest.approx(expected.item(), rel=1e-3)
    assert ref_logprobs[0].tolist() == pytest.approx(logps[1].gather(1, response[:, None])[:, 0].tolist(), abs=1e-4)
    assert mask.tolist() == [[True, True, True]]


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


def test_completions_are_shown_as_common_only_where_they_are():
    rare = {"n": 1024, "commonest": [["ax", 4]] * 10, "samples": [["a", f"text{i}", 0.5] for i in range(9)]}
    text = evaluation.commonest({"before": rare, "after": {**rare, "commonest": [["a好", 11], ["ab", 3]]}})
    before, after = text.split("commonest completions after, of 1024:")
    assert before.startswith("random completions before:") and before.count("atext") == evaluation.SHOWN
    assert after.split() == ["11", "a好", "3", "ab"]


def test_bars_and_new_lines_in_a_completion_do_not_break_the_table():
    samples = {"samples": [["a", "\n好|坏\\\n差", 0.5]]}
    row = evaluation.before_after_table({"before": samples, "after": samples}).splitlines()[2]
    assert row == r"| a | 好\|坏\\ 差 | 0.50 | 好\|坏\\ 差 | 0.50 |"


def test_best_of_n_needs_n_samples_of_each_prompt():
    results = {"before": judged([0.1] * 7, prompts=["a"] * 4 + ["b"] * 3), "after": judged([0.2] * 7)}
    evaluation.add_yardsticks(results, ["a", "b"], 0.2)
    assert [best["n"] for best in results["best_of_n"]] == [2, 3]
