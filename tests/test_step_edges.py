"""The trainer at the edges of what it takes: skipped steps, exact fits, the shortest batches, what is refused."""

import copy
import math

import pytest
import torch
from transformers import GPT2Config

import gpt2_value_head as g
from config import PPOConfig
from ppo import PPOTrainer
from support import batches as b
from support.evaluation import kl_to_reference
from tests.helpers import batch_of, make

BAD = 1e30  # a score whose value loss has a gradient beyond float32, once the unit of rewards is that of others


def small(policy, n_layer=2, n_positions=16, vocab_size=43, **changes):
    """A trainer of a model of another shape, 8 wide, with the tokenizer of the others."""
    shape = dict(n_layer=n_layer, n_positions=n_positions, vocab_size=vocab_size, n_embd=8, n_head=2)
    torch.manual_seed(0)
    model = g.GPT2HeadWithValueModel(GPT2Config(**shape, initializer_range=0.2))
    config = PPOConfig(**{**dict(dtype="float32", device="cpu", gen_len=6), **changes})
    return PPOTrainer(config, model, copy.deepcopy(model), policy[1])


# --- skipped steps


def test_nine_skipped_steps_in_a_row_are_counted_and_the_tenth_is_the_end(policy):
    trainer = make(policy, ppo_epochs=3, minibatch_size=2)
    trainer.reward_unit = 1.0
    queries, responses, scores = batch_of(trainer, policy)
    assert trainer.step(queries, responses, [BAD] * 6)["ppo/skipped"] == 9
    with pytest.raises(FloatingPointError, match="the gradient of 10 optimiser steps in a row was not finite"):
        trainer.step(queries, responses, [BAD] * 6)


def test_ten_skipped_steps_within_one_are_the_end(policy):
    trainer = make(policy, ppo_epochs=5, minibatch_size=3)
    trainer.reward_unit = 1.0
    queries, responses, _ = batch_of(trainer, policy)
    with pytest.raises(FloatingPointError):
        trainer.step(queries, responses, [BAD] * 6)


@pytest.mark.parametrize("n_skipped", [9, 10])
def test_ten_skipped_steps_are_the_end_though_a_good_one_follows(policy, n_skipped):
    trainer = make(policy, ppo_epochs=12)
    queries, responses, scores = batch_of(trainer, policy)
    factors = iter([math.nan] * n_skipped + [1.0] * 12)
    trainer.model.transformer.ln_f.weight.register_hook(lambda gradient: gradient * next(factors))
    if n_skipped < 10:
        assert trainer.step(queries, responses, scores)["ppo/skipped"] == n_skipped
    else:
        with pytest.raises(FloatingPointError, match="10 optimiser steps in a row"):
            trainer.step(queries, responses, scores)


def test_a_good_step_starts_the_count_of_skipped_ones_anew(policy):
    """Between steps, and between the minibatches of one, of which one in two is bad."""
    trainer = make(policy, ppo_epochs=3, minibatch_size=2)
    trainer.reward_unit = 1.0
    queries, responses, scores = batch_of(trainer, policy)
    for _ in range(2):
        assert trainer.step(queries, responses, [BAD] * 6)["ppo/skipped"] == 9
        assert trainer.step(queries, responses, scores)["ppo/skipped"] == 0
    trainer = make(policy, ppo_epochs=11, minibatch_size=3)
    trainer.reward_unit = 1.0
    assert trainer.step(queries, responses, [BAD, *scores[1:]])["ppo/skipped"] == 11


def test_a_skipped_step_leaves_no_trace_in_the_optimiser(policy):
    trainer, twin = make((copy.deepcopy(policy[0]), policy[1])), make(policy)
    queries, responses, scores = batch_of(trainer, policy)
    trainer.reward_unit = twin.reward_unit = 1.0
    trainer.step(queries, responses, [BAD] * 6)
    trainer.step(queries, responses, scores)
    twin.step(queries, responses, scores)
    for weight, same in zip(trainer.model.parameters(), twin.model.parameters()):
        assert torch.allclose(weight, same, atol=1e-6)


# --- which blocks are trained


@pytest.mark.parametrize(
    ("share", "n_layer", "frozen"),
    [(2 / 3, 6, 4), (2 / 3, 12, 8), (2 / 3, 2, 1), (1 / 3, 2, 1), (0.9, 2, 2), (0.5, 3, 2), (0.5, 5, 2), (0.2, 2, 0)],
)
def test_the_frozen_share_is_rounded_to_the_nearest_block_and_a_half_to_the_even_one(policy, share, n_layer, frozen):
    trainer = small(policy, n_layer=n_layer, frozen_share=share)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.step([[2, 5]] * 2, [[6, 7, 3], [9, 8]], [1.0, 0.0])
    moved = {name for name, weight in trainer.model.state_dict().items() if not weight.equal(before[name])}
    blocks = {int(name.split(".")[2]) for name in moved if name.startswith("transformer.h.")}
    assert blocks == set(range(frozen, n_layer))
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} & moved == (
        set() if frozen else {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    )


# --- as many positions as the model has


def test_a_query_and_its_response_may_fill_all_positions(policy):
    trainer = small(policy, n_positions=16, gen_len=6)
    queries = [[2, *range(5, 14)], [2, 5]]
    responses = trainer.generate(queries)
    responses[0] = torch.tensor([5, 6, 7, 8, 9, 10])
    stats = trainer.step(queries, responses, [1.0, 0.0])
    assert math.isfinite(stats["ppo/loss/total"])
    kl, ref_logprobs, _ = kl_to_reference(trainer, trainer.model, queries, responses)
    assert kl.isfinite().all() and ref_logprobs[0].isfinite().all()
    too_long = "query 0 and its response have 10 and 7 tokens, and the model 16 positions"
    for refused in (trainer.step, lambda *batch: kl_to_reference(trainer, trainer.model, *batch[:2])):
        with pytest.raises(ValueError, match=too_long):
            refused(queries, [[5] * 7, [6]], [1.0, 0.0])


def test_a_query_with_no_room_for_its_response_is_refused_before_it_is_sampled(policy):
    trainer = small(policy, n_positions=16, gen_len=6)
    with pytest.raises(ValueError, match="query 1 has 11 tokens, with gen_len 6 more than the model's 16 positions"):
        trainer.generate([[2, 5], [2, *range(5, 15)]])


# --- the shortest batches


def test_a_batch_of_one_token(policy):
    """Its advantage is whitened to 0: nothing is learned but the value."""
    trainer = make(policy, ppo_epochs=1, batch_size=1, minibatch_size=1, gen_len=1)
    before = copy.deepcopy(trainer.model.state_dict())
    stats = trainer.step([[2, 5]], [[3]], [0.6])
    assert stats["tokens/completion_length"] == stats["tokens/ended_share"] == 1
    assert stats["ppo/returns/mean"] == stats["objective/rlhf_reward"] == pytest.approx(0.6)
    assert stats["ppo/loss/policy"] == stats["objective/kl"] == 0
    assert trainer.reward_unit == pytest.approx(1.5)  # of a size of 0.4
    assert stats["ppo/loss/value"] == pytest.approx(0.5 * 0.4**2)
    assert stats["ppo/loss/total"] == pytest.approx(0.1 * 0.5 * 0.4**2)
    after = trainer.model.state_dict()
    assert {name for name in after if not after[name].equal(before[name])} == {
        "v_head.summary.weight", "v_head.summary.bias"
    }  # fmt: skip


def test_responses_of_one_token_are_learned_from(policy):
    trainer = make(policy, lr=1e-2, frozen_share=0)
    queries, responses = [[2, 5]] * 4, [[3], [6], [3], [6]]
    for _ in range(5):
        stats = trainer.step(queries, responses, [1.0, 0.0, 1.0, 0.0])
    assert stats["tokens/ended_share"] == 0.5 and stats["tokens/completion_length"] == 1
    logits = (
        trainer.model(torch.tensor([[2, 5]])).logits[0, -1] - trainer.ref_model(torch.tensor([[2, 5]])).logits[0, -1]
    )
    assert logits[3] > 0.5 + logits[6]


def test_what_follows_the_end_of_a_response_is_not_read(policy):
    trainer, twin = make((copy.deepcopy(policy[0]), policy[1])), make(policy)
    queries, scores = [[2, 5], [2, 6, 7], [2, 8]], [0.1, 0.9, 0.5]
    clean = [[5, 3], [6, 7, 8, 9], [3]]
    dirty = [[5, 3, 2, 40], [6, 7, 8, 9], [3, 3, 7]]
    assert trainer.step(queries, dirty, scores) == pytest.approx(twin.step(queries, clean, scores), rel=1e-4, abs=1e-6)


# --- what is refused (more in test_python_api.py)


def test_the_first_and_the_last_token_of_the_vocabulary_may_be_asked_about(policy):
    stats = make(policy).step([[0, 42], [42, 2]], [[42, 5], [5, 42]], [0.1, 0.9])
    assert math.isfinite(stats["ppo/loss/total"])


def test_rows_beyond_the_tokenizer_are_neither_drawn_nor_taken(policy):
    trainer = small(policy, vocab_size=48, n_positions=16)
    with torch.no_grad():
        trainer.model.transformer.wte.weight[43:] *= 20
    responses = torch.cat(trainer.generate([[2, 5]] * 40))
    assert set(responses.tolist()) <= {3, *range(5, 43)} and len(set(responses.tolist())) > 5
    with pytest.raises(ValueError, match="response 0 holds id 43 before its end"):
        trainer.step([[2, 5]], [[43]], [0.5])


@pytest.mark.parametrize("part", ["transformer.wte.weight", "transformer.wpe.weight", "transformer.h.0.mlp.c_fc.bias"])
def test_models_that_differ_in_what_is_frozen_are_refused(policy, part):
    model, reference = policy[0], copy.deepcopy(policy[0])
    with torch.no_grad():
        reference.get_parameter(part)[0] += 1
    config = PPOConfig(frozen_share=0.5, dtype="float32", device="cpu")
    with pytest.raises(
        ValueError, match="policy and reference differ in a frozen block; frozen_share=0 trains them all"
    ):
        PPOTrainer(config, model, reference, policy[1])


# --- how many at once


def rows_at_once(trainer, calls):
    """Run `calls`, and note how many rows each pass brings to the output projection."""
    rows = []
    hook = trainer.model.lm_head.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    calls()
    hook.remove()
    return rows


def test_no_more_than_a_micro_batch_goes_through_the_model_at_once(policy):
    """A step's rows once for the old probabilities and once for the update; four times as many where nothing learns, of
    which the distinct prompts come first."""
    trainer = make(policy, micro_batch_size=2, minibatch_size=5, ppo_epochs=1, gen_len=2)
    queries = [[2, 5], [2, 6, 7], [2, 8]] * 3
    responses = []
    assert rows_at_once(trainer, lambda: responses.extend(trainer.generate(queries))) == [3, 8, 1, 1]
    rows = rows_at_once(trainer, lambda: trainer.step(queries, responses, [0.1] * 9))
    assert rows == [2, 2, 2, 2, 1] + [2, 2, 1] + [2, 2]
    rows = rows_at_once(trainer, lambda: kl_to_reference(trainer, trainer.model, queries, responses))
    assert rows == [2, 2, 2, 2, 1]


def test_a_micro_batch_is_64_completions_unless_given(policy):
    trainer = make(policy, batch_size=70, minibatch_size=70, ppo_epochs=1, gen_len=1)
    rows = rows_at_once(trainer, lambda: trainer.step([[2, 5]] * 70, [[6]] * 70, [0.1] * 70))
    assert rows == [64, 6, 64, 6]


def test_micro_batches_are_picked_for_the_longest_prompt_and_response(policy, monkeypatch):
    picked = []

    def pick(config, gpt2_config, device, n_prompt, n_tokens, drawing=False):
        picked.append((gpt2_config.n_layer, n_prompt, n_tokens, drawing))
        return 2

    trainer = make(policy, ppo_epochs=1, minibatch_size=3, gen_len=4)
    monkeypatch.setattr("support.engine.pick_micro_batch_size", pick)
    queries = [[2, 5], [2, 6, 7], [2, 8]]
    trainer.generate(queries)
    trainer.step(queries, [[6], [6, 7], [6]], [0.1] * 3)
    layers = len(policy[0].transformer.h)
    assert picked == [(layers, 3, 4, True)] + [(layers, 3, 2, False)] * (len(picked) - 1)
    assert len(picked) >= 4


# --- generate


def test_generate_draws_what_seed_step_and_place_say(policy):
    """Against `sample` with those draws; seed 0 and step 0 are meant as such, and another model continues if given."""
    trainer = make(policy, seed=4, temperature=0.8, micro_batch_size=1)
    other = copy.deepcopy(policy[0])
    with torch.no_grad():
        other.transformer.ln_f.weight *= -1
    queries = [torch.tensor(query) for query in ([2, 5], [2, 6, 7], [2, 8], [2, 5, 5, 5], [2, 9], [2, 5])]
    special = g.restriction(policy[1], 43), 3, 0

    def expected(model, seed, step, first=0):
        prompts = b.Prompts.from_tensors(queries, 0, "cpu")
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
    trainer.step(queries, drawn(), [0.1, 0.9, 0.5, 0.2, 0.3, 0.4])
    assert drawn() == expected(model, 4, 2)


def test_a_bfloat16_run_draws_from_the_distribution_that_it_trains(policy):
    trainer = make(policy, dtype="bfloat16")
    queries = [[2, 5, 6]] * 100
    drawn, of_copy = trainer.generate(queries), trainer.generate(queries, copy.deepcopy(policy[0]).bfloat16(), step=1)
    exact = make((copy.deepcopy(policy[0]), policy[1])).generate(queries)
    assert all(map(torch.equal, drawn, of_copy)) and not all(map(torch.equal, drawn, exact))


# --- what is saved, and in which dtype values are


def test_before_the_first_step_the_policy_for_saving_is_the_policy(policy):
    trainer = make(policy)
    assert trainer.policy_for_saving is trainer.model
    trainer.step(*batch_of(trainer, policy))
    assert trainer.policy_for_saving is not trainer.model
    for weight, same in zip(trainer.policy_for_saving.parameters(), trainer.model.parameters()):
        assert weight.equal(same)  # of one step, the average


def test_a_bfloat16_run_judges_its_policy_for_saving_and_leaves_it_float32(policy):
    trainer = make(policy, dtype="bfloat16")
    trainer.step(*batch_of(trainer, policy))
    judged = trainer.policy_for_saving
    before = copy.deepcopy(judged.state_dict())
    responses = trainer.generate([[2, 5]], judged, 7, 0)
    kl_to_reference(trainer, judged, [[2, 5]], responses)
    after = judged.state_dict()
    assert all(after[name].dtype == torch.float32 and after[name].equal(before[name]) for name in before)


def test_values_are_float32_where_the_arithmetic_is_bfloat16(policy):
    with torch.no_grad():
        policy[0].v_head.summary.bias.fill_(0.3)
    trainer = make(policy, dtype="bfloat16", ppo_epochs=1)
    stats = trainer.step(*batch_of(trainer, policy))
    assert stats["ppo/val/mean"] == pytest.approx(0.3, rel=1e-6)  # 0.30078 in bfloat16


def test_one_seed_trains_to_the_same_bits_and_another_to_others(policy):
    """By the order of the minibatches alone: the completions are given."""
    queries, responses, scores = (
        [[2, 5], [2, 6, 7], [2, 8]] * 2,
        [[5, 6], [7], [9, 3]] * 2,
        [0.1, 0.9, 0.5, 0.4, 0.8, 0.2],
    )
    ends = []
    for seed in (1, 1, 2):
        trainer = make((copy.deepcopy(policy[0]), policy[1]), seed=seed, minibatch_size=2, ppo_epochs=2)
        trainer.step(queries, responses, scores)
        ends.append(torch.cat([weight.flatten() for weight in trainer.model.parameters()]))
    assert ends[0].equal(ends[1]) and not ends[0].equal(ends[2])
