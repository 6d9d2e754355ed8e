"""Faster implementations give the same results: fixed matrix products, logits in chunks, the shared trunk."""

import copy
import dataclasses

import pytest
import torch

from config import PPOConfig
from ppo import PPOTrainer, logprobs_and_entropy, logprobs_from_logits
from reward import SentimentReward
from support.compute import products, vocabulary
from support.models.pretrained import encode_prompt
from support.run.evaluation import kl_to_reference
from tests.helpers import PROMPTS


@pytest.mark.parametrize("reorder", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_a_fixed_product_matches_torch_linear(reorder, bias, rows):
    weight, states = torch.randn(24, 16), torch.randn(rows, 2, 16)
    bias = torch.randn(24) if bias else None
    found = products.FixedProduct(weight, bias, reorder)(states)
    assert torch.allclose(found, torch.nn.functional.linear(states, weight, bias), rtol=1e-5, atol=1e-5)


def test_without_onednn_a_fixed_product_uses_torch_linear(monkeypatch):
    """This is the case on a Mac, and in a torch version without these private operators."""

    def missing(*_):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", missing, raising=False)
    weight, states = torch.randn(24, 16), torch.randn(3, 16)
    fixed = products.FixedProduct(weight, None, reorder=True)
    assert fixed.ordered is None and torch.allclose(fixed(states), states @ weight.t(), rtol=1e-5, atol=1e-5)


def frozen_head(vocab, hidden):
    return products.Projection(torch.nn.Parameter(torch.randn(vocab, hidden), requires_grad=False))


@pytest.mark.parametrize("tokens_at_once", [1, 4, 100])
def test_functions_of_logits_and_their_gradients_are_the_same_in_chunks(monkeypatch, tokens_at_once):
    """Each token has two outputs with different weights. The logits are restricted, and the temperature isn't 1."""
    monkeypatch.setattr(vocabulary, "LOGITS", 30 * tokens_at_once)
    head, states = frozen_head(30, 8), torch.randn(3, 5, 8, requires_grad=True)
    labels, weights = torch.randint(2, 30, (3, 5)), torch.randn(2, 3, 5)
    restriction = torch.zeros(30).index_fill(0, torch.tensor([0, 1]), -torch.inf)
    found = vocabulary.per_token(logprobs_and_entropy, [head], [states], labels, restriction, 0.7)
    (gradient,) = torch.autograd.grad((found * weights).sum(), states)

    logits = (states @ head.weight.t() / 0.7 + restriction).log_softmax(-1)
    probs = logits.exp()
    entropy = -(probs * logits.where(probs > 0, 0)).sum(-1)
    expected = torch.stack([logits.gather(-1, labels[..., None]).squeeze(-1), entropy])
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), states)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_the_logits_of_a_batch_are_never_all_in_memory(monkeypatch):
    monkeypatch.setattr(vocabulary, "LOGITS", 30 * 4)
    seen = []

    def function(logits, labels):
        seen.append(len(logits))
        return logprobs_from_logits(logits, labels)

    states = torch.randn(3, 5, 8, requires_grad=True)
    labels = torch.zeros(3, 5, dtype=torch.int64)
    vocabulary.per_token(function, [frozen_head(30, 8)], [states], labels, torch.zeros(30), 1.0).sum().backward()
    assert seen == [4, 4, 4, 3]


def plain_trainer(policy, **changes) -> PPOTrainer:
    config = PPOConfig(**dict(batch_size=6, minibatch_size=6, gen_len=6, dtype="float32", device="cpu") | changes)
    model = copy.deepcopy(policy[0])
    return PPOTrainer(config, model, copy.deepcopy(model), policy[1])


def test_the_step_reuses_the_trunks_hidden_states_from_sampling(policy):
    """They match the hidden states of a new forward pass, for prompts of three lengths."""
    trainer = plain_trainer(policy)
    queries = [encode_prompt(policy[1], prompt) for prompt in PROMPTS * 2]
    completions = trainer.generate(queries)
    without = dataclasses.replace(completions, hidden_states=None)
    handed, computed = trainer.engine.share_trunk(completions), trainer.engine.share_trunk(without)
    real = completions.mask[:, 1:]
    assert handed.hidden_states.shape == computed.hidden_states.shape == (*real.shape, 32)
    assert torch.allclose(handed.hidden_states[real], computed.hidden_states[real], rtol=1e-4, atol=1e-5)


def test_hidden_states_are_only_reused_from_a_model_with_the_policys_trunk(policy):
    trainer, other = plain_trainer(policy), copy.deepcopy(policy[0])
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 1
    queries = [encode_prompt(policy[1], PROMPTS[0])] * 6
    assert trainer.generate(queries, other).hidden_states is None
    for model in (trainer.model, trainer.ref_model, trainer.engine.averaged):
        assert trainer.generate(queries, model).hidden_states is not None
    assert plain_trainer(policy, frozen_share=0.0).generate(queries).hidden_states is None


def test_frozen_weights_are_only_stored_once(policy):
    trainer = plain_trainer(policy)
    engine = trainer.engine
    trainer.step(trainer.generate([encode_prompt(policy[1], PROMPTS[0])] * 6), torch.rand(6))
    for name, weight in trainer.model.named_parameters():
        others = [dict(model.named_parameters())[name] for model in (trainer.ref_model, engine.averaged)]
        assert all((other.data_ptr() == weight.data_ptr()) == (not weight.requires_grad) for other in others), name
    fixed = engine.compute_model.transformer.h[0].mlp.c_fc
    assert fixed.weight.data_ptr() == trainer.model.transformer.h[0].mlp.c_fc.weight.data_ptr()


def test_a_model_with_another_trunk_is_evaluated_with_its_own_blocks(policy):
    """Its KL matches a sum over the vocabulary, computed from two plain forward passes."""
    trainer, other = plain_trainer(policy), copy.deepcopy(policy[0])
    with torch.no_grad():
        other.transformer.h[0].mlp.c_fc.weight += 0.3 * torch.randn_like(other.transformer.h[0].mlp.c_fc.weight)
    query = encode_prompt(policy[1], PROMPTS[0])
    completions = trainer.generate([query] * 6, other)
    kl, _ = kl_to_reference(trainer, other, completions)
    for i, ids in enumerate(completions.token_lists()):
        text = torch.cat([query, torch.tensor(ids)])[None]
        with torch.no_grad():
            of_both = [model(text).logits[0, len(query) - 1 : -1] for model in (other, policy[0])]
        p, q = ((logits + trainer.engine.restriction).log_softmax(-1) for logits in of_both)
        expected = (p.exp() * (p - q).where(p > -torch.inf, 0)).sum()
        assert kl[i].item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-4)


def test_each_distinct_text_is_only_scored_once(classifier_folder):
    reward = SentimentReward(classifier_folder, torch.device("cpu"))
    seen = []
    reward.pipeline.preprocess = lambda text, _own=reward.pipeline.preprocess, **options: (
        seen.append(text) or _own(text, **options)
    )
    texts = ["很好", "差", "很好", "物流快", "差"]
    scores = reward(texts)
    assert sorted(seen) == sorted(set(texts))
    assert scores.tolist() == [scores[0], scores[1], scores[0], scores[3], scores[1]]
    assert scores[3].item() == pytest.approx(reward(["物流快"]).item(), abs=1e-6)
