"""One PPO step in numbers, token by token, for readers.

    python -m tools.one_step        writes docs/one_step.md and docs/one_step.zh.md anew

A real step on the demo models, on the CPU in float32. Every number comes from the trainer or from a function of ppo.py;
no formula is worked out here. `tests/test_one_step.py` works all of them out once more.
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

WARM_UP = 2  # ordinary steps before: policy, reference and values differ, and a quarter of the batch is still unhappy
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
    """The shortest completions with a score above 0.9 and below 0.1, if there are any among those where the last epoch
    clipped a token that grew (happy) or shrank (unhappy)."""

    def shortest(candidates, to_show):
        rows = candidates.nonzero().squeeze(1).tolist()
        return min(rows, key=lambda i: (not to_show[i].any(), len(step.responses[i])))

    grew, shrank = clipped_in_last_epoch(step)
    return shortest(step.scores > 0.9, grew), shortest(step.scores < 0.1, shrank)


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
    epochs = step.epochs
    before, after = epochs[0].logprobs.exp(), epochs[-1].logprobs.exp()
    grew, shrank = clipped_in_last_epoch(step)
    ratios, clipped = [epoch.ratios for epoch in epochs], [epoch.clipped for epoch in epochs]
    config = step.config

    def positive(i):
        return int((step.whitened[i] > 0).sum())

    def dearest(i, sign):
        return step.responses[i][int((sign * step.penalties[i][step.mask[i]]).argmax())]

    def marked(i, marks):
        return " ".join(token for token, mark in zip(step.responses[i], marks[i]) if mark)

    return text.format(
        step=WARM_UP + 1, warm_up=WARM_UP, batch=config.batch_size, beta=step.stats["objective/kl_coef"],
        gamma=config.gamma, lam=config.lam, cliprange=config.cliprange, cliprange_value=config.cliprange_value,
        epochs=config.ppo_epochs, vf_coef=config.vf_coef, target=config.target, horizon=config.horizon,
        low=1 - config.cliprange, high=1 + config.cliprange,
        mean_score=number(step.scores.mean()), n_unhappy=int((step.scores < 0.1).sum()),
        completion_rows="\n".join(
            f"| **{name}** | {step.prompt}**{step.completions[i]}** | {number(step.scores[i])} |"
            for i, name in names.items()
        ),
        reward_rows=token_rows(step, names, [step.logprobs, step.ref_logprobs, step.penalties, step.rewards]),
        happy_penalty=number(step.penalties[happy].sum()), unhappy_penalty=number(step.penalties[unhappy].sum()),
        dear=dearest(happy, -1), cheap=dearest(unhappy, 1), kl=number(step.stats["objective/kl"]),
        advantage_rows=token_rows(
            step, names, [step.values, step.rewards, step.deltas, step.advantages, step.returns, step.whitened]
        ),
        first_value=number(step.values[happy, 0]), new_first_value=number(epochs[-1].values[happy, 0]),
        happy_return=number(step.returns[happy, 0]), unhappy_return=number(step.returns[unhappy, 0]),
        happy_advantage=number(step.advantages[happy, 0]), unhappy_advantage=number(step.advantages[unhappy, 0]),
        n_tokens=int(step.mask.sum()), mean_advantage=number(masked_mean(step.advantages, step.mask)),
        mean_value=number(step.stats["ppo/val/mean"]), mean_return=number(step.stats["ppo/returns/mean"]),
        happy_positive=positive(happy), happy_tokens=len(step.responses[happy]),
        unhappy_positive=positive(unhappy), unhappy_tokens=len(step.responses[unhappy]),
        epoch_rows=token_rows(step, names, [step.whitened, before, after, *ratios], clipped),
        happy_clipped=marked(happy, grew), unhappy_clipped=marked(unhappy, shrank),
        loss_rows=loss_rows(step, mean_name), unit=number(step.reward_unit), spread=SPREAD,
        fixed=number(step.kl_coefs["fixed"], 4), adaptive=number(step.kl_coefs["adaptive"], 4),
    )  # fmt: skip


ENGLISH = """\
# One PPO step in numbers

中文:[one_step.zh.md](one_step.zh.md). `python -m tools.one_step` writes both pages from a real step; another machine
may find other last digits.

The demo's GPT-2 (`--preset demo`, but λ and `value_lr` of the preset `default`) has taken {warm_up} steps.
This is step {step}, followed along two completions, a
happy and an unhappy one, from their scores to the new policy. (An early step: later nearly all completions are
happy.) Over each column stand its formula and the function of [ppo.py](../ppo.py) that makes it (the values are those
of `ValueHead` in [gpt2_value_head.py](../gpt2_value_head.py)); `PPOTrainer.step` and `PPOTrainer.loss` call these
functions in the order of this page.

| symbol | what | here | in `config.py` |
| --- | --- | --- | --- |
| π | the policy, the model in training; π<sub>old</sub> is how this step finds it | | |
| π<sub>ref</sub> | the reference, the same model before all training | | |
| β | price of distance from the reference, in reward per nat (unit of natural logarithms) | {beta:g} | `init_kl_coef` |
| γ, λ | how much later rewards count; how much later news counts (section 3) | {gamma:g}, {lam:g} | `gamma`, `lam` |
| ε | how far a probability is pushed in one step, as a share of itself | {cliprange:g} | `cliprange` |

## 1. Two completions and their scores

The policy continues the prompt {batch} times (`PPOTrainer.generate`). The classifier reads each whole text and gives
it one number, the probability that it is happy (`SentimentReward` in `reward.py`): {mean_score} on average, and below
0.1 for {n_unhappy} of the {batch}. Two of them:

| | text | score |
| --- | --- | ---: |
{completion_rows}

(The shortest with a score above 0.9 and the shortest below 0.1 of which the clip of section 4 catches a token.) One
score judges a whole text, but training needs a number for each token: which choices were good ones? Sections 2 and 3
lead from the one to the other.

## 2. The KL penalty and the reward

Policy and reference both read the completions and say how probable each token was where it stands. A token that the
policy likes better than the reference does costs something; one that it likes less earns something. That is the KL
penalty, a price on leaving the original language: without it the policy would end up writing the one text that the
classifier likes best. The score is added at the last token, usually `[SEP]`, which ends a text.

| token | log π<sub>old</sub><br><br>`logprobs_from_logits` | log π<sub>ref</sub><br><br>`logprobs_from_logits` \
| KL penalty<br>-β (log π<sub>old</sub> - log π<sub>ref</sub>)<br>`compute_rewards` \
| reward r<br>penalty; + score at the last<br>`compute_rewards` |
| --- | ---: | ---: | ---: | ---: |
{reward_rows}

What to see: in the happy completion 「{dear}」 costs most, since the first {warm_up} steps have made it more
probable; in the unhappy one 「{cheap}」 earns most, having become less probable. The penalties of the whole
completion sum to {happy_penalty} (happy) and {unhappy_penalty} (unhappy), little beside a score between 0 and 1: near
the reference the price is low, and it grows with the distance. The distance itself, the sum without -β, is {kl} nats
a completion on average over the batch: the KL.

## 3. From one score to every token: the advantage

The value head, a second output of the policy's network, guesses before each token how much reward is still to come:
V. The first V of both completions is the same, {first_value}: the same prompt, and nothing else read yet. Then the
guess changes with every character. In the formulas ′ is the next token; after the last token V′ and A′ are 0.

| token | value V<br><br>`ValueHead` | reward r<br><br>`compute_rewards` \
| delta δ<br>r + γ V′ - V<br>`compute_advantages` | advantage A<br>δ + γ λ A′<br>`compute_advantages` \
| return G<br>A + V<br>`compute_advantages` | whitened Â<br>(A - mean) / std<br>`whiten` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{advantage_rows}

With γ = 1 and λ = 1, the defaults, this becomes simple:

- δ = r + V′ - V is the news that a token brings: its own reward, and by how much it changes the guess.
- A is the sum of the news from this token to the end. All guesses but the first cancel out, which leaves A = G - V:
  **how much better it ended than was expected here**.
- G = r + r′ + r″ + … is the sum of the rewards from this token to the end, with nothing guessed about it.

So nearly the whole score reaches every token. After {warm_up} steps the guesses are crude and jump from character to
character; G does not suffer from that. (The article has λ = 0.95: later news counts less, and G is partly guessed.)

At the first token {first_value} was expected. The happy completion got {happy_return}, an advantage of
{happy_advantage}; the unhappy one {unhappy_return}, an advantage of {unhappy_advantage}. But the value head started
at zero {warm_up} steps ago and still guesses too low: over the batch V is {mean_value} on average and G
{mean_return}, so that most tokens look better than expected. Therefore the advantages are whitened: their mean over
all {n_tokens:,} tokens of the batch, {mean_advantage}, is taken off, and they are divided by their standard
deviation. Now a token is compared with the rest of the batch: Â is positive at {happy_positive} of the {happy_tokens}
happy tokens and at {unhappy_positive} of the {unhappy_tokens} unhappy ones. A happy token below 0 stands where the
guess was high already and less was left to win. (The article whitens inside each completion, so that both would have
a mean of 0: which of the two was better would be lost.)

## 4. Four epochs: the ratio and the clip

Only now is anything trained: {epochs} passes over the batch, the epochs, with an optimiser step each. The loss of a
token is

    max(-Â ratio, -Â clip(ratio, 1 - ε, 1 + ε))        ratio = π / π_old = exp(log π - log π_old)

Where Â is positive, a higher probability lowers the loss; where it is negative, a lower one does. But once the ratio
is above {high:g} with a positive Â, or below {low:g} with a negative one, the second term is the larger, and it is a
constant: the token is clipped (**bold**) and pushes no further. The advantages were worked out for π<sub>old</sub>
and say little about a policy far from it; with the clip, {epochs} epochs can use the same completions.

| token | Â<br><br>`whiten` | π<sub>old</sub><br><br>`logprobs_from_logits` | π after<br><br>`logprobs_from_logits` \
| epoch 1<br>π / π<sub>old</sub><br>`policy_loss` | epoch 2<br>π / π<sub>old</sub><br>`policy_loss` \
| epoch 3<br>π / π<sub>old</sub><br>`policy_loss` | epoch 4<br>π / π<sub>old</sub><br>`policy_loss` \
| after<br>π / π<sub>old</sub><br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{epoch_rows}

What to see: in epoch 1 every ratio is 1, since the policy has not moved yet. In the last epoch the clip has caught
what grew too much, 「{happy_clipped}」 in the happy completion, and what shrank too much, 「{unhappy_clipped}」 in
the unhappy one. Yet a ratio may go on after that: the clip is no wall, it takes away the push of this one token,
while the other completions move the same weights. For the same reason some tokens drift against their own Â. And a
token that was almost certain already, such as the second half of a word, has no room to rise.

## 5. The two losses

The policy loss is the mean of section 4 over all tokens of the batch. At the same time the value head learns to guess
G; its loss, too, is the larger of a plain and a clipped one.

| epoch | policy loss<br>mean max(-Â ratio, -Â clip(ratio))<br>`policy_loss` \
| value loss<br>½ mean max((V - G)², (clip(V) - G)²)<br>`value_loss` \
| total<br>policy + {vf_coef:g} value<br>`PPOTrainer.loss` | clipped<br>share of all tokens<br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: |
{loss_rows}

Here V and G are counted in units of {unit}: in this unit the scores of the first batch have a standard deviation
of {spread:g} (`pick_reward_unit`), so that a score from 0 to 100 would train the same policy. clip(V) stays within
{cliprange_value:g} units (`cliprange_value`) of the V of section 3, and {vf_coef:g} is `vf_coef`. The last line, the
mean over the epochs, is what `PPOTrainer.step` returns and `metrics.csv` holds.

What to see: a policy loss of 0 in epoch 1 does not mean that there is nothing to learn. With all ratios 1 it is the
mean of -Â, which whitening made 0; what counts is its slope. From there it goes down, while more and more tokens are
clipped. The value loss falls as well: V at the first token has gone from {first_value} to {new_first_value}, towards
the returns.

## 6. The KL coefficient

Last comes the price for the next step. The `fixed` controller, the default, keeps β. The article's `adaptive` one
aims at a KL of {target:g} nats a completion (`target`); with the {kl} of this batch it would lower the price a
little.

| controller | next β | |
| --- | --- | ---: |
| `FixedKLController` | β | {fixed} |
| `AdaptiveKLController` | β (1 + clip(KL / {target:g} - 1, -0.2, 0.2) · {batch} / {horizon:,}) | {adaptive} |

That was step {step}; the new policy writes the next {batch} completions. How good it gets, and how far from the best
possible: [README](../README.md#how-to-read-the-result-the-gain).
"""

CHINESE = """\
# 用数字看 PPO 的一步

English: [one_step.md](one_step.md)。两页都由 `python -m tools.one_step` 从真实的一步写出；换一台机器，
末位数字可能不同。

演示用的 GPT-2（`--preset demo`，但 λ 和 `value_lr` 取预设 `default` 的值）已经走了 {warm_up} 步。
这里是第 {step} 步：跟着一条好评和一条差评，
从它们的分数一直看到新的策略；选这么早的一步，是因为再往后几乎全是好评。
每列的表头写着公式和算出这一列的函数（都在 [ppo.py](../ppo.py) 里；价值出自
[gpt2_value_head.py](../gpt2_value_head.py) 的 `ValueHead`）；`PPOTrainer.step` 和 `PPOTrainer.loss`
就按本页的顺序调用它们。

| 符号 | 含义 | 这里的值 | 在 `config.py` 里 |
| --- | --- | --- | --- |
| π | 策略，即正在训练的模型；π<sub>old</sub> 是这一步开始时的它 | | |
| π<sub>ref</sub> | 参考模型，即训练开始之前的同一个模型 | | |
| β | 离开参考模型的代价，每 nat（自然对数的单位）扣多少奖励 | {beta:g} | `init_kl_coef` |
| γ、λ | 后面的奖励算几成；后面的意外算几成（第 3 节） | {gamma:g}、{lam:g} | `gamma`、`lam` |
| ε | 一步之内，概率最多被推高或压低几成 | {cliprange:g} | `cliprange` |

## 1. 两条续写和它们的分数

策略把提示续写 {batch} 次（`PPOTrainer.generate`）。分类器读完整条文本，给出一个数：
它是好评的概率（`reward.py` 里的 `SentimentReward`）。平均是 {mean_score}，{batch} 条里有 {n_unhappy} 条不到 0.1。
取其中两条：

| | 文本 | 分数 |
| --- | --- | ---: |
{completion_rows}

（在有词元被第 4 节的截断碰到的续写里，取高于 0.9 分的最短一条和低于 0.1 分的最短一条。）一个分数评的是整条文本，
训练却要给每个词元一个数：哪些字选得好？第 2、3 节就从前者走到后者。

## 2. KL 惩罚和奖励

策略和参考模型都把续写读一遍，说出每个词元在它的位置上有多大概率。策略比参考模型更偏爱的词元要扣分，
不如参考模型偏爱的反而加分。这就是 KL 惩罚，离开原来语言的代价：没有它，策略最后会只写分类器最喜欢的那一句。
分数加在最后一个词元上，通常是表示文本结束的 `[SEP]`。

| 词元 | log π<sub>old</sub><br><br>`logprobs_from_logits` | log π<sub>ref</sub><br><br>`logprobs_from_logits` \
| KL 惩罚<br>-β (log π<sub>old</sub> - log π<sub>ref</sub>)<br>`compute_rewards` \
| 奖励 r<br>惩罚；最后一个再加分数<br>`compute_rewards` |
| --- | ---: | ---: | ---: | ---: |
{reward_rows}

看什么：好评里扣得最多的是「{dear}」，因为前 {warm_up} 步已经让它更容易出现；差评里加得最多的是「{cheap}」，
因为它变得更少见了。整条续写的惩罚之和，好评是 {happy_penalty}，差评是 {unhappy_penalty}，与 0 到 1 的分数相比很小：
离参考模型近，代价就低；走得越远，代价越高。去掉 -β 再求和，就是距离本身，即 KL：整批平均每条 {kl} nats。

## 3. 从一个分数到每个词元：优势（advantage）

价值头是策略网络的第二个输出：在每个词元出现之前，它先猜后面还能得到多少奖励，这就是 V。两条续写的第一个 V 相同，
都是 {first_value}：提示一样，别的还什么都没读。此后每读一个字，猜测就变一次。公式里 ′ 指下一个词元；
最后一个词元之后，V′ 和 A′ 都是 0。

| 词元 | 价值 V<br><br>`ValueHead` | 奖励 r<br><br>`compute_rewards` \
| 意外 δ<br>r + γ V′ - V<br>`compute_advantages` | 优势 A<br>δ + γ λ A′<br>`compute_advantages` \
| 回报 G<br>A + V<br>`compute_advantages` | 白化后的 Â<br>(A - 均值) / 标准差<br>`whiten` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
{advantage_rows}

默认 γ = 1、λ = 1，一切就变得简单：

- δ = r + V′ - V 是一个词元带来的意外：它自己的奖励，加上它让猜测改变了多少。
- A 是从这个词元到结尾的意外之和。除第一个以外，所有的猜测都互相抵消，剩下 A = G - V：**结局比在这里预料的好多少**。
- G = r + r′ + r″ + … 是从这个词元到结尾的奖励之和，里面没有任何猜测。

所以几乎整个分数都传到了每一个词元。才训练了 {warm_up} 步，猜测还很粗糙，一个字一个样；G 却不受它影响。
（文章用 λ = 0.95：越靠后的意外越不算数，G 里也就掺进了猜测。）

在第一个词元处，预料的是 {first_value}。好评实得 {happy_return}，优势是 {happy_advantage}；差评实得 {unhappy_return}，
优势是 {unhappy_advantage}。不过价值头 {warm_up} 步之前才从零开始学，还是猜得太低：整批的 V 平均 {mean_value}，
G 平均 {mean_return}，于是大多数词元都显得好于预料。因此要把优势白化：
减去整批 {n_tokens:,} 个词元的均值 {mean_advantage}，再除以标准差。这样，每个词元就是在和整批相比：
好评的 {happy_tokens} 个词元里，Â 为正的有 {happy_positive} 个；差评的 {unhappy_tokens} 个里有 {unhappy_positive} 个。
好评里如果有负的，那是因为该处的猜测本来就高，剩下能赢的不多。
（文章在每条续写内部做白化，两条的均值就都成了 0：谁比谁好，再也看不出来。）

## 4. 四个 epoch：比值和截断

到这里才真正开始训练：同一批数据用 {epochs} 遍，即 {epochs} 个 epoch，每遍优化一次。一个词元的损失是

    max(-Â ratio, -Â clip(ratio, 1 - ε, 1 + ε))        ratio = π / π_old = exp(log π - log π_old)

Â 为正时，概率升高，损失就降低；Â 为负时，概率降低，损失才降低。但是，一旦 Â 为正而比值高于 {high:g}，
或者 Â 为负而比值低于 {low:g}，第二项就成了较大的一项，而且是个常数：这个词元被截断（**粗体**），不再使劲。
优势是按 π<sub>old</sub> 算的，策略走远了，它就说明不了什么；有了截断，同一批续写才能用 {epochs} 遍。

| 词元 | Â<br><br>`whiten` | π<sub>old</sub><br><br>`logprobs_from_logits` | 之后的 π<br><br>`logprobs_from_logits` \
| epoch 1<br>π / π<sub>old</sub><br>`policy_loss` | epoch 2<br>π / π<sub>old</sub><br>`policy_loss` \
| epoch 3<br>π / π<sub>old</sub><br>`policy_loss` | epoch 4<br>π / π<sub>old</sub><br>`policy_loss` \
| 之后<br>π / π<sub>old</sub><br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{epoch_rows}

看什么：epoch 1 里所有的比值都是 1，因为策略还没有动。到最后一个 epoch，好评里的「{happy_clipped}」涨得太多，
差评里的「{unhappy_clipped}」跌得太多，都被截断了。可是比值此后仍会接着变：截断不是一堵墙，它只是让这一个词元不再使劲，
而别的续写还在推动同一组权重。有些词元会逆着自己的 Â 漂移，也是这个缘故。至于本来就几乎必然出现的词元，
比如一个词的后半个字，已经没有上涨的余地了。

## 5. 两个损失

策略损失是第 4 节的式子对整批所有词元的平均。价值头同时学着猜 G；它的损失也是在普通的和截断的两者之中取较大的一个。

| epoch | 策略损失<br>平均 max(-Â ratio, -Â clip(ratio))<br>`policy_loss` \
| 价值损失<br>½ 平均 max((V - G)², (clip(V) - G)²)<br>`value_loss` \
| 合计<br>策略 + {vf_coef:g} 价值<br>`PPOTrainer.loss` | 被截断<br>占全部词元的比例<br>`policy_loss` |
| --- | ---: | ---: | ---: | ---: |
{loss_rows}

这里的 V 和 G 以 {unit} 为单位：按这个单位，第一批分数的标准差正好是 {spread:g}（`pick_reward_unit`），
所以换成 0 到 100 分，训练出来的策略还是一样。clip(V) 与第 3 节的 V 相差不超过 {cliprange_value:g} 个单位
（`cliprange_value`）；{vf_coef:g} 就是 `vf_coef`。
最后一行是各 epoch 的平均，也就是 `PPOTrainer.step` 返回、`metrics.csv` 记下的数。

看什么：epoch 1 的策略损失是 0，并不等于没有东西可学。比值全是 1 时，它就是 -Â 的均值，而白化已经让这个均值等于 0；
要紧的是坡度。损失果然一路下降，被截断的词元也越来越多。价值损失同样在下降：
第一个词元处的 V 从 {first_value} 变成了 {new_first_value}，正向回报靠拢。

## 6. KL 系数

最后定下一步的代价。默认的 `fixed` 控制器让 β 保持不变。
文章的 `adaptive` 则以每条续写 {target:g} nats 的 KL 为目标（`target`）；这一批只有 {kl}，它会把代价调低一点。

| 控制器 | 下一步的 β | |
| --- | --- | ---: |
| `FixedKLController` | β | {fixed} |
| `AdaptiveKLController` | β (1 + clip(KL / {target:g} - 1, -0.2, 0.2) · {batch} / {horizon:,}) | {adaptive} |

第 {step} 步到此为止，新的策略接着写下一批 {batch} 条。它最后能有多好，离极限还有多远：
见 [README](../README.zh.md#怎样读结果gain)。
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
