"""Proximal policy optimisation for a language model: the mathematics first, then the trainer that uses it.

Shapes: n completions, T tokens (completions are right-padded to the longest), V vocabulary entries. A mask is True
or 1 at a completion's real tokens, its final [SEP] included, and 0 at the padding.

Sources, by the names used below:
    PPO       Schulman et al. 2017, "Proximal policy optimization algorithms", arXiv:1707.06347
    GAE       Schulman et al. 2016, "High-dimensional continuous control using generalized advantage estimation",
              arXiv:1506.02438
    Ziegler   Ziegler et al. 2019, "Fine-tuning language models from human preferences", arXiv:1909.08593, and its
              code, lm-human-preferences
"""

import contextlib
import copy
from dataclasses import replace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from config import pick_dtype, pick_micro_batch_size
from gpt2_value_head import (
    Completions,
    Prompts,
    completion_mask,
    completion_uniforms,
    never_sampled_ids,
    restrict_logits,
    restriction,
    sample,
)
from support import processes

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


# ----------------------------------------------------------------------------------------------
# Rewards and advantages


def compute_rewards(
    scores: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, mask: torch.Tensor, kl_coef: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reward of each token: the KL penalty, and on a completion's last real token its score (Ziegler, section 2.2).

        non_score_rewards[t] = -kl_coef * (logprobs[t] - ref_logprobs[t])

    scores (n,), logprobs, ref_logprobs and mask (n, T). Returns (rewards, non_score_rewards), each (n, T), 0 where
    masked.
    """
    non_score_rewards = (-kl_coef * (logprobs - ref_logprobs)).where(mask.bool(), 0)
    last = mask.long().sum(-1) - 1
    rows = torch.arange(len(scores), device=scores.device)
    rewards = non_score_rewards.clone()
    rewards[rows, last] += scores.to(rewards.dtype)
    return rewards, non_score_rewards


def compute_advantages(
    values: torch.Tensor, rewards: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (GAE, equation 16), and the returns that the values should learn.

        delta[t]     = rewards[t] + gamma * values[t + 1] - values[t]
        advantage[t] = delta[t] + gamma * lam * advantage[t + 1]
        return[t]    = advantage[t] + values[t]

    A completion ends at its last real token: the value and the advantage after it are 0. All (n, T); 0 where masked.
    """
    values = values.where(mask.bool(), 0)
    rewards = rewards.where(mask.bool(), 0)
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
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
        value = value * (1 + error * n_steps / horizon)

    `current_kl` is in nats per completion, `n_steps` counts the completions since the last update.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: int):
        self.value = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, current_kl: float, n_steps: int) -> None:
        error = min(max(current_kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n_steps / self.horizon


class FixedKLController:
    """Keeps the KL coefficient as it is."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, current_kl: float, n_steps: int) -> None:
        pass


# ----------------------------------------------------------------------------------------------
# The trainer


MAX_SKIPPED = 10  # optimiser steps in a row without a finite gradient: then training has failed
STATISTICS = (  # of one optimiser step, in the order in which `PPOTrainer.update` returns them
    "ppo/loss/policy",
    "ppo/loss/value",
    "ppo/loss/total",
    "ppo/policy/approxkl",
    "ppo/policy/ratio",
    "ppo/policy/clipfrac",
    "ppo/val/clipfrac",
    "ppo/grad_norm",
    "ppo/skipped",
)


@torch.no_grad()
def polynomial_average(averages: list[torch.Tensor], weights: list[torch.Tensor], step: int, power: float) -> None:
    """Polynomial-decay averaging of weights, in place (Shamir & Zhang 2013, arXiv:1212.1824, section 4).

    Step t, from 1, weighs about t^power:

        average[t] = (1 - share) * average[t - 1] + share * weights[t],   share = (power + 1) / (power + t)

    Power 0 is the plain mean.
    """
    share = (power + 1) / (power + step)
    torch._foreach_lerp_(averages, weights, share)


class CompletionScorer(torch.nn.Module):
    """`score_completions` as a module's forward, which DistributedDataParallel needs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.score_completions(*args)


class PPOTrainer:
    """Trains a policy, one batch of completions at a time.

    model: the policy, a GPT2HeadWithValueModel with float32 weights. ref_model: the same before training, in any dtype;
    the trainer takes it over. tokenizer: gives the special tokens. Dropout stays off in both.

    Three things are decided here, each in one place:
    - what is trained: `config.frozen_share` of the blocks are a trunk that policy and reference share; a batch goes
      through it once a step. ValueError where the two models differ in it.
    - the dtype of the arithmetic, in `in_compute_dtype`: in bfloat16 a copy of the policy computes, and its gradients
      move the float32 weights (Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740).
    - how work is split, in `micro_batches`. On several processes (see support/processes.py) each calls the same methods
      with the same whole batch; results are those of the whole batch, and the update is that of one process up to
      rounding.

    `policy_for_saving` is an average of the policy's weights over the steps, see `polynomial_average`.
    """

    def __init__(self, config, model, ref_model, tokenizer):
        self.config = config
        self.device = model.device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.micro_batch_size = pick_micro_batch_size(config, model.config.vocab_size, self.device)
        self.pad_token_id, self.sep_token_id = tokenizer.pad_token_id, tokenizer.sep_token_id
        self.never_sampled = set(never_sampled_ids(tokenizer, model.config.vocab_size))
        self.restriction = restriction(tokenizer, model.config.vocab_size, self.device)
        self.token_names = tokenizer.convert_ids_to_tokens
        self.n_steps = 0
        self.n_drawn = 0  # completions since the last step
        self.skipped_in_a_row = 0
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(config.init_kl_coef, config.target, config.horizon)
        else:
            self.kl_controller = FixedKLController(config.init_kl_coef)

        self.model = model.eval()
        self.ref_model = ref_model.eval().to(self.dtype).requires_grad_(False)
        for either in (model, ref_model):
            either.freeze(config.frozen_share)
        self.compute_model = model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)
        self.compute_model.v_head.float()
        for weight, ref_weight in zip(self.compute_model.parameters(), self.ref_model.parameters()):
            if not weight.requires_grad:
                if not weight.equal(ref_weight):
                    raise ValueError("policy and reference differ in a frozen block; frozen_share=0 trains them all")
                ref_weight.data = weight.data
        self.trained = [weight for weight in model.parameters() if weight.requires_grad]
        self.computing = [weight for weight in self.compute_model.parameters() if weight.requires_grad]
        if self.compute_model is not model:
            for weight in self.trained:
                weight.grad = torch.empty_like(weight)
            self.gradients = [weight.grad for weight in self.trained]

        value_head = list(model.v_head.parameters())
        policy = [weight for weight in self.trained if not any(weight is v for v in value_head)]
        groups = [{"params": policy, "lr": config.lr}, {"params": value_head, "lr": config.value_lr}]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon, fused=fused)
        self.average = copy.deepcopy(model)
        self.averaged = [weight for weight in self.average.parameters() if weight.requires_grad]
        self.scorer = CompletionScorer(self.compute_model)
        if processes.world_size() > 1:
            self.scorer = DistributedDataParallel(self.scorer, gradient_as_bucket_view=True)

    @property
    def policy_for_saving(self):
        return self.average if self.n_steps else self.model

    def generate(self, query_tensors: list[torch.Tensor], model=None, seed=None, step=None) -> list[torch.Tensor]:
        """Continue each query (1-d int64, or a list of ids): the responses, 1-d int64 on the CPU, [SEP] included.

        Completion i is decided by (seed, step, i). By default the policy continues, with the run's seed and step, and i
        counts the completions since the last step: n calls with one query draw what one call with n draws. ValueError
        where a query leaves no room for `gen_len` tokens.
        """
        query_tensors = self.as_tensors("query", query_tensors)
        positions, gen_len = self.model.config.n_positions, self.config.gen_len
        for i, query in enumerate(query_tensors):
            if len(query) + gen_len > positions:
                tokens = f"{len(query)} tokens, with gen_len {gen_len} more than the model's {positions} positions"
                raise ValueError(f"query {i} has {tokens}")
        first = 0
        if step is None:
            first, self.n_drawn = self.n_drawn, self.n_drawn + len(query_tensors)
        model = self.model if model is None else model
        seed = self.config.seed if seed is None else seed
        step = self.n_steps + 1 if step is None else step
        model = self.in_compute_dtype(model)
        special = (self.restriction, self.sep_token_id, self.pad_token_id)
        rows = range(len(query_tensors))[processes.rows_of_rank(len(query_tensors))]
        at_once = 4 * self.micro_batch_size  # no gradients are kept: there is room for more
        tokens = torch.zeros(len(query_tensors), gen_len, dtype=torch.int64)
        for part in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
            prompts = Prompts.from_tensors([query_tensors[i] for i in part], self.pad_token_id, self.device)
            uniforms = completion_uniforms(seed, step, [first + i for i in part], gen_len)
            tokens[part.start : part.stop] = sample(model, prompts, uniforms, *special, self.config.temperature).cpu()
        tokens = processes.all_reduce_sum(tokens)
        lengths = completion_mask(tokens, self.sep_token_id).sum(-1)
        return [row[:length] for row, length in zip(tokens, lengths)]

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
        config = self.config
        batch = self.collate(query_tensors, response_tensors, rewards)
        mask = batch.mask
        scores = torch.as_tensor(rewards, dtype=torch.float32).cpu()
        n = len(batch)
        if scores.shape != (n,):
            raise ValueError(f"rewards must have the shape ({n},), one number a response, not {tuple(scores.shape)}")
        if not scores.isfinite().all():
            i = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f"reward {i} is {float(scores[i])}: rewards must be finite numbers")
        if n % processes.world_size():
            raise ValueError(f"{n} completions do not divide by {processes.world_size()} processes")

        scores = scores.to(self.device, non_blocking=True)

        # 1. What policy and reference think of the completions before this step's update
        batch = self.through_trunk(batch)
        old_logprobs, old_values, entropy = self.score(self.model, batch)
        ref_logprobs, *_ = self.score(self.ref_model, batch)

        # 2. Rewards: the KL penalty at every token, the score at the last
        rewards, non_score_rewards = compute_rewards(scores, old_logprobs, ref_logprobs, mask, self.kl_controller.value)

        # 3. Advantages, whitened over the whole batch
        advantages, returns = compute_advantages(old_values, rewards, mask, config.gamma, config.lam)
        whitened = whiten(advantages, mask)

        # 4. Several epochs of minibatches, in an order that depends on (seed, step, epoch) alone
        fixed = torch.stack([old_logprobs, old_values, whitened, returns])
        stats = []
        for epoch in range(config.ppo_epochs):
            order = np.random.default_rng([config.seed, self.n_steps, epoch]).permutation(n)
            for rows in torch.from_numpy(order).split(config.minibatch_size):
                there = rows.to(self.device, non_blocking=True)
                stats.append(self.update(batch.select(rows), *fixed[:, there]))
        self.n_steps, self.n_drawn = self.n_steps + 1, 0
        polynomial_average(self.averaged, self.trained, self.n_steps, config.average_power)

        # 5. Statistics, named as in TRL
        kl = (old_logprobs - ref_logprobs).where(mask, 0).sum(-1)
        of_updates = processes.all_reduce_mean(torch.stack(stats))
        of_step = {
            "objective/kl": kl.mean(),
            "objective/entropy": masked_mean(entropy, mask),
            "objective/non_score_reward": non_score_rewards.sum(-1).mean(),
            "objective/rlhf_reward": rewards.sum(-1).mean(),
            **dict(zip(STATISTICS, of_updates.mean(0))),
            "ppo/skipped": of_updates[:, STATISTICS.index("ppo/skipped")].sum(),
            "ppo/returns/mean": masked_mean(returns, mask),
            "ppo/val/mean": masked_mean(old_values, mask),
            "ppo/val/explained_variance": explained_variance(old_values, returns, mask),
            "tokens/completion_length": mask.sum() / n,
            "tokens/ended_share": ((batch.ids == self.sep_token_id) & mask).any(-1).float().mean(),
        }
        fetched = torch.cat([torch.stack(list(of_step.values())), of_updates[:, -1]]).tolist()
        result = {"objective/kl_coef": self.kl_controller.value, **dict(zip(of_step, fetched))}
        self.count_skipped(fetched[len(of_step) :])

        # 6. The KL coefficient of the next step
        self.kl_controller.update(result["objective/kl"], n)
        return result

    def update(self, minibatch: Completions, old_logprobs, old_values, advantages, returns) -> torch.Tensor:
        """One optimiser step on a minibatch, its gradient gathered over micro-batches and averaged over processes.

        Returns STATISTICS, (9,) float32, whose means over the processes are those of the minibatch.
        """
        config = self.config
        self.in_compute_dtype(self.model).zero_grad()
        n_tokens = minibatch.mask.sum()
        stats = 0
        for part in (parts := self.micro_batches(len(minibatch))):
            micro_batch = minibatch.select(part)
            mask = micro_batch.mask
            exchange = processes.world_size() == 1 or part is parts[-1]
            with contextlib.nullcontext() if exchange else self.scorer.no_sync():
                logits, values = self.logits_and_values(self.scorer, micro_batch)
                logprobs = logprobs_from_logits(logits, micro_batch.ids)
                pg_loss, pg_clipfrac = policy_loss(
                    logprobs, old_logprobs[part], advantages[part], mask, config.cliprange
                )
                vf_loss, vf_clipfrac = value_loss(values, old_values[part], returns[part], mask, config.cliprange_value)
                loss = pg_loss + config.vf_coef * vf_loss
                weight = processes.world_size() * mask.sum() / n_tokens
                (weight * loss).backward()
            log_ratio = (logprobs.detach() - old_logprobs[part]).where(mask, 0)
            approxkl, ratio = 0.5 * masked_mean(log_ratio**2, mask), masked_mean(log_ratio.exp(), mask)
            of_part = (pg_loss, vf_loss, loss, approxkl, ratio, pg_clipfrac, vf_clipfrac)
            stats = stats + weight * torch.stack(of_part).detach()
        if self.compute_model is not self.model:
            torch._foreach_copy_(self.gradients, [weight.grad for weight in self.computing])
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trained, config.max_grad_norm)
        skipped = (~grad_norm.isfinite()).float()
        if self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped  # fused Adam does nothing where this is 1, and nobody waits for a GPU
        if self.optimizer.defaults["fused"] or not skipped:
            self.optimizer.step()
        return torch.cat([stats, torch.stack([grad_norm, skipped])])

    def count_skipped(self, skipped: list[float]) -> None:
        """Count the optimiser steps without a finite gradient, 1 or 0 each, that followed each other up to now."""
        for one in skipped:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if one else 0
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise FloatingPointError(f"the gradient of {MAX_SKIPPED} optimiser steps in a row was not finite")

    # How a batch goes through a model

    @torch.no_grad()
    def in_compute_dtype(self, model):
        """`model` in the dtype of the arithmetic: itself, or a copy. The policy's is kept, and brought up to date."""
        if model is not self.model:
            return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)
        if self.compute_model is not model:
            torch._foreach_copy_(self.computing, self.trained)
        return self.compute_model

    def micro_batches(self, n: int) -> list[slice]:
        """The rows, of n, that this process sends through a model, a micro-batch at a time."""
        mine = range(n)[processes.rows_of_rank(n)]
        size = self.micro_batch_size
        return [slice(first, min(first + size, mine.stop)) for first in range(mine.start, mine.stop, size)]

    @torch.no_grad()
    def over_micro_batches(self, function, batch: Completions) -> torch.Tensor:
        """function(micro-batch) -> (rows, ...), without gradients, for all rows of a batch, of every process."""
        computed = torch.cat([function(batch.select(part)) for part in self.micro_batches(len(batch))])
        if processes.world_size() == 1:
            return computed
        rows = computed.new_zeros(len(batch), *computed.shape[1:])
        rows[processes.rows_of_rank(len(batch))] = computed
        return processes.all_reduce_sum(rows)

    def logits_and_values(self, score_completions, batch: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Restricted logits (n, T, V) and values (n, T), float32: the one forward pass of old, new and reference."""
        logits, values = score_completions(batch, self.config.detach_value)
        return restrict_logits(logits, self.restriction, self.config.temperature), values.float()

    @torch.no_grad()
    def through_trunk(self, batch: Completions) -> Completions:
        """The batch with its hidden states above the trunk; as it is, with nothing frozen."""
        if not self.ref_model.n_frozen:
            return batch
        states = self.over_micro_batches(lambda part: self.ref_model.trunk(part).hidden_states, batch)
        prompts = self.ref_model.trunk(replace(batch, ids=batch.ids[:, :1])).prompts
        return replace(batch, prompts=prompts, hidden_states=states)

    def score(self, model, batch: Completions) -> torch.Tensor:
        """Log-probabilities, values and entropies of a batch, (3, n, T) float32."""
        model = self.in_compute_dtype(model)

        def scored(micro_batch):
            logits, values = self.logits_and_values(model.score_completions, micro_batch)
            logprobs = logprobs_from_logits(logits, micro_batch.ids)
            return torch.stack([logprobs, values, entropy_from_logits(logits)], dim=1)

        return self.over_micro_batches(scored, batch).movedim(1, 0).contiguous()

    def kl_to_reference(
        self, model, query_tensors, response_tensors
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """How far `model` is from the reference along some responses.

        Returns, on the CPU, the KL summed over each completion (n,) in nats, over the whole vocabulary at each token;
        the reference's log-probabilities (n, T) of the tokens; and the mask (n, T).
        """
        batch = self.collate(query_tensors, response_tensors, response_tensors)
        model = self.in_compute_dtype(model)

        def compared(micro_batch):
            logits, _ = self.logits_and_values(model.score_completions, micro_batch)
            ref_logits, _ = self.logits_and_values(self.ref_model.score_completions, micro_batch)
            ref_logprobs = logprobs_from_logits(ref_logits, micro_batch.ids)
            return torch.stack([kl_from_logits(logits, ref_logits), ref_logprobs], dim=1)

        kl, ref_logprobs = self.over_micro_batches(compared, batch).cpu().unbind(1)
        mask = batch.mask.cpu()
        return kl.where(mask, 0).sum(-1), ref_logprobs, mask

    def collate(self, query_tensors, response_tensors, rewards) -> Completions:
        """Check and pad a batch."""
        if not len(query_tensors) == len(response_tensors) == len(rewards) > 0:
            counts = f"{len(query_tensors)} queries, {len(response_tensors)} responses and {len(rewards)} rewards"
            raise ValueError(f"step() needs one response and one reward for each query, not {counts}")
        query_tensors = self.as_tensors("query", query_tensors)
        response_tensors = self.as_tensors("response", response_tensors)
        positions = self.model.config.n_positions
        for i, (query, response) in enumerate(zip(query_tensors, response_tensors)):
            if len(query) + len(response) > positions:
                tokens = f"{len(query)} and {len(response)} tokens"
                raise ValueError(f"query {i} and its response have {tokens}, and the model {positions} positions")
            tokens = response.tolist()
            tokens = tokens[: tokens.index(self.sep_token_id)] if self.sep_token_id in tokens else tokens
            for token in tokens:
                if token in self.never_sampled:
                    name = self.token_names(token) or f"id {token}"
                    raise ValueError(f"response {i} holds {name} before its end, a token that is never sampled")
        responses = torch.nn.utils.rnn.pad_sequence(response_tensors, batch_first=True, padding_value=self.pad_token_id)
        lengths = torch.tensor([len(response) for response in response_tensors])
        mask = completion_mask(responses, self.sep_token_id) & (torch.arange(responses.shape[1]) < lengths[:, None])
        prompts = Prompts.from_tensors(query_tensors, self.pad_token_id, self.device)
        ids, mask = (tensor.to(self.device, non_blocking=True) for tensor in (responses, mask))
        return Completions(prompts, ids, mask)

    def as_tensors(self, what: str, sequences) -> list[torch.Tensor]:
        """Token ids, tensors or lists, as 1-d int64 tensors on the CPU. ValueError where one is empty or unknown."""
        vocab_size = self.model.config.vocab_size
        tensors = [torch.as_tensor(ids).cpu() for ids in sequences]
        for i, ids in enumerate(tensors):
            if not len(ids):
                raise ValueError(f"{what} {i} is empty; it needs at least one token")
            if ids.min() < 0 or ids.max() >= vocab_size:
                raise ValueError(f"{what} {i} holds an id outside the vocabulary of {vocab_size} tokens")
        return tensors


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """1 - variance(returns - values) / variance(returns) over the unmasked tokens: 1 is perfect, 0 no help."""

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    return 1 - variance(returns - values) / variance(returns)
