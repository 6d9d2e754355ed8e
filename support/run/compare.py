"""Compare runs: read what each one wrote, group those that differ only in the seed, and put figures in a table."""

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from support.common.errors import UserError
from support.common.figures import decimals, table
from support.common.files import MEND_LINE, damaged, read_json, whole_lines
from support.run.settings import NOT_COMPARED

# Settings that change nothing that a curve shows, and those that decide the limit
SILENT = {"seed", "log_samples_every", "save_every", "save_every_minutes", "keep_checkpoints", "process_timeout"}
LIMIT = {"model_name", "reward_model_name", "positive_label", "reward", "prompts", "prompts_file", "gen_len"}
LIMIT |= {"temperature", "init_kl_coef"}
FORMATS = {"R": None, "KL": ".3f", "J": None, "gain": ".2f", "SD": ".2f", "error of judging": ".2f"}
FORMATS |= {"unique": ".1%", "seconds a step": ".2f"}  # of the table; None: one decimal more than rewards need
LEGEND = """R, KL, J, gain and unique: means over the trained models of a row, as they were judged. SD: the standard
deviation of their gains. Error of judging: the standard error of one run's gain, which more --eval_samples reduce."""


@dataclass
class Run:
    """What a run folder contains: the columns of metrics.csv, (steps,) float64 each, evaluation.json, config.json."""

    name: str
    metrics: dict[str, np.ndarray]
    evaluation: dict
    settings: dict

    def figures(self) -> dict[str, float]:
        """Returns what the table shows of a run, as far as it is known."""
        found = {"seconds a step": np.median(self.metrics["time/step"])}
        if after := self.evaluation.get("after"):
            J = after["reward"] - self.settings["init_kl_coef"] * after["kl"]
            found |= {"R": after["reward"], "KL": after["kl"], "J": J, "unique": after["unique"]}
        if gain := known_gain(self):
            found |= {"gain": gain["gain"], "error of judging": gain["gain_se"]}
        return found


def known_gain(run: Run) -> dict:
    """Returns a run's gain with its standard error and its limit, {} if it is unknown."""
    gain = run.evaluation.get("gain", {"gain": None})
    return {} if gain["gain"] is None else gain


def read_run(path: Path) -> Run:
    """Read a run folder. Raises UserError if a file is damaged, or if metrics.csv or config.json is missing."""
    metrics, remedy = read_metrics(path), "repair it, or leave this run out"
    settings = read_json(path / "config.json", remedy)
    inputs, evaluation = (read_json(path / name, remedy, missing={}) for name in ("inputs.json", "evaluation.json"))
    if settings.get("reward"):  # the function's file may have changed
        settings["reward"] += "".join(f" {inputs[name]}" for name in inputs if "of --reward " in name)
    return Run(path.resolve().name, metrics, evaluation, settings)


def read_rows(path: Path) -> list[tuple[str, dict[str, float]]]:
    """Returns the whole lines of a metrics.csv, each with its numbers by column; the first, the header, has none."""
    rows, names = [], []
    for number, line in enumerate(whole_lines(path), 1):
        with damaged(f"line {number} of {path}", MEND_LINE):
            numbers = dict(zip(names, map(float, line.split(",")), strict=True)) if names else {}
        names = names or line.strip().split(",")
        rows.append((line, numbers))
    return rows


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """Returns the columns of a run's metrics.csv, (steps,) float64 each, without a half-written last line."""
    path = run / "metrics.csv"
    if not path.is_file():
        raise UserError(f"{run} has no metrics.csv; give the folder of a run")
    rows = [row for _, row in read_rows(path)[1:]]
    if not rows:
        raise UserError(f"{path} has no step yet: the run has not finished one")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@dataclass
class Curve:
    """Runs that are drawn as one. name: the settings that tell them from the others."""

    name: str
    runs: list[Run]
    colour: str = "C0"

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name}, {len(self.runs)} runs"

    @functools.cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns that all its runs have, up to the last step that all have reached: (runs, steps) float64 each."""
        n = min(len(run.metrics["step"]) for run in self.runs)
        names = [name for name in self.runs[0].metrics if all(name in run.metrics for run in self.runs)]
        metrics = {name: np.stack([run.metrics[name][:n] for run in self.runs]) for name in names}
        if np.ptp(metrics["episodes"], axis=0).any():
            raise UserError(f"the steps of {self.label} differ in their episodes; tell these runs apart with --by")
        return metrics


def curves(runs: list[Run], by: list[str] | None = None) -> list[Curve]:
    """Returns a curve for each combination of the settings `by`, in the order of the runs; by default of all settings
    that differ, except for the seed. Runs with the same settings and seed are curves of their own then.

    Raises UserError if no run has a setting of `by`.
    """
    names, groups, found = differences(runs) if by is None else by, {}, []
    if unknown := [name for name in names if not any(name in run.settings for run in runs)]:
        differing = ", ".join([*differences(runs), "preset", "run_name", "seed"])
        raise UserError(f"--by {unknown[0]}: no run here has such a setting; take some of {differing}")
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
    """Returns the settings in which runs differ."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in SILENT | NOT_COMPARED)
    return [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]


def short(value) -> str:
    """Returns a setting's value in at most 24 characters: the end of a path."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 24 else f"…{text[-23:]}"


def reward_decimals(drawn: list[Curve]) -> int:
    """Returns how many decimals tell rewards apart, by the smallest standard deviation of a first step."""
    return decimals(min(run.metrics["env/reward_std"][0] for curve in drawn for run in curve.runs))


def comparison(runs: list[Run], drawn: list[Curve]) -> str:
    """Returns the figures of curves as a Markdown table, and what its reader has to know. "-" is an unknown figure."""
    in_rewards, rows = f".{reward_decimals(drawn) + 1}f", []
    for curve in drawn:
        of_runs = [run.figures() for run in curve.runs]
        known = {name: [each[name] for each in of_runs if name in each] for name in FORMATS}
        shown = {name: np.mean(values) for name, values in known.items() if values}
        if len(known["gain"]) > 1:
            shown["SD"] = np.std(known["gain"], ddof=1)
        row = [curve.name, str(len(curve.runs)), f"{curve.metrics['episodes'][0, -1]:,.0f}"]
        rows.append(row + [f"{shown[n]:{FORMATS[n] or in_rewards}}" if n in shown else "-" for n in FORMATS])
    parts = [table(["", "runs", "episodes", *FORMATS], rows), LEGEND]
    if unlike := [name for name in differences(runs) if name in LIMIT]:
        parts.append(f"These runs differ in {', '.join(unlike)}, and so in the limit: don't compare their gains.")
    if mixed := dict.fromkeys(name for curve in drawn for name in differences(curve.runs)):
        parts.append(f"Runs in one row differ in {', '.join(mixed)}, too; --by tells them apart.")
    for run in [run for run in runs if not known_gain(run)]:
        why = run.evaluation.get("gain", {}).get("why", "not judged yet")
        parts.append(f"The gain of {run.name} is unknown: {why}.")
    return "\n\n".join(parts)
