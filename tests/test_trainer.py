"""PPOTrainer: one step on a batch."""

import copy
import math

import pytest
import torch

from config import PPOConfig
from ppo import PPOTrainer
from support.evaluation import kl_to_reference
from support.models import encode_prompt
from tests.helpers import PROMPTS, batch_of, make


def test_first_ratio_is_one_and_first_kl_zero(policy):
    trainer = make(policy, ppo_epochs=1)
    stats = trainer.step(*batch_of(trainer, policy))
    assert stats["ppo/policy/approxkl"] < 1e-10 and stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert all(type(value) is float and math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("frozen_share, dtype", [(0, "float32"), (0.5, "float32"), (1, "float32"), (0.5, "bfloat16")])
def test_kl_to_the_reference_against_one_sequence_at_a_time(policy, frozen_share, dtype):
    """Prompts of three lengths, shared by responses of six, in micro-batches of 4; a temperature that is not 1.

    The reading beside it: plain passes over unpadded sequences, of the weights as bfloat16 leaves them.
    """
    trainer = make(policy, frozen_share=frozen_share, dtype=dtype, temperature=0.7, micro_batch_size=4, lr=3e-2)
    reference = copy.deepcopy(trainer.model)
    queries, _, scores = batch_of(trainer, policy)
    responses = [torch.tensor(ids) for ids in ([5], [3], [5, 6, 3], [9, 9, 8, 7], [5, 6, 7, 8, 3], [9] * 6)]
    trainer.step(queries, responses, scores)
    kls, ref_logprobs, mask = kl_to_reference(trainer, trainer.model, queries, responses)
    assert mask.sum(1).tolist() == [1, 1, 3, 4, 5, 6] and mask.shape == ref_logprobs.shape == (6, 6)
    plain = [copy.deepcopy(model).to(getattr(torch, dtype)).float() for model in (trainer.model, reference)]
    close = dict(abs=1e-4, rel=1e-3) if dtype == "float32" else dict(abs=0.03, rel=0.1)
    for i, (query, response) in enumerate(zip(queries, responses)):
        new, old = (logprobs_of(model, query, response, temperature=0.7) for model in plain)
        assert kls[i].item() == pytest.approx((new.exp() * (new - old)).sum().item(), **close) and kls[i] > 0.01
        of_tokens = old[range(len(response)), response].tolist()
        assert ref_logprobs[i, : len(response)].tolist() == pytest.approx(of_tokens, **close)


def logprobs_of(model, query, response, temperature):
    """Log-probabilities (T, vocabulary) float64 where each token of the response was chosen."""
    with torch.no_grad():
        logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].double() / temperature
    logits[:, [0, 1, 2, 4]] = -1e30
    return logits.log_softmax(-1)


def test_lists_of_any_lengths_and_padding_do_not_matter(policy):
    """Trailing padding after [SEP] in a response changes nothing."""
    trainer, twin = make(policy, ppo_epochs=1), make((copy.deepcopy(policy[0]), policy[1]), ppo_epochs=1)
    queries, responses, scores = batch_of(trainer, policy)
    ended = torch.tensor([7, 8, 3])
    responses[0] = ended
    padded = [torch.cat([ended, torch.tensor([0, 0])])] + responses[1:]
    assert trainer.step(queries, responses, scores) == pytest.approx(
        twin.step(queries, padded, scores), rel=1e-5, abs=1e-6
    )


def test_micro_batches_change_nothing_but_rounding(policy):
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]), micro_batch_size=2)
    batch = batch_of(trainer, policy)
    assert trainer.step(*batch) == pytest.approx(twin.step(*batch), rel=1e-3, abs=1e-4)


def moved(policy, **changes):
    """How far one optimiser step moves each weight, and its statistics. Adam's first step is lr * g / (|g| + epsilon):
    with both so large, the gradient g itself."""
    trainer = make(
        (copy.deepcopy(policy[0]), policy[1]),
        **{**dict(ppo_epochs=1, lr=1e3, value_lr=1e3, adam_epsilon=1e3, max_grad_norm=1e9), **changes},
    )
    generator = torch.Generator().manual_seed(0)
    queries = [encode_prompt(policy[1], PROMPTS[i % 3]) for i in range(6)]
    responses = [torch.randint(5, 20, (length,), generator=generator) for length in (1, 6, 2, 5, 3, 4)]
    before = copy.deepcopy(trainer.model)
    stats = trainer.step(queries, responses, [0.1, 0.9, 0.4, 0.2, 0.7, 0.5])
    pairs = zip(before.named_parameters(), trainer.model.parameters())
    return {name: (old - new).detach() for (name, old), new in pairs}, stats


def norm_of(moves):
    return torch.cat([move.flatten() for move in moves.values()]).norm().item()


def test_gradient_of_a_step_is_that_of_the_whole_minibatch(policy):
    """Micro-batches of unequal token counts, against the loss of one undivided batch."""
    whole, _ = moved(policy, micro_batch_size=6)
    for size in (4, 1):
        parts, _ = moved(policy, micro_batch_size=size)
        assert norm_of({name: whole[name] - parts[name] for name in whole}) < 1e-4 * norm_of(whole)


def test_a_rewarded_token_becomes_likelier(policy):
    trainer = make(policy, lr=2e-3, init_kl_coef=0.0, batch_size=32, minibatch_size=32)
    queries = [encode_prompt(policy[1], "衣服")] * 32
    rates = []
    for _ in range(12):
        responses = trainer.generate(queries)
        hits = [float((response == 9).any()) for response in responses]
        rates.append(sum(hits) / 32)
        trainer.step(queries, responses, hits)
    assert sum(rates[-3:]) / 3 > rates[0] + 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_the_reference_stays_where_it_was(policy, frozen_share, dtype):
    trainer = make(policy, frozen_share=frozen_share, dtype=dtype, lr=1e-2)
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(*batch_of(trainer, policy))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_an_untouched_policy_is_at_no_distance_from_its_reference(policy, frozen_share, dtype):
    """Exactly 0 in either dtype, though both models come with dropout switched on, as does a copy in float32."""
    model, tokenizer = policy
    config = PPOConfig(frozen_share=frozen_share, dtype=dtype, device="cpu")
    trainer = PPOTrainer(config, model.train(), copy.deepcopy(model), tokenizer)
    queries, responses = [[2, 5], [2, 6, 7, 8]], [[5, 6, 7], [9, 3]]
    for untouched in (trainer.model, trainer.policy_for_saving, trainer.ref_model, copy.deepcopy(trainer.model)):
        assert kl_to_reference(trainer, untouched, queries, responses)[0].tolist() == [0, 0]


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_gradients_are_clipped_to_their_limit_and_told_as_they_were(policy, limit):
    moves, stats = moved(policy, max_grad_norm=limit)
    assert stats["ppo/grad_norm"] > 0.01
    assert norm_of(moves) == pytest.approx(min(stats["ppo/grad_norm"], limit), rel=1e-2)


@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_the_value_head_has_a_learning_rate_of_its_own(policy, frozen_share):
    """Adam's first step is its learning rate wherever the gradient is far larger than epsilon."""
    moves, _ = moved(policy, lr=1e-4, value_lr=2e-2, adam_epsilon=1e-12, frozen_share=frozen_share)
    for name, move in moves.items():
        if move.any():
            expected = 2e-2 if name.startswith("v_head.") else 1e-4
            assert move.abs().max().item() == pytest.approx(expected, rel=1e-2), name
    assert moves["v_head.summary.bias"].any() and moves["transformer.h.1.mlp.c_fc.weight"].any()


@pytest.mark.parametrize("share, moving", [(0, ["wte", "wpe", "h.0.", "h.1.", "ln_f"]), (0.5, ["h.1.", "ln_f"])])
def test_the_lower_blocks_stay_as_they_are(policy, share, moving):
    trainer = make(policy, frozen_share=share)
    before = copy.deepcopy(trainer.model.transformer.state_dict())
    trainer.step(*batch_of(trainer, policy))
    for name, tensor in trainer.model.transformer.state_dict().items():
        assert torch.equal(before[name], tensor) != name.startswith(tuple(moving)), name


def test_a_reference_with_other_frozen_blocks_is_refused(policy):
    """The frozen blocks run once for both models, so they must be the same; without any, the models may differ."""
    model, tokenizer = policy
    reference, twin = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        reference.transformer.h[0].ln_1.weight += 1
    PPOTrainer(PPOConfig(frozen_share=0, dtype="float32", device="cpu"), model, reference, tokenizer)
    with pytest.raises(ValueError, match="frozen"):
        PPOTrainer(PPOConfig(frozen_share=0.5, dtype="float32", device="cpu"), twin, reference, tokenizer)


@pytest.mark.parametrize("power, shares", [(0, [1 / 3, 1 / 3, 1 / 3]), (1, [1 / 6, 2 / 6, 3 / 6]), (1e9, [0, 0, 1])])
def test_saved_policy_is_the_average_of_the_weights(policy, power, shares):
    trainer = make(policy, average_power=power)
    states = []
    for _ in range(3):
        trainer.step(*batch_of(trainer, policy))
        states.append(copy.deepcopy(trainer.model.state_dict()))
    for name, weight in trainer.policy_for_saving.state_dict().items():
        expected = sum(share * state[name] for share, state in zip(shares, states))
        assert torch.allclose(weight, expected, atol=1e-7), name


def test_bfloat16_keeps_float32_weights_and_stays_close(policy):
    exact, coarse = (
        make(policy, ppo_epochs=1),
        make((copy.deepcopy(policy[0]), policy[1]), ppo_epochs=1, dtype="bfloat16"),
    )
    batch = batch_of(exact, policy)
    a, b = exact.step(*batch), coarse.step(*batch)
    assert coarse.model.dtype == torch.float32
    assert b["objective/entropy"] == pytest.approx(a["objective/entropy"], rel=0.02)
    assert b["ppo/loss/value"] == pytest.approx(a["ppo/loss/value"], rel=0.02)


def test_bfloat16_arithmetic_follows_the_float32_weights(policy):
    """Steps far smaller than bfloat16 can hold add up in the weights, and every optimiser step is seen by the next."""
    trainer = make(policy, dtype="bfloat16", lr=1e-6, ppo_epochs=1)
    before = trainer.model.transformer.h[1].mlp.c_fc.weight.clone()
    trainer.step(*batch_of(trainer, policy))
    moved = (trainer.model.transformer.h[1].mlp.c_fc.weight - before).abs()
    assert 0 < moved.max() < 2e-6 and (moved > 0).float().mean() > 0.9
    trainer = make(policy, dtype="bfloat16", lr=1e-2, ppo_epochs=2)
    assert trainer.step(*batch_of(trainer, policy))["ppo/policy/approxkl"] > 1e-4
    rounded = copy.deepcopy(trainer.model).bfloat16()
    compared = [kl_to_reference(trainer, model, [[2, 5]], [[6, 7]])[0] for model in (trainer.model, rounded)]
    assert compared[0] == compared[1] > 0


@pytest.mark.parametrize(
    ("response", "said"),
    [([5, 0, 6], r"\[PAD\]"), ([1, 5, 3], r"\[UNK\]"), ([5, 2], r"\[CLS\]"), ([4], r"\[MASK\]"), ([], "empty")],
)
def test_impossible_responses_are_refused_by_name(policy, response, said):
    trainer = make(policy)
    queries, responses, scores = batch_of(trainer, policy)
    responses[2] = torch.tensor(response, dtype=torch.long)
    with pytest.raises(ValueError, match=f"response 2.*{said}"):
        trainer.step(queries, responses, scores)
