"""Whole PPO steps against a second implementation: float64, one completion at a time, loops for formulas."""

import copy

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from config import PPOConfig
from ppo import PPOTrainer
from support.models import encode_prompt

SETTINGS = dict(
    batch_size=6, minibatch_size=2, micro_batch_size=4, ppo_epochs=3, gen_len=7, temperature=0.8, gamma=0.97, lam=0.9,
    cliprange=0.05, cliprange_value=0.05, vf_coef=0.7, init_kl_coef=0.3, target=0.5, horizon=50, lr=3e-3, value_lr=2e-2,
    adam_epsilon=1e-3, average_power=1.5, max_grad_norm=0.4, seed=5, dtype="float32", device="cpu",
)  # fmt: skip


class PlainPPO:
    """The policy as transformers' own GPT-2 and a matrix product, trained as the papers say."""

    def __init__(self, config, model, tokenizer):
        self.config, self.kl_coef, self.n_steps = config, config.init_kl_coef, 0
        self.lm = GPT2LMHeadModel(copy.deepcopy(model.config)).double().eval()
        self.lm.load_state_dict(model.state_dict(), strict=False)
        self.head = copy.deepcopy(model.v_head.summary).double()
        self.reference = copy.deepcopy(self.lm)
        self.forbidden = [
            tokenizer.pad_token_id,
            tokenizer.unk_token_id,
            tokenizer.cls_token_id,
            tokenizer.mask_token_id,
        ]
        blocks = self.lm.transformer.h
        frozen = blocks[: round(config.frozen_share * len(blocks))]
        if len(frozen):
            for module in (*frozen, self.lm.transformer.wte, self.lm.transformer.wpe):
                module.requires_grad_(False)
        self.trained = [p for p in self.lm.parameters() if p.requires_grad]
        self.adam = torch.optim.Adam(
            [{"params": self.trained, "lr": config.lr}, {"params": self.head.parameters(), "lr": config.value_lr}],
            eps=config.adam_epsilon,
        )
        self.average = None

    def forward(self, lm, query, response):
        output = lm(torch.cat([query, response])[None], output_hidden_states=True)
        at = slice(len(query) - 1, len(query) + len(response) - 1)
        logits = output.logits[0, at] / self.config.temperature
        logits[:, self.forbidden] = -torch.inf
        logprobs = logits.log_softmax(-1)[torch.arange(len(response)), response]
        hidden = output.hidden_states[-1][0, at]
        hidden = hidden.detach() if self.config.detach_value else hidden
        return logprobs, hidden @ self.head.weight[0] + self.head.bias

    def step(self, queries, responses, scores):
        c, n = self.config, len(queries)
        old, returns, advantages, kls = [], [], [], []
        with torch.no_grad():
            for query, response, score in zip(queries, responses, scores):
                logprobs, values = self.forward(self.lm, query, response)
                ref_logprobs, _ = self.forward(self.reference, query, response)
                kls.append(float((logprobs - ref_logprobs).sum()))
                rewards = [-self.kl_coef * float(p - q) for p, q in zip(logprobs, ref_logprobs)]
                rewards[-1] += score
                value = [*values.tolist(), 0.0]
                advantage = [
                    sum(
                        (c.gamma * c.lam) ** (k - t) * (rewards[k] + c.gamma * value[k + 1] - value[k])
                        for k in range(t, len(response))
                    )
                    for t in range(len(response))
                ]
                old.append((logprobs, values))
                advantages.append(np.array(advantage))
                returns.append(torch.tensor(advantage) + values)
        every = np.concatenate(advantages)
        advantages = [torch.tensor((a - every.mean()) / np.sqrt(every.var() + 1e-8)) for a in advantages]
        for epoch in range(c.ppo_epochs):
            order = np.random.default_rng([c.seed, self.n_steps, epoch]).permutation(n)
            for rows in np.split(order, range(c.minibatch_size, n, c.minibatch_size)):
                self.update([(queries[i], responses[i], *old[i], advantages[i], returns[i]) for i in rows])
        self.n_steps += 1
        self.average_weights()
        if c.kl_controller == "adaptive":
            self.kl_coef *= 1 + float(np.clip(np.mean(kls) / c.target - 1, -0.2, 0.2)) * n / c.horizon

    def update(self, minibatch):
        c, loss, n_tokens = self.config, 0.0, 0
        for query, response, old_logprobs, old_values, advantages, returns in minibatch:
            logprobs, values = self.forward(self.lm, query, response)
            for t in range(len(response)):
                ratio = torch.exp(logprobs[t] - old_logprobs[t])
                surrogate = torch.minimum(
                    ratio * advantages[t], ratio.clamp(1 - c.cliprange, 1 + c.cliprange) * advantages[t]
                )
                near = old_values[t] + (values[t] - old_values[t]).clamp(-c.cliprange_value, c.cliprange_value)
                error = torch.maximum((values[t] - returns[t]) ** 2, (near - returns[t]) ** 2)
                loss, n_tokens = loss - surrogate + c.vf_coef * 0.5 * error, n_tokens + 1
        weights = [*self.trained, *self.head.parameters()]
        gradients = torch.autograd.grad(loss / n_tokens, weights)
        norm = torch.sqrt(sum((g**2).sum() for g in gradients))
        for weight, gradient in zip(weights, gradients):
            weight.grad = gradient * min(1.0, c.max_grad_norm / float(norm))
        self.adam.step()

    def weights(self):
        return {name: w.detach().clone() for name, w in self.lm.transformer.named_parameters()}

    def average_weights(self):
        share = (self.config.average_power + 1) / (self.config.average_power + self.n_steps)
        new = self.weights()
        old = self.average or new
        self.average = {name: (1 - share) * old[name] + share * new[name] for name in new}


@pytest.mark.parametrize(
    "changes",
    [
        dict(frozen_share=0.0, detach_value=False, kl_controller="adaptive"),
        dict(frozen_share=0.0, detach_value=True, kl_controller="fixed"),
        dict(frozen_share=0.5, detach_value=True, kl_controller="adaptive"),
        dict(frozen_share=0.5, detach_value=False, kl_controller="fixed", minibatch_size=6),
    ],
)
def test_three_steps_are_those_of_a_second_implementation(policy, changes):
    model, tokenizer = policy
    torch.nn.init.normal_(model.v_head.summary.weight, generator=torch.Generator().manual_seed(3))
    config = PPOConfig(**{**SETTINGS, **changes})
    plain = PlainPPO(config, model, tokenizer)
    trainer = PPOTrainer(config, model, copy.deepcopy(model), tokenizer)
    start = plain.weights()
    queries = [encode_prompt(tokenizer, text) for text in ["刚收到货,感觉", "衣服", "这本书"] * 2]
    clipped = []
    for step in range(3):
        responses = trainer.generate(queries)
        scores = [0.9, 0.1, 0.4, 0.7, 0.2, 0.6][step:] + [0.3] * step
        assert trainer.kl_controller.value == pytest.approx(plain.kl_coef, rel=1e-4)
        stats = trainer.step(queries, responses, scores)
        clipped.append((stats["ppo/policy/clipfrac"], stats["ppo/val/clipfrac"], stats["ppo/grad_norm"]))
        plain.step(queries, responses, scores)
    assert all(policy > 0.05 and value > 0.05 and norm > config.max_grad_norm for policy, value, norm in clipped)

    for name, weight in trainer.model.transformer.named_parameters():
        moved = (plain.weights()[name] - start[name]).abs().max()
        assert torch.allclose(weight.double(), plain.weights()[name], atol=2e-5), name
        assert (moved > 1e-4) == weight.requires_grad, name
    assert torch.allclose(trainer.model.v_head.summary.weight.double(), plain.head.weight, atol=2e-5)
    for name, weight in trainer.policy_for_saving.transformer.named_parameters():
        assert torch.allclose(weight.double(), plain.average[name], atol=2e-5), name
