"""PPOTrainer: one step on a batch, and edge cases of its input."""

import contextlib
import copy
import math

import pytest
import torch
from transformers import GPT2Config

import gpt2_value_head as g
from config import PPOConfig
from support.compute.batches import Prompts
from support.run.evaluation import kl_to_reference
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import batch_of, make

BAD = 1e30  # its value loss has a gradient that overflows float32, unless the score itself sets the unit
QUERIES, RESPONSES = [[2, 5], [2, 6, 7], [2, 8]] * 2, [[5, 6], [7], [9, 3], [9, 9, 8, 7], [3], [5, 6, 7, 8, 3]]
SCORES = [0.1, 0.9, 0.5, 0.4, 0.8, 0.2]
# Two float32 passes round about 4,000 times each, by at most 2^-24. Independent errors add up to 60 times that
FLOAT32 = 2e-5


def twin_of(policy, **changes):
    """Return a trainer for a copy of the policy."""
    return make((copy.deepcopy(policy[0]), policy[1]), **changes)


def small(policy, n_layer=2, n_positions=16, vocab_size=43, tied=True, **changes):
    """Return a trainer for a model of width 8 and the given shape, with the usual tokenizer."""
    shape = dict(n_layer=n_layer, n_positions=n_positions, vocab_size=vocab_size, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = g.GPT2HeadWithValueModel(GPT2Config(**shape, n_embd=8, n_head=2, initializer_range=0.2))
    config = PPOConfig(**{**dict(dtype="float32", device="cpu", gen_len=6), **changes})
    return TextPPOTrainer(config, model, copy.deepcopy(model), policy[1])


def moves(trainer, step):
    """Return what `step` adds to each weight, by name."""
    before = copy.deepcopy(trainer.model.state_dict())
    step()
    return {name: weight - before[name] for name, weight in trainer.model.state_dict().items()}


def test_the_first_ratio_is_1_and_the_first_kl_is_0(policy):
    trainer = make(policy, ppo_epochs=1)
    stats = trainer.step(*batch_of(trainer, policy))
    assert stats["ppo/policy/approxkl"] < FLOAT32**2 and stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=FLOAT32)
    assert stats["objective/kl"] == pytest.approx(0, abs=FLOAT32)
    assert all(type(value) is float and math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_gives_bitwise_identical_weights_and_another_seed_does_not(policy, seed):
    """The completions are given, so only the order of the minibatches differs."""
    ends = []
    for trainer in (make(policy, seed=seed, minibatch_size=2), twin_of(policy, seed=1, minibatch_size=2)):
        trainer.model.load_state_dict(trainer.ref_model.state_dict())
        for _ in range(2):
            trainer.step(QUERIES, RESPONSES, SCORES)
        ends.append(trainer.model.state_dict())
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items()) == (seed == 1)


def test_tokens_after_the_end_of_a_response_are_ignored(policy):
    dirty = [[5, 6], [7], [9, 3, 2, 40], [9, 9, 8, 7], [3, 3, 7], [5, 6, 7, 8, 3, 0, 0]]
    trainer, twin = make(policy), twin_of(policy)
    stats = trainer.step(QUERIES, dirty, SCORES)
    assert twin.step(QUERIES, RESPONSES, SCORES) == pytest.approx(stats, rel=1e-3, abs=FLOAT32)


def test_the_model_runs_on_one_micro_batch_at_a_time(policy):
    """Sampling uses four times as many rows. A step has one pass for old log-probabilities and one for the update."""
    trainer, rows = make(policy, micro_batch_size=2, minibatch_size=5, ppo_epochs=1, gen_len=2), []
    forward = trainer.engine.compute_model.transformer.ln_f.register_forward_hook
    forward(lambda _, args, __: rows.append(len(args[0])))
    responses = trainer.generate(QUERIES + QUERIES[:3])
    assert max(rows) == 8
    rows.clear()
    trainer.step(QUERIES + QUERIES[:3], responses, [0.1] * 9)
    assert rows == [2, 2, 2, 2, 1] + [2, 2, 1] + [2, 2]


@pytest.mark.parametrize(
    ("share", "n_layer", "frozen"),
    [(2 / 3, 6, 4), (2 / 3, 12, 8), (2 / 3, 2, 1), (0.9, 2, 2), (0.5, 3, 2), (0.5, 5, 2), (0.2, 2, 0)],
)
def test_the_frozen_share_is_rounded_to_the_nearest_block_and_halves_to_even(policy, share, n_layer, frozen):
    trainer = small(policy, n_layer=n_layer, tied=False, frozen_share=share)
    moved = moves(trainer, lambda: trainer.step([[2, 5]] * 2, [[6, 7, 3], [9, 8]], [1.0, 0.0]))
    moved = {name for name, move in moved.items() if move.any()}
    assert {int(name.split(".")[2]) for name in moved if ".h." in name} == set(range(frozen, n_layer))
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert embeddings & moved == (set() if frozen else embeddings)
    assert {"transformer.ln_f.bias", "v_head.summary.bias"} < moved


@pytest.mark.parametrize("part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.bias"])
def test_a_reference_with_other_frozen_weights_keeps_them(policy, part):
    """The KL is the same as if nothing were frozen."""
    kls, reference = [], copy.deepcopy(policy[0])
    with torch.no_grad():
        weight = reference.get_parameter(part)
        weight += torch.arange(weight.numel()).sin().reshape(weight.shape)
    for frozen_share in (0, 0.5):
        config = PPOConfig(frozen_share=frozen_share, dtype="float32", device="cpu")
        trainer = TextPPOTrainer(config, copy.deepcopy(policy[0]), copy.deepcopy(reference), policy[1])
        kls.append(trainer.step(QUERIES, RESPONSES, SCORES)["objective/kl"])
    assert kls[0] == pytest.approx(kls[1], rel=1e-4) and abs(kls[0]) > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_the_reference_is_never_changed_and_an_untrained_policy_has_kl_0(policy, frozen_share, dtype):
    """The KL is exactly 0 in either dtype, even if the models come with dropout switched on."""
    config = PPOConfig(frozen_share=frozen_share, dtype=dtype, device="cpu", lr=1e-2)
    trainer = TextPPOTrainer(config, policy[0].train(), copy.deepcopy(policy[0]), policy[1])
    for untouched in (trainer.model, trainer.policy_for_saving, trainer.ref_model):
        assert kl_to_reference(trainer, untouched, trainer.collate(QUERIES, RESPONSES))[0].tolist() == [0] * 6
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.ref_model.state_dict().items())
    assert kl_to_reference(trainer, trainer.model, trainer.collate(QUERIES, RESPONSES))[0].min() > 0


def test_bfloat16_arithmetic_uses_the_current_float32_weights(policy):
    """Updates too small for bfloat16 add up, and each optimiser step sees the result of the one before."""
    trainer = make(policy, dtype="bfloat16", lr=1e-6, ppo_epochs=1)
    moved = moves(trainer, lambda: trainer.step(QUERIES, RESPONSES, SCORES))["transformer.h.1.mlp.c_fc.weight"].abs()
    assert 0 < moved.max() < 2e-6 and (moved > 0).float().mean() > 0.9
    trainer = make(policy, dtype="bfloat16", lr=1e-2, ppo_epochs=2)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/policy/approxkl"] > 1e-4


def test_a_bfloat16_run_samples_from_the_distribution_that_it_trains(policy):
    trainer = make(policy, dtype="bfloat16")
    queries = [[2, 5, 6]] * 100
    drawn, of_copy = trainer.generate(queries), trainer.generate(queries, copy.deepcopy(policy[0]).bfloat16(), step=1)
    exact = twin_of(policy).generate(queries)
    assert all(map(torch.equal, drawn, of_copy)) and not all(map(torch.equal, drawn, exact))


def test_values_and_the_saved_policy_are_float32_in_a_bfloat16_run(policy):
    with torch.no_grad():
        policy[0].v_head.summary.bias.fill_(0.3)
    trainer = make(policy, dtype="bfloat16", ppo_epochs=1)
    stats, evaluated = trainer.step(QUERIES, RESPONSES, SCORES), trainer.policy_for_saving
    assert stats["ppo/val/mean"] == pytest.approx(0.3, rel=1e-6)  # 0.30078 in bfloat16
    before = copy.deepcopy(evaluated.state_dict())
    kl_to_reference(trainer, evaluated, trainer.collate([[2, 5]], trainer.generate([[2, 5]], evaluated, 7, 0)))
    assert evaluated.dtype == torch.float32 and all(map(torch.equal, before.values(), evaluated.state_dict().values()))


def skipping(policy, **changes):
    trainer = make(policy, **changes)
    trainer.reward_unit = 1.0
    return trainer


def test_ten_skipped_optimiser_steps_in_a_row_stop_the_run(policy):
    """Nine don't, a successful one resets the count, and the ten may belong to two PPO steps."""
    trainer = skipping(policy, ppo_epochs=3, minibatch_size=2)
    for _ in range(2):
        assert trainer.step(QUERIES, RESPONSES, [BAD, -BAD] * 3)["ppo/skipped"] == 9
        assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/skipped"] == 0
    trainer.step(QUERIES, RESPONSES, [BAD, -BAD] * 3)
    with pytest.raises(FloatingPointError, match="the gradient was not finite in 10 optimiser steps in a row"):
        trainer.step(QUERIES, RESPONSES, [BAD, -BAD] * 3)


@pytest.mark.parametrize(("n_skipped", "fails"), [(9, False), (10, True)])
def test_skipped_optimiser_steps_in_a_row_are_counted_within_a_step(policy, n_skipped, fails):
    trainer = make(policy, ppo_epochs=3 + n_skipped)
    factors = iter([1.0, *[math.nan] * n_skipped, 1.0, 1.0])
    trainer.model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * next(factors))
    with pytest.raises(FloatingPointError) if fails else contextlib.nullcontext():
        assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/skipped"] == n_skipped


@pytest.mark.parametrize("fused", [True, False])  # False on an Apple GPU
def test_a_skipped_step_does_not_change_the_optimiser(policy, fused):
    trainer, twin = skipping(policy), skipping((copy.deepcopy(policy[0]), policy[1]))
    trainer.engine.optimizer.param_groups[0]["fused"] = trainer.engine.optimizer.param_groups[1]["fused"] = fused
    trainer.engine.optimizer.defaults["fused"] = fused
    trainer.step(QUERIES, RESPONSES, [BAD, -BAD] * 3)
    trainer.step(QUERIES, RESPONSES, SCORES)
    twin.step(QUERIES, RESPONSES, SCORES)
    for weight, same in zip(trainer.model.parameters(), twin.model.parameters()):
        assert torch.allclose(weight, same, rtol=0, atol=FLOAT32)  # only the order of the minibatches differs


def test_a_batch_of_one_token_changes_nothing(policy):
    """Its score equals the batch's mean, and its advantage is whitened to 0, so there is nothing to learn."""
    trainer, stats = make(policy, ppo_epochs=1, batch_size=1, minibatch_size=1, gen_len=1), {}
    moved = moves(trainer, lambda: stats.update(trainer.step([[2, 5]], [[3]], [0.6])))
    assert stats["ppo/returns/mean"] == pytest.approx(0.6) and stats["ppo/loss/policy"] == 0
    assert stats["ppo/loss/total"] == 0 and not any(difference.any() for difference in moved.values())


def test_a_query_and_its_response_may_fill_all_positions_but_no_more(policy):
    trainer = small(policy, n_positions=16, gen_len=6)
    queries = [[2, *range(5, 14)], [2, 5]]
    responses = [[5, 6, 7, 8, 9, 10], trainer.generate(queries)[1]]
    assert math.isfinite(trainer.step(queries, responses, [1.0, 0.0])["ppo/loss/total"])
    kl, ref_logprobs = kl_to_reference(trainer, trainer.model, trainer.collate(queries, responses))
    assert kl.isfinite().all() and ref_logprobs[0].isfinite().all()
    with pytest.raises(ValueError, match=r"10 \+ 7 tokens > 16 positions"):
        trainer.step(queries, [[5] * 7, [6]], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"query 1: 11 tokens \+ gen_len 6 > 16 positions"):
        trainer.generate([[2, 5], [2, *range(5, 15)]])


def test_tokens_beyond_the_tokenizer_are_neither_sampled_nor_accepted(policy):
    trainer = small(policy, vocab_size=48, n_positions=16)
    with torch.no_grad():
        trainer.model.transformer.wte.weight[43:] *= 20
    responses = torch.cat(trainer.generate([[2, 5]] * 40))
    assert set(responses.tolist()) <= {3, *range(5, 43)} and len(set(responses.tolist())) > 5
    with pytest.raises(ValueError, match="response 0 contains .* before its end, but these tokens are never sampled"):
        trainer.step([[2, 5]], [[43]], [0.5])


def test_the_samples_of_generate_depend_on_seed_step_and_position(policy):
    """Compares with `sample` and the same random numbers. Seed 0 and step 0 are valid values."""
    trainer = make(policy, seed=4, temperature=0.8, micro_batch_size=1)
    model, other = trainer.model, copy.deepcopy(policy[0])
    with torch.no_grad():
        other.transformer.ln_f.weight *= -1
    queries = [torch.tensor(query) for query in QUERIES]

    def expected(model, seed, step, first=0):
        prompts, special = Prompts.from_tensors(queries, 0, "cpu"), (g.restriction(policy[1], 43), 3, 0)
        draws = g.completion_uniforms(seed, step, range(first, first + 6), 6)
        rows = g.sample(model, prompts, draws, *special, 0.8)[0].tolist()
        return [row[: row.index(3) + 1] if 3 in row else row for row in rows]

    calls = [
        ((), expected(model, 4, 1)),
        ((), expected(model, 4, 1, first=6)),
        ((model, 4, 1), expected(model, 4, 1)),
        ((other, 0, 0), expected(other, 0, 0)),
        ((model, 0), expected(model, 0, 1, first=12)),
        ((other,), expected(other, 4, 1, first=18)),
    ]
    for args, responses in calls:
        assert [response.tolist() for response in trainer.generate(queries, *args)] == responses
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert [response.tolist() for response in trainer.generate(queries)] == expected(model, 4, 2)
