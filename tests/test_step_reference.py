"""Whole steps of PPOTrainer against a second implementation: plain forward passes, loops, and float64.

Nothing of ppo.py or gpt2_value_head.py is used for it: GPT-2 is the library's, every prompt with its completion goes
through it by itself, without padding or a cache.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from config import PPOConfig
from ppo import PPOTrainer

SEP, FORBIDDEN, N = 3, [0, 1, 2, 4], 7
SETTINGS = dict(
    batch_size=N, minibatch_size=4, micro_batch_size=3, ppo_epochs=2, gen_len=6, temperature=0.7, gamma=0.9, lam=0.8,
    cliprange=0.05, cliprange_value=0.03, vf_coef=0.6, kl_controller="adaptive", init_kl_coef=0.3, target=0.01,
    horizon=20, lr=2e-3, value_lr=1e-2, adam_epsilon=1e-2, max_grad_norm=0.5, average_power=2.0, seed=5,
    dtype="float32", device="cpu",
)  # fmt: skip


class Reference:
    """Proximal policy optimisation once more, from the documentation of PPOConfig and ppo.py."""

    def __init__(self, config, model, ref_model):
        self.config, self.n_steps, self.kl_coef, self.unit = config, 0, config.init_kl_coef, None
        self.gpt2, self.ref_gpt2 = plain_gpt2(model), plain_gpt2(ref_model)
        self.weight = model.v_head.summary.weight.detach().double()[0].requires_grad_()
        self.bias = model.v_head.summary.bias.detach().double().requires_grad_()
        n_frozen = round(config.frozen_share * model.config.n_layer)
        frozen = ("transformer.wte", "transformer.wpe", *(f"transformer.h.{i}." for i in range(n_frozen)))
        for name, parameter in self.gpt2.named_parameters():
            parameter.requires_grad_(not (n_frozen and name.startswith(frozen)))
        policy = [parameter for parameter in self.gpt2.parameters() if parameter.requires_grad]
        self.trained = [*policy, self.weight, self.bias]
        groups = [{"params": policy, "lr": config.lr}, {"params": self.trained[-2:], "lr": config.value_lr}]
        self.optimizer = torch.optim.Adam(groups, eps=config.adam_epsilon)
        self.history = []

    def logprobs_and_values(self, gpt2, query, response):
        """Of one completion: two lists of T numbers, and the entropies."""
        output = gpt2(torch.cat([query, response])[None], output_hidden_states=True)
        logits = output.logits[0, len(query) - 1 : -1] / self.config.temperature
        forbidden = torch.zeros(logits.shape[-1], dtype=torch.bool).index_fill(0, torch.tensor(FORBIDDEN), True)
        logprobs = logits.masked_fill(forbidden, -1e300).log_softmax(-1)
        hidden_states = output.hidden_states[-1][0, len(query) - 1 : -1]
        if self.config.detach_value:
            hidden_states = hidden_states.detach()
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs[torch.arange(len(response)), response], hidden_states @ self.weight + self.bias, entropy

    def step(self, queries, responses, scores):
        c, n = self.config, len(queries)
        if self.unit is None:
            self.unit = np.std(scores) / 0.4
            with torch.no_grad():
                self.weight /= self.unit
                self.bias /= self.unit
        with torch.no_grad():
            old = [self.logprobs_and_values(self.gpt2, *pair) for pair in zip(queries, responses)]
            ref = [self.logprobs_and_values(self.ref_gpt2, *pair)[0] for pair in zip(queries, responses)]
        kls = [logprobs - ref_logprobs for (logprobs, _, _), ref_logprobs in zip(old, ref)]
        rewards = [-self.kl_coef / self.unit * kl for kl in kls]
        advantages, returns = [], []
        for reward, score, (_, values, _) in zip(rewards, scores, old):
            reward[-1] += score / self.unit
            advantage = torch.zeros_like(values)
            for t in range(len(values)):
                for k in range(t, len(values)):
                    following = values[k + 1] if k + 1 < len(values) else 0
                    advantage[t] += (c.gamma * c.lam) ** (k - t) * (reward[k] + c.gamma * following - values[k])
            advantages.append(advantage)
            returns.append(advantage + values)
        together = torch.cat(advantages).numpy()
        advantages = [(a - together.mean()) / np.sqrt(together.var() + 1e-8) for a in advantages]

        updates = []
        for epoch in range(c.ppo_epochs):
            order = np.random.default_rng([c.seed, self.n_steps, epoch]).permutation(n)
            for start in range(0, n, c.minibatch_size):
                policy_losses, value_losses, squares, ratios, policy_clips, value_clips = [], [], [], [], [], []
                for i in order[start : start + c.minibatch_size]:
                    logprobs, values, _ = self.logprobs_and_values(self.gpt2, queries[i], responses[i])
                    for t in range(len(values)):
                        ratio = torch.exp(logprobs[t] - old[i][0][t])
                        policy_losses.append(
                            max(
                                -advantages[i][t] * ratio,
                                -advantages[i][t] * min(max(ratio, 1 - c.cliprange), 1 + c.cliprange),
                            )
                        )
                        policy_clips.append(float(policy_losses[-1] > -advantages[i][t] * ratio))
                        before, clip = old[i][1][t], c.cliprange_value
                        clipped = min(max(values[t], before - clip), before + clip)
                        errors = [(v - returns[i][t]) ** 2 for v in (values[t], clipped)]
                        value_losses.append(max(errors) / 2)
                        value_clips.append(float(errors[1] > errors[0]))
                        squares.append((logprobs[t] - old[i][0][t]).item() ** 2)
                        ratios.append(ratio.item())
                policy_loss, value_loss = sum(policy_losses) / len(ratios), sum(value_losses) / len(ratios)
                self.optimizer.zero_grad(set_to_none=False)  # where all values are clipped, 0 and not None
                loss = policy_loss + c.vf_coef * value_loss
                loss.backward()
                norm = sum((p.grad**2).sum() for p in self.trained).sqrt().item()
                for p in self.trained:
                    p.grad *= min(1.0, c.max_grad_norm / norm)
                self.optimizer.step()
                means = (0.5 * np.mean(squares), np.mean(ratios), np.mean(policy_clips), np.mean(value_clips))
                updates.append([policy_loss.item(), value_loss.item(), loss.item(), *means, norm])
        names = ("loss/policy", "loss/value", "loss/total", "policy/approxkl", "policy/ratio", "policy/clipfrac")
        names = [f"ppo/{name}" for name in (*names, "val/clipfrac", "grad_norm")]
        kl = sum(kl.sum().item() for kl in kls) / n
        targets, predictions = torch.cat(returns), torch.cat([values for _, values, _ in old])
        stats = dict(zip(names, np.mean(updates, axis=0).tolist())) | {
            "objective/kl": kl,
            "objective/kl_coef": self.kl_coef,
            "objective/entropy": torch.cat([entropy for _, _, entropy in old]).mean().item(),
            "objective/non_score_reward": -self.kl_coef * kl,
            "objective/rlhf_reward": np.mean(scores) - self.kl_coef * kl,
            "ppo/skipped": 0.0,
            "ppo/returns/mean": self.unit * targets.mean().item(),
            "ppo/val/mean": self.unit * predictions.mean().item(),
            "ppo/val/explained_variance": 1 - (targets - predictions).numpy().var() / targets.numpy().var(),
            "tokens/completion_length": np.mean([len(response) for response in responses]),
            "tokens/ended_share": np.mean([SEP in response for response in responses]),
        }
        error = min(max(kl / c.target - 1, -0.2), 0.2)
        self.kl_coef *= 1 + error * n / c.horizon
        self.n_steps += 1
        self.history.append(self.weights())
        return stats

    def weights(self):
        named = {**self.gpt2.state_dict(), "v_head.summary.weight": self.weight[None], "v_head.summary.bias": self.bias}
        return {name: tensor.detach().clone() for name, tensor in named.items()}

    def average(self):
        """The two steps' weights, of which step t weighs as `polynomial_average` says."""
        share = (self.config.average_power + 1) / (self.config.average_power + 2)
        first, second = self.history
        return {name: (1 - share) * first[name] + share * second[name] for name in first}


def plain_gpt2(model):
    gpt2 = GPT2LMHeadModel(model.config)
    gpt2.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("v_head")})
    return gpt2.double().eval()


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
