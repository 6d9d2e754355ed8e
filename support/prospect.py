"""What a run can expect, from completions of the model before training and their scores: how far its KL coefficient
lets the best possible policy go; and the coefficient for a distance that one is ready to pay."""

import math
from collections import Counter

import torch

from support.alarms import FAR
from support.errors import UserError
from support.evaluation import LITTLE, NOISY, gibbs_policy, scores_and_prompts

USUAL_BUDGET = 0.4  # nats a completion: where the best policy of the article's job lies
FEWEST = 10  # scores that differ from the rest: a coefficient that rests on fewer is chance


def kl_coef_for(rewards: torch.Tensor, prompt_index: torch.Tensor, kl_budget: float) -> float:
    """The KL coefficient at which the Gibbs policy lies `kl_budget` nats a completion from the reference.

    rewards (n,) of the reference's samples, prompt_index (n,) which prompt each continues. Found by bisection: the
    higher the coefficient, the nearer the policy. UserError where there is none, or fewer than FEWEST scores differ.
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


def what_a_budget_takes(rewards: torch.Tensor, prompt_index: torch.Tensor) -> str:
    """The way out of a coefficient that is none: that of USUAL_BUDGET, where there is one."""
    try:
        return f"--kl_budget {USUAL_BUDGET:g} would take {kl_coef_for(rewards, prompt_index, USUAL_BUDGET):.3g}"
    except UserError:
        return "try another"


def n_differing(rewards: torch.Tensor, prompt_index: torch.Tensor) -> int:
    """How many rewards (n,) are not the commonest of their prompt."""
    groups = [rewards[prompt_index == i].tolist() for i in prompt_index.unique()]
    return sum(len(group) - Counter(group).most_common(1)[0][1] for group in groups)


def prospect(before: dict, prompts: list[str], kl_coef: float) -> list[str]:
    """Lines about what is possible at this KL coefficient, and warnings where that is not what anybody wants.

    before: how the policy before training was judged, see `evaluate`.
    """
    rewards, prompt_index = scores_and_prompts(before, prompts)
    n, mean, deviation = len(rewards), rewards.mean().item(), rewards.std(correction=0).item()
    if (differing := n_differing(rewards, prompt_index)) < FEWEST:
        few = f"{differing} of {n:,} completions before training differ in score from the rest" if differing else ""
        none = f"all {n:,} completions before training have the same score as others of their prompt"
        return [f"warning: {few or none}: there is nothing, or next to nothing, to learn from"]
    if (noise := before.get("noise", 0)) > NOISY:
        told = f"{noise:.0%} of the scores' variance is chance: texts that were scored twice got different scores"
        unknown = "the policy may still learn, but what is possible is unknown, and --kl_budget finds too high a price"
        return [f"warning: {told}; {unknown}: a mean of several scores of a text helps"]
    if kl_coef == 0:
        budget = what_a_budget_takes(rewards, prompt_index)
        return [f"warning: at --init_kl_coef 0 nothing keeps the policy near the language; {budget}"]
    best = gibbs_policy(rewards, prompt_index, kl_coef)
    possible = f"at a KL coefficient of {kl_coef:.3g} the best possible policy"
    if best["kl"] > FAR:
        carried = f"{max(1, round(best['effective_samples'])):,} of {n:,} samples carry it"
        told = f"{possible} lies {best['kl']:.3g} nats away ({carried}): expect collapse"
        lines = [f"warning: {told}; {what_a_budget_takes(rewards, prompt_index)}"]
    elif best["J"] - mean < LITTLE * deviation:
        told = f"{possible} gets {best['reward']:.3g} where there is {mean:.3g} now: too dear"
        lines = [f"warning: {told}; {what_a_budget_takes(rewards, prompt_index)}"]
    else:
        lines = [f"{possible} gets a reward of {best['reward']:.3g} at KL {best['kl']:.2g}; now it is {mean:.3g}"]
    flat = [i for i in prompt_index.unique() if rewards[prompt_index == i].std(correction=0) < 0.01 * deviation]
    if flat:
        which = f"{len(flat)} of {len(prompts)} prompts, as {prompts[flat[0]]!r}"
        lines.append(f"warning: whatever follows {which}, gets much the same score: they teach nothing")
    return lines
