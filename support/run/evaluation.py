"""Evaluate a policy: rewards and KL of completions that are always sampled with the same random numbers.

evaluation.json contains the `Results` of a run: an `Evaluation` before and one after training, and what they are
compared with.
"""

import dataclasses
import json
import math
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ppo import PPOTrainer, kl_from_logits, logprobs_from_logits, masked_mean
from reward import Rewards, SentimentReward
from support.common.files import damaged, read_json, write_whole
from support.compute import processes
from support.compute.batches import Completions
from support.models.pretrained import decode
from support.run.limit import LITTLE, NOISY, best_of_n, frontier, gain, variance_within

SEED = 20_170_707  # of every evaluation, whatever the run's seed: all policies get the same random numbers
STEADY = "a score must depend only on its text, not on earlier calls or on the other texts of a call"
TWICE = 64  # texts that are scored a second time
SURE = 3  # standard errors beyond which a shift of the scores isn't chance
COMPANY = 0.1  # allowed drop of the better half if scored on its own, in SDs; z-scores or ranks drop by 0.8


@dataclass
class Evaluation:
    """A policy's results on n completions. `samples` has (prompt, completion, reward) and `kls` the KL of each. The
    others are means over them, except for `commonest`, (text, count), and what `check_reward` or `change_since` found:
    `noise`, and `unsteady`, which says how the reward changes. If there are several rewards, `parts` has {"name",
    "weight", "scores"} of each."""

    n: int
    reward: float
    reward_ci95: float
    kl: float
    distinct_1: float
    distinct_2: float
    unique: float
    length: float
    ended: float
    ref_logprob: float
    commonest: list
    samples: list
    kls: list
    noise: float = 0.0
    unsteady: str = ""
    end_token: str = "[SEP]"
    parts: list = field(default_factory=list)

    def rewards(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rewards (n,) float64, and the index of the prompt of each (n,) int64."""
        index = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, *_ in self.samples))}
        rewards = torch.tensor([reward for *_, reward in self.samples], dtype=torch.float64)
        return rewards, torch.tensor([index[prompt] for prompt, *_ in self.samples])

    def of_prompt(self, prompt: str) -> "Evaluation":
        """Return only the completions of `prompt`, with their n, reward, kl, samples and kls."""
        rows = [i for i, (continued, *_) in enumerate(self.samples) if continued == prompt]
        samples, kls = ([every[i] for i in rows] for every in (self.samples, self.kls))
        reward = sum(score for *_, score in samples) / len(rows)
        return replace(self, n=len(rows), reward=reward, kl=sum(kls) / len(rows), samples=samples, kls=kls)


@dataclass
class Results:
    """The content of evaluation.json. `gain`, `frontier` and `best_of_n`: see limit.py. `by_prompt` has the results of
    each prompt if there are several, best first; its J is the increase in J. For several rewards, `rewards` has
    {"name", "weight", "before", "after", "error"} of each: mean scores, and the standard error of their difference."""

    before: Evaluation
    after: Evaluation | None = None
    steps: int | None = None
    alarms: list = field(default_factory=list)
    gain: dict | None = None
    frontier: list = field(default_factory=list)
    best_of_n: list = field(default_factory=list)
    by_prompt: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    verdict: str | None = None

    def measure(self, beta: float) -> None:
        """Compute gain, frontier, best-of-n and the figures of each prompt at a KL coefficient."""
        rewards, prompt_index = self.before.rewards()
        self.gain = gain(self.before, self.after, beta)
        self.frontier = frontier(rewards, prompt_index)
        fewest = prompt_index.bincount().min()
        self.best_of_n = [best_of_n(rewards, prompt_index, n, self.gain) for n in (2, 3, 4, 8) if n <= fewest]
        prompts = dict.fromkeys(prompt for prompt, *_ in self.before.samples)
        self.by_prompt = [self.of_prompt(prompt, beta) for prompt in prompts] if len(prompts) > 1 else []
        self.by_prompt.sort(key=lambda found: -found["J"])
        self.rewards = [self.of_reward(*parts) for parts in zip(self.before.parts, self.after.parts)]

    def of_prompt(self, prompt: str, beta: float) -> dict:
        """Return a prompt's reward before and after, KL, increase in J, and gain, which is None if unknown."""
        before, after = self.before.of_prompt(prompt), self.after.of_prompt(prompt)
        found = {"prompt": prompt, "n": after.n, "before": before.reward, "after": after.reward, "kl": after.kl}
        share = gain(before, after, beta)
        known = {name: share[name] for name in ("gain", "gain_se") if name in share}
        return found | {"J": after.reward - before.reward - beta * after.kl} | known

    def of_reward(self, before: dict, after: dict) -> dict:
        """Return how one of several rewards changed. before, after: its entries in `parts`."""
        (mean, error), (mean_after, error_after) = (
            mean_and_error(torch.tensor(part["scores"], dtype=torch.float64), evaluated.rewards()[1])
            for evaluated, part in ((self.before, before), (self.after, after))
        )
        found = {"name": before["name"], "weight": before["weight"], "before": mean, "after": mean_after}
        return found | {"error": math.hypot(error, error_after)}

    @classmethod
    def read(cls, path: Path) -> "Results | None":
        """Read an evaluation.json. Returns None if it doesn't exist. Raises UserError if it is damaged."""
        if not path.exists():
            return None
        remedy = "remove it; --resume will create it again"
        values = read_json(path, remedy)
        with damaged(path, remedy):
            parts = {when: Evaluation(**values[when]) for when in ("before", "after") if values.get(when)}
            return cls(**values | parts)

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1) + "\n")

    def without_samples(self) -> dict:
        """Return all numbers and the verdict, the most important first."""
        found = {"verdict": self.verdict, "gain": self.gain} | dataclasses.asdict(self)
        for when in ("before", "after"):
            found[when] = {name: each for name, each in found[when].items() if name not in ("samples", "kls", "parts")}
        return found


def evaluate(trainer: PPOTrainer, model, reward: Rewards, prompts: list[str], queries: list) -> Evaluation:
    """Evaluate `model` on `eval_samples` completions, with the prompts in turn. queries: the encoded prompts.

    `kl` is the mean of `kl_to_reference`: the same expectation as the sampled log-ratios, with less noise.
    """
    print(f"evaluating {trainer.config.eval_samples:,} completions")
    prompt_index, completions, texts, parts = sample_and_score(trainer, model, reward, prompts, queries)
    kl, ref_logprobs = kl_to_reference(trainer, model, completions)
    mask, n, rewards = completions.mask.cpu(), len(texts), parts @ reward.weights
    ended = ((completions.ids == trainer.tokenizer.sep_token_id) & completions.mask).sum().item()
    of_prompt = [prompts[i] for i in prompt_index]
    counts = Counter(zip(of_prompt, texts))
    return Evaluation(
        n=n,
        reward=rewards.double().mean().item(),
        reward_ci95=1.96 * rewards.std().item() / math.sqrt(n),
        kl=kl.mean().item(),
        distinct_1=distinct(texts, 1),
        distinct_2=distinct(texts, 2),
        unique=len(counts) / n,
        length=mask.sum().item() / n,
        ended=ended / n,
        ref_logprob=masked_mean(ref_logprobs, mask).item(),
        commonest=[[prompt + text, count] for (prompt, text), count in counts.most_common(10)],
        samples=[list(sample) for sample in zip(of_prompt, texts, rewards.tolist())],
        kls=kl.tolist(),
        end_token=trainer.tokenizer.sep_token,
        parts=reward.named(parts),
    )


def sample_and_score(trainer: PPOTrainer, model, reward: Rewards, prompts: list[str], queries: list[torch.Tensor]):
    """Sample `eval_samples` completions, with the prompts in turn. Returns the index of each one's prompt (n,) int64,
    the Completions, their texts, and their scores by each reward (n, k) float32."""
    prompt_index = torch.arange(trainer.config.eval_samples) % len(prompts)
    completions = trainer.engine.generate([queries[i] for i in prompt_index], model, SEED, 0, 0)
    texts = decode(trainer.tokenizer, completions.token_lists())
    whole = [prompts[i] + text for i, text in zip(prompt_index, texts)]
    # Your own function, which may be slow, gets as many texts at once as in training, and a progress bar
    models = all(isinstance(function, SentimentReward) for function in reward.functions.values())
    size = len(whole) if models else trainer.config.batch_size
    calls = tqdm(range(0, len(whole), size), "scoring", delay=5, mininterval=5, disable=processes.rank() > 0)
    parts = [reward.score(whole[start : start + size], prompt_index[start : start + size]) for start in calls]
    return prompt_index, completions, texts, torch.cat(parts)


def check_reward(reward: Rewards, before: Evaluation) -> None:
    """Score the first TWICE texts again, and then the better half of them without the others.

    Sets `noise`, the share of the rewards' variance that is random: half the variance of the change from a text's first
    score to its second. Sets `unsteady` if the second scores are higher or lower on average, or if the better half
    scores lower on its own, as happens with z-scores or ranks within a call.
    """
    scores, _ = before.rewards()
    changes = score_changes(reward, before, list(range(min(TWICE, before.n))))
    before.noise = noise(changes, scores)
    # Choose by the second score; chosen by the first, which they are compared with, they would lose by chance
    better = (scores[: len(changes)] + changes).argsort(descending=True, stable=True)[: len(changes) // 2]
    of_better = score_changes(reward, before, better.tolist())
    (shift, error), (their_shift, their_error) = mean_and_error(changes), mean_and_error(of_better)
    loss = shift - their_shift
    if loss > max(SURE * math.hypot(error, their_error), COMPANY * scores.std(correction=0).item(), 2 * abs(shift)):
        told = f"the better half of {len(changes)} texts scores {loss:.2g} lower without the others"
        way = "return each text's own score, without z-scores or ranks, since PPO whitens the advantages itself"
        before.unsteady = f"a text's score depends on the other texts in its call: {told}; {way}"
    elif told := shifted(changes, scores):
        before.unsteady = f"the reward changes from call to call: {told} the second time; {STEADY}"


def change_since(reward: Rewards, before: Evaluation) -> str:
    """Score the first TWICE texts of an earlier evaluation again. Returns a message that says how the reward
    has changed, or "" if it hasn't."""
    scores, _ = before.rewards()
    changes = score_changes(reward, before, list(range(min(TWICE, before.n))))
    told = shifted(changes, scores)
    if not told and before.noise <= NOISY and noise(changes, scores) > max(NOISY / 2, 4 * before.noise):
        told = f"the same {len(changes)} texts score {changes.std(correction=0).item():.2g} higher or lower"
    return told and f"the reward isn't the same before and after training: {told} now; {STEADY}"


def score_changes(reward: Rewards, evaluated: Evaluation, rows: list[int]) -> torch.Tensor:
    """Score some samples again in one call. Returns the new scores minus the old ones, (len(rows),) float64."""
    samples = [evaluated.samples[row] for row in rows]
    prompt_index = [row % len(reward.columns["prompt"]) for row in rows]  # as in `sample_and_score`
    again = reward.score([prompt + text for prompt, text, _ in samples], prompt_index) @ reward.weights
    return again - torch.tensor([score for *_, score in samples], dtype=torch.float64)


def noise(changes: torch.Tensor, scores: torch.Tensor) -> float:
    """Return half the variance of score changes divided by that of the scores; 1 if all scores are equal."""
    of_change = changes.var(correction=0).item() / 2
    return of_change / (scores.var(correction=0).item() or of_change) if of_change else 0.0


def mean_and_error(values: torch.Tensor, prompt_index: torch.Tensor | None = None) -> tuple[float, float]:
    """Return the mean of values (n,) and its standard error, with fixed prompts if `prompt_index` (n,) is given. The
    mean of no values is NaN."""
    variance = variance_within(values, torch.zeros(len(values)) if prompt_index is None else prompt_index)
    return values.mean().item(), math.sqrt(variance / max(1, len(values)))


def shifted(changes: torch.Tensor, scores: torch.Tensor) -> str:
    """Say by how much the mean of scores has changed; return "" if the change is negligible or may be chance."""
    shift, error = mean_and_error(changes)
    if abs(shift) <= max(SURE * error, LITTLE * scores.std(correction=0).item()):
        return ""
    way = "higher" if shift > 0 else "lower"
    return f"the same {len(changes)} texts score {abs(shift):.2g} {way} (standard error {error:.1g})"


@torch.no_grad()
def kl_to_reference(trainer: PPOTrainer, model, completions: Completions) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the KL from `model` to the reference, (n,) in nats, and the reference's log-probabilities of the tokens,
    (n, T), both on the CPU. The KL is taken over the whole vocabulary at each token and summed over each completion."""

    def function(*logits_and_ids):
        *logits, ids = logits_and_ids  # one or two: the reference needs no second pass
        return torch.stack([kl_from_logits(logits[0], logits[-1]), logprobs_from_logits(logits[-1], ids)])

    engine = trainer.engine
    passes = [engine.passes(each) for each in dict.fromkeys((model, trainer.ref_model))]
    completions = engine.share_trunk(completions, model)
    computed = [engine.forward(part, function, *passes)[0] for part in engine.parts(completions)]
    kl, ref_logprobs = engine.gather(computed, len(completions.ids)).cpu()
    return kl.where(completions.mask.cpu(), 0).sum(-1), ref_logprobs


def distinct(texts: list[str], n: int) -> float:
    """Return distinct-n: different n-grams of characters divided by all (Li et al. 2016, arXiv:1510.03055)."""
    ngrams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / max(1, len(ngrams))
