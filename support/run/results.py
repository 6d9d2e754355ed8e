"""The results of a run in words and tables."""

import math
import statistics

from support.common.figures import decimals, table
from support.run.evaluation import SURE, Results

GOOD = 0.7  # gain; if rewards are normally distributed, a KL of x KL* allows a gain of at most 2 sqrt(x) - x
UNMOVED = 0.01  # KL / KL*, which allows a gain of at most 0.2
FAR = 2  # KL / KL*, which allows at most 0.83: a reward above the limit's then comes from texts that no sample had
CLOSE = 1.5  # KL / KL*, which allows at most 0.95
UNSURE = 0.15  # standard error of the gain above which a good run and a short one look alike
SHOWN = 5  # completions in the before/after table
JUDGED = 2  # a judge has fallen if it is this many standard errors lower
MANY = 20  # with more prompts, the table by prompt shows only the best and the worst


def verdict(results: Results, config) -> str:
    """Return what kind of run this was and which flag to change, in one sentence. The rewards' unit has no effect."""
    before, after, result = results.before, results.after, results.gain
    judges = [each for each in results.rewards if each["weight"] == 0]
    fallen = [each for each in judges if each["after"] < each["before"] - JUDGED * each["error"]]
    if fallen and after.reward > before.reward:
        told = ", ".join(f"{each['name']} fell from {each['before']:.3g} to {each['after']:.3g}" for each in fallen)
        rise = f"the reward rose from {before.reward:.3g} to {after.reward:.3g}, but the judge {told}"
        dearer = "a lower --kl_budget" if config.kl_budget else "a higher --init_kl_coef"
        return f"hacked: {rise}, by more than {JUDGED} standard errors; try {dearer}, or a better reward"
    if (share := result["gain"]) is None:
        needed = result.get("samples_needed")
        more = f"; evaluate again with --eval_only and --eval_samples {needed}" if needed else ""
        return f"gain unknown: {result['why']}{more}"
    kl, limit, error = after.kl, result["limit"], result["gain_se"]
    got, spent = f"{share:.0%} of what is possible", f"KL {kl:.2g}, compared with {limit['kl']:.2g} at the limit"
    calmer = "a lower --lr" if config.minibatch_size == config.batch_size else f"--minibatch_size {config.batch_size}"
    collapsed = after.unique < before.unique / 2
    if kl < UNMOVED * limit["kl"]:
        return f"unmoved: {spent}; try a higher --lr"
    if kl > FAR * limit["kl"] and (after.reward > limit["reward"] or collapsed):
        return f"hacked: {spent}; try {calmer if share < GOOD else 'a higher --init_kl_coef'}"
    if share > 1 + SURE * error:
        told = f"{got}, more than {SURE} standard errors ({error:.0%}) above 100%"
        cause = "the reward isn't the same before and after training, or the best texts are too rare for these samples"
        return f"impossible: {told}: {cause}; check both with --eval_only and more --eval_samples"
    if error > UNSURE and abs(share - GOOD) < 2 * error:
        needed = 2 ** math.ceil(math.log2(len(after.samples) * (2 * error / UNSURE) ** 2))
        return f"good or short: too few samples to tell; evaluate again with --eval_only and --eval_samples {needed}"
    if share >= GOOD:
        return f"good: {got}"
    bought = after.reward - result["J_before"]
    buyable = min(point["reward"] + point["beta"] * (kl - point["kl"]) for point in results.frontier)
    luck = 2 * error * (limit["J"] - result["J_before"])
    if kl > CLOSE * limit["kl"] or bought + luck < 0.5 * (buyable - result["J_before"]):
        return f"wasted KL: {spent}; try {calmer}"
    return f"short: {got}; continue with more --episodes"


ROWS = {  # rows of the results table with their formats; None for the format of rewards
    "reward": ("mean reward", None),
    "reward_ci95": ("95% interval, plus or minus", None),
    "kl": ("KL to the reference, nats", ".3f"),
    "distinct_1": ("distinct-1, characters", ".3f"),
    "distinct_2": ("distinct-2, pairs of characters", ".3f"),
    "unique": ("unique completions", ".1%"),
    "length": ("mean length, tokens", ".1f"),
    "ended": ("ended by {end_token}", ".1%"),
    "ref_logprob": ("log-probability per token, reference", ".2f"),
}


def results_table(results: Results) -> str:
    """Return the figures before and after training and those of the limit as a Markdown table."""
    before, after, result = results.before, results.after, results.gain
    limit = result["limit"] if result["gain"] is not None else {}
    end = after.end_token.strip("[]<>|")
    in_rewards = f".{decimals(statistics.pstdev(score for *_, score in before.samples), 3)}f"
    rows = [
        (what.format(end_token=end), form, getattr(before, key), getattr(after, key), limit.get(key))
        for key, (what, form) in ROWS.items()
    ]
    if "J" in result:
        rows.append((f"J = reward - {result['beta']:.3g} KL", None, result["J_before"], result["J"], limit.get("J")))
    cells = [
        [what, *("" if value is None else f"{value:{form or in_rewards}}" for value in values)]
        for what, form, *values in rows
    ]
    if limit:
        cells.append(["gain", "0", f"{result['gain']:.2f} (standard error {result['gain_se']:.2f})", "1"])
    figures = table(["", "before", "after", "the limit"], cells)
    return f"{figures}\n\n{rewards_table(results)}" if results.rewards else figures


def rewards_table(results: Results) -> str:
    """Return how each of several rewards changed as a Markdown table."""
    rows = []
    for each in results.rewards:
        numbers = each["before"], each["after"], each["after"] - each["before"], each["error"]
        weight = f"{each['weight']:g}" if each["weight"] else "0, a judge"
        rows.append([each["name"], weight, *(f"{number:.{decimals(each['error'])}f}" for number in numbers)])
    return table(["reward", "weight", "before", "after", "change", "standard error"], rows)


def prompts_table(results: Results) -> str:
    """Return the result of each prompt as a Markdown table, best first; if there are many, the best and the worst."""
    form = f".{decimals(statistics.pstdev(score for *_, score in results.before.samples), 3)}f"
    rows = []
    for each in results.by_prompt:
        share = "-" if each["gain"] is None else f"{each['gain']:.2f} (standard error {each['gain_se']:.2f})"
        rewards = [f"{each['before']:{form}}", f"{each['after']:{form}}", f"{each['kl']:.3f}", f"{each['J']:+{form}}"]
        rows.append([each["prompt"], str(each["n"]), *rewards, share])
    if len(rows) > MANY:
        rows[MANY // 2 : -MANY // 2] = [["…"] * 7]
    return table(["prompt", "completions", "reward before", "after", "KL", "J gained", "gain"], rows)


def before_after_table(before: list, after: list, shown: int = SHOWN) -> str:
    """Return the first samples before and after training, from the same random numbers, as a Markdown table."""
    form = f".{decimals(statistics.pstdev(score for *_, score in before))}f"
    pairs = zip(before[:shown], after)
    rows = [[prompt, old, f"{was:{form}}", new, f"{now:{form}}"] for (prompt, old, was), (_, new, now) in pairs]
    return table(["prompt", "before", "score", "after", "score"], rows)
