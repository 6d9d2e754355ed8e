"""Whole steps of PPOTrainer against a second implementation: plain forward passes, loops, and float64.

Nothing of ppo.py or gpt2_value_head.py is used for it: GPT-2 is the library's, every prompt with its completion goes
through it by itself, without padding or a cache.
"""

import copy
import itertools

import pytest
import torch

from config import PPOConfig
from ppo import PPOTrainer
from tests.helpers import SEP, N, Reference

SETTINGS = dict(
    batch_size=N, minibatch_size=4, micro_batch_size=3, ppo_epochs=2, gen_len=6, temperature=0.7, gamma=0.9, lam=0.8,
    cliprange=0.05, cliprange_value=0.03, vf_coef=0.6, kl_controller="adaptive", init_kl_coef=0.3, target=0.01,
    horizon=20, lr=2e-3, value_lr=1e-2, adam_epsilon=1e-2, max_grad_norm=0.5, average_power=2.0, seed=5,
    dtype="float32", device="cpu",
)  # fmt: skip


def batches():
    """Two batches of prompts and responses of all lengths, some of which end, and scores."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.tensor(prompt) for prompt in ([2, 9, 12, 7], [2, 15], [2, 6, 6, 8, 11, 20])]
    for _ in range(2):
        responses = [torch.randint(5, 20, (1 + i % 6,), generator=generator) for i in range(N)]
        for response in responses[1::2]:
            response[-1] = SEP
        yield [prompts[i % 3] for i in range(N)], responses, torch.rand(N, generator=generator).tolist()


@pytest.mark.parametrize("frozen_share, detach_value", list(itertools.product([0, 0.5], [True, False])))
def test_two_steps_end_at_the_weights_of_a_second_implementation(policy, frozen_share, detach_value):
    model, tokenizer = policy
    torch.manual_seed(1)
    config = PPOConfig(**SETTINGS, frozen_share=frozen_share, detach_value=detach_value)
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
    ref_model = copy.deepcopy(model)
    with torch.no_grad():  # a policy that has left its reference: the KL counts from the first step on
        for parameter in (*model.transformer.h[1].parameters(), *model.transformer.ln_f.parameters()):
            parameter += 0.05 * torch.randn_like(parameter)
    start = {name: tensor.double() for name, tensor in copy.deepcopy(model.state_dict()).items()}
    reference = Reference(config, model, ref_model)
    trainer = PPOTrainer(config, model, ref_model, tokenizer)
    for batch in batches():
        stats, expected = trainer.step(*batch), reference.step(*batch)
        assert stats == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert expected["ppo/policy/clipfrac"] > 0.02 and expected["ppo/val/clipfrac"] > 0.02
        assert expected["ppo/grad_norm"] > config.max_grad_norm

    for name in ("v_head.summary.weight", "v_head.summary.bias"):
        start[name] /= reference.unit
    for got, expected in ((trainer.model, reference.weights()), (trainer.policy_for_saving, reference.average())):
        got = got.state_dict()
        assert got.keys() == expected.keys()
        for name in expected:
            moved, should = got[name].double() - start[name], expected[name] - start[name]
            assert (moved - should).norm() <= 2e-3 * should.norm() + 1e-6, name


@pytest.mark.parametrize("c", [0.001, 10_000])
def test_scores_and_coefficient_in_another_unit_are_the_same_run(policy, c):
    """The weights up to rounding, the statistics of rewards in the unit of the scores; values learned before too."""
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight, std=0.1)
    of_rewards = {"kl_coef", "non_score_reward", "rlhf_reward", "returns/mean", "val/mean"}
    trainers = []
    for unit in (1, c):
        own = copy.deepcopy(model)
        own.v_head.scale_(unit)
        config = PPOConfig(**SETTINGS | {"init_kl_coef": 0.3 * unit})
        trainers.append(PPOTrainer(config, own, copy.deepcopy(model), tokenizer))
    for queries, responses, scores in batches():
        plain, other = (
            trainer.step(queries, responses, [unit * score for score in scores])
            for trainer, unit in zip(trainers, (1, c))
        )
        for name, value in plain.items():
            factor = c if name.split("/", 1)[1] in of_rewards else 1
            assert other[name] == pytest.approx(factor * value, rel=1e-4, abs=1e-6 * factor), name
    for weight, same in zip(trainers[0].model.parameters(), trainers[1].model.parameters()):
        assert torch.allclose(weight, same, rtol=1e-4, atol=1e-6)
