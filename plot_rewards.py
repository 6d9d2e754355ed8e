"""Draw the curves of one or more runs.

python plot_rewards.py                              the newest run below runs/, into its folder as rewards.png
python plot_rewards.py runs/a runs/b --out FILE     several runs over each other
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

from config import UserError

PANELS = [  # (title, columns drawn as lines, y axis)
    ("KL to the reference", ["objective/kl"], "nats a completion"),
    ("KL coefficient", ["objective/kl_coef"], "reward a nat"),
    ("policy loss", ["ppo/loss/policy"], ""),
    ("value loss", ["ppo/loss/value"], ""),
    ("entropy", ["objective/entropy"], "nats a token"),
    ("clip fraction", ["ppo/policy/clipfrac", "ppo/val/clipfrac"], "share of tokens"),
    ("completion length", ["tokens/completion_length"], "tokens"),
    ("time", ["time/sample", "time/score", "time/ppo"], "seconds a step"),
]
STYLES = ["-", "--", ":"]  # of several columns in one panel; a run keeps its colour


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders; the newest below runs/ unless given"
    )
    parser.add_argument("--out", type=Path, help="picture to write (default: rewards.png in the first run's folder)")
    args = parser.parse_args(argv)
    try:
        runs = args.runs or [newest_run(Path("runs"))]
        out = args.out or runs[0] / "rewards.png"
        draw(runs, out)
    except UserError as error:
        print(f"plot_rewards.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {out}")
    return 0


def newest_run(runs_dir: Path) -> Path:
    """The run below `runs_dir` that wrote metrics last."""
    files = sorted(runs_dir.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"no run with a metrics.csv in {runs_dir}; train first, or name a run folder")
    return files[-1].parent


def read_metrics(run: Path) -> dict[str, np.ndarray]:
    """The columns of a run's metrics.csv, (steps,) float64 each; a half-written last line is left out."""
    path = run / "metrics.csv"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}")
    whole_lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(whole_lines)
    if not {"step", "env/reward_mean", "env/reward_std"} <= set(reader.fieldnames or []):
        raise UserError(
            f"{path} holds no metrics of a run" if whole_lines else f"{path} is empty: the run has not finished a step"
        )
    try:
        rows = [{name: float(value) for name, value in row.items()} for row in reader]
    except (TypeError, ValueError):
        raise UserError(f"{path} is damaged in line {reader.line_num}: a value there is no number")
    if not rows:
        raise UserError(f"{path} has no step yet: the run has not finished one")
    return {name: np.array([row[name] for row in rows]) for name in reader.fieldnames}


def read_evaluation(run: Path) -> dict:
    """A run's evaluation.json, or nothing where it is not there or not whole yet."""
    try:
        return json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the run, shorter at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def draw(runs: list[Path], out: Path) -> None:
    """Draw the runs over each other into `out`. UserError where a run or `out` cannot be used; no display is needed."""
    data = [(run.resolve().name, read_metrics(run), read_evaluation(run)) for run in runs]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = plt.figure(figsize=(15, 12), layout="constrained")
    grid = fig.add_gridspec(4, 4, height_ratios=[1.5, 1.3, 1, 1])
    reward_axes = fig.add_subplot(grid[0, :])
    plane_axes, histogram_axes = fig.add_subplot(grid[1, :2]), fig.add_subplot(grid[1, 2:])
    small_axes = [fig.add_subplot(grid[2 + i // 4, i % 4]) for i in range(len(PANELS))]
    for number, (name, metrics, evaluation) in enumerate(data):
        colour = f"C{number % 10}"
        draw_reward(reward_axes, name, metrics, colour)
        draw_plane(plane_axes, name, metrics, evaluation, colour, with_frontier=number == 0)
        draw_histogram(histogram_axes, name, evaluation, colour)
        for axes, (title, columns, unit) in zip(small_axes, PANELS):
            for column, style in zip(columns, STYLES):
                if column in metrics:
                    label = column.split("/", 1)[1] if number == 0 and len(columns) > 1 else None
                    axes.plot(metrics["step"], metrics[column], style, color=colour, linewidth=1, label=label)
            axes.set(title=title, xlabel="step", ylabel=unit)
    reward_axes.set(title="mean reward", xlabel="episodes", ylabel="reward")
    plane_axes.set(
        title="reward against KL: up is better, right is dearer",
        xlabel="KL to the reference, nats",
        ylabel="mean reward",
    )
    histogram_axes.set(title="rewards before and after", xlabel="reward", ylabel="share of completions")
    for axes in fig.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="best")
    try:
        fig.savefig(out, dpi=66)
    except (OSError, ValueError) as error:
        raise UserError(f"the picture {out} cannot be written: {getattr(error, 'strerror', None) or error}")
    finally:
        plt.close(fig)


def draw_reward(axes, name: str, metrics: dict, colour: str) -> None:
    """Mean reward with a band of one standard deviation, and smoothed."""
    episodes, mean, std = (metrics[column] for column in ("episodes", "env/reward_mean", "env/reward_std"))
    axes.fill_between(episodes, mean - std, mean + std, color=colour, alpha=0.12, linewidth=0)
    axes.plot(episodes, mean, color=colour, alpha=0.4, linewidth=1)
    axes.plot(episodes, smooth(mean), color=colour, linewidth=2, label=name)


def draw_plane(axes, name: str, metrics: dict, evaluation: dict, colour: str, with_frontier: bool) -> None:
    """The run's path in the plane of KL and reward, one dot a step, below the frontier that no policy can cross."""
    points = evaluation.get("frontier", [])
    if points and with_frontier:
        axes.plot(
            [p["kl"] for p in points],
            [p["reward"] for p in points],
            color="black",
            linewidth=1.5,
            label="best possible",
        )
    axes.scatter(
        metrics["objective/kl"],
        metrics["env/reward_mean"],
        s=8,
        color=colour,
        alpha=0.35,
        label=f"{name}, a dot a step",
    )
    for when, marker in (("before", "o"), ("after", "*")):
        if when in evaluation:
            point = evaluation[when]
            axes.scatter(
                point["kl"],
                point["reward"],
                s=160,
                marker=marker,
                color=colour,
                edgecolor="black",
                zorder=3,
                label=f"{name}, {when}",
            )
    limit = (evaluation.get("gain") or {}).get("limit")
    if limit:
        axes.scatter(
            limit["kl"],
            limit["reward"],
            s=110,
            marker="D",
            facecolor="none",
            edgecolor=colour,
            label=f"{name}, the limit at its beta",
        )


def draw_histogram(axes, name: str, evaluation: dict, colour: str) -> None:
    """Distribution of rewards before (outline) and after (filled) training."""
    for when, options in (("before", dict(histtype="step", linewidth=1.5)), ("after", dict(alpha=0.45))):
        if when in evaluation:
            scores = np.array([score for *_, score in evaluation[when]["samples"]])
            weights = np.full(len(scores), 1 / len(scores))
            edges = np.linspace(min(0, scores.min()), max(1, scores.max()), 41)
            axes.hist(scores, bins=edges, weights=weights, color=colour, label=f"{name}, {when}", **options)


if __name__ == "__main__":
    sys.exit(main())
