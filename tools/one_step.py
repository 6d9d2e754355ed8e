"""One PPO step in numbers, token by token, for readers.

    python -m tools.one_step        writes docs/one_step.md and docs/one_step.zh.md anew

A real step on the demo models, on the CPU in float32. Every number comes from the trainer or from a function of ppo.py,
or is a sum, a product or a mean of such. `tests/test_one_step.py` works all of them out once more.
"""

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from config import PPOConfig
from ppo import (
    SPREAD,
    AdaptiveKLController,
    compute_advantages,
    compute_rewards,
    logprobs_values_entropy,
    masked_mean,
    policy_loss,
    whiten,
)
from reward import score_texts
from support.load import load
from support.text_trainer import TextPPOTrainer

WARM_UP = 3  # ordinary steps before: policy, reference and values differ, and a quarter of the batch is still unhappy
DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"en": DOCS / "one_step.md", "zh": DOCS / "one_step.zh.md"}


# ----------------------------------------------------------------------------------------------
# The step


@dataclass
class Epoch:
    """The policy at the start of an epoch, and what the optimiser step made of it.

    logprobs, values, ratios (n, T) float32, clipped (n, T) bool. stats: what `Engine.optimise` returned, as floats,
    named as in metrics.csv; none for the state after the last epoch.
    """

    logprobs: torch.Tensor
    values: torch.Tensor
    ratios: torch.Tensor
    clipped: torch.Tensor
    stats: dict[str, float]


@dataclass
class Step:
    """One PPO step with everything between; tensors (n,) and (n, T), float32 on the CPU, `mask` as in ppo.py.

    responses: the tokens of each completion, as text. Rewards and values are in the unit of the scores, of which the
    trainer's is `reward_unit`; losses in the trainer's. epochs: `ppo_epochs` of them, and the state after the last.
    stats: what `PPOTrainer.step` returned. kl_coefs: of the next step, under each of the two controllers.
    """

    config: PPOConfig
    prompt: str
    completions: list[str]
    responses: list[list[str]]
    mask: torch.Tensor
    scores: torch.Tensor
    reward_unit: float
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    penalties: torch.Tensor
    rewards: torch.Tensor
    deltas: torch.Tensor
    advantages: torch.Tensor
    returns: torch.Tensor
    whitened: torch.Tensor
    epochs: list[Epoch]
    stats: dict[str, float]
    kl_coefs: dict[str, float]


def demo_config() -> PPOConfig:
    """The demo's settings, with the lambda and the value head's learning rate of the preset `default`."""
    return PPOConfig(preset="demo", lam=1.0, value_lr=1e-3, seed=6, device="cpu")


def take_step(trainer: TextPPOTrainer, reward, prompt: str) -> Step:
    """WARM_UP ordinary steps, then one with everything between written down."""
    config, engine = trainer.config, trainer.engine
    query_tensors = trainer.encode([prompt] * config.batch_size)
    for step in range(WARM_UP + 1):
        response_tensors = trainer.generate(query_tensors)
        completions = trainer.decode(response_tensors)
        scores = score_texts(reward, [prompt + text for text in completions])
        if step < WARM_UP:
            trainer.step(query_tensors, response_tensors, scores)

    # A step, and what its engine gives: the completions, then policy and reference, then the optimiser steps
    kl_coef, seen, new, updates = trainer.kl_controller.value, [], [], []

    def watch(name, call):
        engine.observer = None
        if name == "optimise":
            new.append(engine.evaluate(logprobs_values_entropy, seen[0], trainer.model))
        (updates if name == "optimise" else seen).append(call())
        engine.observer = watch
        return (updates if name == "optimise" else seen)[-1]

    engine.observer = watch
    stats = trainer.step(query_tensors, response_tensors, scores)
    engine.observer = None
    batch, (logprobs, values, _), (ref_logprobs, *_) = seen
    new.append(engine.evaluate(logprobs_values_entropy, batch, trainer.model))

    # What lies between, column by column, each by the function of ppo.py that the page names over it
    mask, unit = batch.mask, trainer.reward_unit
    values = unit * values
    rewards, penalties = compute_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
    advantages, returns = compute_advantages(values, rewards, mask, config.gamma, config.lam)
    deltas, _ = compute_advantages(values, rewards, mask, config.gamma, lam=0)  # with lambda 0 an advantage is a delta
    whitened = whiten(advantages, mask)
    policy_losses = torch.vmap(torch.vmap(policy_loss, (0, 0, 0, 0, None)), (0, 0, 0, 0, None))  # each token's own
    ones, epochs = torch.ones_like(logprobs), []
    for (new_logprobs, new_values, _), update in zip(new, [*updates, {}]):
        ratios, _ = policy_losses(new_logprobs, logprobs, -ones, ones, math.inf)  # advantage -1, no clip: the ratio
        _, clipped = policy_losses(new_logprobs, logprobs, whitened, ones, config.cliprange)
        update = {f"ppo/{name}": value.item() for name, value in update.items()}
        epochs.append(Epoch(new_logprobs, unit * new_values, ratios, clipped.bool() & mask, update))
    adaptive = AdaptiveKLController(kl_coef, config.target, config.horizon)
    adaptive.update(stats["objective/kl"], len(scores))
    return Step(
        config=config, prompt=prompt, completions=completions,
        responses=[trainer.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in response_tensors],
        mask=mask, scores=scores, reward_unit=unit, logprobs=logprobs, ref_logprobs=ref_logprobs, values=values,
        penalties=penalties, rewards=rewards, deltas=deltas, advantages=advantages, returns=returns, whitened=whitened,
        epochs=epochs, stats=stats, kl_coefs={"fixed": trainer.kl_controller.value, "adaptive": adaptive.value},
    )  # fmt: skip


def happy_and_unhappy(step: Step) -> tuple[int, int]:
    """The shortest completion with a score above 0.9 that the step made more probable, and the shortest with one below
    0.1 that it made less probable; of those where the last epoch clipped a token that grew (happy) or shrank (unhappy),
    if there are any."""

    def shortest(candidates, moved, to_show):
        rows = candidates.nonzero().squeeze(1).tolist()
        return min(rows, key=lambda i: (not moved[i], not to_show[i].any(), len(step.responses[i])))

    (grew, shrank), products = clipped_in_last_epoch(step), ratio_products(step)
    return shortest(step.scores > 0.9, products > 1, grew), shortest(step.scores < 0.1, products < 1, shrank)


def ratio_products(step: Step) -> torch.Tensor:
    """By how much the step multiplied the probability of each whole completion (n,)."""
    return step.epochs[-1].ratios.where(step.mask, 1).prod(1)


def clipped_in_last_epoch(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens (n, T) the last epoch clipped because their ratio was too high, and which because too low."""
    last = step.epochs[-2]
    return last.clipped & (last.ratios > 1), last.clipped & (last.ratios < 1)


# ----------------------------------------------------------------------------------------------
# The page


def number(value, digits: int = 3) -> str:
    """A rounded number, without the sign of a zero."""
    return f"{float(value):.{digits}f}".replace("-", "" if round(float(value), digits) == 0 else "-")


def token_rows(step: Step, names: dict[int, str], columns: list[torch.Tensor], bold: list[torch.Tensor] = ()) -> str:
    """The body of a table of tokens: a line with the completion's name, then a line a token.

    columns (n, T) each. bold: for the last columns, where (n, T) a number is set bold.
    """
    marks = [torch.zeros_like(step.mask)] * (len(columns) - len(bold)) + list(bold)
    lines = []
    for i, name in names.items():
        lines.append(f"| **{name}** |" + " |" * len(columns))
        for t, token in enumerate(step.responses[i]):
            cells = [number(column[i, t]) for column in columns]
            cells = [f"**{cell}**" if mark[i, t] else cell for cell, mark in zip(cells, marks)]
            lines.append(f"| {token} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


LOSSES = ("ppo/loss/policy", "ppo/loss/value", "ppo/loss/total", "ppo/policy/clipfrac")


def loss_rows(step: Step, mean: str) -> str:
    """The body of the table of losses: a line an epoch, and their mean."""
    lines = {str(k): epoch.stats for k, epoch in enumerate(step.epochs[:-1], 1)} | {mean: step.stats}
    return "\n".join(
        f"| {name} | " + " | ".join(number(stats[loss], 4) for loss in LOSSES) + " |" for name, stats in lines.items()
    )


def page(step: Step, language: str) -> str:
    """The whole page in English ("en") or Chinese ("zh")."""
    text, happy_name, unhappy_name, mean_name = TEXTS[language]
    happy, unhappy = happy_and_unhappy(step)
    names = {happy: happy_name, unhappy: unhappy_name}
    config, epochs, mask = step.config, step.epochs, step.mask
    before, after = epochs[0].logprobs.exp(), epochs[-1].logprobs.exp()
    grew, shrank = clipped_in_last_epoch(step)
    ratios, clipped = [epoch.ratios for epoch in epochs], [epoch.clipped for epoch in epochs]
    products, is_happy, is_unhappy = ratio_products(step), step.scores > 0.9, step.scores < 0.1
    log_ratios = -step.penalties.sum(1) / step.stats["objective/kl_coef"]
    beyond = mask & ((ratios[-1] > 1 + config.cliprange) | (ratios[-1] < 1 - config.cliprange))

    def highest(i, column):
        return int(column[i].where(mask[i], -math.inf).argmax())

    lowest = highest(happy, -step.whitened)
    against = highest(happy, step.whitened.sign() * (epochs[0].logprobs - epochs[-1].logprobs))

    def positive(i):
        return int((step.whitened[i] > 0).sum())

    def marked(i, marks):
        return " ".join(token for token, mark in zip(step.responses[i], marks[i]) if mark)

    return text.format(
        step=WARM_UP + 1, warm_up=WARM_UP, batch=config.batch_size, beta=step.stats["objective/kl_coef"],
        gamma=config.gamma, lam=config.lam, cliprange=config.cliprange, cliprange_value=config.cliprange_value,
        epochs=config.ppo_epochs, vf_coef=config.vf_coef, target=config.target, horizon=config.horizon,
        low=1 - config.cliprange, high=1 + config.cliprange,
        mean_score=number(step.scores.mean()), n_happy=int(is_happy.sum()), n_unhappy=int(is_unhappy.sum()),
        completion_rows="\n".join(
            f"| **{name}** | {step.prompt}**{step.completions[i]}** | {number(step.scores[i])} |"
            for i, name in names.items()
        ),
        reward_rows=token_rows(step, names, [step.logprobs, step.ref_logprobs, step.penalties, step.rewards]),
        happy_penalty=number(step.penalties[happy].sum()), unhappy_penalty=number(step.penalties[unhappy].sum()),
        dear=step.responses[happy][highest(happy, -step.penalties)],
        cheap=step.responses[unhappy][highest(unhappy, step.penalties)],
        kl=number(step.stats["objective/kl"]), kl_error=number(log_ratios.std() / math.sqrt(len(log_ratios))),
        happy_log_ratio=number(log_ratios[happy]), unhappy_log_ratio=number(log_ratios[unhappy]),
        n_negative=int((log_ratios < 0).sum()), noisy_kl=number(2 / config.batch_size),
        advantage_rows=token_rows(
            step, names, [step.values, step.rewards, step.deltas, step.advantages, step.returns, step.whitened]
        ),
        first_value=number(step.values[happy, 0]), new_first_value=number(epochs[-1].values[happy, 0]),
        first_return=number(step.returns[:, 0].mean()),
        happy_return=number(step.returns[happy, 0]), unhappy_return=number(step.returns[unhappy, 0]),
        happy_advantage=number(step.advantages[happy, 0]), unhappy_advantage=number(step.advantages[unhappy, 0]),
        n_tokens=int(mask.sum()), mean_advantage=number(masked_mean(step.advantages, mask)),
        mean_value=number(step.stats["ppo/val/mean"]), mean_return=number(step.stats["ppo/returns/mean"]),
        happy_positive=positive(happy), happy_tokens=len(step.responses[happy]),
        unhappy_positive=positive(unhappy), unhappy_tokens=len(step.responses[unhappy]),
        lowest=step.responses[happy][lowest], lowest_advantage=number(step.whitened[happy, lowest]),
        lowest_value=number(step.values[happy, lowest]),
        epoch_rows=token_rows(step, names, [step.whitened, before, after, *ratios], clipped),
        happy_product=number(products[happy]), unhappy_product=number(products[unhappy]),
        n_rose=int((is_happy & (products > 1)).sum()), n_fell=int((is_unhappy & (products < 1)).sum()),
        happy_mean_product=number(products[is_happy].mean()), unhappy_mean_product=number(products[is_unhappy].mean()),
        against=step.responses[happy][against], against_advantage=number(step.whitened[happy, against]),
        against_ratio=number(ratios[-1][happy, against]),
        happy_clipped=marked(happy, grew), unhappy_clipped=marked(unhappy, shrank),
        n_beyond=int(beyond.sum()), n_against=int((beyond & ~clipped[-1]).sum()),
        loss_rows=loss_rows(step, mean_name), unit=number(step.reward_unit), spread=SPREAD,
        value_clip=number(config.cliprange_value * step.reward_unit),
        fixed=number(step.kl_coefs["fixed"], 4), adaptive=number(step.kl_coefs["adaptive"], 4),
    )  # fmt: skip


ENGLISH = """\
# One PPO step in numbers

This page follows one step of PPO token by token, from the texts that a model writes to its new weights, in real
numbers. [中文](one_step.zh.md)

You need to know what a probability is and what a gradient is. A token is what a model reads or writes at a time: here a
character, or `[SEP]`, which ends a text.

[Scores](#scores) · [KL penalty](#kl-penalty) · [Advantages](#advantages) · [Ratio and clip](#ratio-and-clip) ·
[Losses](#losses) · [KL coefficient](#kl-coefficient)

A small GPT-2 continues a shop review, a classifier says how happy the review is, and PPO makes happy reviews more
probable. It is the demo (`--preset demo`, but with λ and `value_lr` of the preset `default`) after {warm_up} steps.
This is step {step}, seen along a happy and an unhappy completion. (Why so early a step: later nearly all are happy.)

Over each column stand its formula and the function that works it out. `ValueHead` is in
[gpt2_value_head.py](../gpt2_value_head.py), the others are in [ppo.py](../ppo.py), where `PPOTrainer.step` and
`PPOTrainer.loss` call them in the order of this page. `python -m tools.one_step` writes the page from a real step; on
another machine the last digits may differ, and with other library versions the texts too.

| symbol | what | unit | here | in `config.py` |
| --- | --- | --- | --- | --- |
| π | probability of a token under the policy, the model in training | 0 to 1 | | |
| π<sub>old</sub> | the same before this step | 0 to 1 | | |
| π<sub>ref</sub> | the same under the reference model, the model before all training | 0 to 1 | | |
| log π | natural logarithm of π; -1 nat is a probability of 0.37 | nats | | |
| KL | distance of the policy from the reference model | nats a completion | | |
| | KL that the adaptive controller aims at | nats a completion | {target:g} | `target` |
| β | KL coefficient, the price of this distance | reward per nat | {beta:g} | `init_kl_coef` |
| γ | discount: each token that a reward comes later multiplies it by γ | 0 to 1 | {gamma:g} | `gamma` |
| λ | how far each token looks ahead when it is judged: 1 to the end of the text, 0 to the next token | 0 to 1 \
| {lam:g} | `lam` |
| ε | how far a step pushes the probability of a token away from π<sub>old</sub>, up or down \
| share of π<sub>old</sub> | {cliprange:g} | `cliprange` |
| ε<sub>V</sub> | the same for a value, a guess of the reward still to come \
| the trainer's reward unit, see [Losses](#losses) | {cliprange_value:g} | `cliprange_value` |

## Scores

The policy continues the prompt {batch} times (`PPOTrainer.generate`). The classifier reads each whole text and gives it
a score, the probability that it is happy (`SentimentReward` in [reward.py](../reward.py)): {mean_score} on average,
above 0.9 for {n_happy} of the {batch} and below 0.1 for {n_unhappy}. Two of them:

| | text | score |
| --- | --- | ---: |
{completion_rows}

(The shortest happy one that this step makes more probable, and the shortest unhappy one that it makes less probable,
of those in which the [clip](#ratio-and-clip) catches a token.)

A score judges a whole text, but training needs a number for each token: which choices were good ones? The next two
sections lead from the one to the other.

## KL penalty

Policy and reference model read the completions and say how probable each token was where it stands. A token that the
policy likes better than the reference model does costs something, and one that it likes less earns something. This is
the KL penalty, the price of leaving the original language. Without it the policy would end up writing the one text
that the classifier likes best. The score is added at the last token, usually `[SEP]`.

| token | log π<sub>old</sub><br><br>`logprobs_from_logits` | log π<sub>ref</sub><br><br>`logprobs_from_logits` \
| KL penalty<br>-β (log π<sub>old</sub> - log π<sub>ref</sub>)<br>`compute_rewards` \
| reward r<br>penalty; + score at the last<br>`compute_rewards` |
| --- | ---: | ---: | ---: | ---: |
{reward_rows}

In the happy completion 「{dear}」 costs most: the policy has come to like it better than the reference model does. In
the unhappy one 「{cheap}」 earns most: the policy has come to like it less. Over the whole completion the penalties sum
to {happy_penalty} (happy) and {unhappy_penalty} (unhappy).

### Why a KL may be below 0

Without the factor -β, the penalties of a completion sum to its log-ratio, log π<sub>old</sub> - log π<sub>ref</sub> of
the whole text: {happy_log_ratio} nats for the happy one and {unhappy_log_ratio} for the unhappy one. It is negative
where the policy writes a text less often than the reference model does, as with {n_negative} of the {batch} here.

The KL is the mean log-ratio of everything that the policy may write, and this mean is never negative. A batch only
estimates it: `objective/kl` is the mean over the {batch} completions, {kl} here, with a standard error of {kl_error}.
A run begins at a KL of 0, and while the KL is not much greater than this noise, the estimate may be negative. (A small
KL has a standard error of about √(2 KL / n) with n completions. With {batch} of them that is more than the KL itself as
long as the KL is below 2 / {batch} = {noisy_kl} nats.)

## Advantages

The value head, a second output of the policy's network, guesses before each token how much reward is still to come:
the value V. The first V of both completions is the same, {first_value}, since nothing but the prompt has been read yet.
Then the guess changes with every token. From values and rewards come the other columns, in which ′ means the next
token; after the last token V′ and A′ are 0. With γ = 1 and λ = 1, the defaults, δ, A and G are simple:

- The TD error (temporal-difference error) δ = r + V′ - V is the news that a token brings: its own reward, and by how
  much it changes the guess.
- The advantage A is the sum of the news from this token to the end. All guesses but the first cancel out, which leaves
  A = G - V: **how much better it ended than was expected here**.
- The return G = r + r′ + r″ + … is the sum of the rewards from this token to the end, with nothing guessed about it.

| token | value V<br><br>`ValueHead` | reward r<br><br>`compute_rewards` \
| TD error δ<br>r + γ V′ - V<br>`compute_advantages` | advantage A<br>δ + γ λ A′<br>`compute_advantages` \
| return G<br>A + V<br>`compute_advantages` | whitened Â<br>(A - mean) / standard deviation<br>`whiten` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{advantage_rows}

So nearly the whole score reaches every token. (With a λ below 1 later news counts less, and G is partly guessed.)

At the first token {first_value} was expected. The happy completion got {happy_return}, an advantage of
{happy_advantage}; the unhappy one got {unhappy_return}, an advantage of {unhappy_advantage}.

The guesses may be wrong for all completions alike, above all in the first steps, since the value head starts at zero:
over the batch V is {mean_value} on average and G is {mean_return}. Therefore the advantages are whitened. Their mean
over all {n_tokens:,} tokens of the batch, {mean_advantage}, is taken off, and they are divided by their standard
deviation. Now each token is compared with the rest of the batch: Â is positive at {happy_positive} of the
{happy_tokens} happy tokens and at {unhappy_positive} of the {unhappy_tokens} unhappy ones.

Within one completion G hardly changes, so Â is low where the guess was high: less was left to win. The lowest Â of the
happy completion is {lowest_advantage}, at 「{lowest}」, before which V was {lowest_value}.

### What the value head is for

The score says how a text ended. Whether that was better or worse than usual, and from which token on, takes something
to compare it with: V, what the policy earns on average after the same beginning. Whoever makes such guesses is called
the critic. G does the judging, so a poor critic makes the advantages noisier, but with λ = 1 it does not lead them
astray.

The reward model cannot take its place. It was trained on whole texts and says little about half of one. Even a good
judge of what stands there would not know what the policy will write next, nor what KL penalty is still to come, and
both are part of V. Besides, it is a network of its own, which would have to read every beginning of every completion;
the value head reads what the policy has worked out anyway.

## Ratio and clip

Only now is anything trained: {epochs} passes over the batch, the epochs, with an optimiser step each. The loss of a
token is

    max(-Â ratio, -Â clip(ratio, 1 - ε, 1 + ε))        ratio = π / π_old = exp(log π - log π_old)

Where Â is positive, a higher probability lowers the loss; where Â is negative, a lower one does. But once the ratio is
above {high:g} with a positive Â, or below {low:g} with a negative one, the second term is the larger, and it is a
constant. A constant has no gradient: the token is clipped (**bold**) and pushes no further. The advantages were worked
out for π<sub>old</sub> and say little about a policy far from it; with the clip, {epochs} epochs can use the same
completions.

| token | Â<br><br>`whiten` | π<sub>old</sub><br><br>`logprobs_from_logits` | π after<br><br>`logprobs_from_logits` \
| epoch 1<br>π / π<sub>old</sub><br>`policy_loss` | epoch 2<br>π / π<sub>old</sub><br>`policy_loss` \
| epoch 3<br>π / π<sub>old</sub><br>`policy_loss` | epoch 4<br>π / π<sub>old</sub><br>`policy_loss` \
| after<br>π / π<sub>old</sub><br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{epoch_rows}

- **In epoch 1** every ratio is 1, since the policy has not moved yet.
- **A whole completion** is as probable as its tokens multiplied together. The product of the last column is
  {happy_product} for the happy completion and {unhappy_product} for the unhappy one: so many times as probable as
  before. Not every completion follows its score in one step. Of the {n_happy} with a score above 0.9, {n_rose} became
  more probable, and the mean product of all {n_happy} is {happy_mean_product}. Of the {n_unhappy} below 0.1, {n_fell}
  became less probable, and the mean product of all {n_unhappy} is {unhappy_mean_product}.
- **A token may move against its own Â**: 「{against}」 in the happy completion has an Â of {against_advantage}, and its
  ratio is {against_ratio} after the step. The same weights serve all completions, and what the other tokens ask of
  them can outweigh what this one asks.
- **The clip bounds the gradient, not the ratio.** In the last epoch it caught 「{happy_clipped}」 in the happy
  completion, which grew too much, and 「{unhappy_clipped}」 in the unhappy one, which shrank too much. They push no
  more, but their ratios may go on: the other tokens move the same weights, and so does the optimiser's memory of
  earlier gradients (Adam's momentum).
- **Beyond the limits and not bold** are the tokens that moved against their Â: above {high:g} with a negative one, or
  below {low:g} with a positive one. They keep their push, which leads back. After the step {n_beyond} of the
  {n_tokens:,} ratios of the batch lie beyond the limits, {n_against} of them not clipped.
- **A token that was almost certain**, such as the second half of a word, has no room to rise.

## Losses

The policy loss is the mean of the last section's formula over all tokens of the batch. At the same time the value head
learns to guess G. Its loss, too, is the larger of a plain and a clipped one.

| epoch | policy loss<br>mean max(-Â ratio, -Â clip(ratio))<br>`policy_loss` \
| value loss<br>½ mean max((V - G)², (clip(V) - G)²)<br>`value_loss` \
| total<br>policy + {vf_coef:g} value<br>`PPOTrainer.loss` | clipped<br>share of all tokens<br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: |
{loss_rows}

The last line, the mean over the epochs, is what `PPOTrainer.step` returns and `metrics.csv` holds; {vf_coef:g} is
`vf_coef`.

V and G are counted here in the trainer's reward unit, which is {unit} in scores. It is chosen so that the scores of the
first batch have a standard deviation of {spread:g} units (`pick_reward_unit`): scores from 0 to 100, with a β a hundred
times as high, train the same policy. clip(V) stays within ε<sub>V</sub> = {cliprange_value:g} units
(`cliprange_value`), {value_clip} in scores, of the V before the step.

A policy loss of 0 in epoch 1 does not mean that there is nothing to learn. With all ratios 1 it is the mean of -Â,
which whitening made 0. What counts is its slope: from there it goes down, and tokens begin to be clipped. The value
loss goes down as well: V at the first token was {first_value} and is {new_first_value} after the step; the mean G there
is {first_return}.

### Why losses need not fall during training

Within this step both losses fell. From step to step they need not, even where all goes well:

- The policy loss starts at 0 in every step, since the advantages are whitened anew. It says how far the step got on its
  batch, not how good the policy is.
- The value loss measures the distance to G, which changes with the policy. Besides, nobody can foresee how a completion
  will end; that part of the loss stays.

Watch the mean score and what it costs: `env/reward_mean` and `objective/kl` in `metrics.csv`, and at the end of a run
the gain, which weighs one against the other ([how to read the result](result.md)).

## KL coefficient

Last comes β for the next step. The `fixed` controller, the default, keeps it. The `adaptive` one aims at a KL of
{target:g} nats a completion (`target`): a KL above the target raises β, one below it lowers β, and the larger
`horizon` (in completions), the slower. With the KL of {kl} of this batch:

| controller | next β | |
| --- | --- | ---: |
| `FixedKLController` | β | {fixed} |
| `AdaptiveKLController` | β (1 + clip(KL / {target:g} - 1, -0.2, 0.2) · {batch} / {horizon:,}) | {adaptive} |

That was step {step}; the new policy writes the next {batch} completions. How good it gets, and how far from the best
possible: [how to read the result](result.md).
"""

CHINESE = """\
# 用真实数字看 PPO 的一步

本页用真实的数字，逐个 token 讲清 PPO 的一步：从模型写出续写，到权重更新完毕。[English](one_step.md)

只需要知道概率和梯度是什么。token 是模型读写文本的最小单位：在这里，一个字就是一个 token，
表示文本结束的 `[SEP]` 也是一个。

[得分](#得分) · [KL 惩罚](#kl-惩罚) · [优势](#优势) · [概率比与截断](#概率比与截断) · [损失](#损失) ·
[KL 系数](#kl-系数)

例子是演示用的小 GPT-2：它续写一句商品评价，分类器判断写出来的是不是好评，PPO 让它越来越爱写好评。
设置用 `--preset demo`，只有 λ 和 `value_lr` 取预设 `default` 的值。模型已经训练了 {warm_up} 步，
下面是第 {step} 步，以一条好评和一条差评为例。（选这么早的一步，是因为再往后几乎全是好评，看不出对比。）

每列的表头写着公式和算出这一列的函数。`ValueHead` 在 [gpt2_value_head.py](../gpt2_value_head.py) 里，
其余的都在 [ppo.py](../ppo.py) 里，`PPOTrainer.step` 和 `PPOTrainer.loss` 调用它们的顺序就是本页的顺序。
本页由 `python -m tools.one_step` 生成，数字都来自真实的一步；换一台机器，末位数字可能不同，
换了库的版本，文本也可能不同。

| 符号 | 含义 | 单位 | 这里的值 | 在 `config.py` 里 |
| --- | --- | --- | --- | --- |
| π | 策略（正在训练的模型）给一个 token 的概率 | 0 到 1 | | |
| π<sub>old</sub> | 这一步更新之前的 π | 0 到 1 | | |
| π<sub>ref</sub> | 参考模型（训练开始前的模型）给这个 token 的概率 | 0 到 1 | | |
| log π | π 的自然对数；-1 nat 相当于概率 0.37 | nat | | |
| KL | 策略离参考模型有多远 | 每条续写多少 nat | | |
| | `adaptive` 控制器要达到的 KL | 每条续写多少 nat | {target:g} | `target` |
| β | KL 系数，偏离参考模型的代价 | 每 nat 扣多少奖励 | {beta:g} | `init_kl_coef` |
| γ | 折扣因子：奖励每晚一个 token 得到，就乘一次 γ | 0 到 1 | {gamma:g} | `gamma` |
| λ | 评判一个 token 时往后看多远：1 是看到文本结尾，0 是看到下一个 token 为止 | 0 到 1 | {lam:g} | `lam` |
| ε | 一步之内，最多把一个 token 的概率推离 π<sub>old</sub> 多远，升降都一样 | 占 π<sub>old</sub> 的比例 \
| {cliprange:g} | `cliprange` |
| ε<sub>V</sub> | 与 ε 相同，但用于价值，也就是对后面还能得到多少奖励的估计 \
| 训练器的奖励单位，见[损失](#损失)一节 | {cliprange_value:g} | `cliprange_value` |

## 得分

策略把提示词续写 {batch} 次（`PPOTrainer.generate`）。分类器读完整条文本，给出一个得分，
也就是它是好评的概率（[reward.py](../reward.py) 里的 `SentimentReward`）。这一批平均 {mean_score} 分，
{batch} 条里有 {n_happy} 条高于 0.9，{n_unhappy} 条低于 0.1。取其中两条：

| | 文本 | 得分 |
| --- | --- | ---: |
{completion_rows}

（这两条是这样选出来的：要有 token 被[截断](#概率比与截断)；好评要在更新后概率变大，差评要在更新后概率变小；
各取最短的一条。）

一个得分评的是整条文本，训练却需要每个 token 各有一个数：哪些字选对了，哪些选错了？
接下来两节讲的就是怎样从前者算出后者。

## KL 惩罚

策略和参考模型都把续写读一遍，给出每个 token 在它那个位置上的概率。策略比参考模型更偏爱的 token 会被扣奖励；
反过来，策略不如参考模型偏爱的 token 会加奖励。这就是 KL 惩罚，也就是偏离原来语言习惯的代价。没有它，
策略最后只会反复写分类器最喜欢的那一句。得分加在最后一个 token 上，通常就是 `[SEP]`。

| token | log π<sub>old</sub><br><br>`logprobs_from_logits` | log π<sub>ref</sub><br><br>`logprobs_from_logits` \
| KL 惩罚<br>-β (log π<sub>old</sub> - log π<sub>ref</sub>)<br>`compute_rewards` \
| 奖励 r<br>惩罚；最后一个再加得分<br>`compute_rewards` |
| --- | ---: | ---: | ---: | ---: |
{reward_rows}

好评里扣得最多的是「{dear}」：策略现在比参考模型更偏爱它。差评里加得最多的是「{cheap}」：
策略现在不如参考模型偏爱它。整条续写的惩罚加起来，好评是 {happy_penalty}，差评是 {unhappy_penalty}。

### KL 为什么会小于 0

去掉系数 -β，把一条续写各个 token 的惩罚加起来，就是整条文本的 log π<sub>old</sub> - log π<sub>ref</sub>，
即对数概率比：好评是 {happy_log_ratio} nat，差评是 {unhappy_log_ratio} nat。
策略写出某条文本的概率比参考模型小时，它就是负数；这一批 {batch} 条里有 {n_negative} 条是这样。

KL 是策略可能写出的所有文本的对数概率比的平均，这个平均不会小于 0。但一个批次只能给出它的估计：
`objective/kl` 是 {batch} 条续写的平均，这里是 {kl}，标准误是 {kl_error}。训练从 KL = 0 开始，
只要 KL 比这个误差大不了多少，估计值就可能是负的。（KL 很小时，n 条续写的标准误大约是 √(2 KL / n)；
用 {batch} 条续写来估计，只要 KL 小于 2 / {batch} = {noisy_kl} nat，标准误就比 KL 本身还大。）

## 优势

价值头是策略网络的第二个输出。在每个 token 出现之前，它都要估计后面还能得到多少奖励，这个估计叫做价值 V。
两条续写的第一个 V 相同，都是 {first_value}，因为这时只读了提示词。此后每读一个 token，估计就变一次。
表中其余各列由价值和奖励算出，公式里的 ′ 表示下一个 token；最后一个 token 之后，V′ 和 A′ 都是 0。
γ 和 λ 默认都是 1，这时 δ、A、G 的含义很简单：

- TD 误差（时序差分误差）δ = r + V′ - V，是这个 token 带来的意外：它自己的奖励，加上估计因它而发生的变化。
- 优势 A 是从这个 token 到结尾的意外之和。后面的估计全部抵消，只剩 A = G - V：**结果比在这里预期的好多少**。
- 回报 G = r + r′ + r″ + …，是从这个 token 到结尾的奖励之和，里面没有任何估计的成分。

| token | 价值 V<br><br>`ValueHead` | 奖励 r<br><br>`compute_rewards` \
| TD 误差 δ<br>r + γ V′ - V<br>`compute_advantages` | 优势 A<br>δ + γ λ A′<br>`compute_advantages` \
| 回报 G<br>A + V<br>`compute_advantages` | 白化后的 Â<br>（A - 均值）/ 标准差<br>`whiten` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{advantage_rows}

所以每个 token 都分到了几乎完整的得分。（如果 λ 小于 1，越靠后的意外越不算数，G 里也会掺进估计。）

在第一个 token 处，预期是 {first_value}。好评实际得到 {happy_return}，优势是 {happy_advantage}；
差评实际得到 {unhappy_return}，优势是 {unhappy_advantage}。

估计可能整体偏高或偏低。价值头从零学起，头几步尤其如此：整个批次的 V 平均是 {mean_value}，
G 平均是 {mean_return}。所以要对优势做白化：减去整个批次 {n_tokens:,} 个 token 的均值 {mean_advantage}，
再除以标准差。这样一来，每个 token 都是在和整个批次比较：好评的 {happy_tokens} 个 token 里，
Â 为正的有 {happy_positive} 个；差评的 {unhappy_tokens} 个 token 里有 {unhappy_positive} 个。

在同一条续写里，各个 token 的 G 相差不大，所以预期越高的地方，Â 越低：再往上的余地小了。
好评里最低的 Â 是 {lowest_advantage}，出现在「{lowest}」处，此处的 V 是 {lowest_value}。

### 价值头有什么用

得分只说明一条文本最后写得怎样。要知道它比平常好还是差、从哪个 token 开始变好或变差，还需要一个基准。
V 就是这个基准：写到这里为止，策略接下来平均能得到多少。做这种估计的，叫做价值函数（critic）。
真正定好坏的是 G，V 估得不准，只会让优势的噪声变大；λ = 1 时不会把优势带偏。

奖励模型代替不了它。奖励模型是用完整的文本训练的，拿半句话给它，得分说明不了什么。
即使它看得懂半句话，也不知道策略接下来会写什么、还要扣多少 KL 惩罚，而这两样都算在 V 里。
何况它是另一个网络，要把每条续写的每个开头都读一遍；价值头用的是策略本来就要算的东西，几乎不费额外的时间。

## 概率比与截断

真正的训练从这里才开始：同一个批次用 {epochs} 遍，也就是 {epochs} 个 epoch，每个 epoch 更新一次权重。
一个 token 的损失是

    max(-Â ratio, -Â clip(ratio, 1 - ε, 1 + ε))        ratio = π / π_old = exp(log π - log π_old)

Â 为正时，概率变大，损失就变小；Â 为负时，概率变小，损失才变小。但是一旦 Â 为正而概率比高于 {high:g}，
或者 Â 为负而概率比低于 {low:g}，较大的就是第二项，而它是常数。常数没有梯度：这个 token 被截断了（**粗体**），
不再推动策略。优势是按 π<sub>old</sub> 算的，策略离 π<sub>old</sub> 太远，它就不可靠了；
有了截断，同一批续写才能放心地用 {epochs} 遍。

| token | Â<br><br>`whiten` | π<sub>old</sub><br><br>`logprobs_from_logits` | 更新后的 π<br><br>`logprobs_from_logits` \
| epoch 1<br>π / π<sub>old</sub><br>`policy_loss` | epoch 2<br>π / π<sub>old</sub><br>`policy_loss` \
| epoch 3<br>π / π<sub>old</sub><br>`policy_loss` | epoch 4<br>π / π<sub>old</sub><br>`policy_loss` \
| 更新后<br>π / π<sub>old</sub><br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{epoch_rows}

- **epoch 1** 里的概率比都是 1，因为策略还没有变。
- **整条续写**的概率等于各个 token 的概率相乘。把最后一列乘起来，好评是 {happy_product}，
  差评是 {unhappy_product}：更新后，整条续写的概率就是原来的这么多倍。一步之内，不是每条续写都朝着得分的方向变：
  得分高于 0.9 的 {n_happy} 条里，{n_rose} 条的概率变大了，{n_happy} 条平均变为 {happy_mean_product} 倍；
  低于 0.1 的 {n_unhappy} 条里，{n_fell} 条的概率变小了，{n_unhappy} 条平均变为 {unhappy_mean_product} 倍。
- **个别 token 会逆着自己的 Â 变**：好评里「{against}」的 Â 是 {against_advantage}，更新后的概率比却是
  {against_ratio}。所有续写共用同一组权重，别的 token 的推动可能盖过它自己的。
- **截断限制的是梯度，不是概率比**：最后一个 epoch 里，好评的「{happy_clipped}」涨得太多，
  差评的「{unhappy_clipped}」跌得太多，都被截断了。它们自己不再推动策略，概率比却可能继续变：
  别的 token 还在改变同一组权重，优化器也还记着之前的梯度（Adam 的动量）。
- **超出范围却不是粗体**的，是逆着 Â 变的 token：Â 为负而概率比高于 {high:g}，或者 Â 为正而概率比低于 {low:g}。
  它们的梯度还在，会把概率比往回拉。更新后，整个批次 {n_tokens:,} 个概率比里有 {n_beyond} 个超出范围，
  其中 {n_against} 个没有被截断。
- **本来就几乎必然出现的 token**，比如一个词的后半个字，概率已经没有上升的余地。

## 损失

策略损失是上一节的式子对整个批次所有 token 的平均。与此同时，价值头在学着估计 G；
它的损失也有不截断和截断的两项，取较大的一项。

| epoch | 策略损失<br>平均 max(-Â ratio, -Â clip(ratio))<br>`policy_loss` \
| 价值损失<br>½ 平均 max((V - G)², (clip(V) - G)²)<br>`value_loss` \
| 总损失<br>策略损失 + {vf_coef:g} 价值损失<br>`PPOTrainer.loss` | 被截断<br>占全部 token 的比例<br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: |
{loss_rows}

最后一行是各个 epoch 的平均，`PPOTrainer.step` 返回的、`metrics.csv` 里记下的都是它；
{vf_coef:g} 是 `vf_coef`。

这张表里的 V 和 G 用的是训练器的奖励单位，1 个单位等于 {unit} 分。
取这个单位，是为了让第一个批次得分的标准差正好是 {spread:g} 个单位（`pick_reward_unit`）：
即使换成 0 到 100 分，只要 β 也乘以 100，训练出来的策略还是一样。clip(V) 与更新前的 V 最多相差
ε<sub>V</sub> = {cliprange_value:g} 个单位（`cliprange_value`），也就是 {value_clip} 分。

epoch 1 的策略损失是 0，这不等于没有东西可学。概率比全是 1 时，策略损失就是 -Â 的均值，
而白化已经把这个均值变成了 0。重要的是它的梯度：此后策略损失一路下降，也开始有 token 被截断。价值损失同样在下降：
第一个 token 处的 V 原来是 {first_value}，更新后是 {new_first_value}；那里的 G 平均是 {first_return}。

### 训练中损失为什么不一定下降

这一步之内，两个损失都下降了。但是一步接一步地看，即使训练得很好，损失也不一定下降：

- 每一步都重新做白化，策略损失每次都从 0 开始。它只说明这一步在自己的批次上走了多远，不说明策略有多好。
- 价值损失量的是 V 离 G 有多远，而 G 会随着策略变。何况一条续写最后写成什么样，事先谁也不知道，
  这部分损失降不下去。

应该看的是平均得分，以及为它付出了多少 KL：`metrics.csv` 里的 `env/reward_mean` 和 `objective/kl`；
训练结束后再看 gain，它把两者合在一起衡量（[怎样看训练结果](result.zh.md)）。

## KL 系数

最后要定的是下一步的 β。默认的 `fixed` 控制器不改它。`adaptive` 控制器的目标是每条续写的 KL 等于
{target:g} nat（`target`）：KL 高于目标就调高 β，低于目标就调低 β；`horizon`（单位是续写的条数）越大，调得越慢。
这个批次的 KL 是 {kl}，算出来是：

| 控制器 | 下一步的 β | |
| --- | --- | ---: |
| `FixedKLController` | β | {fixed} |
| `AdaptiveKLController` | β (1 + clip(KL / {target:g} - 1, -0.2, 0.2) · {batch} / {horizon:,}) | {adaptive} |

第 {step} 步到此结束，更新后的策略接着写下一批 {batch} 条续写。它最后能有多好，离理论上限还有多远：
[怎样看训练结果](result.zh.md)。
"""

TEXTS = {"en": (ENGLISH, "happy", "unhappy", "mean"), "zh": (CHINESE, "好评", "差评", "平均")}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    config = demo_config()
    policy, tokenizer, reward, (prompt,) = load(config)
    step = take_step(TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer), reward, prompt)
    for language, path in PAGES.items():
        path.write_text(page(step, language), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
