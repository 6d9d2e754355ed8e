"""How good a policy is, and how much of the possible gain it got.

PPO maximises J = R - beta * KL: mean reward minus the KL coefficient times the KL to the reference, per completion.
The best policy for that is known, the Gibbs policy, proportional to ref * exp(r / beta) (Ziegler et al. 2019,
section 2; Korbak et al. 2022, "RL with KL penalties is better viewed as Bayesian inference", arXiv:2205.11275).
Its reward R*, its KL* and its J* follow from rewards of the reference's own samples, so a run can say which share
of the way it went:

    gain = (J - J_ref) / (J* - J_ref)        1 is the limit, 0 is nothing, below 0 the run did harm
"""

import json
import math
import statistics
from collections import Counter
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from ppo import kl_from_logits, logprobs_from_logits, masked_mean
from reward import score_texts
from support.errors import UserError
from support.figures import decimals, in_markdown
from support.files import damaged, read_evaluation, write_whole
from support.text_trainer import TextPPOTrainer

SEED = 20_170_707  # of the evaluation alone: every policy of every run is judged on the same draws
BETAS = [0.15 * 1.25**i for i in range(22)]  # of the frontier, up to 16, in standard deviations of the rewards
GOOD = 0.7  # gain; a share x of KL* buys at most 2 sqrt(x) - x of it, where rewards are normally distributed:
UNMOVED = 0.01  # share of KL*, for 0.2
FAR = 2  # times KL*: with more reward than the limit's, this is no noise; texts were found that no sample held
CLOSE = 1.5  # times KL*, for 0.95
LITTLE = 0.03  # possible gain in J, in standard deviations of the rewards: the noise in judging J by a thousand samples
UNSURE = 0.15  # standard error of the gain, from where a good run and a short one look alike
UNKNOWN = {  # why the gain is unknown: the verdict
    "beta is 0": "no limit: KL, {kl} now, has no price; try --kl_budget 0.4",
    "beta is too low": "hacked, or about to be: at this --init_kl_coef the best policy writes a handful of texts; "
    "KL is {kl}; try --kl_budget 0.4",
    "beta is too high": "unmoved: at this --init_kl_coef hardly any KL is worth it; try --kl_budget 0.4",
    "the rewards are chance": "gain unknown: the same text gets different rewards, and what is possible cannot be told "
    "from luck; what counts is whether the mean reward rose",
    "the rewards are equal": "nothing to learn: all completions of a prompt have the same reward; change --reward",
    "too few samples": "gain unknown: judge again by more samples, with --eval_only and --eval_samples {samples}",
}
TWICE = 64  # texts that are scored a second time
NOISY = 0.02  # share of the scores' variance that is chance: from here on the limit is a tenth too far away
SHOWN = 5  # completions in the before/after table


def evaluate(trainer: TextPPOTrainer, model, reward, prompts: list[str]) -> dict:
    """Judge `model` on `eval_samples` completions, the prompts in turn. A dict that JSON can hold.

    `kl` is the mean over completions of sum_t KL(model || reference) at the sampled prefixes, computed over the whole
    vocabulary at each token: the same expectation as the sampled log-ratios, with less noise.
    """
    n = trainer.config.eval_samples
    prompt_index, query_tensors, responses, completions, rewards = sample_and_score(
        trainer, model, reward, prompts, n, SEED, 0
    )
    kl, ref_logprobs, mask = kl_to_reference(trainer, model, query_tensors, responses)

    ended = [bool(response[-1] == trainer.sep_token_id) for response in responses]
    return {
        "n": n,
        "reward": rewards.mean().item(),
        "reward_ci95": 1.96 * rewards.std().item() / math.sqrt(n),
        "kl": kl.mean().item(),
        "distinct_1": distinct(completions, 1),
        "distinct_2": distinct(completions, 2),
        "unique": len(set(zip(prompt_index, completions))) / n,
        "length": sum(len(response) for response in responses) / n,
        "ended": sum(ended) / n,
        "ref_logprob": masked_mean(ref_logprobs, mask).item(),
        "commonest": [
            [prompts[i] + text, count] for (i, text), count in Counter(zip(prompt_index, completions)).most_common(10)
        ],
        "samples": [[prompts[i], text, score] for i, text, score in zip(prompt_index, completions, rewards.tolist())],
        "kls": kl.tolist(),
    }


def sample_and_score(trainer: TextPPOTrainer, model, reward, prompts: list[str], n: int, seed: int, step: int):
    """n completions, the prompts in turn: which prompt each continues, queries, responses, texts, and rewards (n,)."""
    prompt_index, queries = [i % len(prompts) for i in range(n)], trainer.encode(prompts)
    query_tensors = [queries[i] for i in prompt_index]
    responses = trainer.generate(query_tensors, model, seed, step)
    completions = trainer.decode(responses)
    rewards = score_texts(reward, [prompts[i] + text for i, text in zip(prompt_index, completions)])
    return prompt_index, query_tensors, responses, completions, rewards


def noise(reward, judged: dict) -> float:
    """Which share of the rewards' variance is chance: half the mean squared difference of TWICE texts' two rewards."""
    scores = torch.tensor([score for *_, score in judged["samples"]], dtype=torch.float64)
    again = score_texts(reward, [prompt + text for prompt, text, _ in judged["samples"][:TWICE]])
    difference = (again - scores[:TWICE]).square().mean().item() / 2
    return difference / scores.var(correction=0).item() if difference else 0.0


def kl_to_reference(
    trainer: TextPPOTrainer, model, query_tensors, response_tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far `model` is from the reference along some responses.

    Returns, on the CPU, the KL summed over each completion (n,) in nats, over the whole vocabulary at each token; the
    reference's log-probabilities (n, T) of the tokens; and the mask (n, T).
    """

    def compared(ids, policy, reference):
        (logits, _), (ref_logits, _) = policy, reference
        return kl_from_logits(logits, ref_logits), logprobs_from_logits(ref_logits, ids)

    completions = trainer.engine.collator.completions(query_tensors, response_tensors)
    kl, ref_logprobs = trainer.engine.evaluate(compared, completions, model, trainer.ref_model).cpu()
    mask = completions.mask.cpu()
    return kl.where(mask, 0).sum(-1), ref_logprobs, mask


def distinct(texts: list[str], n: int) -> float:
    """Distinct-n: different runs of n characters over all runs of n characters (Li et al. 2016, arXiv:1510.03055)."""
    runs = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(runs)) / max(1, len(runs))


def gibbs_policy(rewards: torch.Tensor, prompt_index: torch.Tensor, beta: float) -> dict:
    """R*, KL* and J* of the Gibbs policy from rewards (n,) of the reference's samples, and where the estimate rests.

    Of each prompt's m samples, weights w_i proportional to exp(r_i / beta), R* = sum w_i r_i and
    J* = beta log mean exp(r_i / beta), without their bias of order 1 / m: the jackknife (Quenouille 1956), which leaves
    out one sample at a time, with a weight of 1/2 at most. Then means over the samples, and KL* = (R* - J*) / beta.
    `effective_samples` is n / mean (m w_i)^2. `ratios` (n,) float64, m w_i, are the Gibbs policy's probabilities over
    the reference's: beta times them is how far each sample moves J*, for its standard error.
    """
    groups = [(prompt_index == i).nonzero().squeeze(1) for i in prompt_index.unique()]
    table = pad_sequence([rewards[group].double() for group in groups], batch_first=True)  # (prompts, m)
    m = torch.tensor([[len(group)] for group in groups], dtype=torch.float64)
    there = torch.arange(table.shape[1]) < m
    exponents = (table / beta).where(there, float("-inf"))
    weights = exponents.softmax(1)
    reward, log_mean = (weights * table).sum(1, keepdim=True), exponents.logsumexp(1, keepdim=True) - m.log()
    left_out = weights.clamp(max=0.5)
    reward += (m - 1) / m * (left_out / (1 - left_out) * (table - reward)).sum(1, keepdim=True)
    log_mean -= (m - 1) / m * torch.log1p(-left_out).sum(1, keepdim=True) - (m - 1) * torch.log1p(-1 / m.clamp(min=2))
    ratios = torch.empty(len(rewards), dtype=torch.float64)
    ratios[torch.cat(groups)] = (m * weights)[there]
    reward, best = ((m / len(rewards) * each).sum().item() for each in (reward, beta * log_mean))
    return {
        "reward": reward,
        "kl": (reward - best) / beta,
        "J": best,
        "effective_samples": len(rewards) / (ratios**2).mean().item(),
        "ratios": ratios,
    }


def scores_and_prompts(judged: dict, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """The rewards (n,) float64 of a judged policy's samples, and which prompt each continues (n,)."""
    rewards = torch.tensor([score for _, _, score in judged["samples"]], dtype=torch.float64)
    return rewards, torch.tensor([prompts.index(prompt) for prompt, _, _ in judged["samples"]])


def variance_within(values: torch.Tensor, prompt_index: torch.Tensor) -> float:
    """The variance of values (n,) around the mean of their prompt's; exactly 0 where a prompt's are all equal."""
    groups = [values[prompt_index == i].double() for i in prompt_index.unique()]
    squares = sum((group - group.mean()).square().sum().item() for group in groups if group.min() < group.max())
    return squares / max(1, len(values) - len(groups))


def gain(before: dict, after: dict, prompts: list[str], beta: float) -> dict:
    """What share of the possible gain `after` got, with its standard error; None with the reason where that is unknown.

    The standard error is that of (J - J_ref) / (J* - J_ref) to first order in the errors of all three, for these
    prompts; of judging alone: runs with other seeds differ, too.
    """
    if beta == 0:
        return {"gain": None, "why": "beta is 0"}
    rewards, prompt_index = scores_and_prompts(before, prompts)
    best = gibbs_policy(rewards, prompt_index, beta)
    ratios = best.pop("ratios")
    result = {"beta": beta, "limit": best, "J_before": rewards.mean().item(), "J": after["reward"] - beta * after["kl"]}
    possible, deviation = best["J"] - result["J_before"], math.sqrt(variance_within(rewards, prompt_index))
    if before.get("noise", 0) > NOISY:
        return {**result, "gain": None, "why": "the rewards are chance"}
    if (effective := best["effective_samples"]) < (least := least_effective(prompt_index, 100)):
        m = len(rewards) / len(prompt_index.unique())
        if m >= 20 and effective * m / len(rewards) < max(2, m / 100):
            return {**result, "gain": None, "why": "beta is too low"}
        needed = power_of_two(2 * len(rewards) * least / effective)
        return {**result, "gain": None, "why": "too few samples", "samples_needed": needed}
    if deviation == 0:
        return {**result, "gain": None, "why": "the rewards are equal"}
    if possible < LITTLE * deviation:
        return {**result, "gain": None, "why": "beta is too high"}
    share = (result["J"] - result["J_before"]) / possible
    of_after = torch.tensor([s for *_, s in after["samples"]]) - beta * torch.tensor(after["kls"])
    of_before = (1 - share) * rewards + share * beta * ratios
    values = (of_after, scores_and_prompts(after, prompts)[1]), (of_before, prompt_index)
    variance = sum(variance_within(value, index) / len(value) for value, index in values)
    return {**result, "gain": share, "gain_se": math.sqrt(variance) / possible}


def least_effective(prompt_index: torch.Tensor, altogether: int) -> int:
    """How many effective samples carry a limit: some altogether, and five a prompt, which the jackknife needs."""
    return max(altogether, 5 * len(prompt_index.unique()))


def frontier(before: dict, prompts: list[str]) -> list[dict]:
    """(beta, reward, kl) of the Gibbs policies over a range of beta, as far as the samples carry them."""
    rewards, prompt_index = scores_and_prompts(before, prompts)
    deviation = math.sqrt(variance_within(rewards, prompt_index))
    betas = [beta * deviation for beta in BETAS if deviation > 0]
    points = [{"beta": beta, **gibbs_policy(rewards, prompt_index, beta)} for beta in betas]
    least = least_effective(prompt_index, 20)
    return [{name: p[name] for name in ("beta", "reward", "kl")} for p in points if p["effective_samples"] >= least]


def add_yardsticks(results: dict, prompts: list[str], beta: float) -> None:
    """Put next to "before" and "after" what they are measured against: the gain, the frontier, and best-of-n."""
    results["gain"] = gain(results["before"], results["after"], prompts, beta)
    results["frontier"] = frontier(results["before"], prompts)
    fewest = min(Counter(prompt for prompt, *_ in results["before"]["samples"]).values())
    results["best_of_n"] = [best_of_n(results, prompts, n) for n in (2, 3, 4, 8) if n <= fewest]


def best_of_n(results: dict, prompts: list[str], n: int) -> dict:
    """What drawing n completions of the reference and keeping the best would give, without any training.

    reward: the expected best of n different samples of a prompt, a mean over prompts, exact for these samples: of m
    rewards in ascending order, m at least n, the i-th is the best of C(i - 1, n - 1) of the C(m, n) choices.
    kl: log n - (n - 1) / n, an upper bound (Beirami et al. 2024, arXiv:2401.01879). gain: as of a trained model, so a
    lower bound; None where that of the run is unknown.
    """
    rewards, prompt_index = scores_and_prompts(results["before"], prompts)
    best = []
    for i in prompt_index.unique():
        ordered = rewards[prompt_index == i].sort().values
        m = len(ordered)
        ways = torch.tensor([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)], dtype=torch.float64)
        best.append((ways * ordered).sum())
    reward, kl = torch.stack(best).mean().item(), math.log(n) - (n - 1) / n
    run, share = results["gain"], None
    if run["gain"] is not None:
        share = (reward - run["beta"] * kl - run["J_before"]) / (run["limit"]["J"] - run["J_before"])
    return {"n": n, "reward": reward, "kl": kl, "gain": share}


def verdict(results: dict, config) -> str:
    """What kind of run this was and the one flag to change, in a sentence; the unit of the rewards does not matter."""
    after, result = results["after"], results["gain"]
    kl, share, limit = after["kl"], result["gain"], result.get("limit")
    collapsed = after["unique"] < results["before"]["unique"] / 2
    if share is None:
        if result["why"] == "the rewards are equal" and after["reward"] > result["J_before"]:
            return "gain unknown: all rewards before training were equal; some are higher now"
        if result["why"] == "too few samples" and collapsed:
            return (
                f"hacked: KL {two_digits(kl)}, and {after['unique']:.0%} of the texts are unique; try --kl_budget 0.4"
            )
        return UNKNOWN[result["why"]].format(kl=two_digits(kl), samples=result.get("samples_needed"))
    got, spent = f"{share:.0%} of what is possible", f"KL {two_digits(kl)} where {two_digits(limit['kl'])} is worth it"
    calmer = "a lower --lr" if config.minibatch_size == config.batch_size else f"--minibatch_size {config.batch_size}"
    if kl < UNMOVED * limit["kl"]:
        return f"unmoved: {spent}; try a higher --lr"
    if kl > FAR * limit["kl"] and (after["reward"] > limit["reward"] or collapsed):
        return f"hacked: {spent}; try {calmer if share < GOOD else 'a higher --init_kl_coef'}"
    if (error := result["gain_se"]) > UNSURE and abs(share - GOOD) < 2 * error:
        needed = power_of_two(len(after["samples"]) * (2 * error / UNSURE) ** 2)
        return f"good or short, which these samples cannot tell: --eval_only with --eval_samples {needed} would"
    if share >= GOOD:
        return f"good: {got}"
    bought = after["reward"] - result["J_before"]
    buyable = min(point["reward"] + point["beta"] * (kl - point["kl"]) for point in results["frontier"])
    luck = 2 * error * (limit["J"] - result["J_before"])
    if kl > CLOSE * limit["kl"] or bought + luck < 0.5 * (buyable - result["J_before"]):
        return f"wasted KL: {spent}; try {calmer}"
    return f"short: {got}; go on with more --episodes"


def two_digits(value: float) -> str:
    """A number from 0 on, rounded to two digits."""
    return f"{float(f'{value:.2g}'):g}"


def power_of_two(value: float) -> int:
    """The first power of two that is no less."""
    return 2 ** math.ceil(math.log2(value))


ROWS = [  # of the printed table: (what, key, format, none where the unit is that of the scores)
    ("mean reward", "reward", ""),
    ("  95% interval, plus or minus", "reward_ci95", ""),
    ("KL to the reference, nats", "kl", ".3f"),
    ("distinct-1, characters", "distinct_1", ".3f"),
    ("distinct-2, pairs of characters", "distinct_2", ".3f"),
    ("unique completions", "unique", ".1%"),
    ("mean length, tokens", "length", ".1f"),
    ("ended by [SEP]", "ended", ".1%"),
    ("log-probability a token, reference", "ref_logprob", ".2f"),
]


def spread(judged: dict) -> float:
    """The standard deviation of a judged policy's rewards."""
    return statistics.pstdev(score for _, _, score in judged["samples"])


def rows(evaluation: dict) -> list[list[str]]:
    """The figures of an evaluation as they are shown: what, before, after, and the limit, "" where there is none."""
    before, after, result = evaluation["before"], evaluation["after"], evaluation["gain"]
    limit = result["limit"] if result["gain"] is not None else {}
    of_scores = f".{decimals(spread(before), 3)}f"
    found = [(what, form or of_scores, before[key], after[key], limit.get(key)) for what, key, form in ROWS]
    if "J" in result:
        J = result["J_before"], result["J"], limit.get("J")
        found.append((f"J = reward - {result['beta']:.3g} KL", of_scores, *J))
    return [[what, *("" if value is None else f"{value:{form}}" for value in values)] for what, form, *values in found]


def summary(evaluation: dict) -> str:
    """The evaluation as a short table for the terminal."""
    result = evaluation["gain"]
    shown = [["", "before", "after", ""], *rows(evaluation)]
    lines = [f"{what:36}{before:>10}{after:>10}" for what, before, after, _ in shown]
    if result["gain"] is not None:
        best, of_scores = result["limit"], f".{decimals(spread(evaluation['before']), 3)}f"
        error = f"{result['gain_se']:.2f}, of judging alone; seeds differ, too"
        lines.append(f"gain {result['gain']:.2f} (standard error {error}) of what is possible: the limit is")
        lines.append(f"J* {best['J']:{of_scores}}, with reward {best['reward']:{of_scores}} at KL {best['kl']:.2f}")
    return "\n".join([*lines, evaluation["verdict"]])


def results_table(evaluation: dict) -> str:
    """The figures of an evaluation as a Markdown table, the limit beside them."""
    shown, result = rows(evaluation), evaluation["gain"]
    if result["gain"] is not None:
        shown.append(["gain", "0", f"{result['gain']:.2f} (standard error {result['gain_se']:.2f})", "1"])
    lines = [f"| {' | '.join(cells)} |" for cells in shown]
    return "\n".join(["| | before | after | the limit |", "| --- | ---: | ---: | ---: |", *lines])


def commonest(evaluation: dict) -> str:
    """The ten commonest completions before and after; none where no one makes up 1% of all and comes three times."""
    lines = []
    for when in ("before", "after"):
        judged = evaluation[when]
        if judged["commonest"][0][1] >= max(3, 0.01 * judged["n"]):
            lines.append(f"commonest completions {when}, of {judged['n']}:")
            lines += [f"  {count:4d}  {text}" for text, count in judged["commonest"]]
    return "\n".join(lines)


def before_after_table(evaluation: dict, shown: int = SHOWN) -> str:
    """A few completions of the same random draws before and after training, as a Markdown table."""
    digits = decimals(spread(evaluation["before"]))
    lines = ["| prompt | before | score | after | score |", "| --- | --- | --- | --- | --- |"]
    for (prompt, old, old_score), (_, new, new_score) in list(
        zip(evaluation["before"]["samples"], evaluation["after"]["samples"])
    )[:shown]:
        prompt, old, new = map(in_markdown, (prompt, old, new))
        lines.append(f"| {prompt} | {old} | {old_score:.{digits}f} | {new} | {new_score:.{digits}f} |")
    return "\n".join(lines)


def read(run_dir: Path, prompts: list[str]) -> dict:
    """A run's evaluation.json, or nothing where there is none yet. UserError where the model before training is not
    judged in it, or on other prompts."""
    results = read_evaluation(run_dir)
    with damaged(run_dir / "evaluation.json", "remove it: --resume makes it again"):
        judged = {prompt for prompt, _, _ in results["before"]["samples"]} if results else set()
    if others := judged - set(prompts):
        raise UserError(f"{run_dir / 'evaluation.json'} is of another prompt, {min(others)!r}; is it another run's?")
    return results


def figures(evaluation: dict) -> dict:
    """An evaluation without its samples, what matters most first."""
    of_samples = ("samples", "kls")
    judged = {
        when: {name: value for name, value in evaluation[when].items() if name not in of_samples}
        for when in ("before", "after")
    }
    return {"verdict": evaluation["verdict"], "gain": evaluation["gain"], **evaluation, **judged}


def write_json(path: Path, evaluation: dict) -> None:
    write_whole(path, json.dumps(evaluation, ensure_ascii=False, indent=1) + "\n")
