"""Runs beside one another: what each of them wrote, what differs between them, which are one curve, and their table.

Runs that differ in nothing but the seed are one curve, the mean over the seeds; a spread is the standard deviation.
"""

import functools
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np

from config import PRESETS, PPOConfig
from support.errors import UserError, escaped
from support.figures import decimals
from support.files import MEND_LINE, read_json, whole_lines
from support.settings import NOT_COMPARED

REQUIRED = ["step", "episodes", "env/reward_mean", "objective/kl"]  # columns of metrics.csv
STD = "env/reward_std"  # another, which a loop of one's own may lack

# Settings that tell no run from another: `preset` stands for those that follow from it, see `told`
SILENT = NOT_COMPARED | {"seed", "log_samples_every", "save_every", "save_every_minutes", "keep_checkpoints"}
SILENT |= {"process_timeout"}
# Settings that decide what a completion earns, and with it the frontier
REWARD = "model_name reward_model_name positive_label reward prompts prompts_file gen_len temperature".split()
SHOWN = 24  # characters of a value


# ----------------------------------------------------------------------------------------------
# What a run wrote


@dataclass
class Run:
    """What a run folder holds. metrics: the columns of metrics.csv, (steps,) float64 each. settings: config.json, {}
    where there is none. hashes: of models, prompts and a reward of one's own, by what they are hashes of."""

    name: str
    metrics: dict[str, np.ndarray]
    evaluation: dict
    settings: dict
    hashes: dict

    def values(self, names: list[str]) -> tuple[str, ...]:
        """Settings and hashes as JSON, to be compared."""
        known = self.settings | self.hashes
        return tuple(json.dumps(known[name]) if name in known else "unknown" for name in names)


def read_run(path: Path) -> Run:
    """UserError where the metrics.csv cannot be used. Of other files that are damaged a warning says so."""

    def unless_damaged(name: str) -> dict:
        try:
            return read_json(path / name, "the run is drawn without it", missing={})
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            return {}

    metrics, evaluation = read_metrics(path), unless_damaged("evaluation.json")
    settings, inputs = unless_damaged("config.json"), unless_damaged("inputs.json")
    # The demo's models are made anew, and on another machine may differ in the last digits
    inputs = {name: value for name, value in inputs.items() if not name.endswith("_name demo")}
    hashes = {re.sub("^the |(?<=_name) .*|(?<=--reward) .*", "", name): value for name, value in inputs.items()}
    return Run(path.resolve().name, metrics, evaluation, settings, hashes)


def read_rows(path: Path) -> list[tuple[str, dict[str, float]]]:
    """The lines of a metrics.csv that are whole, each with its numbers by column; the first, the names, has none.

    UserError, with the line, where one cannot be read without doubt.
    """
    rows, names = [], []
    for number, line in enumerate(whole_lines(path), 1):
        cells = [cell.strip('" \r') for cell in line.split(",")]
        try:
            if number == 1:
                names = cells
                if missing := [name for name in REQUIRED if name not in names]:
                    raise ValueError(f"it names no column {missing[0]}")
                if len(set(names)) < len(names):
                    raise ValueError("it names a column twice")
                rows.append((line, {}))
            elif line.strip():
                if len(cells) != len(names):
                    raise ValueError(f"{len(cells)} values below {len(names)} names")
                rows.append((line, dict(zip(names, map(float, cells)))))
        except ValueError as error:
            form = "numbers have points, and commas between them"
            raise UserError(f"{path} is damaged in line {number}: {error}; {form}; {MEND_LINE}")
    return rows


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv, (steps,) float64 each; a half-written last line is left out."""
    rows = [row for _, row in read_rows(run / "metrics.csv")[1:]]
    if not rows:
        raise UserError(f"{run / 'metrics.csv'} has no step yet: the run has not finished one")
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


# ----------------------------------------------------------------------------------------------
# What differs, and which runs are one curve


@dataclass
class Curve:
    """Runs that are drawn as one: their mean. values: what tells them from the others, by setting, as it is shown."""

    values: dict[str, str]
    runs: list[Run]
    unit: str = "seeds"  # what there may be several of; "runs" where they differ in more than the seed

    @property
    def label(self) -> str:
        told = [value if name in ("run", "run_name") else f"{name} {value}" for name, value in self.values.items()]
        return ", ".join(told + ([f"{len(self.runs)} {self.unit}"] if len(self.runs) > 1 else []))

    @functools.cached_property
    def metrics(self) -> dict[str, np.ndarray]:
        """The columns that all its runs have, at the episodes that all have reached: (runs, steps) float64 each.

        UserError where there are none.
        """
        tables = [run.metrics for run in self.runs]
        episodes = functools.reduce(np.intersect1d, [table["episodes"] for table in tables])
        if not len(episodes):
            raise UserError(f"the runs of {self.label} share no number of episodes; let --by tell them apart")
        rows = [np.intersect1d(table["episodes"], episodes, return_indices=True)[1] for table in tables]
        shared = [name for name in tables[0] if all(name in table for table in tables)]
        return {name: np.stack([table[name][at] for table, at in zip(tables, rows)]) for name in shared}


def curves(runs: list[Run], by: list[str] = ()) -> list[Curve]:
    """Runs that have the same settings but for the seed, each as one curve; or the same of the settings `by`.

    A run without its settings, or one that differs in nothing at all from another, is a curve called by its name.
    UserError where no run has a setting of `by`.
    """
    known = [run for run in runs if run.settings]
    for name in by:
        if not any(name in run.settings for run in known):
            differing = ", ".join([*differences(known), "run_name", "seed"])
            raise UserError(f"--by {name}: no run here has such a setting; take some of {differing}")
    names = list(by) or told(known)
    groups = {}
    for run in sorted(known, key=lambda run: [order(run.settings.get(name)) for name in names]):
        groups.setdefault(run.values(names), []).append(run)
    found = []
    for group in groups.values():
        values = {name: short(name, (group[0].settings | group[0].hashes).get(name, "unknown")) for name in names}
        if by or len({run.settings["seed"] for run in group}) == len(group):
            found.append(Curve(values, group, "runs" if differences(group) else "seeds"))
        else:
            found += [Curve(dict(values), [run]) for run in group]
    labels = Counter(curve.label for curve in found)
    for curve in found:
        if labels[curve.label] > 1 or not curve.label:
            curve.values["run"] = curve.runs[0].name
    return found + [Curve({"run": run.name}, [run]) for run in runs if not run.settings]


def differences(runs: list[Run]) -> list[str]:
    """The settings in which runs differ, and the hashes where the settings do not tell why."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in SILENT)
    differing = [name for name in names if len({run.values([name]) for run in runs}) > 1]
    hashes = [name for name in (runs[0].hashes if runs else ()) if all(name in run.hashes for run in runs)]
    worlds = {run.values(REWARD) for run in runs}
    return differing + [name for name in hashes if len({run.values([*REWARD, name]) for run in runs}) > len(worlds)]


def told(runs: list[Run]) -> list[str]:
    """The `differences` of runs, with `preset` in place of those which in every run are as its preset has them."""
    presets = {preset: vars(PPOConfig(preset=preset)) for run in runs if (preset := run.settings["preset"]) in PRESETS}
    absent = object()

    def follows(name: str) -> bool:
        return all(run.settings.get(name) == presets.get(run.settings["preset"], {}).get(name, absent) for run in runs)

    names = differences(runs)
    return ["preset"] * any(map(follows, names)) + [name for name in names if not follows(name)]


def order(value) -> tuple:
    """Numbers by size, and after them anything else."""
    return (0, value, "") if isinstance(value, (int, float)) else (1, 0, json.dumps(value))


def short(name: str, value) -> str:
    """A setting's value in a few characters: 3e-5, 0.15, the last part of a path, the first of several prompts."""
    if isinstance(value, list) and value:
        return short(name, value[0]) + f" and {len(value) - 1} more" * (len(value) > 1)
    if isinstance(value, float):
        return np.format_float_scientific(value, 5, trim="-", exp_digits=1) if 0 < abs(value) <= 1e-3 else f"{value:g}"
    text = Path(value).name if isinstance(value, str) and name.endswith(("_name", "_file")) else str(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


# ----------------------------------------------------------------------------------------------
# The table


def after(name: str):
    """What the judgement of the trained model says of a run, None where there is none."""
    return lambda run: (run.evaluation.get("after") or {}).get(name)


def J(run: Run) -> float | None:
    reward, beta = after("reward")(run), run.settings.get("init_kl_coef")
    return None if reward is None or beta is None else reward - beta * after("kl")(run)


def of_gain(name: str):
    """A figure of a run's gain, None where the gain is not known."""

    def figure(run: Run):
        gain = run.evaluation.get("gain") or {}
        return None if gain.get("gain") is None else gain.get(name)

    return figure


def seconds(run: Run) -> float | None:
    return float(np.median(run.metrics["time/step"])) if "time/step" in run.metrics else None


def reward_decimals(drawn: list[Curve]) -> int:
    """With how many decimals rewards are told apart, by the least standard deviation of a first step."""
    spreads = [run.metrics[STD][0] for curve in drawn for run in curve.runs if STD in run.metrics]
    return decimals(min(spreads, default=0))


FIGURES = [  # of the table: (header, of a run, of several, format; None: one decimal more than rewards need)
    ("R", after("reward"), np.mean, None),
    ("KL", after("kl"), np.mean, ".3f"),
    ("J", J, np.mean, None),
    ("gain", of_gain("gain"), np.mean, ".2f"),
    ("SD", of_gain("gain"), lambda gains: gains.std(ddof=1) if len(gains) > 1 else None, ".2f"),
    ("error of judging", of_gain("gain_se"), np.mean, ".2f"),
    ("unique", after("unique"), np.mean, ".1%"),
    ("seconds a step", seconds, np.mean, ".2f"),
]
LEGEND = """R, KL, J, gain and unique: of the trained models as they were judged, means over a line's seeds or runs.
SD: the standard deviation of the gain over them. Error of judging: the standard error of one run's gain, which more
--eval_samples make smaller."""


def table(drawn: list[Curve]) -> str:
    """Curves as a Markdown table; "-" where a figure is not known."""
    names = list(dict.fromkeys(name for curve in drawn for name in curve.values if name != "episodes"))
    unit = "runs" if any(curve.unit == "runs" for curve in drawn) else "seeds"
    rows = [[*names, unit, "episodes", *(header for header, *_ in FIGURES)]]
    of_rewards = f".{reward_decimals(drawn) + 1}f"
    for curve in drawn:
        cells = [curve.values.get(name, "-") for name in names]
        cells += [str(len(curve.runs)), f"{curve.metrics['episodes'][0, -1]:,.0f}"]
        for _, figure, of_several, form in FIGURES:
            found = [value for value in map(figure, curve.runs) if value is not None]
            value = of_several(np.array(found)) if found else None
            cells.append("-" if value is None else f"{value:{form or of_rewards}}")
        rows.append([re.sub(r"([\\|])", r"\\\1", escaped(cell)) for cell in cells])
    widths = [max(map(width, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * each for each in widths])
    return "\n".join(
        f"| {' | '.join(cell + ' ' * (each - width(cell)) for cell, each in zip(row, widths))} |" for row in rows
    )


def width(text: str) -> int:
    """Columns of a terminal, of which a Chinese character takes two."""
    return sum(1 + (east_asian_width(character) in "WF") for character in text)


def what_does_not_compare(runs: list[Run]) -> str:
    """Why gains of these runs differ by more than training; nothing where they do not."""
    names = differences([run for run in runs if run.settings])
    of_reward = [name for name in names if name in REWARD or name.startswith("hash of")]
    beta = [name for name in names if name == "init_kl_coef"]
    limit = "a frontier and a limit" if of_reward else "a limit"
    differ = f"these runs differ in {', '.join(of_reward + beta)}"
    return f"{differ}: each has {limit} of its own, and their gains do not compare" if of_reward + beta else ""


def remarks(runs: list[Run], drawn: list[Curve]) -> list[str]:
    """What a reader of the table has to know, a line each."""
    lines = [what_does_not_compare(runs)]
    if mixed := dict.fromkeys(name for curve in drawn if curve.unit == "runs" for name in differences(curve.runs)):
        lines.append(f"runs in one line of this table differ in {', '.join(mixed)}, too; --by tells them apart")
    for curve in drawn:
        if missing := sum(after("reward")(run) is None for run in curve.runs):
            lines.append(f"{curve.label}: {missing} of {len(curve.runs)} not judged yet")
        if len({run.metrics["episodes"][-1] for run in curve.runs}) > 1:
            lines.append(f"{curve.label}: drawn as far as all of them have come")
    unknown = {}
    for curve in drawn:
        for why in {(run.evaluation.get("gain") or {}).get("why") for run in curve.runs} - {None}:
            unknown.setdefault(why, []).append(curve.label)
    lines += [f"gain unknown of {'; '.join(labels)}: {why}" for why, labels in unknown.items()]
    return [escaped(line) for line in lines if line]
