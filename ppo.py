"""Proximal policy optimisation for a language model: the mathematics first, then the trainer that uses it.

These points differ from textbook PPO, the article's code or both (docs/settings.md says what each is worth):

 1. An action is one token. The score arrives at a completion's last token and is credited to all of its tokens.
 2. Each token pays a KL penalty. Without it, the policy would end up repeating a few positive words.
 3. Advantages are whitened over the whole batch. Whitening within each completion would erase how good it is.
 4. Lambda is 1. Otherwise early tokens would rely on the value head to predict the final score, which it does poorly.
    (It is 0.95 in the demo, where the value head does better.)
 5. A minibatch is the whole batch by default (128 completions). Many noisy steps cost KL but bring little reward.
 6. The value head has its own learning rate, and its gradient doesn't reach the transformer, which it would disturb
    if there were many small minibatches.
 7. The lower blocks are frozen and shared by policy and reference: half the work for the same gain.
 8. Old log-probabilities come from the same code as the new ones, not from sampling, so each ratio starts at exactly 1.
 9. The KL coefficient is fixed. A controller would only lower it, as KL stays far below the usual target of 6 nats.
10. The saved policy is an average of the weights over the steps, which removes the noise of single steps.
11. Adam's epsilon is 1e-5. With 1e-8, weights whose gradient is only rounding error move as fast as all others.
12. An optimiser step is skipped and counted if its gradient isn't finite.
13. Scores are centred on each batch's mean and scaled by the first batch's standard deviation. So scores from 0 to 1,
    from 0 to 10,000 or from 80 to 90 train the same way, if kl_coef is scaled with them.

Shapes: n completions, T tokens (completions are right-padded to the longest), V vocabulary entries. A mask is True
or 1 at a completion's real tokens, including its final [SEP], and 0 at the padding. Logits and values at t depend on
the prompt and the tokens before t: the logits predict token t, the values predict the reward from token t on.

Sources, by the names used below:
    PPO       Schulman et al. 2017, "Proximal policy optimization algorithms", arXiv:1707.06347
    GAE       Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation",
              arXiv:1506.02438
    Ziegler   Ziegler et al. 2019, "Fine-tuning language models from human preferences", arXiv:1909.08593, and its
              code, lm-human-preferences
"""

from dataclasses import dataclass

import numpy as np
import torch

from support.compute.batches import Completions, select_rows, to_device
from support.compute.engine import Engine

# ----------------------------------------------------------------------------------------------
# Probabilities


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[label]. logits (..., V), labels (...) int64 -> (...), in nats."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def logprobs_and_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return log softmax(logits)[label] and the entropy -sum p log p (0 log 0 = 0), in nats, stacked: (2, ...)."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs.where(logprobs > float("-inf"), 0)).sum(-1)
    return torch.stack([logprobs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy])


def kl_from_logits(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """Return sum p (log p - log q) with p = softmax(logits), q = softmax(ref_logits), in nats. Two (..., V) -> (...).

    Tokens of probability 0 under p add nothing.
    """
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    difference = (logprobs - ref_logprobs).where(logprobs > float("-inf"), 0)
    return (logprobs.exp() * difference).sum(-1)


# ----------------------------------------------------------------------------------------------
# Masked statistics


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of the entries whose mask is 1, a scalar. Both have the same shape; other entries may be NaN."""
    return values.where(mask.bool(), 0).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """Return (values - mean) / sqrt(variance + 1e-8) over all entries of the batch whose mask is 1, 0 at the others.

    The variance is the biased one. With shift_mean=False the mean is added back.
    """
    values = values.where(mask.bool(), 0)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).where(mask.bool(), 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return 1 - variance(returns - values) / variance(returns) over all real tokens: 1 is perfect, 0 is useless.

    Returns 0 if all returns are equal.
    """

    def variance(x):
        x = x.where(mask.bool(), 0)
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    unexplained = variance(returns - values) / variance(returns)
    return (1 - unexplained).where(variance(returns) > 0, 0)


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


SPREAD = 0.4  # about the spread of the article's scores, for which cliprange_value, vf_coef and value_lr were chosen


def pick_reward_unit(scores: torch.Tensor, kl_coef: float) -> float:
    """Return the unit in which the scores (n,) of the first batch have a standard deviation of SPREAD (like Ziegler,
    section 2.1). If the scores barely differ (std below kl_coef / 100, or below float32's rounding, 1e-7 of the mean),
    dividing by their std would amplify noise, so kl_coef takes its place; if that is 0, the unit is 1."""
    scores = scores.double().cpu()
    spread, rounding = scores.std(correction=0).item(), 1e-7 * scores.mean().abs().item()
    return (spread if spread > max(kl_coef / 100, rounding) else kl_coef) / SPREAD or 1.0


def compute_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute each token's reward: the KL penalty, plus the score at the last real token (Ziegler, section 2.2).

        kl_penalties[t] = -kl_coef * (logprobs[t] - ref_logprobs[t])

    scores (n,), the others (n, T). Returns (token_rewards, kl_penalties), each (n, T), 0 at the padding.
    """
    kl_penalties = (-kl_coef * (logprobs - ref_logprobs)).where(mask.bool(), 0)
    last = mask.long().sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    token_rewards = kl_penalties.clone()
    token_rewards[rows, last] += scores.to(token_rewards.dtype)
    return token_rewards, kl_penalties


def compute_advantages(
    values: torch.Tensor, token_rewards: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute advantages (GAE, equation 16) and returns, which the values should learn to predict.

        delta[t]     = token_rewards[t] + gamma * values[t + 1] - values[t]
        advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
        return[t]    = advantage[t] + values[t]

    After a completion's last real token, value and advantage are 0. All (n, T), 0 at the padding.
    """
    values = values.where(mask.bool(), 0)
    token_rewards = token_rewards.where(mask.bool(), 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = delta + gamma * lam * next_advantage
        next_value, next_advantage = values[:, t], advantages[:, t]
    return advantages, advantages + values


# ----------------------------------------------------------------------------------------------
# Losses


def policy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the clipped surrogate objective (PPO, equation 7), negated, as a mean over tokens.

        ratio = exp(logprobs - old_logprobs)
        loss  = mean max(-advantages * ratio, -advantages * clip(ratio, 1 - cliprange, 1 + cliprange))

    All (n, T). Returns (loss, clipfrac); clipfrac is the share of tokens whose clipped loss is strictly larger.
    """
    ratio = (logprobs - old_logprobs).where(mask.bool(), 0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    clipfrac = masked_mean((clipped > unclipped).to(logprobs.dtype), mask)
    return masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute half the mean over tokens of the larger squared error, clipped or unclipped (Ziegler's code, `loss`).

        clipped values = clip(values, old_values - cliprange_value, old_values + cliprange_value)
        loss           = 0.5 * mean max((values - returns)^2, (clipped values - returns)^2)

    All (n, T). Returns (loss, clipfrac), without vf_coef; clipfrac as in `policy_loss`.
    """
    values = values.where(mask.bool(), 0)
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    clipfrac = masked_mean((clipped > unclipped).to(values.dtype), mask)
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac


# ----------------------------------------------------------------------------------------------
# The KL coefficient and the average of the weights


class AdaptiveKLController:
    """Adjusts the KL coefficient so that the KL approaches the target (Ziegler, section 2.2).

        error = clip(current_kl / target - 1, -0.2, 0.2)
        value = value * (1 + error * n_completions / horizon)

    `current_kl` is in nats per completion; `n_completions` is the number of completions since the last update.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, n_completions: int) -> None:
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_completions / self.horizon


class FixedKLController:
    """Keeps the KL coefficient as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_completions: int) -> None:
        pass


@torch.no_grad()
def polynomial_average(averages: list[torch.Tensor], weights: list[torch.Tensor], step: int, power: float) -> None:
    """Update polynomial-decay averages in place (Shamir & Zhang 2013, arXiv:1212.1824, section 4).

    Step t (1-based) counts roughly in proportion to t^power; power 0 is the plain mean.

        average[t] = (1 - share) * average[t - 1] + share * weights[t],   share = (power + 1) / (power + t)
    """
    share = (power + 1) / (power + step)
    torch._foreach_lerp_(averages, weights, share)  # private; torch's own Adam uses such functions


# ----------------------------------------------------------------------------------------------
# The trainer


@dataclass
class Experience:
    """A batch for the optimiser steps: old logprobs and values, whitened advantages, returns; all (n, T) float32."""

    completions: Completions
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return self.completions.mask

    def select(self, rows: torch.Tensor | slice) -> "Experience":
        """Keep only these completions. rows: a slice, or a tensor on the CPU."""
        tensors = select_rows(rows, self.logprobs, self.values, self.advantages, self.returns)
        return Experience(self.completions.select(rows), *tensors)


def ppo_loss(config, logprobs: torch.Tensor, values: torch.Tensor, batch: Experience):
    """Compute PPO's loss and a dict of statistics on a micro-batch; all are means over its tokens.

    logprobs, values: those of the current policy, (n, T).
    """
    mask = batch.mask
    pg_loss, pg_clipfrac = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, config.cliprange)
    vf_loss, vf_clipfrac = value_loss(values, batch.values, batch.returns, mask, config.cliprange_value)
    loss = pg_loss + config.vf_coef * vf_loss

    log_ratio = (logprobs.detach() - batch.logprobs).where(mask, 0)
    return loss, {
        "loss/policy": pg_loss,
        "loss/value": vf_loss,
        "loss/total": loss,
        "policy/approxkl": 0.5 * masked_mean(log_ratio**2, mask),
        "policy/ratio": masked_mean(log_ratio.exp(), mask),
        "policy/clipfrac": pg_clipfrac,
        "val/clipfrac": vf_clipfrac,
    }


class PPOTrainer:
    """Trains a policy, one batch of completions at a time. For a loop of your own, TextPPOTrainer
    (support.text_trainer) is easier: it adds conversions and checks.

    config: a PPOConfig. model: the policy, a GPT2HeadWithValueModel with float32 weights. ref_model: the model from
    which KL is measured, usually the untrained policy, in any dtype; the trainer may modify it. Turns dropout off.
    """

    def __init__(self, config, model, ref_model, tokenizer):
        self.config, self.model, self.ref_model, self.tokenizer = config, model, ref_model, tokenizer
        self.engine = Engine(config, model, ref_model, tokenizer)
        self.n_steps = 0
        self.n_drawn = 0  # completions since the last step
        # A value v means a score of reward_mean (of the latest step) + v * reward_unit (of the first step)
        self.reward_mean, self.reward_unit = 0.0, None
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        else:
            self.kl_controller = FixedKLController(config.init_kl_coef)

    def set_kl_coef(self, kl_coef: float) -> None:
        """Change the KL coefficient. Raises ValueError after the first step."""
        if self.n_steps:
            raise ValueError("the KL coefficient can only be set before the first step")
        self.config.init_kl_coef = self.kl_controller.value = kl_coef

    @property
    def policy_for_saving(self):
        """The policy with its weights averaged over the steps (`polynomial_average`)."""
        return self.engine.averaged if self.n_steps else self.model

    def generate(self, query_tensors: list[torch.Tensor], model=None, seed=None, step=None) -> Completions:
        """Complete each query, a 1-d int64 tensor on the CPU.

        The random numbers of completion i depend only on (seed, step, i). By default, model is the policy, seed the
        run's, and step the coming one; i then continues from earlier calls for that step, so n calls with one query
        each give the same completions as one call with n queries. If step is given, i starts at 0.
        """
        model = self.model if model is None else model
        seed = self.config.seed if seed is None else seed
        if step is not None:
            return self.engine.generate(query_tensors, model, seed, step, 0)
        completions = self.engine.generate(query_tensors, model, seed, self.n_steps + 1, self.n_drawn)
        self.n_drawn += len(query_tensors)
        return completions

    @torch.enable_grad()
    def step(self, completions: Completions, scores: torch.Tensor) -> dict[str, float]:
        """Take one PPO step on a batch. Returns its statistics as floats.

        scores: a finite number for each completion, (n,) float32. Optimiser steps without a finite gradient are skipped
        and counted in `ppo/skipped`. Raises FloatingPointError after 10 of them in a row (MAX_SKIPPED in the engine).
        """
        config, engine, mask, n = self.config, self.engine, completions.mask, len(scores)
        mean = self.reward_mean = scores.double().mean().item()
        if self.reward_unit is None:
            self.reward_unit = pick_reward_unit(scores, config.init_kl_coef)
            self.model.v_head.count_from_(mean, self.reward_unit)
        unit, centred = self.reward_unit, to_device((scores.double() - mean).float(), engine.device)

        # 1. The policy's log-probabilities and values and the reference's log-probabilities, before this step's update
        completions = engine.share_trunk(completions)  # runs the frozen blocks once for both models (point 7)
        logprobs, entropy, values = self.forward_pass(completions, self.model, logprobs_and_entropy)
        ref_logprobs, _ = self.forward_pass(completions, self.ref_model, logprobs_from_logits)

        # 2. Rewards in the trainer's unit: the KL penalty, plus the score (minus the mean) at the last token
        kl_coef = self.kl_controller.value / unit
        token_rewards, kl_penalties = compute_rewards(centred / unit, logprobs, ref_logprobs, mask, kl_coef)

        # 3. Advantages, whitened over the whole batch
        advantages, returns = compute_advantages(values, token_rewards, mask, config.gamma, config.lam)
        experience = Experience(completions, logprobs, values, whiten(advantages, mask), returns)

        # 4. Several epochs of minibatches; a minibatch's gradient is the sum over its micro-batches
        updates = []
        for epoch in range(config.ppo_epochs):
            for rows in self.minibatches(n, epoch):
                means = {}
                engine.zero_grad()
                for batch, weight in engine.micro_batches(experience.select(rows)):  # weight: its share of the tokens
                    new_logprobs, new_values = engine.forward(batch.completions, logprobs_from_logits)
                    loss, statistics = ppo_loss(config, new_logprobs, new_values, batch)
                    engine.backward(weight * loss)
                    for name, value in statistics.items():
                        means[name] = means.get(name, 0) + weight * value.detach()
                updates.append(means | engine.clip_and_step())  # skips a gradient that isn't finite
        self.n_steps, self.n_drawn = self.n_steps + 1, 0
        polynomial_average(engine.averages, engine.weights, self.n_steps, config.average_power)

        # 5. Statistics, named as in TRL. Rewards, returns and values are in the scores' unit, KL and entropy in nats
        kl = (logprobs - ref_logprobs).where(mask, 0).sum(-1)
        ended = (completions.ids == engine.sep_token_id) & mask
        stats = engine.fetch(
            {
                "objective/kl": kl.mean(),
                "objective/entropy": masked_mean(entropy, mask),
                "objective/non_score_reward": unit * kl_penalties.sum(-1).mean(),
                "objective/rlhf_reward": mean + unit * token_rewards.sum(-1).mean(),
                **{f"ppo/{name}": value for name, value in engine.means(updates).items()},
                "ppo/returns/mean": mean + unit * masked_mean(returns, mask),
                "ppo/val/mean": mean + unit * masked_mean(values, mask),
                "ppo/val/explained_variance": explained_variance(values, returns, mask),
                "tokens/completion_length": mask.sum() / n,
                "tokens/ended_share": ended.any(-1).float().mean(),
            }
        )
        stats = {"objective/kl_coef": self.kl_controller.value, **stats}

        # 6. The KL coefficient of the next step
        self.kl_controller.update(stats["objective/kl"], n)
        return stats

    @torch.no_grad()
    def forward_pass(self, completions: Completions, model, function) -> torch.Tensor:
        """Return the results of function(logits, ids) and, last, the values at each token, stacked: (k, n, T)."""
        computed, passes = [], self.engine.passes(model)
        for part in self.engine.parts(completions):
            results, values = self.engine.forward(part, function, passes)
            computed.append(torch.cat([results.view(-1, *values.shape), values[None]]))
        return self.engine.gather(computed, len(completions.ids))

    def minibatches(self, n: int, epoch: int) -> tuple[torch.Tensor, ...]:
        """Return the rows of each minibatch, in an order that depends only on (seed, step, epoch)."""
        order = np.random.default_rng([self.config.seed, self.n_steps, epoch]).permutation(n)
        return torch.from_numpy(order).split(self.config.minibatch_size)
