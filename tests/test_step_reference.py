"""Whole steps of PPOTrainer, checked against a second implementation: `Reference`, with loops in float64.

It uses nothing from ppo.py or gpt2_value_head.py. Each prompt goes through the library's GPT-2 together with its
completion, without padding or a cache.
"""

import copy

import pytest
import torch

from config import PPOConfig
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import SEP, Reference

N = 7  # completions in a batch, which may differ from batch_size
SETTINGS = dict(
    batch_size=N + 1, minibatch_size=4, micro_batch_size=3, ppo_epochs=2, gen_len=6, temperature=0.7,
    gamma=0.9, lam=0.8,
    cliprange=0.05, cliprange_value=0.03, vf_coef=0.6, kl_controller="adaptive", init_kl_coef=0.3, target=0.01,
    horizon=20, lr=2e-3, value_lr=1e-2, adam_epsilon=1e-2, max_grad_norm=0.5, average_power=2.0, seed=5,
    dtype="float32", device="cpu", frozen_share=0.5,
)  # fmt: skip
OTHERS = [
    dict(frozen_share=0.0),
    dict(frozen_share=0.5),
    dict(frozen_share=0.0, detach_value=False),
    dict(frozen_share=0.5, detach_value=False),
    dict(frozen_share=0.5, reference="with another trunk"),
    dict(temperature=1.3, gamma=1.0, lam=1.0, kl_controller="fixed", vf_coef=0.1, seed=0),
    dict(ppo_epochs=1, minibatch_size=N, micro_batch_size=0, average_power=0.0, frozen_share=1, detach_value=False),
    dict(minibatch_size=1, ppo_epochs=3, max_grad_norm=9.0, horizon=3, target=50.0, cliprange_value=1.0),
]  # fmt: skip
# A forward pass rounds a number about 4,000 times, by at most 2^-24 each time. Independent errors add up to 60 times
# that, 4e-6; five times as much is allowed. REL covers the errors that a step multiplies.
ABS, REL = 2e-5, 1e-3


def batches():
    """Yield two batches of prompts, responses of all lengths, some of which have an end token, and scores."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.tensor(prompt) for prompt in ([2, 9, 12, 7], [2, 15], [2, 6, 6, 8, 11, 20])]
    for _ in range(2):
        responses = [torch.randint(5, 20, (1 + i % 6,), generator=generator) for i in range(N)]
        for response in responses[1::2]:
            response[-1] = SEP
        yield [prompts[i % 3] for i in range(N)], responses, torch.rand(N, generator=generator).tolist()


def moved_policy(model, seed=1, blocks=(1,)):
    """Return a policy and its reference, which differ, so that the KL of the first step isn't 0."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
    ref_model = copy.deepcopy(model)
    with torch.no_grad():
        for part in (*(model.transformer.h[i] for i in blocks), model.transformer.ln_f):
            for parameter in part.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    return model, ref_model


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_two_steps_give_the_same_weights_as_a_second_implementation(policy, changes):
    config = PPOConfig(**SETTINGS | changes)
    if config.frozen_share == 1:
        model, ref_model = policy[0], copy.deepcopy(policy[0])
    else:
        model, ref_model = moved_policy(policy[0], blocks=(0, 1) if config.reference else (1,))
    start = {name: tensor.double() for name, tensor in copy.deepcopy(model.state_dict()).items()}
    reference = Reference(config, model, ref_model)
    trainer = TextPPOTrainer(config, model, ref_model, policy[1])
    for batch in batches():
        stats, expected = trainer.step(*batch), reference.step(*batch)
        assert stats == pytest.approx(expected, rel=REL, abs=ABS)
        if config.cliprange_value < 0.2 and config.ppo_epochs == 2 and config.temperature < 1:  # settings that clip
            assert expected["ppo/policy/clipfrac"] > 0.02 and expected["ppo/val/clipfrac"] > 0.02
            assert expected["ppo/grad_norm"] > config.max_grad_norm
    assert trainer.kl_controller.value == pytest.approx(reference.kl_coef, rel=REL)

    start["v_head.summary.bias"] -= reference.start
    for name in ("v_head.summary.weight", "v_head.summary.bias"):
        start[name] /= reference.unit
    for got, expected in ((trainer.model, reference.weights()), (trainer.policy_for_saving, reference.average())):
        got = got.state_dict()
        assert got.keys() == expected.keys()
        for name in expected:
            moved, should = got[name].double() - start[name], expected[name] - start[name]
            assert (moved - should).norm() <= 2 * REL * should.norm() + ABS * SETTINGS["lr"] / 1e-2, name


@pytest.mark.parametrize("learned", [False, True], ids=["new value head", "old value head"])
@pytest.mark.parametrize("c, offset", [(0.001, 0), (10_000, 0), (1, 100), (2, -85)])
def test_training_does_not_depend_on_the_unit_or_offset_of_the_scores(policy, c, offset, learned):
    """The KL coefficient scales with the unit. Statistics of rewards are in the unit of the scores."""
    model, ref_model = moved_policy(policy[0])
    of_rewards = {"kl_coef", "non_score_reward", "rlhf_reward", "returns/mean", "val/mean"}
    trainers = []
    for unit, shift in ((1, 0), (c, offset)):
        own = copy.deepcopy(model)
        with torch.no_grad():
            own.v_head.summary.weight *= unit if learned else 0
            own.v_head.summary.bias.fill_(shift if learned else 0)
        config = PPOConfig(**SETTINGS | {"init_kl_coef": 0.3 * unit})
        trainers.append(TextPPOTrainer(config, own, copy.deepcopy(ref_model), policy[1]))
    for queries, responses, scores in batches():
        plain = trainers[0].step(queries, responses, scores)
        other = trainers[1].step(queries, responses, [c * score + offset for score in scores])
        for name, value in plain.items():
            name_in_group = name.split("/", 1)[1]
            factor = c if name_in_group in of_rewards else 1
            shift = offset if name_in_group in of_rewards - {"kl_coef", "non_score_reward"} else 0
            assert other[name] == pytest.approx(factor * value + shift, rel=REL, abs=ABS * factor), name
    for weight, same in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
        assert torch.allclose(weight, same, rtol=REL, atol=ABS)
    average = [list(trainer.policy_for_saving.v_head.parameters()) for trainer in trainers]
    assert all(torch.allclose(weight, same, rtol=REL, atol=ABS) for weight, same in zip(*average))
