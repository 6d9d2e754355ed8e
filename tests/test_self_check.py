"""A run looks whether the library still computes as this program drives it."""

import pytest
import torch
from transformers.models.gpt2 import modeling_gpt2

import gpt2_value_head
import train_ppo
from support import self_check, shared_prompts
from support.batches import Prompts
from support.errors import UserError


def without_padding(mask, *shape):
    return gpt2_value_head.attention_bias(None, *shape)


def without_mask(*shape):
    return torch.zeros_like(gpt2_value_head.attention_bias(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen_share", [0, 0.5, 1])
def test_all_ways_agree_in_every_dtype(policy, dtype, frozen_share):
    model, _ = policy
    model.freeze(frozen_share)
    self_check.check_passes(model.to(dtype))


@pytest.mark.parametrize("break_it", [without_padding, without_mask])
def test_shared_prompts_whose_mask_the_library_loses_are_noticed(policy, monkeypatch, break_it):
    monkeypatch.setattr(shared_prompts, "attention_bias", break_it)
    with pytest.raises(UserError, match="with a shared prompt a text gets logits that are [0-9]+% off"):
        self_check.check_passes(policy[0])


def test_shared_prompts_at_wrong_positions_are_noticed(policy, monkeypatch):
    monkeypatch.setattr(shared_prompts, "position_ids", lambda mask: torch.arange(mask.shape[1]).expand_as(mask))
    with pytest.raises(UserError, match="with a shared prompt"):
        self_check.check_passes(policy[0])


def test_completions_that_read_another_prompt_are_noticed(policy, monkeypatch):
    monkeypatch.setattr(Prompts, "spread", lambda self, tensor: tensor[self.rows.flip(0)])
    with pytest.raises(UserError, match="with a shared prompt"):
        self_check.check_passes(policy[0])


def test_a_mask_that_sampling_loses_is_noticed(policy, monkeypatch):
    attention_bias = gpt2_value_head.attention_bias
    monkeypatch.setattr(gpt2_value_head, "attention_bias", lambda mask, *shape: attention_bias(None, *shape))
    with pytest.raises(UserError, match="token by token a text gets"):
        self_check.check_passes(policy[0])


def test_a_cache_that_the_library_does_not_fill_is_noticed(policy, monkeypatch):
    forward = gpt2_value_head.GPT2HeadWithValueModel.forward

    def uncached(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, logits_to_keep=0):
        mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        return forward(self, input_ids, mask, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(gpt2_value_head.GPT2HeadWithValueModel, "forward", uncached)
    with pytest.raises(UserError, match="token by token"):
        self_check.check_passes(policy[0])


def test_a_whole_text_whose_own_mask_is_lost_is_noticed(policy, monkeypatch):
    """The library's mask for a text without padding; eager attention has no other."""
    policy[0].set_attn_implementation("eager")
    monkeypatch.setattr(modeling_gpt2, "create_causal_mask", lambda attention_mask, **_: attention_mask)
    with pytest.raises(UserError, match="with a shared prompt"):
        self_check.check_passes(policy[0])


def test_a_run_ends_with_the_line_before_it_trains(demo, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shared_prompts, "attention_bias", without_mask)
    assert train_ppo.main(["--preset", "demo", "--runs_dir", str(tmp_path), "--run_name", "r"]) == 2
    assert "is not what this program was written for: with a shared prompt" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_logits_that_are_not_finite_are_left_to_sampling(policy):
    with torch.no_grad():
        policy[0].transformer.ln_f.weight.fill_(float("nan"))
    self_check.check_passes(policy[0])
