"""The policy: GPT-2 with a language-model head and a value head, sampling from it, and its pass over completions."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from support.compute.blocks import Texts, attention_bias, embed_prompts, position_ids, run_blocks
from support.compute.vocabulary import per_token

# ----------------------------------------------------------------------------------------------
# The model


class ValueHead(nn.Module):
    """Predicts a value for each token: the reward still to come. Starts at zero."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.summary = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.summary.weight)
        nn.init.zeros_(self.summary.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map hidden states (batch, seq, hidden) to values (batch, seq), in the dtype of the head's weights."""
        return self.summary(hidden_states.to(self.summary.weight.dtype)).squeeze(-1)

    @torch.no_grad()
    def count_from_(self, mean: float, unit: float) -> None:
        """Convert learned values v to (v - mean) / unit; a head that is still zero stays at zero."""
        if self.summary.weight.any() or self.summary.bias.any():
            self.summary.weight /= unit
            self.summary.bias.sub_(mean).div_(unit)


class CausalLMOutputWithValue(NamedTuple):
    """logits (batch, seq, vocab) of the next token, no restriction, temperature 1; value (batch, seq) at each token."""

    logits: torch.Tensor
    value: torch.Tensor
    past_key_values: Cache | None


class GPT2HeadWithValueModel(GPT2PreTrainedModel):
    """GPT-2 with a value head and a language-model head, which shares the weights of the embeddings unless the config
    says otherwise."""

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
        """Freeze the embeddings, the output projection and the lower `share` of the blocks, or nothing if it is 0."""
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
        """Compute logits and values at the last `logits_to_keep` positions of `input_ids`, or at all positions if 0.

        input_ids (batch, seq) int64. attention_mask (batch, past + seq): 0 at the padding, which may be on the left or
        right; None if there is no padding. Positions count only real tokens.
        """
        cache = DynamicCache() if use_cache and past_key_values is None else past_key_values
        positions = bias = None
        if attention_mask is not None:
            positions = position_ids(attention_mask)[:, -input_ids.shape[1] :]
            bias = attention_bias(attention_mask, attention_mask.shape[1], input_ids.shape[1], self.lm_head.weight)
        # The cache is passed by position: its name depends on the library's version
        output = self.transformer(input_ids, cache, attention_mask=bias, position_ids=positions, use_cache=use_cache)
        hidden_states = output.last_hidden_state[:, -logits_to_keep:]
        return CausalLMOutputWithValue(self.lm_head(hidden_states), self.v_head(hidden_states), cache)


# ----------------------------------------------------------------------------------------------
# Sampling


def never_sampled_ids(tokenizer, vocab_size: int) -> list[int]:
    """Return the ids that the tokenizer doesn't have (they pad the embeddings), and those of all special tokens except
    [SEP], which ends a text."""
    padding = set(range(vocab_size)).difference(tokenizer.get_vocab().values())
    return sorted(special_ids(tokenizer).union(padding) - {tokenizer.sep_token_id})


def special_ids(tokenizer) -> set[int]:
    """Return the ids of all special tokens, including those without a role, such as [CLS] if texts start with [BOS]."""
    return {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}


def restriction(tokenizer, vocab_size: int, device="cpu") -> torch.Tensor:
    """Return the term added to logits so that some tokens are never sampled: (vocab,) float32, 0 or -inf."""
    ids = torch.tensor(never_sampled_ids(tokenizer, vocab_size), dtype=torch.int64)
    return torch.zeros(vocab_size).index_fill(0, ids, float("-inf")).to(device)


def completion_uniforms(seed: int, step: int, indices: Iterable[int], gen_len: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), (indices, gen_len) float32, which depend only on (seed, step, index).

    Philox is a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key
    is (seed, step), and the completion's index is part of the counter, so a batch may be split in any way.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, 0, index])).random(gen_len, np.float32)
        for index in indices
    ]
    return torch.from_numpy(np.stack(rows))


def completion_mask(responses: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """Return the mask of completions, (n, T) bool: True up to and including the first [SEP]."""
    ended = (responses == sep_token_id).long().cumsum(-1)
    return (ended == 0) | ((ended == 1) & (responses == sep_token_id))


ASK_EVERY = 8  # tokens between checks for the end of all completions; each check waits for the GPU


@torch.no_grad()
def sample(
    model: GPT2HeadWithValueModel,
    prompts,
    uniforms: torch.Tensor,
    restriction: torch.Tensor,
    sep_token_id: int,
    pad_token_id: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue prompts by pure ancestral sampling. Returns the responses (n, gen_len) int64, with padding after [SEP],
    and their hidden states as in `Completions`, (n, gen_len - 1, hidden).

    prompts: `Prompts` of n completions; each distinct one goes through the model once. uniforms (n, gen_len): token t
    of completion i is the first whose cumulative probability exceeds uniforms[i, t] (inversion of the distribution
    function). All tensors are on one device. Raises FloatingPointError if logits are NaN.
    """
    precise = torch.float32 if uniforms.device.type == "mps" else torch.float64

    def draw(logits, uniforms):
        cumulative = logits.softmax(-1).to(precise).cumsum(-1)
        threshold = uniforms[:, None].to(precise) * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold, right=True).squeeze(1)

    n, gen_len = uniforms.shape
    responses = torch.full((n, gen_len), pad_token_id, device=uniforms.device)
    running = torch.ones(n, dtype=torch.bool, device=uniforms.device)
    texts = Texts(model, prompts, gen_len - 1)
    for t in range(gen_len):
        states = model.transformer.ln_f(texts.states)
        tokens = per_token(draw, [model.lm_head], [states], uniforms[:, t], restriction, temperature)
        tokens = tokens.where(running, pad_token_id)
        responses[:, t] = tokens
        tokens = tokens.clamp(max=len(restriction) - 1)  # NaN logits: searchsorted returns vocab_size, see below
        running = running & (tokens != sep_token_id)
        if t + 1 == gen_len or (t % ASK_EVERY == ASK_EVERY - 1 and not running.any()):
            break
        texts.read(tokens)
    if (responses == len(restriction)).any():
        raise FloatingPointError("the model's logits are not finite")
    return responses, texts.trunk_states


# ----------------------------------------------------------------------------------------------
# The pass over completions that share prompts: each distinct prompt goes through the model once


class SharedPrompts(nn.Module):
    """Runs a GPT2HeadWithValueModel on `Completions` (support/compute/batches.py). detach_value: stop the gradient from
    the value head to the transformer."""

    def __init__(self, model: GPT2HeadWithValueModel, detach_value: bool = False):
        super().__init__()
        self.model = model
        self.detach_value = detach_value

    def trunk(self, prompts, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states after the frozen blocks (embeddings if nothing is frozen): of the prompts, (prompts, P,
        hidden), and of completions `ids` (n, T) without their last tokens, (n, T - 1, hidden). Policy and reference
        share this trunk, and each has its own branch above it, like the hydra of trlX (Havrilla et al. 2023)."""
        gpt2, ids = self.model.transformer, ids[:, :-1]
        prompt_states, last = embed_prompts(gpt2, prompts)
        after = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        states = gpt2.wte(ids) + gpt2.wpe(last[prompts.rows, None] + after)
        return run_blocks(gpt2.h[: self.model.n_frozen], prompts, prompt_states, states)

    def forward(self, completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states below the output projection (n, T, hidden) and values (n, T). Position t has seen the
        prompt and the tokens before t, so the last token isn't read. Completions with known hidden states after the
        trunk go through the branch only."""
        gpt2, prompts = self.model.transformer, completions.prompts
        prompt_states, states = prompts.hidden_states, completions.hidden_states
        if states is None:
            prompt_states, states = self.trunk(prompts, completions.ids)
        prompt_states, states = run_blocks(gpt2.h[self.model.n_frozen :], prompts, prompt_states, states)
        last_of_prompts = prompts.spread(prompt_states[:, -1:])
        hidden_states = gpt2.ln_f(torch.cat([last_of_prompts, states], dim=1))
        return hidden_states, self.model.v_head(hidden_states.detach() if self.detach_value else hidden_states)
