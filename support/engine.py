"""How a batch goes through a policy and its reference, and how a gradient gets into the policy's weights.

Nothing here knows what is worked out from logits and values: functions of the caller do. Three things are decided here,
each in one place:

- what is trained: `config.frozen_share` of the blocks are a trunk that policy and reference share; a batch goes through
  it once a step (`share_trunk`).
- the dtype of the arithmetic (`in_compute_dtype`): in bfloat16 a copy of the policy computes, and its gradients move
  the float32 weights (Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740).
- how work is split (`micro_batches`), into parts that fit into memory and over processes (see support/collectives.py).
  Each process calls the same methods with the same whole batch; results are those of the whole batch, and the update is
  that of one process up to rounding.
"""

import contextlib
import copy
import functools
import inspect
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from gpt2_value_head import completion_uniforms, restrict_logits, restriction, sample
from support import collectives
from support.batches import Collator, Completions, completion_mask
from support.devices import pick_dtype, pick_micro_batch_size, to_device
from support.self_check import check_passes
from support.shared_prompts import SharedPrompts

MAX_SKIPPED = 10  # optimiser steps in a row without a finite gradient: then training has failed


@torch.no_grad()
def polynomial_average(averages: list[torch.Tensor], weights: list[torch.Tensor], step: int, power: float) -> None:
    """Polynomial-decay averaging of weights, in place (Shamir & Zhang 2013, arXiv:1212.1824, section 4).

    Step t, from 1, weighs about t^power:

        average[t] = (1 - share) * average[t - 1] + share * weights[t],   share = (power + 1) / (power + t)

    Power 0 is the plain mean.
    """
    share = (power + 1) / (power + step)
    torch._foreach_lerp_(averages, weights, share)  # private, as `_foreach_copy_`


def observed(method):
    """Have `Engine.observer`, where a tool has set one, make the call: observer(name, call) returns what call() did."""

    @functools.wraps(method)
    def call(self, *args):
        if self.observer is None:
            return method(self, *args)
        return self.observer(method.__name__, functools.partial(method, self, *args))

    return call


def one_at_a_time(method):
    """A trainer's method that one thread at a time may be in. What it cannot take is said with what it can."""
    signature = inspect.signature(method)
    taken = ", ".join(list(signature.parameters)[1:])

    @functools.wraps(method)
    def call(self, *args, **named):
        try:
            signature.bind(self, *args, **named)
        except TypeError as error:
            elsewhere = "all else is set in the config, such as gen_len and temperature"
            raise TypeError(f"{method.__name__}() takes {taken}: {error}; {elsewhere}") from None
        try:
            self.engine.turn.pop()
        except IndexError:
            raise ValueError("another thread is in step() or generate() of this trainer: one at a time") from None
        try:
            return method(self, *args, **named)
        finally:
            self.engine.turn.append("free")

    return call


class Engine:
    """Two models, the optimiser, and the average of the policy's weights over the steps.

    model, ref_model, tokenizer: as PPOTrainer takes them. ValueError where the models differ in what is frozen.
    `averaged` is the policy with its averaged weights. observer: see `observed`.
    """

    observer = None

    def __init__(self, config, model, ref_model, tokenizer):
        self.config = config
        self.turn = ["free"]  # until a thread takes it: as safe as a lock, and a trainer can be copied
        if any(weight.is_inference() for weight in model.parameters()):
            raise ValueError("a model that was made in torch.inference_mode() cannot be trained; load it outside")
        self.device = model.device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.collator = Collator(tokenizer, model.config, self.device)
        self.restriction = restriction(tokenizer, model.config.vocab_size, self.device)

        # What is frozen stands in memory once, and what computes is a copy where the arithmetic is not float32
        self.model = model.eval()
        self.ref_model = ref_model.eval().to(self.dtype).requires_grad_(False)
        for one in (model, ref_model):
            one.freeze(config.frozen_share)
        self.compute_model = model if self.dtype == torch.float32 else copy.deepcopy(model).to(self.dtype)
        self.compute_model.v_head.float()
        for weight, ref_weight in zip(self.compute_model.parameters(), self.ref_model.parameters()):
            if not weight.requires_grad:
                if not weight.equal(ref_weight):
                    raise ValueError("policy and reference differ in a frozen block; frozen_share=0 trains them all")
                ref_weight.data = weight.data

        # What is trained: float32 weights, which take the copy's gradients
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.copied_weights = [weight for weight in self.compute_model.parameters() if weight.requires_grad]
        if self.compute_model is not model:
            for weight in self.weights:
                weight.grad = torch.empty_like(weight)
            self.gradients = [weight.grad for weight in self.weights]
        value_head = list(model.v_head.parameters())
        policy = [weight for weight in self.weights if not any(weight is v for v in value_head)]
        groups = [{"params": policy, "lr": config.lr}, {"params": value_head, "lr": config.value_lr}]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon, fused=fused)
        self.skipped_in_a_row = self.most_skipped = torch.zeros((), device=self.device)

        self.averaged = copy.deepcopy(model)
        self.averages = [weight for weight in self.averaged.parameters() if weight.requires_grad]
        self.trained_policy = SharedPrompts(self.compute_model, config.detach_value)
        check_passes(self.compute_model)
        if collectives.world_size() > 1:
            self.trained_policy = DistributedDataParallel(self.trained_policy, gradient_as_bucket_view=True)

    def collate(self, query_tensors, response_tensors, scores) -> tuple[Completions, torch.Tensor]:
        """A batch, as completions and scores (n,) float32. ValueError where it cannot be trained on."""
        if torch.is_inference_mode_enabled():
            raise ValueError("nothing can be trained in torch.inference_mode(); leave it before step()")
        completions, scores = self.collator.with_scores(query_tensors, response_tensors, scores)
        if len(completions) % collectives.world_size():
            raise ValueError(f"{len(completions)} completions do not divide by {collectives.world_size()} processes")
        return completions, scores

    def scale_values(self, factor: float) -> None:
        """Have the policy's values be `factor` times what they are."""
        for model in (self.model, self.averaged):
            model.v_head.scale_(factor)

    # ------------------------------------------------------------------------------------------
    # Through the models, without gradients

    @observed
    def generate(self, query_tensors, model, seed: int, step: int, first: int) -> list[torch.Tensor]:
        """Continue each query: the responses, 1-d int64 on the CPU, [SEP] included. Draws are those of (seed, step,
        first + i)."""
        model = self.in_compute_dtype(model)
        sep_token_id, pad_token_id = self.collator.sep_token_id, self.collator.pad_token_id
        rows = range(len(query_tensors))[collectives.rows_of_rank(len(query_tensors))]
        longest, gen_len = max(len(query) for query in query_tensors), self.config.gen_len
        at_once = pick_micro_batch_size(self.config, model.config, self.device, longest, gen_len, drawing=True)
        tokens = torch.zeros(len(query_tensors), gen_len, dtype=torch.int64)
        for part in (rows[i : i + at_once] for i in range(0, len(rows), at_once)):
            prompts = self.collator.prompts([query_tensors[i] for i in part])
            draws = completion_uniforms(seed, step, [first + i for i in part], gen_len)
            uniforms = to_device(draws, self.device)
            drawn = sample(
                model, prompts, uniforms, self.restriction, sep_token_id, pad_token_id, self.config.temperature
            )
            tokens[part.start : part.stop] = drawn.cpu()
        tokens = collectives.all_reduce_sum(tokens)
        lengths = completion_mask(tokens, sep_token_id).sum(-1)
        return [row[:length] for row, length in zip(tokens, lengths)]

    @observed
    def share_trunk(self, completions: Completions) -> Completions:
        """The batch with its hidden states above the trunk; as it is, with nothing frozen."""
        if not self.ref_model.n_frozen:
            return completions
        passes = SharedPrompts(self.ref_model)
        (states,) = self.over_micro_batches(lambda part: (passes.trunk(part).hidden_states,), completions)
        with torch.no_grad():
            prompts = passes.trunk(replace(completions, ids=completions.ids[:, :1])).prompts
        return replace(completions, prompts=prompts, hidden_states=states)

    @observed
    def evaluate(self, function, completions: Completions, *models) -> torch.Tensor:
        """function(ids, (logits, values) of each model) -> k tensors (rows, T), for all completions: (k, n, T).

        Logits are those of the distribution that is sampled, float32 as the values.
        """
        passes = [SharedPrompts(self.in_compute_dtype(model)) for model in models]
        return self.over_micro_batches(
            lambda part: function(part.ids, *(self.logits_and_values(one, part) for one in passes)), completions
        )

    @torch.no_grad()
    def over_micro_batches(self, function, completions: Completions) -> torch.Tensor:
        """function(micro-batch) -> k tensors (rows, ...), for the rows of every process: (k, n, ...)."""
        parts = [completions.select(rows) for rows in self.micro_batches(completions)]
        computed = torch.cat([torch.stack(function(part), dim=1) for part in parts])
        if collectives.world_size() > 1:
            rows = computed.new_zeros(len(completions), *computed.shape[1:])
            rows[collectives.rows_of_rank(len(completions))] = computed
            computed = collectives.all_reduce_sum(rows)
        return computed.movedim(1, 0).contiguous()

    def micro_batches(self, completions: Completions) -> list[slice]:
        """The rows that this process sends through a model, a micro-batch at a time."""
        n_prompt, n_tokens = completions.prompts.ids.shape[1], completions.ids.shape[1]
        size = pick_micro_batch_size(self.config, self.model.config, self.device, n_prompt, n_tokens)
        mine = range(len(completions))[collectives.rows_of_rank(len(completions))]
        return [slice(first, min(first + size, mine.stop)) for first in range(mine.start, mine.stop, size)]

    def logits_and_values(self, passes, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Restricted logits (n, T, V) and values (n, T), float32: the way of old, new and reference alike."""
        logits, values = passes(completions)
        return restrict_logits(logits, self.restriction, self.config.temperature), values.float()

    @torch.no_grad()
    def in_compute_dtype(self, model):
        """`model` in the dtype of the arithmetic: itself, or a copy. The policy's is kept, and brought up to date."""
        if model is not self.model:
            return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)
        if self.compute_model is not model:
            torch._foreach_copy_(self.copied_weights, self.weights)  # private; torch's Adam has leaned on it since 2.1
        return self.compute_model

    # ------------------------------------------------------------------------------------------
    # Through the policy, with gradients

    def policy(self, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values as in `evaluate`, whose gradients `optimise` gathers: for its `loss_of` alone."""
        return self.logits_and_values(self.trained_policy, completions)

    @observed
    @torch.enable_grad()
    def optimise(self, batch, loss_of) -> dict[str, torch.Tensor]:
        """One optimiser step. Its statistics, whose means over the processes are those of the batch: see `means`.

        batch: anything with completions, their mask (n, T), and select(rows). loss_of(micro-batch) returns a loss and a
        dict of statistics, each a mean over the micro-batch's tokens. A step whose gradient is not finite is not taken.
        """
        self.in_compute_dtype(self.model).zero_grad()
        n_tokens = batch.mask.sum()
        means = {}
        for rows in (parts := self.micro_batches(batch.completions)):
            micro_batch = batch.select(rows)
            # Means over a micro-batch's tokens add up to the mean over all by their share of the tokens; what a process
            # adds up is then divided by the number of processes, where gradients and statistics are averaged over them
            weight = collectives.world_size() * micro_batch.mask.sum() / n_tokens
            exchange = collectives.world_size() == 1 or rows is parts[-1]
            with contextlib.nullcontext() if exchange else self.trained_policy.no_sync():
                loss, statistics = loss_of(micro_batch)
                (weight * loss).backward()
            for name, value in statistics.items():
                means[name] = means.get(name, 0) + weight * value.detach()
        if self.compute_model is not self.model:
            torch._foreach_copy_(self.gradients, [weight.grad for weight in self.copied_weights])
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        skipped = (~grad_norm.isfinite()).float()
        if self.optimizer.defaults["fused"]:
            # What GradScaler sets: fused Adam does nothing where this is 1 (torch 2.0 and newer), and nobody waits
            self.optimizer.found_inf = skipped
        if self.optimizer.defaults["fused"] or not skipped:
            self.optimizer.step()
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped
        self.most_skipped = self.most_skipped.maximum(self.skipped_in_a_row)
        return {**means, "grad_norm": grad_norm, "skipped": skipped}

    def average(self, step: int) -> None:
        """Let `averaged` follow the policy after its step number `step`, from 1."""
        polynomial_average(self.averages, self.weights, step, self.config.average_power)

    # ------------------------------------------------------------------------------------------
    # Statistics, and what a checkpoint holds

    def means(self, updates: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The statistics of some optimiser steps as means over these and the processes; of the skipped their number."""
        table = torch.stack([torch.stack(list(update.values())) for update in updates])
        table = collectives.all_reduce_mean(table)
        return {**dict(zip(updates[0], table.mean(0))), "skipped": table.sum(0)[list(updates[0]).index("skipped")]}

    def fetch(self, statistics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Scalars as plain numbers, in the one transfer of a step.

        FloatingPointError where the last MAX_SKIPPED optimiser steps in a row, or more, had no finite gradient.
        """
        *values, most_skipped = torch.stack([*statistics.values(), self.most_skipped]).tolist()
        self.most_skipped = self.skipped_in_a_row
        if most_skipped >= MAX_SKIPPED:
            raise FloatingPointError(f"the gradient of {MAX_SKIPPED} optimiser steps in a row was not finite")
        return dict(zip(statistics, values))

    def state_dict(self) -> dict:
        """What a checkpoint holds of the engine: weights by name, the optimiser's state, and the skipped steps."""
        return {
            "policy": {name: weight.detach() for name, weight in self.model.named_parameters()},
            "average": {name: weight.detach() for name, weight in self.averaged.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "skipped_in_a_row": int(self.skipped_in_a_row),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take what `state_dict` gave. ValueError where weights are missing, or are another model's."""
        for model, weights in ((self.model, state["policy"]), (self.averaged, state["average"])):
            own = dict(model.named_parameters(remove_duplicate=False))  # of tied weights `weights` holds one name
            fitting = {name for name, weight in weights.items() if name in own and weight.shape == own[name].shape}
            held = {id(own[name]) for name in fitting}
            if wrong := [*(weights.keys() - fitting), *(name for name in own if id(own[name]) not in held)]:
                raise ValueError(f"its weights are not those of this model, first in {min(wrong)}")
            model.load_state_dict(weights, strict=False)
        weights = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        moments = state["optimizer"]["state"]  # empty before the first step
        for weight, kept in zip(weights, [moments[i] for i in range(len(weights))] if moments else []):
            if any(kept[name].shape != weight.shape for name in ("exp_avg", "exp_avg_sq")) or kept["step"].dim():
                raise ValueError("its optimizer is that of another model")
        groups = self.optimizer.state_dict()["param_groups"]  # by this run's settings, fused as this device has it
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.skipped_in_a_row = self.most_skipped = self.skipped_in_a_row.new_tensor(float(state["skipped_in_a_row"]))
