"""A pass over completions that share prompts: each distinct prompt goes through the model only once."""

from dataclasses import replace

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from gpt2_value_head import attention_bias, position_ids
from support.batches import Completions, Prompts


class SharedPrompts(nn.Module):
    """A GPT2HeadWithValueModel on completions. detach_value: no gradient from the value head to the transformer."""

    def __init__(self, model, detach_value: bool = False):
        super().__init__()
        self.model = model
        self.detach_value = detach_value

    def trunk(self, completions: Completions) -> Completions:
        """Add the hidden states after the frozen blocks; if nothing is frozen, the embeddings. Policy and reference
        share this trunk and have a branch each above it, like the hydra of trlX (Havrilla et al. 2023)."""
        prompts, ids = completions.prompts, completions.ids[:, :-1]
        gpt2 = self.model.transformer
        prompt_positions = position_ids(torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask)
        after = torch.arange(1, ids.shape[1] + 1, device=ids.device)
        prompt_states = gpt2.wte(prompts.ids) + gpt2.wpe(prompt_positions)
        states = gpt2.wte(ids) + gpt2.wpe(prompt_positions[prompts.rows, -1:] + after)
        prompt_states, states = run_blocks(gpt2.h[: self.model.n_frozen], prompts, prompt_states, states)
        return replace(completions, prompts=replace(prompts, hidden_states=prompt_states), hidden_states=states)

    def forward(self, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, T, vocab) and values (n, T); those at t have seen the prompt and the tokens before t, so the last
        token isn't read. Completions that have been through the trunk only go through the branch."""
        if completions.hidden_states is None:
            completions = self.trunk(completions)
        gpt2, prompts = self.model.transformer, completions.prompts
        blocks = gpt2.h[self.model.n_frozen :]
        prompt_states, states = run_blocks(blocks, prompts, prompts.hidden_states, completions.hidden_states)
        last_of_prompts = prompts.spread(prompt_states[:, -1:])
        hidden_states = gpt2.ln_f(torch.cat([last_of_prompts, states], dim=1))
        value = self.model.v_head(hidden_states.detach() if self.detach_value else hidden_states)
        return self.model.lm_head(hidden_states), value


def run_blocks(blocks, prompts: Prompts, prompt_states: torch.Tensor, states: torch.Tensor):
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
