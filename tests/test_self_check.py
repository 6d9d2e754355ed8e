"""A run checks that transformers still computes what this program expects."""

import contextlib
import copy

import pytest
import torch
from transformers.models.gpt2 import modeling_gpt2

from gpt2_value_head import GPT2HeadWithValueModel
from support.common.errors import UserError
from support.compute import blocks, products, self_check
from support.compute.batches import Prompts
from tests.helpers import make

attention_bias = blocks.attention_bias


def without_padding(mask, *shape):
    return attention_bias(None, *shape)


def overwriting(read):
    """Store every token in the slot and at the position of the first one."""

    def call(self, tokens):
        read(self, tokens)
        self.n_read = 0

    return call


def unpadded(read):
    def call(self, tokens):
        self.bias = None
        read(self, tokens)

    return call


def check(model, dtype=torch.float32):
    self_check.check_passes(model, products.computing_copy(model, dtype))


@pytest.mark.parametrize(("dtype", "frozen_share"), [(torch.float32, 0), (torch.bfloat16, 0.5)])
def test_all_kinds_of_forward_passes_agree_in_every_dtype(policy, dtype, frozen_share):
    policy[0].freeze(frozen_share)
    check(policy[0], dtype)
    policy[0].transformer.ln_f.bias.data[7] = torch.nan
    check(policy[0], dtype)  # sampling reports NaN


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("option", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {}])
def test_our_attention_matches_the_librarys(policy, option, attention):
    """Covers every option of a GPT-2 config that changes attention, with weights large enough to show it."""
    config = copy.deepcopy(policy[0].config)
    config.update({"n_layer": 3, "initializer_range": 0.3, **option})
    model = GPT2HeadWithValueModel(config).eval()
    model.set_attn_implementation(attention)
    check(model)


@pytest.mark.parametrize(
    ("module", "name", "broken", "way"),
    [
        (blocks, "attention_bias", without_padding, "with a shared prompt"),
        (blocks, "position_ids", lambda m: torch.arange(m.shape[1]).expand_as(m), "with a shared prompt"),
        (Prompts, "spread", lambda self, tensor: tensor[self.rows.flip(0)], "with a shared prompt"),
        (blocks.Texts, "read", unpadded, "token by token"),
        (blocks.Texts, "read", overwriting, "token by token"),
        (modeling_gpt2, "create_causal_mask", lambda attention_mask, **_: attention_mask, "with a shared prompt"),
    ],
)
def test_missing_masks_and_wrong_positions_are_detected(policy, monkeypatch, module, name, broken, way):
    policy[0].set_attn_implementation("eager")
    monkeypatch.setattr(module, name, broken(getattr(module, name)) if name == "read" else broken)
    with pytest.raises(UserError, match=f"{way}, the logits are [0-9]+% off"):
        check(policy[0])


def test_the_bfloat16_copy_of_the_model_is_checked(policy, monkeypatch):
    """In bfloat16, a copy of the model does the arithmetic. If the library is only wrong in bfloat16, the run stops."""

    def broken(mask, n_keys, seq, like):
        bias = attention_bias(mask, n_keys, seq, like)
        return bias if like.dtype == torch.float32 else torch.zeros_like(bias)

    monkeypatch.setattr(blocks, "attention_bias", broken)
    make(policy, dtype="float32")
    with pytest.raises(UserError, match="with a shared prompt, the logits are"):
        make(policy, dtype="bfloat16")


@pytest.mark.parametrize(
    ("dtype", "noise", "noticed"),
    [("float32", 0.005, False), ("float32", 0.02, True), ("bfloat16", 0.05, False), ("bfloat16", 0.15, True)],
)
def test_rounding_is_allowed_and_larger_errors_are_detected(policy, monkeypatch, dtype, noise, noticed):
    forward = products.Projection.forward

    def noisy(self, states):
        logits = forward(self, states)
        direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).to(logits.dtype)
        size = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True)
        return logits + noise * size * direction / direction.norm(dim=-1, keepdim=True)

    monkeypatch.setattr(products.Projection, "forward", noisy)
    with pytest.raises(UserError, match="with a shared prompt") if noticed else contextlib.nullcontext():
        check(policy[0], getattr(torch, dtype))
