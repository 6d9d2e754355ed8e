"""The policy: GPT-2 with its language-model head and a value head, and sampling from it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, GPT2PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils import ModelOutput

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


@dataclass
class CausalLMOutputWithValue(ModelOutput):
    """What a forward pass returns.

    logits (batch, seq, vocab): next-token scores, unrestricted and without temperature.
    value (batch, seq): the value head's estimate at each token.
    past_key_values: the key/value cache, or None where `use_cache` is off.
    """

    logits: torch.Tensor | None = None
    value: torch.Tensor | None = None
    past_key_values: Cache | None = None


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
    ) -> CausalLMOutputWithValue:
        """Logits and values at every position of `input_ids`.

        input_ids (batch, seq) int64. attention_mask (batch, past + seq) with 0 at the padding, which may stand left
        or right; positions count real tokens only. None means that nothing is padding.
        """
        hidden_states, past_key_values = self.hidden_states(input_ids, attention_mask, past_key_values, use_cache)
        return CausalLMOutputWithValue(self.lm_head(hidden_states), self.v_head(hidden_states), past_key_values)

    def hidden_states(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        """The trunk alone, arguments as in `forward`: hidden states (batch, seq, hidden) and the cache."""
        positions = None if attention_mask is None else position_ids(attention_mask)[:, -input_ids.shape[1] :]
        output = self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        return output.last_hidden_state, output.past_key_values

    def score_completions(self, completions: "Completions", detach_value=False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values where each completion token was chosen: row t saw the prompt and tokens before t.

        Returns logits (n, T, vocab) and values (n, T). Each distinct prompt goes through the model once, whatever n,
        and the last token of a completion, after which nothing is predicted, not at all. Completions that have been
        through the trunk go through the branch only. `detach_value` keeps the value head's gradient out of both.
        """
        return self.branch(self.trunk(completions) if completions.hidden_states is None else completions, detach_value)

    def trunk(self, completions: "Completions") -> "Completions":
        """The completions with their hidden states below the trained blocks; with nothing frozen, the embeddings.

        The trunk stays as it is in training, so policy and reference share it; a branch of its own is what they have
        above it. As in trlX (Havrilla et al. 2023), which calls this a hydra.
        """
        prompts, ids = completions.prompts, completions.ids[:, :-1]
        wte, wpe = self.transformer.wte, self.transformer.wpe
        prompt_positions = position_ids(torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask)
        after = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        prompt_states = wte(prompts.ids) + wpe(prompt_positions)
        states = wte(ids) + wpe(prompt_positions[prompts.rows, -1:] + after)
        prompt_states, states = self.run_blocks(self.transformer.h[: self.n_frozen], prompts, prompt_states, states)
        return replace(completions, prompts=replace(prompts, hidden_states=prompt_states), hidden_states=states)

    def branch(self, completions: "Completions", detach_value=False) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and values as in `score_completions`, of completions that have been through the trunk."""
        prompts, states = completions.prompts, completions.hidden_states
        blocks = self.transformer.h[self.n_frozen :]
        prompt_states, states = self.run_blocks(blocks, prompts, prompts.hidden_states, states)
        last_of_prompts = prompt_states[:, -1:].index_select(0, prompts.rows)
        hidden_states = self.transformer.ln_f(torch.cat([last_of_prompts, states], dim=1))
        value = self.v_head(hidden_states.detach() if detach_value else hidden_states)
        return self.lm_head(hidden_states), value

    def run_blocks(self, blocks, prompts: "Prompts", prompt_states: torch.Tensor, states: torch.Tensor):
        """Hidden states of the distinct prompts (prompts, P, hidden) and of the completions without their last token
        (n, T - 1, hidden), through some of the blocks.

        A completion reads the keys and values of its prompt, which are worked out once for all that share it. These are
        picked by `index_select` (`reorder_cache` does that): `tensor[index]` adds up gradients in the threads' order.
        """
        cache = DynamicCache()
        bias = attention_bias(prompts.mask, prompt_states, prompt_states.shape[1])
        for block in blocks:
            prompt_states = block(prompt_states, cache, bias)
        if states.shape[1]:
            cache.reorder_cache(prompts.rows)
            bias = attention_bias(prompts.mask_with(states.shape[1]), states, prompt_states.shape[1] + states.shape[1])
            for block in blocks:
                states = block(states, cache, bias)
        return prompt_states, states


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens only: 0 at the first, whatever padding stands before it. mask (batch, seq)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def attention_bias(mask: torch.Tensor | None, states: torch.Tensor, n_keys: int) -> torch.Tensor:
    """What is added to attention scores: 0 where a token may look, the dtype's lowest number elsewhere.

    states (batch, seq, hidden) are of the last tokens of n_keys. mask (batch, n_keys) is 0 at the padding, or None.
    Returns (batch, 1, seq, n_keys), or (1, 1, seq, n_keys) without padding, in the states' dtype. In memory a row is a
    multiple of 8 numbers long: CUDA's kernels would copy the bias, in every block, to make it so.
    """
    seq, lowest = states.shape[1], torch.finfo(states.dtype).min
    wide = torch.full((seq, -(-n_keys // 8) * 8), lowest, dtype=states.dtype, device=states.device)
    bias = wide.triu(n_keys - seq + 1)[None, None]
    if mask is not None:
        padding = torch.nn.functional.pad(mask == 0, (0, bias.shape[-1] - n_keys))
        bias = bias.masked_fill(padding[:, None, None], lowest)
    return bias[..., :n_keys]


# ----------------------------------------------------------------------------------------------
# Prompts, completions, and the distribution that these are drawn from


@dataclass
class Prompts:
    """The distinct prompts of a batch, left-padded, and which of them each completion continues.

    ids (prompts, P) int64. mask (prompts, P) int64, 0 at the padding, or None where all have one length.
    index (n,) int64, on the CPU: completion i continues prompt index[i]. rows: the same, on the prompts' device.
    hidden_states (prompts, P, hidden): what `GPT2HeadWithValueModel.trunk` made of them, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    index: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __post_init__(self):
        self.rows = self.index.to(self.ids.device, non_blocking=True)

    @classmethod
    def from_tensors(cls, query_tensors: list[torch.Tensor], pad_token_id: int, device) -> "Prompts":
        """Gather n 1-d token tensors, many of them usually equal."""
        queries = [tuple(query.tolist()) for query in query_tensors]
        distinct = list(dict.fromkeys(queries))
        longest = max(len(query) for query in distinct)
        padding = [longest - len(query) for query in distinct]
        ids = torch.tensor([[pad_token_id] * pad + list(query) for pad, query in zip(padding, distinct)])
        mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long() if any(padding) else None
        rows = {query: row for row, query in enumerate(distinct)}
        index = torch.tensor([rows[query] for query in queries])
        ids, mask = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (ids, mask))
        return cls(ids, mask, index)

    def select(self, rows: torch.Tensor | slice) -> "Prompts":
        """The prompts of these completions only; rows on the CPU, where it is worked out which these are."""
        used, index = self.index[rows].unique(return_inverse=True)
        if len(used) == len(self.ids):
            return replace(self, index=index)
        used = used.to(self.ids.device, non_blocking=True)
        tensors = (self.ids, self.mask, self.hidden_states)
        ids, mask, hidden_states = (None if tensor is None else tensor[used] for tensor in tensors)
        return Prompts(ids, mask, index, hidden_states)

    def mask_with(self, n_tokens: int) -> torch.Tensor | None:
        """Attention mask (n, P + n_tokens) of each completion's prompt followed by n_tokens of its own."""
        if self.mask is None:
            return None
        mask = self.mask[self.rows]
        return torch.cat([mask, mask.new_ones(len(mask), n_tokens)], dim=1)


@dataclass
class Completions:
    """A batch of completions and the prompts that they continue.

    ids (n, T) int64, right-padded. mask (n, T) bool, True at the real tokens, a final [SEP] included.
    hidden_states (n, T - 1, hidden): what `GPT2HeadWithValueModel.trunk` made of them, or None, as in `prompts`.
    """

    prompts: Prompts
    ids: torch.Tensor
    mask: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: torch.Tensor | slice) -> "Completions":
        """These completions only; rows, a tensor of them, on the CPU."""
        prompts = self.prompts.select(rows)
        if isinstance(rows, torch.Tensor):
            rows = rows.to(self.ids.device, non_blocking=True)
        hidden_states = None if self.hidden_states is None else self.hidden_states[rows]
        return Completions(prompts, self.ids[rows], self.mask[rows], hidden_states)


def never_sampled_ids(tokenizer, vocab_size: int) -> list[int]:
    """[PAD] [UNK] [CLS] [MASK]: every special token but the [SEP] that ends a text; and rows of the embeddings beyond
    the tokenizer's tokens, which only pad them to a round number."""
    return sorted({*tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)} - {tokenizer.sep_token_id})


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

    uniforms (n, gen_len) decide the draws: token t of row i is the first whose cumulative probability exceeds
    uniforms[i, t] (inversion of the distribution function). Returns (n, gen_len) int64; what follows a [SEP] is
    padding. The prefill runs once for each distinct prompt. FloatingPointError where logits are NaN.
    """
    device = prompts.ids.device
    precise = torch.float32 if device.type == "mps" else torch.float64
    uniforms = uniforms.to(device, non_blocking=True)
    n, gen_len = uniforms.shape
    responses = torch.full((n, gen_len), pad_token_id, device=device)
    running = torch.ones(n, dtype=torch.bool, device=device)

    hidden_states, cache = model.hidden_states(prompts.ids, prompts.mask, use_cache=True)
    hidden_states = hidden_states[prompts.rows, -1]
    cache.batch_select_indices(prompts.rows)
    for t in range(gen_len):
        probs = restrict_logits(model.lm_head(hidden_states), restriction, temperature).softmax(-1)
        cumulative = probs.to(precise).cumsum(-1)
        threshold = uniforms[:, t : t + 1].to(precise) * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, threshold, right=True)
        tokens = tokens.squeeze(1).where(running, pad_token_id)
        responses[:, t] = tokens
        tokens = tokens.clamp(max=len(restriction) - 1)  # NaN has no token: one past the last, told below
        running = running & (tokens != sep_token_id)
        if t + 1 == gen_len or (t % ASK_EVERY == ASK_EVERY - 1 and not running.any()):
            break
        hidden_states, cache = model.hidden_states(tokens[:, None], prompts.mask_with(t + 1), cache, use_cache=True)
        hidden_states = hidden_states[:, -1]
    if (responses == len(restriction)).any():
        raise FloatingPointError("the model's logits are not finite")
    return responses


def completion_mask(responses: torch.Tensor, sep_token_id: int) -> torch.Tensor:
    """True at a completion's tokens up to and including its first [SEP], (n, T) bool."""
    ended = (responses == sep_token_id).long().cumsum(-1)
    return (ended == 0) | ((ended == 1) & (responses == sep_token_id))
