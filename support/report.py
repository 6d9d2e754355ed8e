"""report.md: what a run was and what came of it, for whoever opens its folder, on GitHub as it is."""

import json
import math
from pathlib import Path

import numpy as np

from support.compare import read_rows
from support.errors import escaped
from support.evaluation import SHOWN, before_after_table, results_table
from support.figures import duration, in_markdown
from support.files import MEND_LINE, damaged, whole_lines
from support.settings import changes, load_config

STARTS = "environment.jsonl"


def run_report(run_dir: Path, results: dict, inputs: dict[str, str], starts: list[dict]) -> str:
    """The report of a run that has been judged, in Markdown.

    results: evaluation.json. inputs: hashes of the models and others, by name. starts: environment.jsonl. The rest is
    read from the run's folder; UserError where that is damaged.
    """
    parts = [f"# {in_markdown(run_dir.resolve().name)}", f"**{results['verdict']}**"]
    if (run_dir / "rewards.png").exists():
        parts.append("![curves of the run](rewards.png)")

    n = f"{results['after']['n']:,} completions before training and as many after it"
    limit = "The limit is the best policy that this KL coefficient allows, and the gain the share of the way there"
    parts += ["## Results", f"Judged on {n}, of the same random draws. {limit}; KL is in nats a completion."]
    parts += [results_table(results), *best_of_n(results)]
    if alarms := results.get("alarms"):
        parts.append("Warnings while it trained:")
        parts.append("\n".join(f"- step {alarm['step']}: {in_markdown(alarm['says'])}" for alarm in alarms))

    parts += [f"## The first {SHOWN} completions, before and after", before_after_table(results)]

    parts += ["## How it was made", "\n".join(f"    {command(start)}" for start in starts)]
    parts += differences(run_dir)
    parts.append(table(["input", "hash"], [(name.removeprefix("the hash of "), inputs[name]) for name in inputs]))
    parts.append(table(["what", "here"], [*training(run_dir), *circumstances(starts)]))
    return "\n\n".join(parts) + "\n"


def table(header: list[str], rows: list[tuple]) -> str:
    """A Markdown table of texts as they stand."""
    lines = [f"| {' | '.join(map(in_markdown, cells))} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "| --- " * len(header) + "|", *lines[1:]])


def best_of_n(results: dict) -> list[str]:
    """What the original model gives without training, in a sentence; none where its gain is not known."""
    gains = [f"{best['gain']:.2f} with {best['n']}" for best in results["best_of_n"] if best["gain"] is not None]
    what = "Without any training, the best of several drafts by the original model has a gain of"
    return [f"{what} {', '.join(gains)}."] if gains else []


def differences(run_dir: Path) -> list[str]:
    """Say which settings differ from the run's preset."""
    config = load_config(run_dir / "config.json")
    changed = [(name, str(here), str(preset)) for name, (preset, here) in changes(config).items()]
    if not changed:
        return [f"All settings are those of the preset {config.preset}."]
    what = f"Settings that differ from the preset {config.preset}:"
    return [what, table(["setting", "here", "preset"], changed)]


def training(run_dir: Path) -> list[tuple[str, str]]:
    """How long the steps took; nothing where the folder has lost what was logged of them."""
    path = run_dir / "metrics.csv"
    seconds = [row.get("time/step", math.nan) for _, row in read_rows(path)[1:]] if path.exists() else []
    if not seconds:
        return []
    each = f"{np.nanmedian(seconds):.2f} s a step in the median"
    took = f"{len(seconds):,} steps in {duration(np.nansum(seconds))}, without loading and judging"
    return [("training", f"{took}; {each}")]


# ----------------------------------------------------------------------------------------------
# The starts of a run: one when it began, one for each --resume and for each --eval_only


def read_starts(run_dir: Path) -> list[dict]:
    """The lines of environment.jsonl; UserError where one is damaged."""
    path = run_dir / STARTS
    starts = []
    for number, line in enumerate(whole_lines(path) if path.exists() else [], 1):
        with damaged(f"line {number} of {path}", MEND_LINE):
            starts.append(json.loads(line))
    return starts


def when(start: dict) -> str:
    return f"from step {start['step']}" if start.get("step") else "judged again"


def command(start: dict) -> str:
    return f"{escaped(start.get('command') or '(command not kept)')}  # {when(start)}"


def circumstances(starts: list[dict]) -> list[tuple[str, str]]:
    """Versions, device, dtype and others by name, and from when on where they have changed."""
    found = []
    for name in dict.fromkeys(name for start in starts for name in start if name not in ("step", "command")):
        values = []
        for start in starts:
            value = f"{start[name]:,}" if type(start.get(name)) is int else str(start.get(name, "unknown"))
            if not values or values[-1][0] != value:
                values.append((value, when(start)))
        shown = [values[0][0]] if len(values) == 1 else [f"{value} ({since})" for value, since in values]
        found.append((name, ", ".join(shown)))
    return found
