"""PPOTrainer: one step on a batch, and the edges of what it takes."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config

import gpt2_value_head as g
from config import PPOConfig
from ppo import PPOTrainer
from support import shared_prompts
from support.batches import Prompts
from support.errors import UserError
from support.evaluation import kl_to_reference
from tests.helpers import batch_of, make

BAD = 1e30  # a score whose value loss has a gradient beyond float32, once the unit of rewards is that of others
QUERIES, RESPONSES = [[2, 5], [2, 6, 7], [2, 8]] * 2, [[5, 6], [7], [9, 3], [9, 9, 8, 7], [3], [5, 6, 7, 8, 3]]
SCORES = [0.1, 0.9, 0.5, 0.4, 0.8, 0.2]
# Two float32 passes round some 4,000 times each, by 2^-24 at most; independent errors add up to 60 times that
FLOAT32 = 2e-5


def twin_of(policy, **changes):
    """A trainer of a copy of the policy."""
    return make((copy.deepcopy(policy[0]), policy[1]), **changes)


def small(policy, n_layer=2, n_positions=16, vocab_size=43, **changes):
    """A trainer of a model of another shape, 8 wide, with the usual tokenizer."""
    shape = dict(n_layer=n_layer, n_positions=n_positions, vocab_size=vocab_size, n_embd=8, n_head=2)
    torch.manual_seed(0)
    model = g.GPT2HeadWithValueModel(GPT2Config(**shape, initializer_range=0.2))
    config = PPOConfig(**{**dict(dtype="float32", device="cpu", gen_len=6), **changes})
    return PPOTrainer(config, model, copy.deepcopy(model), policy[1])


def moves(trainer, step):
    """What `step` adds to each weight, by name."""
    before = copy.deepcopy(trainer.model.state_dict())
    step()
    return {name: weight - before[name] for name, weight in trainer.model.state_dict().items()}


def test_the_first_ratio_is_1_and_the_first_kl_0(policy):
    trainer = make(policy, ppo_epochs=1)
    stats = trainer.step(*batch_of(trainer, policy))
    assert stats["ppo/policy/approxkl"] < FLOAT32**2 and stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=FLOAT32)
    assert stats["objective/kl"] == pytest.approx(0, abs=FLOAT32)
    assert all(type(value) is float and math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_one_seed_trains_to_the_same_bits_and_another_to_others(policy, seed):
    """Only the order of the minibatches differs: the completions are given."""
    ends = []
    for trainer in (make(policy, seed=seed, minibatch_size=2), twin_of(policy, seed=1, minibatch_size=2)):
        trainer.model.load_state_dict(trainer.ref_model.state_dict())
        for _ in range(2):
            trainer.step(QUERIES, RESPONSES, SCORES)
        ends.append(trainer.model.state_dict())
    assert all(weight.equal(ends[1][name]) for name, weight in ends[0].items()) == (seed == 1)


# --- how a batch is split and padded


def test_what_follows_the_end_of_a_response_is_not_read(policy):
    dirty = [[5, 6], [7], [9, 3, 2, 40], [9, 9, 8, 7], [3, 3, 7], [5, 6, 7, 8, 3, 0, 0]]
    trainer, twin = make(policy), twin_of(policy)
    stats = trainer.step(QUERIES, dirty, SCORES)
    assert twin.step(QUERIES, RESPONSES, SCORES) == pytest.approx(stats, rel=1e-3, abs=FLOAT32)


def rows_at_once(trainer, call):
    """How many rows each pass of `call` brings to the output projection."""
    rows = []
    hook = trainer.model.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    call()
    hook.remove()
    return rows


def test_no_more_than_a_micro_batch_goes_through_the_model_at_once(policy):
    """A step: rows once for the old log-probabilities and once for the update. Sampling: four times as many rows, after
    the distinct prompts."""
    trainer = make(policy, micro_batch_size=2, minibatch_size=5, ppo_epochs=1, gen_len=2)
    queries, responses = QUERIES + QUERIES[:3], []
    assert rows_at_once(trainer, lambda: responses.extend(trainer.generate(queries))) == [3, 8, 1, 1]
    rows = rows_at_once(trainer, lambda: trainer.step(queries, responses, [0.1] * 9))
    assert rows == [2, 2, 2, 2, 1] + [2, 2, 1] + [2, 2]
    rows = rows_at_once(trainer, lambda: kl_to_reference(trainer, trainer.model, queries, responses))
    assert rows == [2, 2, 2, 2, 1]


# --- what is trained


@pytest.mark.parametrize(
    ("share", "n_layer", "frozen"),
    [(2 / 3, 6, 4), (2 / 3, 12, 8), (2 / 3, 2, 1), (1 / 3, 2, 1), (0.9, 2, 2), (0.5, 3, 2), (0.5, 5, 2), (0.2, 2, 0)],
)
def test_the_frozen_share_is_rounded_to_the_nearest_block_and_a_half_to_the_even_one(policy, share, n_layer, frozen):
    trainer = small(policy, n_layer=n_layer, frozen_share=share)
    moved = moves(trainer, lambda: trainer.step([[2, 5]] * 2, [[6, 7, 3], [9, 8]], [1.0, 0.0]))
    moved = {name for name, move in moved.items() if move.any()}
    assert {int(name.split(".")[2]) for name in moved if ".h." in name} == set(range(frozen, n_layer))
    embeddings = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert embeddings & moved == (set() if frozen else embeddings)
    assert {"transformer.ln_f.bias", "v_head.summary.bias"} < moved


@pytest.mark.parametrize("part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.bias"])
def test_models_that_differ_in_what_is_frozen_are_refused(policy, part):
    model, reference = policy[0], copy.deepcopy(policy[0])
    with torch.no_grad():
        reference.get_parameter(part)[0] += 1
    PPOTrainer(PPOConfig(frozen_share=0, dtype="float32", device="cpu"), copy.deepcopy(model), reference, policy[1])
    with pytest.raises(ValueError, match="frozen_share=0 trains them all"):
        PPOTrainer(PPOConfig(frozen_share=0.5, dtype="float32", device="cpu"), model, reference, policy[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_the_reference_stays_where_it_was_and_an_untouched_policy_with_it(policy, frozen_share, dtype):
    """The KL is exactly 0 in either dtype, even if the models come with dropout switched on."""
    config = PPOConfig(frozen_share=frozen_share, dtype=dtype, device="cpu", lr=1e-2)
    trainer = PPOTrainer(config, policy[0].train(), copy.deepcopy(policy[0]), policy[1])
    for untouched in (trainer.model, trainer.policy_for_saving, trainer.ref_model, copy.deepcopy(trainer.model)):
        assert kl_to_reference(trainer, untouched, QUERIES, RESPONSES)[0].tolist() == [0] * 6
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(QUERIES, RESPONSES, SCORES)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.ref_model.state_dict().items())
    assert kl_to_reference(trainer, trainer.model, QUERIES, RESPONSES)[0].min() > 0


# --- bfloat16: a copy of the policy computes, the weights stay float32


def test_bfloat16_arithmetic_follows_the_float32_weights(policy):
    """Steps far smaller than bfloat16 can represent add up, and each optimiser step sees the one before."""
    trainer = make(policy, dtype="bfloat16", lr=1e-6, ppo_epochs=1)
    moved = moves(trainer, lambda: trainer.step(QUERIES, RESPONSES, SCORES))["transformer.h.1.mlp.c_fc.weight"].abs()
    assert 0 < moved.max() < 2e-6 and (moved > 0).float().mean() > 0.9
    trainer = make(policy, dtype="bfloat16", lr=1e-2, ppo_epochs=2)
    assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/policy/approxkl"] > 1e-4
    rounded = copy.deepcopy(trainer.model).bfloat16()
    compared = [kl_to_reference(trainer, model, [[2, 5]], [[6, 7]])[0] for model in (trainer.model, rounded)]
    assert compared[0] == compared[1] > 0


def test_a_bfloat16_run_draws_from_the_distribution_that_it_trains(policy):
    trainer = make(policy, dtype="bfloat16")
    queries = [[2, 5, 6]] * 100
    drawn, of_copy = trainer.generate(queries), trainer.generate(queries, copy.deepcopy(policy[0]).bfloat16(), step=1)
    exact = twin_of(policy).generate(queries)
    assert all(map(torch.equal, drawn, of_copy)) and not all(map(torch.equal, drawn, exact))


def test_a_bfloat16_run_leaves_what_it_judges_and_saves_in_float32(policy):
    trainer = make(policy, dtype="bfloat16")
    trainer.step(QUERIES, RESPONSES, SCORES)
    judged = trainer.policy_for_saving
    before = copy.deepcopy(judged.state_dict())
    kl_to_reference(trainer, judged, [[2, 5]], trainer.generate([[2, 5]], judged, 7, 0))
    assert all(
        weight.dtype == torch.float32 and weight.equal(before[name]) for name, weight in judged.named_parameters()
    )
    assert trainer.model.dtype == torch.float32 and trainer.ref_model.dtype == torch.bfloat16


def test_values_are_float32_if_the_arithmetic_is_bfloat16(policy):
    with torch.no_grad():
        policy[0].v_head.summary.bias.fill_(0.3)
    stats = make(policy, dtype="bfloat16", ppo_epochs=1).step(QUERIES, RESPONSES, SCORES)
    assert stats["ppo/val/mean"] == pytest.approx(0.3, rel=1e-6)  # 0.30078 in bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_check_gets_the_model_that_computes(policy, monkeypatch, dtype):
    """A library that goes wrong only in bfloat16 is noticed if, and only if, a run computes in it."""
    forward = shared_prompts.attention_bias

    def lost_in_bfloat16(mask, n_keys, seq, like):
        bias = forward(mask, n_keys, seq, like)
        return torch.zeros_like(bias) if bias.dtype == torch.bfloat16 else bias

    monkeypatch.setattr(shared_prompts, "attention_bias", lost_in_bfloat16)
    if dtype == "float32":
        make(policy)
    else:
        with pytest.raises(UserError, match="with a shared prompt the logits are"):
            make(policy, dtype="bfloat16")


# --- skipped optimiser steps


def skipping(policy, **changes):
    trainer = make(policy, **changes)
    trainer.reward_unit = 1.0
    return trainer


def test_nine_skipped_steps_in_a_row_are_counted_and_the_tenth_is_the_end(policy):
    trainer = skipping(policy, ppo_epochs=3, minibatch_size=2)
    assert trainer.step(QUERIES, RESPONSES, [BAD] * 6)["ppo/skipped"] == 9
    with pytest.raises(FloatingPointError, match="the gradient of 10 optimiser steps in a row was not finite"):
        trainer.step(QUERIES, RESPONSES, [BAD] * 6)


@pytest.mark.parametrize("n_skipped", [9, 10])
def test_ten_skipped_steps_within_one_are_the_end_even_if_a_good_one_follows(policy, n_skipped):
    trainer = make(policy, ppo_epochs=12)
    factors = iter([1.0, *[math.nan] * n_skipped, 1.0, 1.0])
    trainer.model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * next(factors))
    if n_skipped < 10:
        trainer.config.ppo_epochs = 3 + n_skipped
        assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/skipped"] == n_skipped
    else:
        with pytest.raises(FloatingPointError, match="10 optimiser steps in a row"):
            trainer.step(QUERIES, RESPONSES, SCORES)


def test_a_good_step_starts_the_count_of_skipped_ones_anew(policy):
    """Between steps, and between the minibatches of one, half of which are bad."""
    trainer = skipping(policy, ppo_epochs=3, minibatch_size=2)
    for _ in range(2):
        assert trainer.step(QUERIES, RESPONSES, [BAD] * 6)["ppo/skipped"] == 9
        assert trainer.step(QUERIES, RESPONSES, SCORES)["ppo/skipped"] == 0
    trainer = skipping(policy, ppo_epochs=11, minibatch_size=3)
    assert trainer.step(QUERIES, RESPONSES, [BAD, *SCORES[1:]])["ppo/skipped"] == 11


def test_a_skipped_step_leaves_no_trace_in_the_optimiser(policy):
    trainer, twin = skipping(policy), skipping((copy.deepcopy(policy[0]), policy[1]))
    trainer.step(QUERIES, RESPONSES, [BAD] * 6)
    trainer.step(QUERIES, RESPONSES, SCORES)
    twin.step(QUERIES, RESPONSES, SCORES)
    for weight, same in zip(trainer.model.parameters(), twin.model.parameters()):
        assert torch.allclose(weight, same, rtol=0, atol=FLOAT32)  # only the order of the minibatches differs


# --- the shortest and the longest batches


def test_a_batch_of_one_token(policy):
    """Its advantage is whitened to 0: only the value is learned."""
    trainer, stats = make(policy, ppo_epochs=1, batch_size=1, minibatch_size=1, gen_len=1), {}
    moved = moves(trainer, lambda: stats.update(trainer.step([[2, 5]], [[3]], [0.6])))
    assert stats["tokens/completion_length"] == stats["tokens/ended_share"] == 1
    assert stats["ppo/returns/mean"] == stats["objective/rlhf_reward"] == pytest.approx(0.6)
    assert stats["ppo/loss/policy"] == stats["objective/kl"] == 0
    assert trainer.reward_unit == pytest.approx(1.5)  # of a size of 0.4
    assert stats["ppo/loss/value"] == pytest.approx(0.5 * 0.4**2)
    assert stats["ppo/loss/total"] == pytest.approx(0.1 * 0.5 * 0.4**2)
    assert {name for name in moved if moved[name].any()} == {"v_head.summary.weight", "v_head.summary.bias"}


def test_a_query_and_its_response_may_fill_all_positions_and_no_more(policy):
    trainer = small(policy, n_positions=16, gen_len=6)
    queries = [[2, *range(5, 14)], [2, 5]]
    responses = [[5, 6, 7, 8, 9, 10], trainer.generate(queries)[1]]
    assert math.isfinite(trainer.step(queries, responses, [1.0, 0.0])["ppo/loss/total"])
    kl, ref_logprobs, _ = kl_to_reference(trainer, trainer.model, queries, responses)
    assert kl.isfinite().all() and ref_logprobs[0].isfinite().all()
    for refused in (trainer.step, lambda *batch: kl_to_reference(trainer, trainer.model, *batch[:2])):
        with pytest.raises(ValueError, match=r"query 0 and its response: 10 \+ 7 tokens > 16 positions"):
            refused(queries, [[5] * 7, [6]], [1.0, 0.0])
    with pytest.raises(ValueError, match=r"query 1: 11 tokens \+ gen_len 6 > 16 positions"):
        trainer.generate([[2, 5], [2, *range(5, 15)]])


def test_rows_beyond_the_tokenizer_are_neither_drawn_nor_taken(policy):
    trainer = small(policy, vocab_size=48, n_positions=16)
    with torch.no_grad():
        trainer.model.transformer.wte.weight[43:] *= 20
    responses = torch.cat(trainer.generate([[2, 5]] * 40))
    assert set(responses.tolist()) <= {3, *range(5, 43)} and len(set(responses.tolist())) > 5
    with pytest.raises(ValueError, match="response 0 has .* before its end, which are never sampled"):
        trainer.step([[2, 5]], [[43]], [0.5])


# --- generate


def test_generate_draws_what_seed_step_and_place_say(policy):
    """Against `sample` with those random numbers. Seed 0 and step 0 are seeds and steps like others."""
    trainer = make(policy, seed=4, temperature=0.8, micro_batch_size=1)
    other = copy.deepcopy(policy[0])
    with torch.no_grad():
        other.transformer.ln_f.weight *= -1
    queries = [torch.tensor(query) for query in ([2, 5], [2, 6, 7], [2, 8], [2, 5, 5, 5], [2, 9], [2, 5])]
    special = g.restriction(policy[1], 43), 3, 0

    def expected(model, seed, step, first=0):
        prompts = Prompts.from_tensors(queries, 0, "cpu")
        draws = g.completion_uniforms(seed, step, range(first, first + 6), 6)
        rows = g.sample(model, prompts, draws, *special, 0.8).tolist()
        return [row[: row.index(3) + 1] if 3 in row else row for row in rows]

    def drawn(*args, **named):
        responses = trainer.generate(queries, *args, **named)
        assert all(response.dtype == torch.int64 and response.dim() == 1 for response in responses)
        return [response.tolist() for response in responses]

    model = trainer.model
    assert drawn() == expected(model, 4, 1)
    assert drawn() == expected(model, 4, 1, first=6)
    assert drawn(step=1) == expected(model, 4, 1)
    assert drawn(other, 0, 0) == expected(other, 0, 0) != expected(model, 0, 0)
    assert drawn(seed=0) == expected(model, 0, 1, first=12)
    assert drawn(other) == expected(other, 4, 1, first=18)
    trainer.step(queries, drawn(), SCORES)
    assert drawn() == expected(model, 4, 2)
