"""How a batch goes through a policy and its reference, and how a gradient gets into the policy's weights.

The engine knows nothing about PPO: callers pass in functions of logits and values. Policy and reference share the first
`config.frozen_share` of their blocks. In bfloat16 a copy of the policy computes, and its gradients move the float32
weights (Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740). Work is split into micro-batches and
over processes, which all call the same methods with the same whole batch and get the results of the whole batch. The
update equals that of a single process up to rounding.
"""

import contextlib
import copy
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from gpt2_value_head import completion_uniforms, restrict_logits, restriction, sample
from support import processes
from support.batches import Collator, Completions, Prompts, completion_mask
from support.devices import pick_dtype, pick_micro_batch_size, to_device
from support.self_check import check_passes
from support.shared_prompts import SharedPrompts

MAX_SKIPPED = 10  # optimiser steps in a row without a finite gradient: then training has failed


class Engine:
    """Two models, the optimiser, and the average of the policy's weights over the steps. Arguments as PPOTrainer's."""

    def __init__(self, config, model, ref_model, tokenizer):
        self.config, self.device = config, model.device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.collator = Collator(tokenizer, model.config, self.device)
        self.restriction = restriction(tokenizer, model.config.vocab_size, self.device)

        # Frozen weights are in memory once; if the arithmetic is not float32, a copy of the policy computes
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

        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.copied_weights = [weight for weight in self.compute_model.parameters() if weight.requires_grad]
        policy, value_head = self.weights[:-2], self.weights[-2:]  # the head's weight and bias come last
        groups = [{"params": policy, "lr": config.lr}, {"params": value_head, "lr": config.value_lr}]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon, fused=fused)
        self.skipped_in_a_row = 0  # optimiser steps, up to the last `fetch`
        self.averaged = copy.deepcopy(model)
        self.averages = [weight for weight in self.averaged.parameters() if weight.requires_grad]
        self.trained_policy = SharedPrompts(self.compute_model, config.detach_value)
        check_passes(self.compute_model)
        if processes.world_size() > 1:
            self.trained_policy = DistributedDataParallel(self.trained_policy, gradient_as_bucket_view=True)

    def generate(self, queries: list[torch.Tensor], model, seed: int, step: int, first: int) -> list[torch.Tensor]:
        """`PPOTrainer.generate`; response i uses the random numbers of (seed, step, first + i)."""
        model = self.in_compute_dtype(model)
        special = self.restriction, self.collator.sep_token_id, self.collator.pad_token_id
        rows = range(len(queries))[processes.rows_of_rank(len(queries))]
        longest, gen_len = max(len(query) for query in queries), self.config.gen_len
        size = pick_micro_batch_size(self.config, model.config, self.device, longest, gen_len, drawing=True)
        tokens = torch.zeros(len(queries), gen_len, dtype=torch.int64)
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            prompts = Prompts.from_tensors([queries[i] for i in part], self.collator.pad_token_id, self.device)
            uniforms = to_device(completion_uniforms(seed, step, [first + i for i in part], gen_len), self.device)
            tokens[part.start : part.stop] = sample(model, prompts, uniforms, *special, self.config.temperature).cpu()
        tokens = processes.all_reduce_sum(tokens)
        lengths = completion_mask(tokens, self.collator.sep_token_id).sum(-1)
        return [row[:length] for row, length in zip(tokens, lengths)]

    def share_trunk(self, completions: Completions) -> Completions:
        """Add the hidden states above the trunk to a batch, or return it unchanged if nothing is frozen."""
        if not self.ref_model.n_frozen:
            return completions
        passes = SharedPrompts(self.ref_model)
        (states,) = self.over_micro_batches(lambda part: (passes.trunk(part).hidden_states,), completions)
        with torch.no_grad():
            prompts = passes.trunk(replace(completions, ids=completions.ids[:, :1])).prompts
        return replace(completions, prompts=prompts, hidden_states=states)

    def evaluate(self, function, completions: Completions, *models) -> torch.Tensor:
        """Apply function(ids, (logits, values) of each model), which returns k tensors (rows, T), to all completions:
        (k, n, T). Logits and values as in `logits_and_values`."""
        passes = [SharedPrompts(self.in_compute_dtype(model)) for model in models]
        return self.over_micro_batches(
            lambda part: function(part.ids, *(self.logits_and_values(part, one) for one in passes)), completions
        )

    @torch.no_grad()
    def over_micro_batches(self, function, completions: Completions) -> torch.Tensor:
        """Apply function(micro-batch), which returns k tensors (rows, ...), on all processes together: (k, n, ...)."""
        parts = [completions.select(rows) for rows in self.micro_batches(completions)]
        computed = torch.cat([torch.stack(function(part), dim=1) for part in parts])
        rows = computed.new_zeros(len(completions), *computed.shape[1:])
        rows[processes.rows_of_rank(len(completions))] = computed
        return processes.all_reduce_sum(rows).movedim(1, 0).contiguous()

    def micro_batches(self, completions: Completions) -> list[slice]:
        """The rows that this process sends through a model, one micro-batch at a time."""
        n_prompt, n_tokens = completions.prompts.ids.shape[1], completions.ids.shape[1]
        size = pick_micro_batch_size(self.config, self.model.config, self.device, n_prompt, n_tokens)
        mine = range(len(completions))[processes.rows_of_rank(len(completions))]
        return [slice(first, min(first + size, mine.stop)) for first in range(mine.start, mine.stop, size)]

    def logits_and_values(self, completions: Completions, passes=None) -> tuple[torch.Tensor, torch.Tensor]:
        """Restricted logits (n, T, V) and values (n, T), float32. passes: a SharedPrompts, by default the policy's."""
        logits, values = (passes or self.trained_policy)(completions)
        return restrict_logits(logits, self.restriction, self.config.temperature), values.float()

    @torch.no_grad()
    def in_compute_dtype(self, model):
        """`model` in the dtype of the arithmetic: itself or a copy. The copy of the policy is kept and updated here."""
        if model is not self.model:
            return model if model.dtype == self.dtype else copy.deepcopy(model).to(self.dtype)
        if self.compute_model is not model:
            torch._foreach_copy_(self.copied_weights, self.weights)  # private; torch's Adam has used it since 2.1
        return self.compute_model

    @torch.enable_grad()
    def optimise(self, batch, loss_of) -> dict[str, torch.Tensor]:
        """Take one optimiser step, or skip it if the gradient isn't finite. Returns its statistics for `means`.

        batch: an `Experience`. loss_of(micro-batch) returns a loss and a dict of statistics, means over its tokens.
        """
        self.in_compute_dtype(self.model).zero_grad()
        n_tokens, means = batch.mask.sum(), {}
        for rows in (parts := self.micro_batches(batch.completions)):
            micro_batch = batch.select(rows)
            # Weighted by its share of the tokens: the sum is the mean over all. DDP divides by the number of processes
            weight = processes.world_size() * micro_batch.mask.sum() / n_tokens
            exchange = processes.world_size() == 1 or rows is parts[-1]
            with contextlib.nullcontext() if exchange else self.trained_policy.no_sync():
                loss, statistics = loss_of(micro_batch)
                (weight * loss).backward()
            for name, value in statistics.items():
                means[name] = means.get(name, 0) + weight * value.detach()
        if self.compute_model is not self.model:
            for weight, copied_weight in zip(self.weights, self.copied_weights):
                weight.grad = copied_weight.grad.float()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        skipped = (~grad_norm.isfinite()).float()
        if fused := self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped  # as GradScaler sets it: if 1, Adam does nothing, without a look at it
        if fused or not skipped:
            self.optimizer.step()
        return {**means, "grad_norm": grad_norm, "skipped": skipped}

    def means(self, updates: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Average the statistics of several optimiser steps over steps and processes; `skipped` is summed."""
        table = torch.stack([torch.stack(list(update.values())) for update in updates])
        table = processes.all_reduce_sum(table / processes.world_size())
        self.skipped = table[:, list(updates[0]).index("skipped")]
        return {**dict(zip(updates[0], table.mean(0))), "skipped": self.skipped.sum()}

    def fetch(self, statistics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Convert scalars to floats, in one transfer from the GPU; after `means`. Raises FloatingPointError after
        MAX_SKIPPED skipped optimiser steps in a row."""
        fetched = torch.stack([*statistics.values(), *self.skipped]).tolist()
        for skipped in fetched[len(statistics) :]:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise FloatingPointError(f"the gradient of {MAX_SKIPPED} optimiser steps in a row was not finite")
        return dict(zip(statistics, fetched))

    def state_dict(self) -> dict:
        """The engine's part of a checkpoint: weights by name, the optimiser's state, and the skipped steps."""
        return {
            "policy": {name: weight.detach() for name, weight in self.model.named_parameters()},
            "average": {name: weight.detach() for name, weight in self.averaged.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises ValueError or RuntimeError if the weights are another model's."""
        for model, weights in ((self.model, state["policy"]), (self.averaged, state["average"])):
            if weights.keys() != dict(model.named_parameters()).keys():
                raise ValueError("its weights are not those of this model")
            model.load_state_dict(weights, strict=False)  # tied weights are there under one name only
        groups = self.optimizer.state_dict()["param_groups"]  # with this run's settings, fused if this device allows it
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.skipped_in_a_row = state["skipped_in_a_row"]
