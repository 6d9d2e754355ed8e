"""PPOTrainer: one step on a batch."""

import copy
import math

import pytest
import torch

from config import PPOConfig
from ppo import PPOTrainer
from support.models import encode_prompt

PROMPTS = ["刚收到货,感觉", "衣服", "这本书很好"]


def make(policy, **changes):
    model, tokenizer = policy
    defaults = dict(batch_size=6, minibatch_size=6, gen_len=6, dtype="float32", device="cpu", episodes=60)
    return PPOTrainer(PPOConfig(**{**defaults, **changes}), model, copy.deepcopy(model), tokenizer)


def batch_of(trainer, policy, n=6):
    queries = [encode_prompt(policy[1], PROMPTS[i % 3]) for i in range(n)]
    responses = trainer.generate(queries)
    return queries, responses, [0.1 * i for i in range(n)]


def test_first_ratio_is_one_and_first_kl_zero(policy):
    trainer = make(policy, ppo_epochs=1)
    stats = trainer.step(*batch_of(trainer, policy))
    assert stats["ppo/policy/approxkl"] < 1e-10 and stats["ppo/policy/clipfrac"] == 0
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert all(type(value) is float and math.isfinite(value) for value in stats.values())


@pytest.mark.parametrize("frozen_share", [0, 0.5])
def test_statistics_against_one_sequence_at_a_time(policy, frozen_share):
    """KL, entropy and the first value loss, worked out from plain forward passes on unpadded sequences."""
    trainer = make(policy, ppo_epochs=1, frozen_share=frozen_share)
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, trainer.model.parameters()):
            parameter += 0.02 * torch.randn_like(parameter)
    batch = batch_of(trainer, policy)
    kls, entropies = [], []
    for query, response in zip(*batch[:2]):
        ids = torch.cat([query, response])[None]
        logps = []
        for model in (trainer.model, trainer.ref_model):
            with torch.no_grad():
                logits = model(ids).logits[0, len(query) - 1 : -1].double()
            logits[:, [0, 1, 2, 4]] = -1e30
            logps.append(logits.log_softmax(-1))
        kls.append((logps[0] - logps[1]).gather(1, response[:, None]).sum().item())
        entropies += (-(logps[0].exp() * logps[0]).sum(-1)).tolist()
    stats = trainer.step(*batch)
    assert stats["objective/kl"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert stats["objective/entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    assert stats["tokens/completion_length"] == sum(map(len, batch[1])) / 6


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


def test_gradient_of_a_step_is_that_of_the_whole_minibatch(policy):
    """Micro-batches of unequal token counts, against the loss of one undivided batch."""
    gradients = []
    for micro_batch_size in (6, 4, 1):
        trainer = make(
            (copy.deepcopy(policy[0]), policy[1]), ppo_epochs=1, micro_batch_size=micro_batch_size, max_grad_norm=1e9
        )
        trainer.optimizer.step = lambda: None
        torch.manual_seed(0)
        queries = [encode_prompt(policy[1], PROMPTS[i % 3]) for i in range(6)]
        responses = [torch.randint(5, 20, (length,)) for length in (1, 6, 2, 5, 3, 4)]
        trainer.step(queries, responses, [0.1, 0.9, 0.4, 0.2, 0.7, 0.5])
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() / gradients[0].norm() < 1e-5


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


def test_reference_and_dropout_stay_as_they_are(policy):
    trainer = make(policy)
    before = copy.deepcopy(trainer.ref_model.state_dict())
    trainer.step(*batch_of(trainer, policy))
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.ref_model.state_dict().items())
    assert not trainer.model.training


def test_gradients_are_clipped(policy):
    trainer = make(policy, max_grad_norm=0.01, ppo_epochs=1)
    assert trainer.step(*batch_of(trainer, policy))["ppo/grad_norm"] > 0.01
    norm = torch.stack([p.grad.norm() for p in trainer.model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_the_value_head_has_a_learning_rate_of_its_own(policy):
    trainer = make(policy, lr=1e-5, value_lr=2e-3, frozen_share=0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [1e-5, 2e-3]
    counts = [sum(p.numel() for p in group["params"]) for group in trainer.optimizer.param_groups]
    assert counts[1] == trainer.model.config.n_embd + 1 and sum(counts) == trainer.model.num_parameters()


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
        states.append(trainer.model.transformer.ln_f.weight.detach().clone())
    expected = sum(share * state for share, state in zip(shares, states))
    assert torch.allclose(trainer.policy_for_saving.transformer.ln_f.weight, expected, atol=1e-7)


def test_adaptive_controller_is_told_the_kl_and_the_completions(policy):
    trainer = make(policy, kl_controller="adaptive", horizon=100)
    trainer.step(*batch_of(trainer, policy))
    assert trainer.kl_controller.value == pytest.approx(0.2 * (1 - 0.2 * 6 / 100))


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
    computing = trainer.in_compute_dtype(trainer.model)
    assert computing.lm_head.weight.equal(trainer.model.lm_head.weight.bfloat16())


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


def test_lists_that_do_not_fit_are_refused(policy):
    trainer = make(policy)
    queries, responses, scores = batch_of(trainer, policy)
    with pytest.raises(ValueError, match="6 queries, 6 responses and 5 rewards"):
        trainer.step(queries, responses, scores[:5])


def test_padding_adds_nothing_to_the_kl(policy):
    """The KL of a short completion is the same next to a long one, whose length it is padded to."""
    trainer = make(policy, lr=1e-2)
    queries, responses, scores = batch_of(trainer, policy)
    trainer.step(queries, responses, scores)
    short, long = torch.tensor([5, 3]), torch.tensor([5, 6, 7, 8, 9])
    alone, _, _ = trainer.kl_to_reference(trainer.model, queries[:1], [short])
    both, _, mask = trainer.kl_to_reference(trainer.model, [queries[0]] * 2, [short, long])
    assert both[0] == pytest.approx(float(alone), rel=1e-3) and both[0] > 0.01
    assert mask.tolist() == [[True, True, False, False, False], [True] * 5]
