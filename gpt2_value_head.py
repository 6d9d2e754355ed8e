"""The policy: GPT-2 with a language-model head and a value head, sampling from it, and its pass over completions."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

# ----------------------------------------------------------------------------------------------
# The model


class ValueHead(nn.Module):
    """A value for each token: the reward still to come. Starts at zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq), in the dtype of the head's own weights."""
        return self.summary(hidden_states.to(self.summary.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def count_from_(self, mean: float, unit: float) -> None:
        """Count learned values from `mean`, in `unit`; a head that is still zero stays at zero."""
        if self.summary.weight.any() or self.summary.bias.any():
            self.summary.weight /= unit
            self.summary.bias.sub_(mean).div_(unit)


class CausalLMOutputWithValue(NamedTuple):
    """logits (batch, seq, vocab) of the next token, unrestricted at temperature 1; value (batch, seq) at each token."""

    logits: torch.Tensor
    value: torch.Tensor
    past_key_values: Cache | None


class GPT2HeadWithValueModel(GPT2PreTrainedModel):
    """GPT-2 with a value head and a language-model head, whose weights are the embeddings' unless the config says
    otherwise."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.v_head = ValueHead(config.n_embd)
        self.n_frozen = 0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as the library does, except for the value head, which starts at zero."""
        super()._init_weights(module)
        if module is self.v_head.summary:
            nn.init.zeros_(module.weight)

    def freeze(self, share: float) -> None:
        """Freeze the lower `share` of the blocks, the embeddings and the output projection; a share of 0, nothing."""
        self.n_frozen = round(share * len(self.transformer.h))
        if self.n_frozen:
            embeddings = (self.transformer.wte, self.transformer.wpe, self.lm_head)
            for module in (*embeddings, *self.transformer.h[: self.n_frozen]):
                module.requires_grad_(False)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutputWithValue:
        """Compute logits and values at the last `logits_to_keep` positions of `input_ids`, or at all if that is 0.

        input_ids (batch, seq) int64. attention_mask (batch, past + seq) with 0 at the padding, which may be left or
        right, or None without padding; positions count real tokens only.
        """
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        positions = bias = None
        if attention_mask is not None:
            positions = position_ids(attention_mask)[:, -input_ids.shape[1] :]
            bias = attention_bias(attention_mask, attention_mask.shape[1], input_ids.shape[1], self.lm_head.weight)
        # Versions of the library differ in the cache's name, not in its place
        output = self.transformer(input_ids, cache, attention_mask=bias, position_ids=positions, use_cache=use_cache)
        hidden_states = output.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithValue(self.lm_head(hidden_states), self.v_head(hidden_states), cache)


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only, from 0 at the first one. mask (batch, seq)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def attention_bias(mask: torch.Tensor | None, n_keys: int, seq: int, like: torch.Tensor) -> torch.Tensor:
    """Additive attention mask of the last `seq` of n_keys tokens: 0 at visible keys, else the dtype's lowest number.

    mask (batch, n_keys) is 0 at the padding, or None. Returns (batch, 1, seq, n_keys), or (1, 1, seq, n_keys) without
    padding, in the dtype of `like`. The library uses a 4-d mask unchanged; of a 2-d one it would ask the GPU at every
    token whether it hides anything. In memory a row is a multiple of 8 numbers long, or CUDA's kernels would copy it.
    """
    lowest = torch.finfo(like.dtype).min
    wide = torch.full((seq, -(-n_keys // 8) * 8), lowest, dtype=like.dtype, device=like.device)
    bias = wide.triu(n_keys - seq + 1)[None, None]
    if mask is not None:
        padding = torch.nn.functional.pad(mask == 0, (0, bias.shape[-1] - n_keys))
        bias = bias.masked_fill(padding[:, None, None], lowest)
    return bias[..., :n_keys]


# ----------------------------------------------------------------------------------------------
# Sampling


def never_sampled_ids(tokenizer, vocab_size: int) -> list[int]:
    """All special tokens except [SEP], which ends a text, and ids that aren't the tokenizer's, which pad the
    embeddings."""
    padding = set(range(vocab_size)).difference(tokenizer.get_vocab().values())
    return sorted(special_ids(tokenizer).union(padding) - {tokenizer.sep_token_id})


def special_ids(tokenizer) -> set[int]:
    """Ids of all special tokens, including those that have no role, such as [CLS] if texts start with [BOS]."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def restriction(tokenizer, vocab_size: int, device="cpu") -> torch.Tensor:
    """The term added to logits so that some tokens are never sampled: (vocab,) float32, 0 or -inf."""
    ids = torch.tensor(never_sampled_ids(tokenizer, vocab_size), dtype=torch.int64)
    return torch.zeros(vocab_size).index_fill(0, ids, float("-inf")).to(device)


def restrict_logits(logits: torch.Tensor, restriction: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logits of the distribution that is sampled, logits / temperature + restriction, in float32 or better.

    logits (..., vocab), restriction (vocab,). Sampling, policy, reference and update all use it, or PPO's ratios
    and the KL would compare different things. One pass over memory, including the cast.
    """
    return torch.add(restriction, logits, alpha=1 / temperature)


def completion_uniforms(seed: int, step: int, indices: Iterable[int], gen_len: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (indices, gen_len) float32, which depend only on (seed, step, index).

    Philox is a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key
    is (seed, step), and the completion's index is part of the counter, so a batch may be split in any way.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, index])).random(gen_len, np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


def completion_mask(responses: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """True at a completion's tokens up to and including its first [SEP], (n, T) bool."""
    ended = (responses == sep_token_id).long().cumsum(-1)
    return (ended == 0) | ((ended == 1) & (responses == sep_token_id))


ASK_EVERY = 8  # tokens between two checks whether all completions have ended: each check waits for the GPU


@torch.no_grad()
def sample(
    model: GPT2HeadWithValueModel,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    rows: torch.Tensor,
    uniforms: torch.Tensor,
    restriction: torch.Tensor,
    sep_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Continue prompts by pure ancestral sampling, with the key/value cache. Returns (n, gen_len) int64, with padding
    after [SEP].

    ids (prompts, P) int64: distinct prompts, left-padded; each goes through the model once. mask (prompts, P) int64, 0
    at the padding, or None without padding. rows (n,) int64: completion i continues prompt rows[i]. uniforms
    (n, gen_len), all on one device: token t of completion i is the first whose cumulative probability exceeds
    uniforms[i, t] (inversion of the distribution function). Raises FloatingPointError if logits are NaN.
    """
    precise = torch.float32 if ids.device.type == "mps" else torch.float64
    n, gen_len = uniforms.shape
    responses = torch.full((n, gen_len), pad_token_id, device=ids.device)
    running = torch.ones(n, dtype=torch.bool, device=ids.device)
    seen = None if mask is None else torch.cat([mask[rows], mask.new_ones(n, gen_len)], dim=1)

    cache = DynamicCache()
    logits = model(ids, mask, cache, use_cache=True, logits_to_keep=1).logits[rows, -1]
    cache.batch_select_indices(rows)
    for t in range(gen_len):
        probs = restrict_logits(logits, restriction, temperature).softmax(-1)
        cumulative = probs.to(precise).cumsum(-1)
        threshold = uniforms[:, t : t + 1].to(precise) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)
        tokens = tokens.squeeze(1).where(running, pad_token_id)
        responses[:, t] = tokens
        tokens = tokens.clamp(max=len(restriction) - 1)  # NaN logits: searchsorted returns vocab_size, see below
        running = running & (tokens != sep_token_id)
        if t + 1 == gen_len or (t % ASK_EVERY == ASK_EVERY - 1 and not running.any()):
            break
        seen_now = None if seen is None else seen[:, : ids.shape[1] + t + 1]
        logits = model(tokens[:, None], seen_now, cache, use_cache=True).logits[:, -1]
    if (responses == len(restriction)).any():
        raise FloatingPointError("the model's logits are not finite")
    return responses


# ----------------------------------------------------------------------------------------------
# The pass over completions that share prompts: each distinct prompt goes through the model once


class SharedPrompts(nn.Module):
    """A GPT2HeadWithValueModel on `Completions` (support/compute/batches.py). detach_value: no gradient from the value
    head to the transformer."""

    def __init__(self, model: GPT2HeadWithValueModel, detach_value: bool = False):
        super().__init__()
        self.model = model
        self.detach_value = detach_value

    def trunk(self, prompts, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states of prompts (prompts, P, hidden) and of completions ids (n, T) without their last tokens,
        (n, T - 1, hidden), after the frozen blocks; if nothing is frozen, the embeddings. Policy and reference share
        this trunk and have a branch each above it, like the hydra of trlX (Havrilla et al. 2023)."""
        gpt2, ids = self.model.transformer, ids[:, :-1]
        prompt_positions = position_ids(torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask)
        after = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        prompt_states = gpt2.wte(prompts.ids) + gpt2.wpe(prompt_positions)
        states = gpt2.wte(ids) + gpt2.wpe(prompt_positions[prompts.rows, -1:] + after)
        return run_blocks(gpt2.h[: self.model.n_frozen], prompts, prompt_states, states)

    def forward(self, completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, T, vocab) and values (n, T); those at t have seen the prompt and the tokens before t, so the last
        token isn't read. Completions that have been through the trunk only go through the branch."""
        gpt2, prompts = self.model.transformer, completions.prompts
        prompt_states, states = prompts.hidden_states, completions.hidden_states
        if states is None:
            prompt_states, states = self.trunk(prompts, completions.ids)
        prompt_states, states = run_blocks(gpt2.h[self.model.n_frozen :], prompts, prompt_states, states)
        last_of_prompts = prompts.spread(prompt_states[:, -1:])
        hidden_states = gpt2.ln_f(torch.cat([last_of_prompts, states], dim=1))
        value = self.model.v_head(hidden_states.detach() if self.detach_value else hidden_states)
        return self.model.lm_head(hidden_states), value


def run_blocks(blocks, prompts, prompt_states: torch.Tensor, states: torch.Tensor):
    """Run some blocks on the hidden states of the distinct prompts (prompts, P, hidden) and of the completions without
    their last tokens (n, T - 1, hidden). Returns both."""
    (n_prompt, seq), cache = (prompt_states.shape[1], states.shape[1]), DynamicCache()
    bias = attention_bias(prompts.mask, n_prompt, n_prompt, prompt_states)
    for block in blocks:
        prompt_states = block(prompt_states, cache, attention_mask=bias)
    if seq:
        for layer in cache.layers:
            if layer.is_initialized:  # the layers below these blocks are not
                layer.keys, layer.values = prompts.spread(layer.keys), prompts.spread(layer.values)
        bias = attention_bias(prompts.mask_with(seq), n_prompt + seq, seq, states)
        for block in blocks:
            states = block(states, cache, attention_mask=bias)
    return prompt_states, states
