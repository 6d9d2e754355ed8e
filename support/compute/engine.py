"""Run batches through a policy and its reference, and apply gradients to the policy's weights.

The engine knows nothing about PPO. Policy and reference share the first `config.frozen_share` of their blocks, unless
these differ, as they may in a second round of training. In bfloat16 a copy of the policy does the arithmetic, and its
gradients update the float32 weights (Micikevicius et al. 2018, "Mixed precision training", arXiv:1710.03740). Work is
split into micro-batches and over processes. All processes call the same methods with the whole batch and get the
results of the whole batch. The update equals that of a single process up to rounding.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.parallel import DistributedDataParallel

from gpt2_value_head import SharedPrompts, completion_mask, completion_uniforms, restriction, sample
from support.compute import processes
from support.compute.batches import Completions, Prompts, to_device
from support.compute.devices import keep_freed_memory, pick_dtype
from support.compute.products import (
    computing_copy,
    drawing_copy,
    fix_products,
    frozen_part,
    frozen_weights,
    share_frozen,
    store_transposed,
)
from support.compute.self_check import check_passes
from support.compute.vocabulary import per_token

MAX_SKIPPED = 10  # training has failed after this many optimiser steps in a row without a finite gradient


class Engine:
    """Two models, the optimiser, and the average of the policy's weights over the steps. Arguments as PPOTrainer's."""

    def __init__(self, config, model, ref_model, tokenizer):
        self.config, self.device = config, model.device
        self.dtype = pick_dtype(config.dtype, self.device)
        self.sep_token_id, self.pad_token_id = tokenizer.sep_token_id, tokenizer.pad_token_id
        self.restriction = restriction(tokenizer, model.config.vocab_size, self.device)
        self.world_size = processes.world_size()

        # Models are in float32 and share frozen weights; their copies do the arithmetic
        self.model, self.ref_model = model.eval(), ref_model.eval().requires_grad_(False)
        for one in (model, ref_model):
            one.freeze(config.frozen_share)
        if self.dtype == torch.float32:
            store_transposed(model.transformer.h[: model.n_frozen])
        if not share_frozen(model, ref_model):
            ref_model.n_frozen = 0  # no common trunk: each goes through its own blocks
        ref_model.float()
        self.averaged = copy.deepcopy(model, {id(weight): weight for weight in frozen_weights(model)})
        self.compute_model = computing_copy(model, self.dtype)
        self.reference = SharedPrompts(self.copy_of(ref_model))
        if self.dtype != torch.float32:
            fix_products(self.reference.model.transformer.h)  # its weights never change

        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.n_trained = sum(weight.numel() for weight in self.weights)
        self.copied_weights = [weight for weight in self.compute_model.parameters() if weight.requires_grad]
        policy, value_head = self.weights[:-2], self.weights[-2:]  # the head's weight and bias come last
        groups = [{"params": policy, "lr": config.lr}, {"params": value_head, "lr": config.value_lr}]
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon, fused=fused)
        self.skipped_in_a_row = 0  # optimiser steps, up to the last `fetch`
        self.averages = [weight for weight in self.averaged.parameters() if weight.requires_grad]
        self.trained_policy = SharedPrompts(self.compute_model, config.detach_value)
        check_passes(model, self.compute_model)
        keep_freed_memory()  # from here on; memory freed while loading has gone back to the system
        if self.world_size > 1:
            self.trained_policy = DistributedDataParallel(self.trained_policy, gradient_as_bucket_view=True)

    def generate(self, queries: list[torch.Tensor], model, seed: int, step: int, first: int) -> Completions:
        """Continue each query with `model`; completion i uses the random numbers of (seed, step, first + i)."""
        gen_len = self.config.gen_len
        special = self.restriction, self.sep_token_id, self.pad_token_id
        prompts = Prompts.from_tensors(queries, self.pad_token_id, self.device)
        size = self.micro_batch_size(prompts.ids.shape[1], gen_len, drawing=True)
        ids = torch.zeros(len(queries), gen_len, dtype=torch.int64, device=self.device)
        drawing, states = drawing_copy(self.passes(model).model), []
        for rows in self.own_rows(len(queries), size):
            numbers = range(first + rows.start, first + rows.stop)
            uniforms = to_device(completion_uniforms(seed, step, numbers, gen_len), self.device)
            ids[rows], drawn_states = sample(drawing, prompts.select(rows), uniforms, *special, self.config.temperature)
            states.append(drawn_states[None])
        mask = completion_mask(self.all_reduce_sum(ids), self.sep_token_id)
        longest = int(mask.sum(-1).max())
        completions = Completions(prompts, ids[:, :longest], mask[:, :longest])
        if self.ref_model.n_frozen and self.shares_trunk(model):
            states = self.gather(states, len(queries))[0]
            completions.hidden_states = states[:, : longest - 1]
        return completions

    # --- splitting a batch

    def micro_batch_size(self, n_prompt: int, n_tokens: int, drawing: bool = False) -> int:
        """Return how many completions of n_tokens tokens, after prompts of n_prompt, go through a model at once. By
        default as many as fit into an eighth of a GPU's memory; elsewhere into 128 MiB, but at least 32 if they fit in
        2 GiB. Training keeps about 17 numbers per token and unit of width in each trained block, and six copies of the
        logits if the projection is trained; drawing keeps keys and values."""
        more = 4 if drawing else 1
        if self.config.micro_batch_size:
            return more * self.config.micro_batch_size
        gpt2 = self.model.config
        kept = 8 * (n_prompt + n_tokens) * gpt2.n_layer * gpt2.n_embd
        if not drawing:
            kept += 68 * n_tokens * (gpt2.n_layer - self.model.n_frozen + 1) * gpt2.n_embd
            kept += 0 if self.model.n_frozen else 24 * n_tokens * gpt2.vocab_size
        if self.device.type == "cuda":
            return max(1, torch.cuda.get_device_properties(self.device).total_memory // 8 // kept)
        return max(1, min(2**31 // kept, max(32 * more, 2**27 // kept)))

    def own_rows(self, n: int, size: int) -> list[slice]:
        """Return the rows, out of n, that this process sends through a model, `size` at a time."""
        mine = range(n)[processes.rows_of_rank(n)] if self.world_size > 1 else range(n)
        return [slice(first, min(first + size, mine.stop)) for first in range(mine.start, mine.stop, size)]

    def parts(self, completions: Completions, batch=None) -> list:
        """Return this process's micro-batches of `completions`, or of `batch`, which has more data for each of them."""
        n_completions, n_tokens = completions.ids.shape
        size = self.micro_batch_size(completions.prompts.ids.shape[1], n_tokens)
        return [(batch or completions).select(rows) for rows in self.own_rows(n_completions, size)]

    def gather(self, computed: list[torch.Tensor], n: int) -> torch.Tensor:
        """Concatenate results (k, rows, ...) of the micro-batches of `parts` over all processes, to (k, n, ...)."""
        computed = torch.cat(computed, dim=1)
        if self.world_size == 1:
            return computed
        whole = computed.new_zeros(len(computed), n, *computed.shape[2:])
        whole[:, processes.rows_of_rank(n)] = computed
        return processes.all_reduce_sum(whole)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the processes, in place."""
        return processes.all_reduce_sum(tensor) if self.world_size > 1 else tensor

    # --- forward passes

    @torch.no_grad()
    def take_over_weights(self) -> None:
        """Copy the policy's trained weights into its computing copy; a float32 copy shares them already."""
        if self.dtype != torch.float32:
            torch._foreach_copy_(self.copied_weights, self.weights)  # private; torch's Adam has used it since 2.1

    def copy_of(self, model):
        """Return a computing copy of a model that isn't the policy."""
        return computing_copy(model, self.dtype, self.compute_model if self.shares_trunk(model) else None)

    def shares_trunk(self, model) -> bool:
        """Return whether a model shares its frozen weights with the policy."""
        ours, theirs = frozen_part(self.model), frozen_part(model)
        return bool(ours and theirs) and theirs[0].weight.data_ptr() == ours[0].weight.data_ptr()

    def passes(self, model) -> SharedPrompts:
        """Return the `passes` with which `forward` sends completions through `model`."""
        if model is self.ref_model:
            return self.reference
        if model is not self.model:
            return SharedPrompts(self.copy_of(model))
        self.take_over_weights()
        return SharedPrompts(self.compute_model)

    def forward(self, completions: Completions, function, *passes) -> tuple[torch.Tensor, torch.Tensor]:
        """Return function(logits, ids) at each token, (..., n, T), and values (n, T), both float32.

        passes: see `passes`; by default the policy's, for training. With several models, the function gets the logits
        of each, restricted and in float32, before the ids; gradient and values come from the first model. It is called
        for some tokens at a time, with logits (tokens, V) and ids (tokens,), see `per_token`.
        """
        passes = passes or (self.trained_policy,)
        (states, values), *others = (each(completions) for each in passes)
        heads = [(self.compute_model if each is self.trained_policy else each.model).lm_head for each in passes]
        states, temperature = [states, *(each for each, _ in others)], self.config.temperature
        return per_token(function, heads, states, completions.ids, self.restriction, temperature), values.float()

    @torch.no_grad()
    def share_trunk(self, completions: Completions, model=None) -> Completions:
        """Add the hidden states after the frozen blocks if policy and reference share any."""
        if not self.ref_model.n_frozen or not self.shares_trunk(model or self.model):
            return completions
        passes, prompts = self.reference, completions.prompts
        hidden_states = completions.hidden_states
        if hidden_states is None:
            states = [passes.trunk(part.prompts, part.ids)[1][None] for part in self.parts(completions)]
            hidden_states = self.gather(states, len(completions.ids))[0]
        prompt_states, _ = passes.trunk(prompts, completions.ids[:, :1])
        return replace(completions, prompts=replace(prompts, hidden_states=prompt_states), hidden_states=hidden_states)

    # --- an optimiser step

    def zero_grad(self) -> None:
        """Begin an optimiser step: clear the gradients, and copy the weights of the last step."""
        self.take_over_weights()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Free the gradients of the policy and of its computing copy."""
        for weight in (*self.weights, *self.copied_weights):
            weight.grad = None

    def micro_batches(self, batch) -> Iterator[tuple]:
        """Yield this process's micro-batches, each with its share of the batch's tokens as its weight: the weighted sum
        of their losses is the mean over all tokens. batch: an Experience."""
        n_tokens, parts = batch.mask.sum(), self.parts(batch.completions, batch)
        for part in parts:
            last = self.world_size == 1 or part is parts[-1]  # gradients are exchanged in its backward pass
            with contextlib.nullcontext() if last else self.trained_policy.no_sync():
                yield part, self.world_size * part.mask.sum() / n_tokens  # DDP divides by the number of processes

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of a loss to the gradients."""
        loss.backward()

    def clip_and_step(self) -> dict[str, torch.Tensor]:
        """Clip the gradient and take an optimiser step, or skip it if the gradient isn't finite."""
        if self.dtype != torch.float32:
            gradients = [torch.empty_like(weight) for weight in self.weights]
            torch._foreach_copy_(gradients, [weight.grad for weight in self.copied_weights])
            for weight, gradient in zip(self.weights, gradients):
                weight.grad = gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(self.weights, self.config.max_grad_norm)
        skipped = (~grad_norm.isfinite()).float()
        if fused := self.optimizer.defaults["fused"]:
            self.optimizer.found_inf = skipped  # as GradScaler sets it: if 1, Adam does nothing; no wait for the GPU
        if fused or not skipped:
            self.optimizer.step()
        self.drop_gradients()  # their memory is needed while completions are sampled
        return {"grad_norm": grad_norm, "skipped": skipped}

    # --- statistics

    def means(self, updates: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Average the statistics of optimiser steps over steps and processes, except for `skipped`, which is summed."""
        table = torch.stack([torch.stack(list(update.values())) for update in updates])
        table = self.all_reduce_sum(table / self.world_size)
        self.skipped = table[:, list(updates[0]).index("skipped")]
        return {**dict(zip(updates[0], table.mean(0))), "skipped": self.skipped.sum()}

    def fetch(self, statistics: dict[str, torch.Tensor]) -> dict[str, float]:
        """Convert scalars to floats, in one transfer from the GPU. Call `means` first. Raises FloatingPointError after
        MAX_SKIPPED skipped optimiser steps in a row."""
        fetched = torch.stack([*statistics.values(), *self.skipped]).tolist()
        for skipped in fetched[len(statistics) :]:
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            if self.skipped_in_a_row == MAX_SKIPPED:
                raise FloatingPointError(f"the gradient was not finite in {MAX_SKIPPED} optimiser steps in a row")
        return dict(zip(statistics, fetched))

    # --- checkpoints

    def state_dict(self) -> dict:
        """Return the engine's part of a checkpoint: weights by name, the optimiser's state, and the skipped steps."""
        return {
            "policy": {name: weight.detach().contiguous() for name, weight in self.model.named_parameters()},
            "average": {name: weight.detach().contiguous() for name, weight in self.averaged.named_parameters()},
            "optimizer": self.optimizer.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned. Raises ValueError or RuntimeError if the weights are of another model."""
        for model, weights in ((self.model, state["policy"]), (self.averaged, state["average"])):
            if weights.keys() != dict(model.named_parameters()).keys():
                raise ValueError("its weights belong to another model")
            model.load_state_dict(weights, strict=False)  # tied weights are saved under only one name
        groups = self.optimizer.state_dict()["param_groups"]  # with this run's settings; fused if this device allows it
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.skipped_in_a_row = state["skipped_in_a_row"]
