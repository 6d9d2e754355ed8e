"""What a run can expect, from scored completions of the model before training, and the KL coefficient for a budget."""

import math

import torch

from support.alarms import FAR
from support.errors import UserError
from support.evaluation import FEWEST, gibbs_policy, n_differing, possible, scores_and_prompts


def kl_coef_for(rewards: torch.Tensor, prompt_index: torch.Tensor, kl_budget: float) -> float:
    """Returns the KL coefficient at which the Gibbs policy is `kl_budget` nats per completion from the reference, found
    by bisection. Raises UserError if there is none, or if fewer than FEWEST rewards differ.

    rewards (n,) of the reference's samples, prompt_index (n,) of each one's prompt.
    """
    if (differing := n_differing(rewards, prompt_index)) < FEWEST:
        told = f"of {len(rewards):,} completions before training {differing} differ in score from the rest"
        raise UserError(f"--kl_budget: {told}, and {FEWEST} must; raise --eval_samples, or reward what texts do have")
    scale = rewards.double().std().item()
    low, high = math.log(scale / 1000), math.log(scale * 1000)
    farthest = gibbs_policy(rewards, prompt_index, math.exp(low))["kl"]
    if farthest <= kl_budget:
        most = f"the best possible policy is at most {farthest:.2f} nats away, whatever the coefficient"
        raise UserError(f"--kl_budget {kl_budget:g} is more than these scores can use: {most}; give less than that")
    for _ in range(50):
        middle = (low + high) / 2
        farther = gibbs_policy(rewards, prompt_index, math.exp(middle))["kl"] > kl_budget
        low, high = (middle, high) if farther else (low, middle)
    return math.exp(high)


def prospect(before: dict, prompts: list[str], kl_coef: float) -> list[str]:
    """Returns lines about what is possible at this KL coefficient, and warnings. before: see `evaluate`."""
    rewards, prompt_index = scores_and_prompts(before, prompts)
    found, lines = possible(before, prompts, kl_coef), []
    if best := found.get("limit"):
        told = f"the best possible policy gets a reward of {best['reward']:.3g} at KL {best['kl']:.2g}"
        lines.append(f"at a KL coefficient of {kl_coef:.3g} {told}; now it is {rewards.mean().item():.3g}")
    if "why" in found:
        return [*lines, f"warning: {found['why']}"]
    if best["kl"] > FAR:
        lines.append(f"warning: a KL of {best['kl']:.2g} nats is far away: expect collapse; try --kl_budget 0.4")
    little = 0.01 * rewards.std(correction=0).item()
    if flat := [i for i in prompt_index.unique() if rewards[prompt_index == i].std(correction=0) < little]:
        which = f"{len(flat)} of {len(prompts)} prompts, for example {prompts[flat[0]]!r}"
        lines.append(f"warning: whatever follows {which}, gets much the same score: they teach nothing")
    return lines
