"""Compare runs: read what each one wrote, group those that differ only in the seed, and put figures in a table."""

import functools
import itertools
import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.common.errors import UserError
from support.common.figures import decimals, table
from support.common.files import FIX_LINE, damaged, read_json, whole_lines
from support.run.settings import NOT_COMPARED

STARTS = "environment.jsonl"  # a line for the start of the run, for each --resume and for each --eval_only

# Settings that change a curve only by chance or not at all, and settings that decide the limit
SILENT = {"seed", "device", "micro_batch_size", "log_samples_every", "save_every", "save_every_minutes"}
SILENT |= {"keep_checkpoints", "process_timeout", "eval_samples"}
LIMIT = {"model_name", "reward_model_name", "positive_label", "reward", "reward_weights", "prompts", "prompts_file"}
LIMIT |= {"gen_len", "temperature", "init_kl_coef"}
# None: one decimal more than rewards
FORMATS = {"R": None, "KL": ".3f", "J": None, "gain": ".2f", "standard error": ".3f", "SD": ".2f"}
FORMATS |= {"evaluation error": ".2f", "unique": ".1%", "seconds per step": ".2f"}
LEGEND = """R, KL, J, gain and unique: means over the evaluated models of a row. SD: the standard deviation of
the row's gains. Evaluation error: the standard error of one run's gain that comes only from the evaluation; more
--eval_samples reduce it. Standard error: that of the mean gain, from the larger of these two."""
PAIRS = """A difference is larger than noise if it is more than twice its standard error. Of twenty pairs
that are equally good, about one seems to differ by chance."""
ONE_SEED = """Each row is one run. Another seed changes its gain by a few hundredths, so these differences may be noise.
Train at least three seeds of each."""


@dataclass
class Run:
    """What a run folder contains: the columns of metrics.csv, (steps,) float64 each, evaluation.json, config.json."""

    name: str
    metrics: dict[str, np.ndarray]
    evaluation: dict
    settings: dict

    def figures(self) -> dict[str, float]:
        """Return a run's figures for the table, as far as they are known."""
        found = {"seconds per step": np.median(self.metrics["time/step"])}
        if after := self.evaluation.get("after"):
            J = after["reward"] - self.settings["init_kl_coef"] * after["kl"]
            found |= {"R": after["reward"], "KL": after["kl"], "J": J, "unique": after["unique"]}
        if gain := known_gain(self):
            found |= {"gain": gain["gain"], "evaluation error": gain["gain_se"]}
        return found


def known_gain(run: Run) -> dict:
    """Return a run's gain with its standard error and its limit, or {} if it is unknown."""
    gain = run.evaluation.get("gain") or {"gain": None}  # null until the run is evaluated after training
    return {} if gain["gain"] is None else gain


def read_run(path: Path) -> Run:
    """Read a run folder. Raises UserError if a file is damaged, or if metrics.csv or config.json is missing."""
    metrics, remedy = read_metrics(path), "repair it, or leave this run out"
    settings = read_json(path / "config.json", remedy)
    inputs, evaluation = (read_json(path / name, remedy, missing={}) for name in ("inputs.json", "evaluation.json"))
    if rewards := settings.get("reward"):  # a function's file may have changed
        rewards = [rewards] if isinstance(rewards, str) else rewards
        settings["reward"] = " ".join([*rewards, *(inputs[name] for name in inputs if "of --reward " in name)])
    if evaluation.get("after"):  # --eval_only may have used another number of samples
        settings["eval_samples"] = evaluation["after"]["n"]
    if codes := dict.fromkeys(start["code"] for start in read_starts(path) if "code" in start):
        settings["code"] = ", ".join(codes)
    return Run(path.resolve().name, metrics, evaluation, settings)


def read_starts(run_dir: Path) -> list[dict]:
    """Return the lines of environment.jsonl. Raises UserError if one is damaged."""
    path = run_dir / STARTS
    with damaged(path, FIX_LINE):
        return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def read_rows(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Return the whole lines of a metrics.csv, each with its numbers by column; the first, the header, has none."""
    rows, names = [], []
    for number, line in enumerate(whole_lines(path), 1):
        with damaged(f"line {number} of {path}", FIX_LINE):
            numbers = dict(zip(names, map(float, line.split(",")), strict=True)) if names else {}
        names = names or line.strip().split(",")
        rows.append((line, numbers))
    return rows


def lacks_steps(run: Path) -> bool:
    """Return whether a run has a metrics.csv without a step, as a failed start leaves it. Doesn't read the numbers."""
    path = run / "metrics.csv"
    return path.is_file() and len(whole_lines(path)) < 2


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """Return the columns of a run's metrics.csv, (steps,) float64 each, without a half-written last line."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.csv; give the folder of a run")
    rows = [row for _, row in read_rows(path)[1:]]
    if not rows:
        raise UserError(f"{path} has no rows yet: the run hasn't finished a step")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Curve:
    """Runs that are drawn as one curve. name: the settings in which they differ from other curves."""

    name: str
    runs: list[Run]
    colour: str = "C0"

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name}, {len(self.runs)} runs"

    @functools.cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """Return the columns that all its runs have, up to the last step that all have reached: (runs, steps) float64
        each."""
        n = min(len(run.metrics["step"]) for run in self.runs)
        names = [name for name in self.runs[0].metrics if all(name in run.metrics for run in self.runs)]
        metrics = {name: np.stack([run.metrics[name][:n] for run in self.runs]) for name in names}
        if np.ptp(metrics["episodes"], axis=0).any():
            raise UserError(f"the runs of {self.label} differ in their episodes per step; separate them with --by")
        return metrics


def curves(runs: list[Run], by: list[str] | None = None) -> list[Curve]:
    """Return a curve for each combination of the settings `by`, in the order of the runs. By default these are all
    settings that differ, except for the seed; runs with the same settings and seed then get a curve each.

    Raises UserError if no run has a setting of `by`.
    """
    names, groups, found = differences(runs) if by is None else by, {}, []
    if unknown := [name for name in names if not any(name in run.settings for run in runs)]:
        differing = ", ".join([*differences(runs), "preset", "run_name", "seed"])
        raise UserError(f"--by {unknown[0]}: no run here has such a setting; choose from {differing}")
    for run in runs:
        groups.setdefault(str([run.settings.get(name) for name in names]), []).append(run)
    for group in groups.values():
        name = ", ".join(f"{name} {short(group[0].settings.get(name, 'unknown'))}" for name in names)
        together = by is not None or len({run.settings.get("seed") for run in group}) == len(group)
        for members in [group] if together else [[run] for run in group]:
            found.append(Curve(name or ("all" if len(members) > 1 else members[0].name), members))
    same = Counter(curve.name for curve in found)
    for curve in found:
        curve.name += f" ({curve.runs[0].name})" if same[curve.name] > 1 else ""
    return found


def differences(runs: list[Run]) -> list[str]:
    """Return the settings in which runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in SILENT | NOT_COMPARED)
    return [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]


def short(value) -> str:
    """Return a setting's value in at most 24 characters; of a long path, only the end."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"…{text[-23:]}"


def reward_decimals(drawn: list[Curve]) -> int:
    """Return how many decimals tell rewards apart, by the smallest standard deviation of a first step."""
    return decimals(min(run.metrics["env/reward_std"][0] for curve in drawn for run in curve.runs))


def spreads(drawn: list[Curve]) -> list[float | None]:
    """Return for each curve the standard deviation of another run's gain, due to its seed and to the evaluation.

    That is the SD of its gains or, if it is only one run, the SD within all curves, but at least the evaluation error.
    All are None if no curve has several gains.
    """
    known = [[known_gain(run) for run in curve.runs if known_gain(run)] for curve in drawn]
    gains = [[each["gain"] for each in of_curve] for of_curve in known]
    several = [each for each in gains if len(each) > 1]
    if not several:
        return [None] * len(drawn)
    within = math.sqrt(sum(len(each) * np.var(each) for each in several) / sum(len(each) - 1 for each in several))
    deviations = [np.std(each, ddof=1) if len(each) > 1 else within for each in gains]
    errors = [np.mean([each["gain_se"] for each in of_curve]) if of_curve else None for of_curve in known]
    return [None if error is None else max(error, deviation) for error, deviation in zip(errors, deviations)]


def pairs(drawn: list[Curve], figures: list[dict], spread: list[float | None]) -> str:
    """Return a table of the differences in gain between curves, and how many seeds the others would need."""
    rows, known = [], [i for i, each in enumerate(spread) if each is not None]
    for a, b in itertools.combinations(known, 2):
        difference = figures[a]["gain"] - figures[b]["gain"]
        error = math.hypot(figures[a]["standard error"], figures[b]["standard error"])
        told = "yes"
        if abs(difference) <= 2 * error:
            seeds = 4 * (spread[a] ** 2 + spread[b] ** 2) / max(difference**2, 1e-12)
            told = f"no: needs {math.ceil(seeds)} seeds each" if seeds < 100 else "no: needs over 100 seeds each"
        rows.append([drawn[a].name, drawn[b].name, f"{difference:+.3f}", f"{error:.3f}", told])
    return table(["", "minus", "difference in gain", "standard error", "larger than noise"], rows)


def comparison(runs: list[Run], drawn: list[Curve]) -> str:
    """Return the figures of curves as a Markdown table, the differences that are larger than noise, and what
    else a reader has to know. "-" is an unknown figure."""
    in_rewards, rows, figures, spread = f".{reward_decimals(drawn) + 1}f", [], [], spreads(drawn)
    for curve, deviation in zip(drawn, spread):
        of_runs = [run.figures() for run in curve.runs]
        known = {name: [each[name] for each in of_runs if name in each] for name in FORMATS}
        shown = {name: np.mean(values) for name, values in known.items() if values}
        if len(known["gain"]) > 1:
            shown["SD"] = np.std(known["gain"], ddof=1)
        if deviation is not None:
            shown["standard error"] = deviation / math.sqrt(len(known["gain"]))
        row = [curve.name, str(len(curve.runs)), f"{curve.metrics['episodes'][0, -1]:,.0f}"]
        rows.append(row + [f"{shown[n]:{FORMATS[n] or in_rewards}}" if n in shown else "-" for n in FORMATS])
        figures.append(shown)
    parts = [table(["", "runs", "episodes", *FORMATS], rows), LEGEND]
    if unlike := [name for name in differences(runs) if name in LIMIT]:
        parts.append(f"These runs differ in {', '.join(unlike)}, so their limits differ: don't compare their gains.")
    elif sum("gain" in shown for shown in figures) > 1:
        parts += [pairs(drawn, figures, spread), PAIRS] if any(spread) else [ONE_SEED]
    if mixed := dict.fromkeys(name for curve in drawn for name in differences(curve.runs)):
        parts.append(f"Runs in the same row also differ in {', '.join(mixed)}; --by separates them.")
    for run in [run for run in runs if not known_gain(run)]:
        why = (run.evaluation.get("gain") or {}).get("why", "not evaluated yet")
        parts.append(f"The gain of {run.name} is unknown: {why}.")
    return "\n\n".join(parts)
