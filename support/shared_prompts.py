"""The policy's pass over completions that share prompts: each distinct prompt goes through the model once.

Plain `GPT2HeadWithValueModel.forward` would take each completion with its prompt before it. Here the prompts go first,
and the completions, without them, read their keys and values. `tests/test_sampling.py` holds the two ways together.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from gpt2_value_head import position_ids
from support.batches import Completions, Prompts


class SharedPrompts(nn.Module):
    """Logits and values of completions under a GPT2HeadWithValueModel, whose weights are this module's.

    `detach_value` keeps the value head's gradient out of the transformer.
    """

    def __init__(self, model, detach_value: bool = False):
        super().__init__()
        self.model = model
        self.detach_value = detach_value

    def trunk(self, completions: Completions) -> Completions:
        """The completions with their hidden states below the trained blocks; with nothing frozen, the embeddings.

        The trunk stays as it is in training, so policy and reference share it; a branch of its own is what they have
        above it. As in trlX (Havrilla et al. 2023), which calls this a hydra.
        """
        prompts, ids = completions.prompts, completions.ids[:, :-1]
        gpt2 = self.model.transformer
        prompt_positions = position_ids(torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask)
        after = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        prompt_states = gpt2.wte(prompts.ids) + gpt2.wpe(prompt_positions)
        states = gpt2.wte(ids) + gpt2.wpe(prompt_positions[prompts.rows, -1:] + after)
        prompt_states, states = run_blocks(gpt2.h[: self.model.n_frozen], prompts, prompt_states, states)
        return replace(completions, prompts=replace(prompts, hidden_states=prompt_states), hidden_states=states)

    def forward(self, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, T, vocab) and values (n, T) where each token was chosen: row t saw the prompt and tokens before t.

        After a completion's last token nothing is predicted, so it is left out. Completions that have been through the
        trunk go through the branch only.
        """
        if completions.hidden_states is None:
            completions = self.trunk(completions)
        gpt2, prompts = self.model.transformer, completions.prompts
        blocks = gpt2.h[self.model.n_frozen :]
        prompt_states, states = run_blocks(blocks, prompts, prompts.hidden_states, completions.hidden_states)
        last_of_prompts = prompt_states[:, -1:].index_select(0, prompts.rows)
        hidden_states = gpt2.ln_f(torch.cat([last_of_prompts, states], dim=1))
        value = self.model.v_head(hidden_states.detach() if self.detach_value else hidden_states)
        return self.model.lm_head(hidden_states), value


def run_blocks(blocks, prompts: Prompts, prompt_states: torch.Tensor, states: torch.Tensor):
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
