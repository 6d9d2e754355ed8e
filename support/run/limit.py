"""The best policy that a KL coefficient allows, and how much of the possible gain another policy got.

PPO maximises J = R - beta * KL: mean reward minus the KL coefficient times the KL to the reference, per completion.
The best policy for that is the Gibbs policy, proportional to ref * exp(r / beta) (Ziegler et al. 2019, section 2;
Korbak et al. 2022, arXiv:2205.11275). Its R*, KL* and J* can be estimated from rewards of the reference's samples:

    gain = (J - J_ref) / (J* - J_ref)        1 is the limit, 0 means no gain, below 0 the run did harm

In all functions, rewards (n,) are those of the reference's samples, and prompt_index (n,) int64 has their prompts.
"""

import math
from collections import Counter

import torch
from torch.nn.utils.rnn import pad_sequence

from support.common.errors import UserError

BETAS = [0.15 * 1.25**i for i in range(22)]  # of the frontier, up to 16, in standard deviations of the rewards
FEW = 100  # effective samples that a limit needs; for the jackknife also at least 5 per prompt
FEWEST = 10  # rewards that differ from the others of their prompt; with fewer, a result may be chance
LITTLE = 0.03  # possible gain in J, in standard deviations of the rewards: the noise of J with a thousand samples
NOISY = 0.02  # random share of the rewards' variance; above it, the limit is over a tenth too far away


def by_prompt(values: torch.Tensor, prompt_index: torch.Tensor) -> list[torch.Tensor]:
    """Split values (n,) by their prompt."""
    return [values[prompt_index == i] for i in prompt_index.unique()]


def gibbs_policy(rewards: torch.Tensor, prompt_index: torch.Tensor, beta: float) -> dict:
    """Estimate R*, KL* and J* of the Gibbs policy.

    For each prompt's m samples, weights w_i proportional to exp(r_i / beta), R* = sum w_i r_i and
    J* = beta log mean exp(r_i / beta). The jackknife (Quenouille 1956) removes their bias of order 1 / m: it leaves out
    one sample at a time, with a weight of 1/2 at most. R* and J* are averaged over the samples; KL* = (R* - J*) / beta.
    `ratios` (n,) float64, m w_i, are the Gibbs policy's probabilities divided by the reference's. `effective_samples`
    is n / mean (m w_i)^2, the number of samples on which the estimate rests.
    """
    groups = by_prompt(torch.arange(len(rewards)), prompt_index)
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


def variance_within(values: torch.Tensor, prompt_index: torch.Tensor) -> float:
    """Return the variance of values (n,) around their prompt's mean; exactly 0 if those of each prompt are equal."""
    groups = [group.double() for group in by_prompt(values, prompt_index)]
    squares = sum((group - group.mean()).square().sum().item() for group in groups if group.min() < group.max())
    return squares / max(1, len(values) - len(groups))


def n_differing(rewards: torch.Tensor, prompt_index: torch.Tensor) -> int:
    """Return how many rewards are not the commonest of their prompt."""
    groups = by_prompt(rewards, prompt_index)
    return sum(len(group) - Counter(group.tolist()).most_common(1)[0][1] for group in groups)


def possible(before, beta: float) -> dict:
    """Return beta, the limit and J_before; also `why`, a reason, if no gain can be measured.

    before: an Evaluation.
    """
    if beta == 0:
        return {"why": before.unsteady or "the KL coefficient is 0, so KL has no price; try --kl_budget 0.4"}
    rewards, prompt_index = before.rewards()
    best, n, n_prompts = gibbs_policy(rewards, prompt_index, beta), len(rewards), len(prompt_index.unique())
    result = {"beta": beta, "limit": best, "J_before": rewards.mean().item()}
    m, effective = n / n_prompts, best["effective_samples"]
    if before.unsteady:
        why = before.unsteady
    elif (differing := n_differing(rewards, prompt_index)) < FEWEST:
        why = f"nothing to learn: only {differing} of {n:,} rewards differ from the others of their prompt"
    elif before.noise > NOISY:
        why = f"{before.noise:.0%} of the rewards' variance is noise, as scoring the same texts twice shows"
    elif m >= 20 and effective < max(FEW, 5 * n_prompts) and effective * m / n < max(2, m / 100):
        why = "at this KL coefficient the best policy writes only a handful of texts; try --kl_budget 0.4"
    elif best["J"] - result["J_before"] < LITTLE * math.sqrt(variance_within(rewards, prompt_index)):
        why = "at this KL coefficient the best policy is hardly better than the reference; try --kl_budget 0.4"
    else:
        return result
    return result | {"why": why}


def gain(before, after, beta: float) -> dict:
    """Return the share of the possible gain that `after` got, with its standard error; if unknown, None and why.

    before, after: Evaluations. The standard error is that of (J - J_ref) / (J* - J_ref) to first order in the errors of
    all three, for these prompts. It covers only the sampling of the evaluation: runs with other seeds differ, too.
    """
    (rewards, prompt_index), (rewards_after, prompt_index_after) = before.rewards(), after.rewards()
    result = possible(before, beta)
    if after.unsteady and not before.unsteady:
        result["why"] = after.unsteady
    if beta == 0:
        return {"gain": None, **result}
    best = result["limit"]
    ratios, result["J"] = best.pop("ratios"), after.reward - beta * after.kl
    least = max(FEW, 5 * len(prompt_index.unique()))
    if "why" not in result and best["effective_samples"] < least:
        needed = 2 ** math.ceil(math.log2(2 * len(rewards) * least / best["effective_samples"]))
        result |= {"why": "the effective sample size is too small to estimate the limit", "samples_needed": needed}
    if "why" in result:
        return {"gain": None, **result}
    way = best["J"] - result["J_before"]
    share = (result["J"] - result["J_before"]) / way
    of_after = rewards_after.float() - beta * torch.tensor(after.kls)
    of_before = (1 - share) * rewards + share * beta * ratios
    values = (of_after, prompt_index_after), (of_before, prompt_index)
    variance = sum(variance_within(value, index) / len(value) for value, index in values)
    return {**result, "gain": share, "gain_se": math.sqrt(variance) / way}


def frontier(rewards: torch.Tensor, prompt_index: torch.Tensor) -> list[dict]:
    """Return (beta, reward, kl) of the Gibbs policies over a range of beta, as far as there are samples for it."""
    deviation = math.sqrt(variance_within(rewards, prompt_index))
    betas = [beta * deviation for beta in BETAS if deviation > 0]
    points = [{"beta": beta, **gibbs_policy(rewards, prompt_index, beta)} for beta in betas]
    least = max(20, 5 * len(prompt_index.unique()))
    return [{name: p[name] for name in ("beta", "reward", "kl")} for p in points if p["effective_samples"] >= least]


def best_of_n(rewards: torch.Tensor, prompt_index: torch.Tensor, n: int, of_run: dict) -> dict:
    """Return what drawing n completions of the reference and keeping the best would give, without any training.

    reward: the expected best of n different samples of a prompt, a mean over prompts. Among m rewards in ascending
    order, the i-th is the best in C(i - 1, n - 1) of the C(m, n) choices. kl: log n - (n - 1) / n, an upper bound
    (Beirami et al. 2024, arXiv:2401.01879). gain: as for a trained model, so a lower bound; None if `of_run` has none.
    """
    best = []
    for group in by_prompt(rewards, prompt_index):
        m = len(group)
        ways = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)
        best.append((ways * group.sort().values).sum())
    reward, kl, share = torch.stack(best).mean().item(), math.log(n) - (n - 1) / n, None
    if of_run["gain"] is not None:
        share = (reward - of_run["beta"] * kl - of_run["J_before"]) / (of_run["limit"]["J"] - of_run["J_before"])
    return {"n": n, "reward": reward, "kl": kl, "gain": share}


def kl_coef_for(rewards: torch.Tensor, prompt_index: torch.Tensor, kl_budget: float) -> float:
    """Return the KL coefficient at which the Gibbs policy is `kl_budget` nats per completion from the reference, found
    by bisection. Raises UserError if there is none, or if fewer than FEWEST rewards differ."""
    if (differing := n_differing(rewards, prompt_index)) < FEWEST:
        told = f"{FEWEST} scores before training must differ from the rest, but only {differing} of {len(rewards):,} do"
        raise UserError(f"--kl_budget: {told}; raise --eval_samples, or use a reward that varies more")
    scale = rewards.double().std().item()
    low, high = math.log(scale / 1000), math.log(scale * 1000)
    farthest = gibbs_policy(rewards, prompt_index, math.exp(low))["kl"]
    if farthest <= kl_budget:
        most = f"at any coefficient, the best possible policy is at most {farthest:.2f} nats from the reference"
        raise UserError(f"--kl_budget {kl_budget:g} is too high for these scores: {most}; give less than that")
    for _ in range(50):
        middle = (low + high) / 2
        farther = gibbs_policy(rewards, prompt_index, math.exp(middle))["kl"] > kl_budget
        low, high = (middle, high) if farther else (low, middle)
    return math.exp(high)
