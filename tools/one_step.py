"""Recompute the numbers of docs/one_step.md: a PPO step of the demo, token by token.

    python -m tools.one_step

Every number comes from the trainer or from a function of ppo.py. On another machine the demo's models may
differ, and so may the texts and numbers. tests/test_one_step.py checks what docs/one_step.md says about its numbers.
"""

import argparse
import math
from dataclasses import dataclass

import torch

import ppo
from config import PPOConfig
from ppo import PPOTrainer
from support.models.pretrained import decode
from support.run.load import load

WARM_UP = 3  # ordinary steps first, so that policy and reference differ; a quarter of the batch is still unhappy


@dataclass
class Step:
    """A PPO step with all intermediate values: float32 tensors (n,) and (n, T) on the CPU, named as on the page.

    tokens: the tokens of each completion, as text. Rewards and values are in the unit of the scores; the trainer's unit
    is `unit` times that. logprobs, values and ratios: at the start of each epoch and, last, after the step. stats: what
    `PPOTrainer.step` returned.
    """

    tokens: list[list[str]]
    mask: torch.Tensor
    scores: torch.Tensor
    unit: float
    ref_logprobs: torch.Tensor
    penalties: torch.Tensor
    rewards: torch.Tensor
    deltas: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    whitened: torch.Tensor
    logprobs: list[torch.Tensor]
    values: list[torch.Tensor]
    ratios: list[torch.Tensor]
    stats: dict[str, float]


def demo_config() -> PPOConfig:
    """Return the demo's settings, with the lambda of the preset `default`."""
    return PPOConfig(preset="demo", lam=1.0, seed=7, device="cpu")


def take_step(config: PPOConfig) -> Step:
    """Take WARM_UP ordinary steps, then one whose intermediate values are recorded."""
    policy, tokenizer, reward, (prompt,), queries, reference = load(config)
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    queries = queries * config.batch_size
    for step in range(WARM_UP + 1):
        batch = trainer.generate(queries)
        texts = [prompt + text for text in decode(tokenizer, batch.token_lists())]
        scores = reward.score(texts, [0] * len(texts)) @ reward.weights
        if step < WARM_UP:
            trainer.step(batch, scores)

    zero_grad, seen = trainer.engine.zero_grad, []

    def zero_grad_watched():  # called at the start of each optimiser step; an epoch has only one
        seen.append(trainer.forward_pass(batch, trainer.model, ppo.logprobs_from_logits))
        zero_grad()

    trainer.engine.zero_grad = zero_grad_watched
    ref_logprobs, _ = trainer.forward_pass(batch, trainer.ref_model, ppo.logprobs_from_logits)
    kl_coef, stats = trainer.kl_controller.value, trainer.step(batch, scores)
    seen.append(trainer.forward_pass(batch, trainer.model, ppo.logprobs_from_logits))

    mask, mean, unit = batch.mask, trainer.reward_mean, trainer.reward_unit
    logprobs, values = [new[0] for new in seen], [mean + unit * new[1] for new in seen]
    rewards, penalties = ppo.compute_rewards(scores, logprobs[0], ref_logprobs, mask, kl_coef)
    advantages, returns = ppo.compute_advantages(values[0], rewards, mask, config.gamma, config.lam)
    deltas, _ = ppo.compute_advantages(values[0], rewards, mask, config.gamma, lam=0)  # an advantage is then a delta
    whitened = ppo.whiten(advantages, mask)
    ratios = [(new - logprobs[0]).where(mask, 0).exp() for new in logprobs]
    return Step(
        [tokenizer.convert_ids_to_tokens(ids) for ids in batch.token_lists()], mask, scores, unit, ref_logprobs,
        penalties, rewards, deltas, advantages, returns, whitened, logprobs, values, ratios, stats,
    )  # fmt: skip


def happy_and_unhappy(step: Step, cliprange: float) -> dict[str, int]:
    """Return the row of the shortest completion with a score above 0.9 that the step made more probable, and of the
    shortest with a score below 0.1 that it made less probable. Prefers those with a token clipped in the last epoch."""
    products, last = step.ratios[-1].prod(1), step.ratios[-2]

    def shortest(chosen, clipped):
        return min(chosen.nonzero().flatten().tolist(), key=lambda i: (not clipped[i].any(), len(step.tokens[i])))

    return {
        "happy": shortest((step.scores > 0.9) & (products > 1), (last > 1 + cliprange) & (step.whitened > 0)),
        "unhappy": shortest((step.scores < 0.1) & (products < 1), (last < 1 - cliprange) & (step.whitened < 0)),
    }


def columns(step: Step) -> dict[str, torch.Tensor]:
    """Return the columns of the page's token tables, (n, T) each."""
    of_epochs = {f"ratio {k}": ratios for k, ratios in enumerate(step.ratios[:-1], 1)}
    return {
        "log pi_old": step.logprobs[0], "log pi_ref": step.ref_logprobs, "penalty": step.penalties,
        "reward": step.rewards, "V": step.values[0], "delta": step.deltas, "A": step.advantages, "G": step.returns,
        "whitened": step.whitened, "pi_old": step.logprobs[0].exp(), "pi after": step.logprobs[-1].exp(),
        **of_epochs, "ratio after": step.ratios[-1],
    }  # fmt: skip


def of_batch(step: Step, config: PPOConfig) -> dict[str, float]:
    """Return the page's numbers about the whole batch. Losses are in the trainer's unit."""
    mask, scores, n = step.mask, step.scores, len(step.scores)
    log_ratios, products = (step.logprobs[0] - step.ref_logprobs).where(mask, 0).sum(1), step.ratios[-1].prod(1)
    happy, unhappy, ratios = scores > 0.9, scores < 0.1, step.ratios[-1]
    high, low = ratios > 1 + config.cliprange, ratios < 1 - config.cliprange
    against = high & (step.whitened < 0) | low & (step.whitened > 0)
    adaptive = ppo.AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
    adaptive.update(log_ratios.mean().item(), n)
    found = {
        "mean score": scores.mean(), "happy": happy.sum(), "unhappy": unhappy.sum(),
        "negative log-ratios": (log_ratios < 0).sum(), "KL": log_ratios.mean(),
        "standard error of the KL": log_ratios.std() / math.sqrt(n), "mean V": ppo.masked_mean(step.values[0], mask),
        "mean G": ppo.masked_mean(step.returns, mask), "mean A": ppo.masked_mean(step.advantages, mask),
        "tokens": mask.sum(), "happy that rose": (happy & (products > 1)).sum(),
        "mean product of the happy": products[happy].mean(), "unhappy that fell": (unhappy & (products < 1)).sum(),
        "mean product of the unhappy": products[unhappy].mean(), "ratios beyond the limits": (high | low).sum(),
        "of them not clipped": against.sum(), "reward unit": step.unit, "first V": step.values[0][:, 0].mean(),
        "first V after": step.values[-1][:, 0].mean(), "mean first G": step.returns[:, 0].mean(),
        "next beta, adaptive": adaptive.value,
    }  # fmt: skip
    old_values, returns = step.values[0] / step.unit, step.returns / step.unit
    for k, (logprobs, values) in enumerate(zip(step.logprobs[:-1], step.values), 1):
        policy, clipped = ppo.policy_loss(logprobs, step.logprobs[0], step.whitened, mask, config.cliprange)
        value, _ = ppo.value_loss(values / step.unit, old_values, returns, mask, config.cliprange_value)
        total = policy + config.vf_coef * value
        found |= {
            f"policy loss {k}": policy,
            f"value loss {k}": value,
            f"total loss {k}": total,
            f"clipped {k}": clipped,
        }
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    config = demo_config()
    step = take_step(config)
    shown = columns(step)
    for name, i in happy_and_unhappy(step, config.cliprange).items():
        print(
            f"\n{name}: {''.join(step.tokens[i])}, score {step.scores[i]:.3f}\n\n| token | " + " | ".join(shown) + " |"
        )
        for t, token in enumerate(step.tokens[i]):
            print(f"| {token} | " + " | ".join(f"{column[i, t]:.3f}" for column in shown.values()) + " |")
    print()
    for name, value in of_batch(step, config).items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
