"""Warnings before and during training. Each is given once, with the remedy; --stop_on_alarm makes some end the run.

The limits of the alarms lie between the healthy and the sick runs of docs/experiments.md.
"""

import math
from statistics import fmean

from support.run.limit import possible

LAST = 5  # steps over which numbers that vary from batch to batch are averaged
TOO_FAST, CLIPPED = 0.01, 0.1  # approxkl and clipfrac
STILL = 3e-5  # approxkl of the first step
FAR, BEYOND = 2.0, 1.5  # KL in nats, and as a multiple of the limit's
NARROW, ALIKE = 0.5, 0.4  # entropy and unique texts, as shares of the first step's; texts of four tokens come close
COLLAPSE = {"far away", "narrow", "alike"}  # alarms that mean reward hacking or collapse
MISLED = 10  # steps in a row with an explained variance below -0.01; a value head that has learned nothing has 0
QUARTER = 10  # a plateau is only reported if a quarter of the run has this many steps
DEARER = "try a higher --init_kl_coef, or --kl_budget 0.4"


def prospect(before, prompts: list[str], kl_coef: float) -> list[str]:
    """Return lines about what is possible at this KL coefficient, and warnings; no lines if the reward is unsteady.
    before: an Evaluation."""
    if before.unsteady:
        return []
    rewards, prompt_index = before.rewards()
    found, lines = possible(before, kl_coef), []
    if best := found.get("limit"):
        told = f"the best possible policy gets a reward of {best['reward']:.3g} at KL {best['kl']:.2g}"
        lines.append(f"at a KL coefficient of {kl_coef:.3g} {told}; the reference gets {rewards.mean().item():.3g}")
    if "why" in found:
        return [*lines, f"warning: {found['why']}"]
    if best["kl"] > FAR:
        lines.append(f"warning: at a KL of {best['kl']:.2g} nats, expect collapse; try --kl_budget 0.4")
    little = 0.01 * rewards.std(correction=0).item()
    if flat := [i for i in prompt_index.unique() if rewards[prompt_index == i].std(correction=0) < little]:
        which = f"{len(flat)} of {len(prompts)} prompts (for example {before.samples[flat[0]][0]!r})"
        lines.append(f"warning: all completions of {which} get nearly the same score, so PPO can't learn from them")
    return lines


class Alarms:
    """Watches each step of a run. `found` lists what it has reported: {"step", "alarm", "says"}. `stop`: whether
    --stop_on_alarm ends the run here."""

    def __init__(self, config, kl_limit: float | None):
        """kl_limit: the KL of the best possible policy in nats, or None if unknown."""
        self.moves_first = config.ppo_epochs * math.ceil(config.batch_size / config.minibatch_size) > 1
        self.kl_limit = kl_limit or 0.0
        self.first, self.last, self.rewards, self.misled, self.found = None, [], [], 0, []
        self.stop_on_alarm, self.stop = config.stop_on_alarm, False

    def look(self, row: dict[str, float]) -> list[dict]:
        """Check the next row of metrics.csv. Returns the alarms that it raises for the first time."""
        self.last = [*self.last[1 - LAST :], row]
        first = self.first = self.first or row
        fast, clipped = row["ppo/policy/approxkl"], row["ppo/policy/clipfrac"]
        recent = ("objective/kl", "objective/entropy", "tokens/unique_share")
        kl, entropy, unique = (sum(each[name] for each in self.last) / len(self.last) for name in recent)
        signs = {}
        if row is first and row["env/reward_std"] <= 1e-7 * abs(row["env/reward_mean"]):
            signs["no spread"] = "all scores of the first batch are equal: so far there is nothing to learn"
        elif row is first and self.moves_first and fast < STILL:
            signs["no movement"] = f"the policy hardly moves (approxkl {fast:.1g}); try a higher --lr"
        if fast > TOO_FAST or clipped > CLIPPED:
            seen = f"approxkl {fast:.2g}, clipfrac {clipped:.2g}"
            signs["too fast"] = f"the policy moves too fast ({seen}); lower --lr or use fewer optimiser steps per batch"
        if kl > max(FAR, BEYOND * self.kl_limit):
            signs["far away"] = f"KL is {kl:.2g} nats, too far from the reference; {DEARER}"
        if entropy < NARROW * first["objective/entropy"]:
            signs["narrow"] = f"entropy has fallen from {first['objective/entropy']:.2g} to {entropy:.2g}; {DEARER}"
        if unique < ALIKE * first["tokens/unique_share"]:
            signs["alike"] = f"only {unique:.0%} of the texts in a batch are unique; {DEARER}"
        self.misled = self.misled + 1 if row.get("ppo/val/explained_variance", 0.0) < -0.01 else 0
        if self.misled == MISLED:
            signs["bad values"] = f"explained variance was below 0 for {MISLED} steps; try a lower --value_lr"
        self.rewards.append(row["env/reward_mean"])
        if steps := self.stalled(row):
            signs["plateau"] = f"the reward hasn't risen for {steps} steps; further steps only add noise"
        told = {alarm["alarm"] for alarm in self.found}
        new = [{"step": int(row["step"]), "alarm": name, "says": signs[name]} for name in signs if name not in told]
        self.found += new
        self.stop |= self.stop_on_alarm and any(alarm["alarm"] in COLLAPSE for alarm in new)
        return new

    def stalled(self, row: dict[str, float]) -> int:
        """Return half the number of steps so far if the reward rose before that but not since, on average; else 0."""
        n = len(self.rewards) // 4
        if n < QUARTER:
            return 0
        second, third, fourth = (fmean(self.rewards[-i * n :][:n]) for i in (3, 2, 1))
        error = row["env/reward_std"] / math.sqrt(row["episodes"] / row["step"])  # of a batch's mean
        return 2 * n if second - fmean(self.rewards[:LAST]) > 2 * error and max(third, fourth) <= second else 0
