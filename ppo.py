"""Proximal policy optimisation for a language model: the mathematics first, then the trainer that uses it.

In these points it departs from textbook PPO or from the article's code (docs/differences.md has the article's side):

 1. One action is one token, and the score stands on a completion's last: what a whole text is worth, each token earns.
 2. The reward has a price on the distance from the reference, per token: without it happy words crowd out language.
 3. Advantages are whitened over the whole batch, not inside one sequence: else which completion was better is lost.
 4. Lambda is 1: values explain little of one score at the end, so what a smaller lambda cuts off is signal (in the
    demo they explain more: 0.95).
 5. A minibatch is 128 completions, the whole of a usual batch: many steps on a few completions each waste KL.
 6. The value head's gradient stops at the head, which has a learning rate of its own: in many small minibatches,
    learning values disturbs the policy.
 7. The lower blocks are frozen, and reference and policy share them: no less gain, for half the work.
 8. Old log-probabilities are worked out as the new ones are, not kept from sampling: the first ratio is 1.
 9. The KL coefficient is fixed: the adaptive controller's target of 6 nats is never met, so it only ever fell.
10. Saved is an average of the weights over the steps: it averages out the noise of single steps.
11. Adam's epsilon is 1e-5: with 1e-8, weights whose gradient is rounding error move as fast as all others.
12. An optimiser step without a finite gradient is left out and counted, not taken.
13. Rewards are counted in a unit that the first batch's scores set: scores from 0 to 1 or from 0 to 10,000 are one job.

Shapes: n completions, T tokens (completions are right-padded to the longest), V vocabulary entries. A mask is True
or 1 at a completion's real tokens, its final [SEP] included, and 0 at the padding. Logits and values at t are those
before token t: they have seen the prompt and the tokens before t, and say how likely t is and what is still to come.

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

from support.batches import Completions, select_rows
from support.engine import Engine, one_at_a_time

# ----------------------------------------------------------------------------------------------
# Probabilities


def logprobs_from_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[label]. logits (..., V), labels (...) int64 -> (...), in nats."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: torch.Tensor) -> torch.Tensor:
    """-sum p log p of softmax(logits), in nats. (..., V) -> (...). A logit of -inf adds nothing (0 log 0 = 0)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def kl_from_logits(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
    """sum p (log p - log q) with p = softmax(logits), q = softmax(ref_logits), in nats. (..., V) twice -> (...).

    Tokens of probability 0 under p add nothing.
    """
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    difference = (logprobs - ref_logprobs).where(logprobs > float("-inf"), 0)
    return (logprobs.exp() * difference).sum(-1)


# ----------------------------------------------------------------------------------------------
# Masked statistics


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of the unmasked entries, a scalar. values and mask of one shape; what is masked may even be NaN."""
    return values.where(mask.bool(), 0).sum() / mask.sum()


def whiten(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """(values - mean) / sqrt(variance + 1e-8) over all unmasked entries of the batch, 0 at the masked ones.

    The variance is the biased one. With shift_mean=False the mean is added back.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).where(mask.bool(), 0)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - variance(returns - values) / variance(returns) over the unmasked tokens: 1 is perfect, 0 no help.

    0 also where all returns are equal: there is nothing to explain.
    """

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    unexplained = variance(returns - values) / variance(returns)
    return (1 - unexplained).where(variance(returns) > 0, 0)


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


SPREAD = 0.4  # about that of a probability's: for it cliprange_value, vf_coef and value_lr were found


def pick_reward_unit(scores: torch.Tensor, kl_coef: float) -> float:
    """The unit in which the scores (n,) of the first batch have a standard deviation of SPREAD (Ziegler, section 2.1,
    scales its reward model in this way).

    Where they are as good as equal, since a hundredth of what a nat costs is no spread, the unit is that of their size.
    """
    scores = scores.double().cpu()
    spread = scores.std(correction=0).item()
    if spread <= kl_coef / 100:
        spread = max(scores.mean().abs().item(), kl_coef)
    return spread / SPREAD or 1.0


def compute_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward of each token: the KL penalty, and on a completion's last real token its score (Ziegler, section 2.2).

        kl_penalties[t] = -kl_coef * (logprobs[t] - ref_logprobs[t])

    scores (n,), logprobs, ref_logprobs and mask (n, T). Returns (token_rewards, kl_penalties), each (n, T), 0 where
    masked.
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
    """Generalised advantage estimation (GAE, equation 16), and the returns that the values should learn.

        delta[t]     = token_rewards[t] + gamma * values[t + 1] - values[t]
        advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
        return[t]    = advantage[t] + values[t]

    A completion ends at its last real token: the value and the advantage after it are 0. All (n, T); 0 where masked.
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
    """The clipped surrogate objective (PPO, equation 7), negated, as a mean over tokens.

        ratio = exp(logprobs - old_logprobs)
        loss  = mean max(-advantages * ratio, -advantages * clip(ratio, 1 - cliprange, 1 + cliprange))

    All (n, T). Returns (loss, clipfrac); clipfrac is the share of tokens where the clipped loss is strictly larger.
    """
    ratio = (logprobs - old_logprobs).where(mask.bool(), 0).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    clipfrac = masked_mean((clipped > unclipped).to(logprobs.dtype), mask)
    return masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, cliprange_value: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the mean squared error of the values, the larger of clipped and unclipped (Ziegler's code, `loss`).

        clipped values = clip(values, old_values - cliprange_value, old_values + cliprange_value)
        loss           = 0.5 * mean max((values - returns)^2, (clipped values - returns)^2)

    All (n, T). Returns (loss, clipfrac), without vf_coef; clipfrac as in `policy_loss`.
    """
    clipped_values = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    unclipped = (values - returns) ** 2
    clipped = (clipped_values - returns) ** 2
    clipfrac = masked_mean((clipped > unclipped).to(values.dtype), mask)
    return 0.5 * masked_mean(torch.maximum(unclipped, clipped), mask), clipfrac


# ----------------------------------------------------------------------------------------------
# The KL coefficient


class AdaptiveKLController:
    """Steers the KL coefficient until the KL meets the target (Ziegler, section 2.2).

        error = clip(current_kl / target - 1, -0.2, 0.2)
        value = value * (1 + error * n_completions / horizon)

    `current_kl` is in nats per completion, `n_completions` since the last update.
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


# ----------------------------------------------------------------------------------------------
# The trainer


@dataclass
class Experience:
    """Completions, and what they taught: all that an optimiser step needs.

    logprobs, values, advantages, returns (n, T) float32: of the policy that drew the completions, before any update.
    """

    completions: Completions
    logprobs: torch.Tensor
    values: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return self.completions.mask

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, rows: torch.Tensor | slice) -> "Experience":
        """These completions only; rows, a tensor of them, on the CPU."""
        tensors = select_rows(rows, self.logprobs, self.values, self.advantages, self.returns)
        return Experience(self.completions.select(rows), *tensors)


def logprobs_values_entropy(ids: torch.Tensor, logits_and_values: tuple[torch.Tensor, torch.Tensor]):
    """What a model says of completions: of their ids (n, T), with logits (n, T, V) and values (n, T); all (n, T)."""
    logits, values = logits_and_values
    return logprobs_from_logits(logits, ids), values, entropy_from_logits(logits)


class PPOTrainer:
    """Trains a policy, one batch of completions at a time.

    config: a PPOConfig. model: the policy, a GPT2HeadWithValueModel with float32 weights. ref_model: the same before
    training, in any dtype; the trainer takes it over. tokenizer: gives the special tokens. Dropout stays off in both.

    How batches go through the models, on which device, in which dtype and on how many processes, is `engine`'s.
    """

    def __init__(self, config, model, ref_model, tokenizer):
        self.config, self.model, self.ref_model = config, model, ref_model
        self.engine = Engine(config, model, ref_model, tokenizer)
        self.sep_token_id = tokenizer.sep_token_id
        self.n_steps = 0
        self.n_drawn = 0  # completions since the last step
        self.reward_unit = None  # of rewards and values from the first step on, in the unit of the scores
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        else:
            self.kl_controller = FixedKLController(config.init_kl_coef)

    def set_kl_coef(self, kl_coef: float) -> None:
        """Take another KL coefficient, before the first step."""
        if self.n_steps:
            raise ValueError("the KL coefficient can be set before the first step alone")
        self.config.init_kl_coef = self.kl_controller.value = kl_coef

    @property
    def policy_for_saving(self):
        """The policy with an average of its weights over the steps, see `polynomial_average` in support/engine.py."""
        return self.engine.averaged if self.n_steps else self.model

    @one_at_a_time
    def generate(self, query_tensors: list[torch.Tensor], model=None, seed=None, step=None) -> list[torch.Tensor]:
        """Continue each query (1-d int64, or a list of ids): the responses, 1-d int64 on the CPU, [SEP] included.

        Completion i is decided by (seed, step, i). By default the policy continues, with the run's seed and step, and i
        counts the completions since the last step: n calls with one query draw what one call with n draws. ValueError
        where a query leaves no room for `gen_len` tokens.
        """
        query_tensors = self.engine.collator.queries(query_tensors, self.config.gen_len)
        model = self.model if model is None else model
        seed = self.config.seed if seed is None else seed
        if step is not None:
            return self.engine.generate(query_tensors, model, seed, step, 0)
        responses = self.engine.generate(query_tensors, model, seed, self.n_steps + 1, self.n_drawn)
        self.n_drawn += len(responses)
        return responses

    @one_at_a_time
    def step(
        self, query_tensors: list[torch.Tensor], response_tensors: list[torch.Tensor], rewards
    ) -> dict[str, float]:
        """One PPO step on a batch.

        query_tensors, response_tensors: lists of 1-d int64 tensors, or of lists of ids, of any lengths (a response
        includes its [SEP]). rewards: one finite score for each response, a list or a tensor (n,). Returns the step's
        statistics as plain floats. An optimiser step whose gradient is not finite is skipped and counted in
        `ppo/skipped`. ValueError, before anything moves, where the lists do not fit together, a score is not finite, or
        a response could not have been sampled; FloatingPointError after MAX_SKIPPED skipped steps in a row.
        """
        config, engine = self.config, self.engine
        completions, scores = engine.collate(query_tensors, response_tensors, rewards)
        mask, n = completions.mask, len(completions)
        if self.reward_unit is None:
            self.reward_unit = pick_reward_unit(scores, config.init_kl_coef)
            engine.scale_values(1 / self.reward_unit)
        unit = self.reward_unit

        # 1. What policy and reference think of the completions before this step's update
        completions = engine.share_trunk(completions)  # through the frozen blocks, once for both (point 7)
        logprobs, values, entropy = engine.evaluate(logprobs_values_entropy, completions, self.model)
        ref_logprobs, *_ = engine.evaluate(logprobs_values_entropy, completions, self.ref_model)

        # 2. Rewards, in the trainer's unit: the KL penalty at every token, the score at the last
        kl_coef = self.kl_controller.value / unit
        token_rewards, kl_penalties = compute_rewards(scores / unit, logprobs, ref_logprobs, mask, kl_coef)

        # 3. Advantages, whitened over the whole batch
        advantages, returns = compute_advantages(values, token_rewards, mask, config.gamma, config.lam)
        experience = Experience(completions, logprobs, values, whiten(advantages, mask), returns)

        # 4. Several epochs of minibatches, in an order that depends on (seed, step, epoch) alone
        updates = []
        for epoch in range(config.ppo_epochs):
            order = np.random.default_rng([config.seed, self.n_steps, epoch]).permutation(n)
            for rows in torch.from_numpy(order).split(config.minibatch_size):
                # zero_grad, loss, backward, clip_grad_norm_, optimizer.step
                updates.append(engine.optimise(experience.select(rows), self.loss))
        self.n_steps, self.n_drawn = self.n_steps + 1, 0
        engine.average(self.n_steps)

        # 5. Statistics, named as in TRL; all but the losses in the unit of the scores
        kl = (logprobs - ref_logprobs).where(mask, 0).sum(-1)
        stats = engine.fetch(
            {
                "objective/kl": kl.mean(),
                "objective/entropy": masked_mean(entropy, mask),
                "objective/non_score_reward": unit * kl_penalties.sum(-1).mean(),
                "objective/rlhf_reward": unit * token_rewards.sum(-1).mean(),
                **{f"ppo/{name}": mean for name, mean in engine.means(updates).items()},
                "ppo/returns/mean": unit * masked_mean(returns, mask),
                "ppo/val/mean": unit * masked_mean(values, mask),
                "ppo/val/explained_variance": explained_variance(values, returns, mask),
                "tokens/completion_length": mask.sum() / n,
                "tokens/ended_share": ((completions.ids == self.sep_token_id) & mask).any(-1).float().mean(),
            }
        )
        stats = {"objective/kl_coef": self.kl_controller.value, **stats}

        # 6. The KL coefficient of the next step
        self.kl_controller.update(stats["objective/kl"], n)
        return stats

    def loss(self, batch: Experience) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """PPO's loss of some completions and its statistics, scalars, each a mean over their tokens."""
        config, mask = self.config, batch.mask
        logits, values = self.engine.policy(batch.completions)
        logprobs = logprobs_from_logits(logits, batch.completions.ids)
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
