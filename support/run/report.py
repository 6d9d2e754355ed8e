"""Write report.md: the settings and results of a run, for anyone who opens its folder."""

import math
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.common.errors import escaped
from support.common.figures import in_markdown, table
from support.common.files import read_json
from support.run.compare import read_metrics, read_starts
from support.run.evaluation import Results
from support.run.results import SHOWN, before_after_table, prompts_table, results_table
from support.run.settings import changes, load_config, total_steps


def run_report(run_dir: Path, results: Results) -> str:
    """Return the report of a finished run, in Markdown. Raises UserError if a file there is damaged."""
    starts, inputs = read_starts(run_dir), read_json(run_dir / "inputs.json", "remove it; it is recreated", missing={})
    parts = [f"# {in_markdown(run_dir.resolve().name)}", f"**{results.verdict}**"]
    if (run_dir / "rewards.png").exists():
        parts.append("![curves of the run](rewards.png)")
    n = f"{results.after.n:,} completions before and after training"
    limit = "The limit is the best possible policy at this KL coefficient, and the gain is the share of the way there"
    evaluated = f"Evaluated on {n}, with the same random numbers. {limit}. KL is in nats per completion."
    parts += ["## Results", evaluated, results_table(results)]
    if gains := [f"{best['gain']:.2f} with n = {best['n']}" for best in results.best_of_n if best["gain"] is not None]:
        drafts = "Without training, best-of-n from the original model has a gain of"
        parts.append(f"{drafts} {', '.join(gains)}.")
    if results.by_prompt:
        about = "Best first. J gained is the increase in J = reward - beta KL. A gain of - is unknown, usually"
        parts += [
            "## By prompt",
            f"{about} because there are too few samples of that prompt; raise `--eval_samples`.",
            prompts_table(results),
        ]
    if results.alarms:
        warnings = [f"- step {alarm['step']}: {in_markdown(alarm['says'])}" for alarm in results.alarms]
        parts += ["## Warnings during training", "\n".join(warnings)]
    config = load_config(run_dir / "config.json")
    if (results.steps or math.inf) < total_steps(config):
        parts.append(f"`--stop_on_alarm` ended the run after step {results.steps} of {total_steps(config)}.")
    parts += [
        f"## The first {SHOWN} completions, before and after",
        before_after_table(results.before.samples, results.after.samples),
    ]

    commands = [f"    {escaped(start.get('command', '(unknown)'))}  # {when(start)}" for start in starts]
    parts += ["## How it was made", "\n".join(commands)]
    if (run_dir / "metrics.csv").exists():
        seconds = read_metrics(run_dir)["time/step"]
        took = f"{len(seconds):,} steps in {tqdm.format_interval(sum(seconds))}, excluding loading and evaluation"
        parts.append(f"{took}; median {np.median(seconds):.2f} s per step.")
    if changed := [[name, str(here), str(preset)] for name, (preset, here) in changes(config).items()]:
        parts.append(f"Settings that differ from the preset {config.preset}:")
        parts.append(table(["setting", "here", "preset"], changed))
    else:
        parts.append(f"All settings are those of the preset {config.preset}.")
    parts.append(table(["input", "hash"], [[name.removeprefix("the hash of "), inputs[name]] for name in inputs]))
    names = dict.fromkeys(name for start in starts for name in start if name not in ("step", "command"))
    others = [now for old, now in zip([{}, *starts], starts) if any(now.get(n) != old.get(n) for n in names)]
    rows = [[name, *(str(start.get(name, "")) for start in others)] for name in names]
    return "\n\n".join([*parts, table(["environment", *map(when, others)], rows)]) + "\n"


def when(start: dict) -> str:
    return f"from step {start['step']}" if start.get("step") else "evaluated again"
