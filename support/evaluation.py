"""How good a policy is, and how much of the possible gain it got.

PPO maximises J = R - beta * KL: mean reward minus the KL coefficient times the KL to the reference, per completion.
The best policy for that is the Gibbs policy, proportional to ref * exp(r / beta) (Ziegler et al. 2019, section 2;
Korbak et al. 2022, arXiv:2205.11275). Its R*, KL* and J* can be estimated from rewards of the reference's samples:

    gain = (J - J_ref) / (J* - J_ref)        1 is the limit, 0 is nothing, below 0 the run did harm
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ppo import kl_from_logits, logprobs_from_logits, masked_mean
from reward import score_texts
from support.figures import decimals, table
from support.files import damaged, read_json, write_whole
from support.text_trainer import TextPPOTrainer

SEED = 20_170_707  # of every evaluation, whatever the run's seed: all policies are judged on the same draws
BETAS = [0.15 * 1.25**i for i in range(22)]  # of the frontier, up to 16, in standard deviations of the rewards
GOOD = 0.7  # gain; with normal rewards a share x of KL* buys at most 2 sqrt(x) - x of it, so the shares of KL* below
UNMOVED = 0.01  # buy at most 0.2 of the gain,
FAR = 2  # at most 0.83: more reward than the limit's at this distance means that texts were found which no sample had,
CLOSE = 1.5  # and at most 0.95
FEW = 100  # effective samples that a limit needs, and for the jackknife 5 of each prompt
FEWEST = 10  # rewards that differ from the others of their prompt: what rests on fewer is chance
LITTLE = 0.03  # possible gain in J, in standard deviations of the rewards: the noise of J with a thousand samples
UNSURE = 0.15  # standard error of the gain above which a good run and a short one look alike
TWICE = 64  # texts that are scored a second time
NOISY = 0.02  # share of the rewards' variance that is chance above which the limit is over a tenth too far away
SHOWN = 5  # completions in the before/after table


def evaluate(trainer: TextPPOTrainer, model, reward, prompts: list[str]) -> dict:
    """Judge `model` on `eval_samples` completions, the prompts in turn. Returns a dict that JSON can hold.

    `kl` is the mean of `kl_to_reference`: the same expectation as the sampled log-ratios, with less noise.
    """
    n = trainer.config.eval_samples
    prompt_index, query_tensors, responses, completions, rewards = sample_and_score(trainer, model, reward, prompts, n)
    kl, ref_logprobs, mask = kl_to_reference(trainer, model, query_tensors, responses)
    counts = Counter(zip(prompt_index, completions))
    return {
        "n": n,
        "reward": rewards.mean().item(),
        "reward_ci95": 1.96 * rewards.std().item() / math.sqrt(n),
        "kl": kl.mean().item(),
        "distinct_1": distinct(completions, 1),
        "distinct_2": distinct(completions, 2),
        "unique": len(counts) / n,
        "length": sum(len(response) for response in responses) / n,
        "ended": sum(bool(response[-1] == trainer.sep_token_id) for response in responses) / n,
        "ref_logprob": masked_mean(ref_logprobs, mask).item(),
        "commonest": [[prompts[i] + text, count] for (i, text), count in counts.most_common(10)],
        "samples": [[prompts[i], text, score] for i, text, score in zip(prompt_index, completions, rewards.tolist())],
        "kls": kl.tolist(),
    }


def sample_and_score(trainer: TextPPOTrainer, model, reward, prompts: list[str], n: int):
    """Returns n completions, the prompts in turn: prompt indices, queries, responses, texts and rewards (n,)."""
    prompt_index, queries = [i % len(prompts) for i in range(n)], trainer.encode(prompts)
    query_tensors = [queries[i] for i in prompt_index]
    responses = trainer.generate(query_tensors, model, SEED, 0)
    completions = trainer.decode(responses)
    rewards = score_texts(reward, [prompts[i] + text for i, text in zip(prompt_index, completions)])
    return prompt_index, query_tensors, responses, completions, rewards


def noise(reward, judged: dict) -> float:
    """Returns the share of the rewards' variance that is chance: half the mean squared difference of two rewards of
    the same text, for TWICE texts, over the variance of all rewards."""
    scores = torch.tensor([score for *_, score in judged["samples"]], dtype=torch.float64)
    again = score_texts(reward, [prompt + text for prompt, text, _ in judged["samples"][:TWICE]])
    difference = (again - scores[:TWICE]).square().mean().item() / 2
    return difference / scores.var(correction=0).item() if difference else 0.0


def kl_to_reference(trainer: TextPPOTrainer, model, query_tensors, response_tensors) -> tuple[torch.Tensor, ...]:
    """Returns how far `model` is from the reference along responses, on the CPU: the KL (n,) in nats, over the whole
    vocabulary at each token and summed; the reference's log-probabilities (n, T) of the tokens; and the mask (n, T)."""

    def compared(ids, policy, reference):
        (logits, _), (ref_logits, _) = policy, reference
        return kl_from_logits(logits, ref_logits), logprobs_from_logits(ref_logits, ids)

    completions = trainer.engine.collator.completions(query_tensors, response_tensors)
    kl, ref_logprobs = trainer.engine.evaluate(compared, completions, model, trainer.ref_model).cpu()
    mask = completions.mask.cpu()
    return kl.where(mask, 0).sum(-1), ref_logprobs, mask


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n: different n-grams of characters over all of them (Li et al. 2016, arXiv:1510.03055)."""
    ngrams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(1, len(ngrams))


def gibbs_policy(rewards: torch.Tensor, prompt_index: torch.Tensor, beta: float) -> dict:
    """Estimate R*, KL* and J* of the Gibbs policy from rewards (n,) of the reference's samples.

    For each prompt's m samples, weights w_i proportional to exp(r_i / beta), R* = sum w_i r_i and
    J* = beta log mean exp(r_i / beta), without their bias of order 1 / m: the jackknife (Quenouille 1956), which leaves
    out one sample at a time, with a weight of 1/2 at most. Then means over the samples, and KL* = (R* - J*) / beta.
    `ratios` (n,) float64, m w_i, are the Gibbs policy's probabilities over the reference's. `effective_samples`, on
    which the estimate rests, is n / mean (m w_i)^2.
    """
    groups = [(prompt_index == i).nonzero().squeeze(1) for i in prompt_index.unique()]
    padded = pad_sequence([rewards[group].double() for group in groups], batch_first=True)  # (prompts, m)
    m = torch.tensor([[len(group)] for group in groups], dtype=torch.float64)
    there = torch.arange(padded.shape[1]) < m
    exponents = (padded / beta).where(there, float("-inf"))
    weights = exponents.softmax(1)
    reward, log_mean = (weights * padded).sum(1, keepdim=True), exponents.logsumexp(1, keepdim=True) - m.log()
    left_out = weights.clamp(max=0.5)
    reward += (m - 1) / m * (left_out / (1 - left_out) * (padded - reward)).sum(1, keepdim=True)
    log_mean -= (m - 1) / m * torch.log1p(-left_out).sum(1, keepdim=True) - (m - 1) * torch.log1p(-1 / m.clamp(min=2))
    ratios = torch.empty(len(rewards), dtype=torch.float64)
    ratios[torch.cat(groups)] = (m * weights)[there]
    reward, best = ((m / len(rewards) * each).sum().item() for each in (reward, beta * log_mean))
    return {
        "reward": reward,
        "kl": (reward - best) / beta,
        "J": best,
        "effective_samples": len(rewards) / (ratios**2).mean().item(),
        "ratios": ratios,
    }


def scores_and_prompts(judged: dict, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the rewards (n,) float64 of a judged policy's samples, and the index of the prompt of each (n,)."""
    rewards = torch.tensor([score for _, _, score in judged["samples"]], dtype=torch.float64)
    return rewards, torch.tensor([prompts.index(prompt) for prompt, _, _ in judged["samples"]])


def variance_within(values: torch.Tensor, prompt_index: torch.Tensor) -> float:
    """Returns the variance of values (n,) around their prompt's mean; exactly 0 if those of each prompt are equal."""
    groups = [values[prompt_index == i].double() for i in prompt_index.unique()]
    squares = sum((group - group.mean()).square().sum().item() for group in groups if group.min() < group.max())
    return squares / max(1, len(values) - len(groups))


def possible(before: dict, prompts: list[str], beta: float) -> dict:
    """Returns beta, the limit and J_before; and as `why`, if it can't be told how far a run gets, the reason."""
    if beta == 0:
        return {"why": "the KL coefficient is 0, so KL has no price; try --kl_budget 0.4"}
    rewards, prompt_index = scores_and_prompts(before, prompts)
    best, n, n_prompts = gibbs_policy(rewards, prompt_index, beta), len(rewards), len(prompt_index.unique())
    result = {"beta": beta, "limit": best, "J_before": rewards.mean().item()}
    m, effective = n / n_prompts, best["effective_samples"]
    if (differing := n_differing(rewards, prompt_index)) < FEWEST:
        why = f"nothing to learn: only {differing} of {n:,} rewards differ from the others of their prompt"
    elif (chance := before.get("noise", 0)) > NOISY:
        why = f"{chance:.0%} of the rewards' variance is chance, as scoring the same texts twice shows"
    elif m >= 20 and effective < max(FEW, 5 * n_prompts) and effective * m / n < max(2, m / 100):
        why = "at this KL coefficient the best policy writes a handful of texts; try --kl_budget 0.4"
    elif best["J"] - result["J_before"] < LITTLE * math.sqrt(variance_within(rewards, prompt_index)):
        why = "at this KL coefficient hardly any KL is worth it; try --kl_budget 0.4"
    else:
        return result
    return result | {"why": why}


def n_differing(rewards: torch.Tensor, prompt_index: torch.Tensor) -> int:
    """Returns how many rewards (n,) are not the commonest of their prompt."""
    groups = [rewards[prompt_index == i].tolist() for i in prompt_index.unique()]
    return sum(len(group) - Counter(group).most_common(1)[0][1] for group in groups)


def gain(before: dict, after: dict, prompts: list[str], beta: float) -> dict:
    """Returns the share of the possible gain that `after` got, with its standard error; None and why if unknown.

    The standard error is that of (J - J_ref) / (J* - J_ref) to first order in the errors of all three, for these
    prompts. It covers only the sampling of the evaluation: runs with other seeds differ, too.
    """
    result = possible(before, prompts, beta)
    if beta == 0:
        return {"gain": None, **result}
    best, (rewards, prompt_index) = result["limit"], scores_and_prompts(before, prompts)
    ratios, result["J"] = best.pop("ratios"), after["reward"] - beta * after["kl"]
    least = max(FEW, 5 * len(prompt_index.unique()))
    if "why" not in result and best["effective_samples"] < least:
        needed = 2 ** math.ceil(math.log2(2 * len(rewards) * least / best["effective_samples"]))
        result |= {"why": "too few samples", "samples_needed": needed}
    if "why" in result:
        return {"gain": None, **result}
    way = best["J"] - result["J_before"]
    share = (result["J"] - result["J_before"]) / way
    of_after = torch.tensor([s for *_, s in after["samples"]]) - beta * torch.tensor(after["kls"])
    of_before = (1 - share) * rewards + share * beta * ratios
    values = (of_after, scores_and_prompts(after, prompts)[1]), (of_before, prompt_index)
    variance = sum(variance_within(value, index) / len(value) for value, index in values)
    return {**result, "gain": share, "gain_se": math.sqrt(variance) / way}


def frontier(before: dict, prompts: list[str]) -> list[dict]:
    """Returns (beta, reward, kl) of the Gibbs policies over a range of beta, as far as there are samples for it."""
    rewards, prompt_index = scores_and_prompts(before, prompts)
    deviation = math.sqrt(variance_within(rewards, prompt_index))
    betas = [beta * deviation for beta in BETAS if deviation > 0]
    points = [{"beta": beta, **gibbs_policy(rewards, prompt_index, beta)} for beta in betas]
    least = max(20, 5 * len(prompt_index.unique()))
    return [{name: p[name] for name in ("beta", "reward", "kl")} for p in points if p["effective_samples"] >= least]


def best_of_n(results: dict, prompts: list[str], n: int) -> dict:
    """Returns what drawing n completions of the reference and keeping the best would give, without any training.

    reward: the expected best of n different samples of a prompt, a mean over prompts. Of m rewards in ascending order,
    the i-th is the best of C(i - 1, n - 1) of the C(m, n) choices. kl: log n - (n - 1) / n, an upper bound (Beirami et
    al. 2024, arXiv:2401.01879). gain: as for a trained model, so a lower bound; None if that of the run is unknown.
    """
    rewards, prompt_index = scores_and_prompts(results["before"], prompts)
    best = []
    for i in prompt_index.unique():
        ordered = rewards[prompt_index == i].sort().values
        m = len(ordered)
        ways = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)
        best.append((ways * ordered).sum())
    reward, kl = torch.stack(best).mean().item(), math.log(n) - (n - 1) / n
    run, share = results["gain"], None
    if run["gain"] is not None:
        share = (reward - run["beta"] * kl - run["J_before"]) / (run["limit"]["J"] - run["J_before"])
    return {"n": n, "reward": reward, "kl": kl, "gain": share}


def add_yardsticks(results: dict, prompts: list[str], beta: float) -> None:
    """Put next to "before" and "after" what they are measured against: the gain, the frontier, and best-of-n."""
    results["gain"] = gain(results["before"], results["after"], prompts, beta)
    results["frontier"] = frontier(results["before"], prompts)
    fewest = min(Counter(prompt for prompt, *_ in results["before"]["samples"]).values())
    results["best_of_n"] = [best_of_n(results, prompts, n) for n in (2, 3, 4, 8) if n <= fewest]


def verdict(results: dict, config) -> str:
    """Returns what kind of run this was and the flag to change, in one sentence; the rewards' unit doesn't matter."""
    after, result = results["after"], results["gain"]
    if (share := result["gain"]) is None:
        more = f"judge again by more samples, with --eval_only and --eval_samples {result.get('samples_needed')}"
        return f"gain unknown: {more if 'samples_needed' in result else result['why']}"
    kl, limit, error = after["kl"], result["limit"], result["gain_se"]
    got, spent = f"{share:.0%} of what is possible", f"KL {kl:.2g} where {limit['kl']:.2g} is worth it"
    calmer = "a lower --lr" if config.minibatch_size == config.batch_size else f"--minibatch_size {config.batch_size}"
    collapsed = after["unique"] < results["before"]["unique"] / 2
    if kl < UNMOVED * limit["kl"]:
        return f"unmoved: {spent}; try a higher --lr"
    if kl > FAR * limit["kl"] and (after["reward"] > limit["reward"] or collapsed):
        return f"hacked: {spent}; try {calmer if share < GOOD else 'a higher --init_kl_coef'}"
    if error > UNSURE and abs(share - GOOD) < 2 * error:
        needed = 2 ** math.ceil(math.log2(len(after["samples"]) * (2 * error / UNSURE) ** 2))
        return f"good or short, which these samples cannot tell: --eval_only with --eval_samples {needed} would"
    if share >= GOOD:
        return f"good: {got}"
    bought = after["reward"] - result["J_before"]
    buyable = min(point["reward"] + point["beta"] * (kl - point["kl"]) for point in results["frontier"])
    luck = 2 * error * (limit["J"] - result["J_before"])
    if kl > CLOSE * limit["kl"] or bought + luck < 0.5 * (buyable - result["J_before"]):
        return f"wasted KL: {spent}; try {calmer}"
    return f"short: {got}; go on with more --episodes"


ROWS = [  # of the table of results: (what, key, format; None for the rewards' own)
    ("mean reward", "reward", None),
    ("95% interval, plus or minus", "reward_ci95", None),
    ("KL to the reference, nats", "kl", ".3f"),
    ("distinct-1, characters", "distinct_1", ".3f"),
    ("distinct-2, pairs of characters", "distinct_2", ".3f"),
    ("unique completions", "unique", ".1%"),
    ("mean length, tokens", "length", ".1f"),
    ("ended by SEP", "ended", ".1%"),
    ("log-probability a token, reference", "ref_logprob", ".2f"),
]


def results_table(evaluation: dict) -> str:
    """Returns the figures before and after training and those of the limit as a Markdown table."""
    before, after, result = evaluation["before"], evaluation["after"], evaluation["gain"]
    limit = result["limit"] if result["gain"] is not None else {}
    in_rewards = f".{decimals(statistics.pstdev(score for *_, score in before['samples']), 3)}f"
    rows = [(what, form or in_rewards, before[key], after[key], limit.get(key)) for what, key, form in ROWS]
    if "J" in result:
        what = f"J = reward - {result['beta']:.3g} KL"
        rows.append((what, in_rewards, result["J_before"], result["J"], limit.get("J")))
    cells = [[what, *("" if value is None else f"{value:{form}}" for value in values)] for what, form, *values in rows]
    if limit:
        cells.append(["gain", "0", f"{result['gain']:.2f} (standard error {result['gain_se']:.2f})", "1"])
    return table(["", "before", "after", "the limit"], cells)


def before_after_table(evaluation: dict, shown: int = SHOWN) -> str:
    """Returns the first completions before and after training, of the same random draws, as a Markdown table."""
    before, after = (evaluation[when]["samples"] for when in ("before", "after"))
    form = f".{decimals(statistics.pstdev(score for *_, score in before))}f"
    pairs = zip(before[:shown], after)
    rows = [[prompt, old, f"{was:{form}}", new, f"{now:{form}}"] for (prompt, old, was), (_, new, now) in pairs]
    return table(["prompt", "before", "score", "after", "score"], rows)


def without_samples(evaluation: dict) -> dict:
    """Returns an evaluation without its samples, what matters most first."""
    found = {"verdict": evaluation["verdict"], "gain": evaluation["gain"], **evaluation}
    for when in ("before", "after"):
        found[when] = {name: value for name, value in evaluation[when].items() if name not in ("samples", "kls")}
    return found


def read(run_dir: Path, prompts: list[str]) -> dict:
    """Returns a run's evaluation.json, {} if there is none. Raises UserError if it is damaged or of other prompts."""
    path, remedy = run_dir / "evaluation.json", "remove it: --resume makes it again"
    results = read_json(path, remedy, missing={})
    with damaged(path, remedy):
        if results:
            scores_and_prompts(results["before"], prompts)
    return results


def write_json(path: Path, evaluation: dict) -> None:
    write_whole(path, json.dumps(evaluation, ensure_ascii=False, indent=1) + "\n")
