"""The policy: GPT-2 with its language-model head and a value head, and sampling from it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from support.batches import Prompts, never_sampled_ids

# ----------------------------------------------------------------------------------------------
# The model


class ValueHead(nn.Module):
    """One number for every token: the reward still to come from there on. Starts at zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, seq, hidden) -> (batch, seq), in the dtype of the head's own weights."""
        return self.summary(hidden_states.to(self.summary.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def scale_(self, factor: float) -> None:
        """Have all values be `factor` times what they are."""
        self.summary.weight *= factor
        self.summary.bias *= factor


class CausalLMOutputWithValue(NamedTuple):
    """What a forward pass returns.

    logits (batch, seq, vocab): of the next token, unrestricted and without temperature.
    value (batch, seq): the value head's estimate at each token.
    past_key_values: the key/value cache, or None where there is none.
    """

    logits: torch.Tensor
    value: torch.Tensor
    past_key_values: Cache | None


class GPT2HeadWithValueModel(GPT2PreTrainedModel):
    """GPT-2 with a language-model head, tied to the embedding unless the config says no, and a value head."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config):
        super().__init__(config)
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.v_head = ValueHead(config.n_embd)
        self.n_frozen = 0
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The library's GPT-2 initialisation, except that the value head starts at zero."""
        super()._init_weights(module)
        if module is self.v_head.summary:
            nn.init.zeros_(module.weight)

    def freeze(self, share: float) -> None:
        """Keep the lower `share` of the blocks as they are, and the embeddings with the output projection.

        Share 0 freezes nothing.
        """
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
        """Logits and values at the last `logits_to_keep` positions of `input_ids`, at all where that is 0.

        input_ids (batch, seq) int64. attention_mask (batch, past + seq) with 0 at the padding, which may stand left
        or right; positions count real tokens only. None means that nothing is padding.
        """
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        positions = bias = None
        if attention_mask is not None:
            positions = position_ids(attention_mask)[:, -input_ids.shape[1] :]
            bias = attention_bias(attention_mask, attention_mask.shape[1], input_ids.shape[1], self.lm_head.weight)
        # The cache's name differs between versions of the library, its place does not
        output = self.transformer(input_ids, cache, attention_mask=bias, position_ids=positions, use_cache=use_cache)
        hidden_states = output.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithValue(self.lm_head(hidden_states), self.v_head(hidden_states), cache)


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only: 0 at the first, whatever padding stands before it. mask (batch, seq)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def attention_bias(mask: torch.Tensor | None, n_keys: int, seq: int, like: torch.Tensor) -> torch.Tensor:
    """What is added to attention scores: 0 where a token may look, the dtype's lowest number elsewhere.

    It is of the last `seq` of n_keys tokens. mask (batch, n_keys) is 0 at the padding, or None. Returns
    (batch, 1, seq, n_keys), or (1, 1, seq, n_keys) without padding, in the dtype of `like`; the library takes four
    dimensions as they are, and would ask the GPU whether a mask hides anything, at every token. In memory a row is a
    multiple of 8 numbers long: CUDA's kernels would copy the bias, in every block, to make it so.
    """
    lowest = torch.finfo(like.dtype).min
    wide = torch.full((seq, -(-n_keys // 8) * 8), lowest, dtype=like.dtype, device=like.device)
    bias = wide.triu(n_keys - seq + 1)[None, None]
    if mask is not None:
        padding = torch.nn.functional.pad(mask == 0, (0, bias.shape[-1] - n_keys))
        bias = bias.masked_fill(padding[:, None, None], lowest)
    return bias[..., :n_keys]


# ----------------------------------------------------------------------------------------------
# The distribution that completions are drawn from


def restriction(tokenizer, vocab_size: int, device="cpu") -> torch.Tensor:
    """What is added to logits so that some tokens are never sampled: (vocab,) float32, 0 or -inf."""
    ids = torch.tensor(never_sampled_ids(tokenizer, vocab_size), dtype=torch.int64)
    return torch.zeros(vocab_size).index_fill(0, ids, float("-inf")).to(device)


def restrict_logits(logits: torch.Tensor, restriction: torch.Tensor, temperature: float) -> torch.Tensor:
    """The logits of the distribution that is sampled, logits / temperature + restriction, in float32 at least.

    logits (..., vocab), restriction (vocab,). Sampling, policy, reference and update all use this one distribution;
    otherwise PPO's ratios and the KL would compare different things. One pass over memory, cast included.
    """
    return torch.add(restriction, logits, alpha=1 / temperature)


# ----------------------------------------------------------------------------------------------
# Sampling


def completion_uniforms(seed: int, step: int, indices: Iterable[int], gen_len: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), (indices, gen_len) float32: a function of (seed, step, index) alone.

    Philox is a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key
    is (seed, step), the completion's index stands in the counter, so a batch may be split in any way.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, index])).random(gen_len, np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


ASK_EVERY = 8  # tokens between two looks whether all completions have ended: a GPU stops for each


@torch.no_grad()
def sample(
    model: GPT2HeadWithValueModel,
    prompts: Prompts,
    uniforms: torch.Tensor,
    restriction: torch.Tensor,
    sep_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Continue every prompt by pure ancestral sampling, with the key/value cache.

    uniforms (n, gen_len), where the prompts are, decide the draws: token t of row i is the first whose cumulative
    probability exceeds uniforms[i, t] (inversion of the distribution function). Returns (n, gen_len) int64; after a
    [SEP] comes padding. The prefill runs once for each distinct prompt. FloatingPointError where logits are NaN.
    """
    device = prompts.ids.device
    precise = torch.float32 if device.type == "mps" else torch.float64
    n, gen_len = uniforms.shape
    responses = torch.full((n, gen_len), pad_token_id, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)

    n_prompt, mask = prompts.ids.shape[1], prompts.mask_with(gen_len)
    cache = DynamicCache()
    logits = model(prompts.ids, prompts.mask, cache, use_cache=True, logits_to_keep=1).logits[prompts.rows, -1]
    cache.batch_select_indices(prompts.rows)
    for t in range(gen_len):
        probs = restrict_logits(logits, restriction, temperature).softmax(-1)
        cumulative = probs.to(precise).cumsum(-1)
        threshold = uniforms[:, t : t + 1].to(precise) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)
        tokens = tokens.squeeze(1).where(running, pad_token_id)
        responses[:, t] = tokens
        tokens = tokens.clamp(max=len(restriction) - 1)  # NaN has no token: one past the last, told below
        running = running & (tokens != sep_token_id)
        if t + 1 == gen_len or (t % ASK_EVERY == ASK_EVERY - 1 and not running.any()):
            break
        seen = None if mask is None else mask[:, : n_prompt + t + 1]
        logits = model(tokens[:, None], seen, cache, use_cache=True).logits[:, -1]
    if (responses == len(restriction)).any():
        raise FloatingPointError("the model's logits are not finite")
    return responses
