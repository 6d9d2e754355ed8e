"""GPT-2's blocks on prompts and completions: whole completions in one pass, or one token of each at a time.

The library's layers are called in the same order as in its own block. Only the attention is written here, so that
completions share the keys and values of their prompt. Shapes: p distinct prompts of P tokens, n completions of S
tokens, head size d.
"""

import torch


def attention_bias(mask: torch.Tensor | None, n_keys: int, seq: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive attention mask of the last `seq` of n_keys tokens: 0 if visible, else the dtype's minimum.

    mask (batch, n_keys) is 0 at the padding, or None. Returns (batch, 1, seq, n_keys), or (1, 1, seq, n_keys) without
    padding, in the dtype of `like`. The library uses a 4-d mask unchanged; with a 2-d one it would wait for the GPU
    at every token. In memory, rows are padded to a multiple of 8 numbers; otherwise CUDA's kernels would copy them.
    """
    lowest = torch.finfo(like.dtype).min
    wide = torch.full((seq, -(-n_keys // 8) * 8), lowest, dtype=like.dtype, device=like.device)
    bias = wide.triu(n_keys - seq + 1)[None, None]
    if mask is not None:
        padding = torch.nn.functional.pad(mask == 0, (0, bias.shape[-1] - n_keys))
        bias = bias.masked_fill(padding[:, None, None], lowest)
    return bias[..., :n_keys]


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Return positions that count real tokens only, from 0 at the first one. mask (batch, seq)."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def embed_prompts(gpt2, prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of the distinct prompts (p, P, hidden), and the position of the last token of each (p,)."""
    positions = position_ids(torch.ones_like(prompts.ids) if prompts.mask is None else prompts.mask)
    return gpt2.wte(prompts.ids) + gpt2.wpe(positions), positions[:, -1]


def run_block(block, states: torch.Tensor, attend) -> torch.Tensor:
    """Run one GPT-2 block on states (rows, hidden). `attend` maps queries, keys and values, (rows, 3, heads, d), to the
    attention's output, (rows, hidden)."""
    heads = block.attn.num_heads
    states = states + block.attn.c_proj(attend(block.attn.c_attn(block.ln_1(states)).unflatten(-1, (3, heads, -1))))
    return states + block.mlp(block.ln_2(states))


def attention(block, queries, keys, values, bias: torch.Tensor | None) -> torch.Tensor:
    """Return softmax(scale queries keys^T + bias) values, (n, seq, hidden). queries (n, heads, seq, d), keys and values
    (n, heads, n_keys, d), bias from `attention_bias` or None."""
    config = block.attn.config
    scale = queries.shape[-1] ** -0.5 if config.scale_attn_weights else 1.0
    if config.scale_attn_by_inverse_layer_idx:
        scale /= block.attn.layer_idx + 1
    if config._attn_implementation == "eager":
        scores = queries @ keys.transpose(-1, -2)
        scores = scores.mul_(scale) if bias is None else torch.add(bias, scores, alpha=scale)
        mixed = scores.softmax(-1) @ values
    else:
        mixed = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, bias, scale=scale)
    return mixed.transpose(1, 2).flatten(2)


def run_blocks(blocks, prompts, prompt_states: torch.Tensor, states: torch.Tensor, kept: list | None = None):
    """Run some blocks on the hidden states of the distinct prompts (p, P, hidden) and of the completions without their
    last tokens (n, S, hidden). Returns both. kept: list for each block's prompt keys and values (p, heads, 2, P, d)."""
    (p, n_prompt, _), (n, seq, _) = prompt_states.shape, states.shape
    bias = attention_bias(prompts.mask, n_prompt, n_prompt, states)
    completion_bias = attention_bias(prompts.mask_with(seq), n_prompt + seq, seq, states) if seq else None
    rows = torch.cat([prompt_states.flatten(0, 1), states.flatten(0, 1)])
    for block in blocks:

        def attend(qkv):
            of_prompts, own = qkv.split([p * n_prompt, n * seq])
            of_prompts = of_prompts.unflatten(0, (p, n_prompt)).transpose(1, 3)  # (p, heads, 3, P, d)
            mixed = attention(block, *of_prompts.unbind(2), bias).flatten(0, 1)
            if kept is not None:
                kept.append(of_prompts[:, :, 1:])
            if not seq:
                return mixed
            query, *own = own.unflatten(0, (n, seq)).permute(2, 0, 3, 1, 4)  # each (n, heads, S, d)
            shared = prompts.spread(of_prompts[:, :, 1:]).unbind(2)
            keys, values = (torch.cat(parts, dim=2) for parts in zip(shared, own))
            return torch.cat([mixed, attention(block, query, keys, values, completion_bias).flatten(0, 1)])

        rows = run_block(block, rows, attend)
    prompt_states, states = rows.split([p * n_prompt, n * seq])
    return prompt_states.unflatten(0, (p, n_prompt)), states.unflatten(0, (n, seq))


class Texts:
    """Reads texts token by token: the prompts first, then up to n_tokens of each of n completions.

    Keys and values are written in place into buffers of fixed length. states (n, hidden): the blocks' output for the
    last token. trunk_states (n, n_tokens, hidden): the output of the frozen blocks for each token so far, 0 if
    nothing is frozen.
    """

    def __init__(self, model, prompts, n_tokens: int):
        self.gpt2, self.n_frozen, self.n_read = model.transformer, model.n_frozen, 0
        n, self.n_prompt, kept = len(prompts.rows), prompts.ids.shape[1], []
        states, positions = embed_prompts(self.gpt2, prompts)
        self.positions = positions[prompts.rows]
        mask = prompts.mask_with(n_tokens)
        self.bias = None if mask is None else attention_bias(mask, mask.shape[1], 1, states)
        states, _ = run_blocks(self.gpt2.h, prompts, states, states.new_empty(n, 0, states.shape[-1]), kept)
        self.states = states[prompts.rows, -1]
        self.trunk_states = states.new_zeros(n, n_tokens, states.shape[-1])
        self.buffers = []
        for of_prompts in kept:
            _, heads, _, n_prompt, size = of_prompts.shape
            self.buffers.append(states.new_empty(2, n, heads, n_prompt + n_tokens, size))
            self.buffers[-1][..., :n_prompt, :] = of_prompts[prompts.rows].permute(2, 0, 1, 3, 4)

    def read(self, tokens: torch.Tensor) -> None:
        """Read the next token of each completion, (n,) int64."""
        now = self.n_prompt + self.n_read
        self.n_read += 1
        bias = None if self.bias is None else self.bias[..., : now + 1]
        states = self.gpt2.wte(tokens) + self.gpt2.wpe(self.positions + self.n_read)
        for i, (block, buffer) in enumerate(zip(self.gpt2.h, self.buffers), 1):

            def attend(qkv):
                buffer[:, :, :, now] = qkv[:, 1:].transpose(0, 1)  # (2, n, heads, d)
                return attention(block, qkv[:, 0, :, None], *buffer[..., : now + 1, :], bias).squeeze(1)

            states = run_block(block, states, attend)
            if i == self.n_frozen:
                self.trunk_states[:, self.n_read - 1] = states
        self.states = states
