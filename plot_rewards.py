"""Draw the curves of one or more runs.

python plot_rewards.py                              the newest run below runs/, into its folder as rewards.png
python plot_rewards.py runs/a runs/b                several over each other, into compare.png here, or into --out FILE
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from support.errors import UserError, escaped
from support.reading import MEND_LINE, read_evaluation, whole_lines
from support.streams import hold_streams
from support.writing import whole

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
REQUIRED = ["step", "episodes", "env/reward_mean", "objective/kl"]  # columns of metrics.csv
AT = {"kl": float, "reward": float}  # what is drawn of evaluation.json, where it is there
JUDGED = {**AT, "samples": [(str, str, float)]}
DRAWN = {"before?": JUDGED, "after?": JUDGED, "frontier?": [AT], "best_of_n?": [{**AT, "n": int}]}
DRAWN |= {"gain?": {"limit?": AT}}
CHINESE_FONTS = [
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "WenQuanYi Micro Hei",
    "SimHei",
]
STYLES = ["-", "--", ":"]  # of several columns in one panel; a run keeps its colour


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders; the newest below runs/ unless given"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="picture to write (default: rewards.png in the run's folder; of several runs, compare.png here)",
    )
    args = parser.parse_args(argv)
    try:
        runs = args.runs or [newest_run(Path("runs"))]
        out = args.out or (runs[0] / "rewards.png" if len(runs) == 1 else Path("compare.png"))
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


def judged(run: Path) -> dict:
    """A run's evaluation.json, or nothing where it is not there yet or damaged, which is said."""
    try:
        return read_evaluation(run, DRAWN, "the run is drawn without it")
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return {}


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the run. Its window shrinks towards both ends, which stay what they were."""
    half, last = max(1, len(values) // 20), len(values) - 1
    reach = [min(half, i, last - i) for i in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def draw(runs: list[Path], out: Path) -> None:
    """Draw the runs over each other into `out`. UserError where a run or `out` cannot be used; no display is needed."""
    data = [(run.resolve().name, read_metrics(run), judged(run)) for run in runs]
    panels = [panel for panel in PANELS if changes(panel[1], [metrics for _, metrics, _ in data])]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    n_rows = -(-len(panels) // 4)
    with matplotlib.rc_context({"font.size": 12, "font.family": fonts(), "axes.grid": True, "grid.alpha": 0.3}):
        fig = plt.figure(figsize=(13, 8 + 2.6 * n_rows), layout="constrained")
        grid = fig.add_gridspec(2 + n_rows, 4, height_ratios=[1.5, 1.6] + [1] * n_rows)
        reward_axes = fig.add_subplot(grid[0, :])
        plane_axes, histogram_axes = fig.add_subplot(grid[1, :2]), fig.add_subplot(grid[1, 2:])
        small_axes = [fig.add_subplot(grid[2 + i // 4, i % 4]) for i in range(len(panels))]
        plane_key = {"a step": dict(marker=".", linestyle="", alpha=0.5)}
        for number, (_, metrics, evaluation) in enumerate(data):
            colour = f"C{number % 10}"
            draw_reward(reward_axes, metrics, colour, number)
            draw_plane(plane_axes, metrics, evaluation, colour, plane_key)
            draw_histogram(histogram_axes, evaluation, colour)
            for axes, (_, columns, _) in zip(small_axes, panels):
                for column, style in zip(columns, STYLES):
                    if column in metrics:
                        axes.plot(metrics["step"], metrics[column], style, color=colour, linewidth=1)
        for axes, (title, columns, unit) in zip(small_axes, panels):
            axes.set(title=title, xlabel="step", ylabel=unit)
            if len(columns) > 1:
                add_key(axes, {name.split("/", 1)[1]: dict(linestyle=s) for name, s in zip(columns, STYLES)})
        add_key(plane_axes, plane_key)
        reward_axes.set(title="mean reward of each step, and the 10th to 90th percentile", xlabel="episodes")
        plane_axes.set(title="reward against KL: up is better, right is dearer", xlabel="KL to the reference, nats")
        histogram_axes.set(title="rewards before (line) and after (filled)", ylabel="share of completions")
        histogram_axes.set_xlabel("reward")
        for axes in (reward_axes, plane_axes):
            axes.set_ylabel("mean reward")
        names = [Line2D([], [], color=f"C{i % 10}", linewidth=3, label=shown(run[0])) for i, run in enumerate(data)]
        fig.legend(handles=names, loc="outside upper left", ncols=min(4, len(names)), frameon=False)
        plt.close(fig)  # which needs no window to be saved
        ending = out.suffix[1:].lower() or "png"
        if ending not in fig.canvas.get_supported_filetypes():
            raise UserError(f"{out} cannot be written: no picture ends in .{ending}; take .png, .pdf or .svg")
        with whole(out) as partial:
            fig.savefig(partial, dpi=100, format=ending)


def changes(columns: list[str], runs: list[dict]) -> bool:
    """Whether any of these columns takes more than one value."""
    return any(len({value for run in runs for value in run.get(column, ())}) > 1 for column in columns)


def fonts() -> list[str]:
    """Font families to look characters up in: matplotlib's own, then the installed ones that have Chinese."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in get_font_names()]]


def shown(name: str) -> str:
    """A run's name as the fonts here can write it: Chinese by its code points where no font has them, no formula."""
    name = escaped(name).replace("$", r"\$")
    return name if len(fonts()) > 1 else name.encode("ascii", "backslashreplace").decode()


def add_key(axes, entries: dict[str, dict]) -> None:
    """A legend that says what marks mean, in black, whichever runs there are."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **{"color": "black", "linewidth": 1, **mark}, label=what) for what, mark in entries.items()
    ]
    axes.legend(handles=handles, loc="best", fontsize=10)


def draw_reward(axes, metrics: dict, colour: str, number: int) -> None:
    """Mean reward, smoothed, with its start and its end in figures; and the band that most completions lie in."""
    episodes, mean = metrics["episodes"], metrics["env/reward_mean"]
    if "env/reward_p10" in metrics:  # runs of earlier versions have none
        axes.fill_between(
            episodes, metrics["env/reward_p10"], metrics["env/reward_p90"], color=colour, alpha=0.12, linewidth=0
        )
    axes.plot(episodes, mean, color=colour, alpha=0.4, linewidth=1)
    axes.plot(episodes, smooth(mean), color=colour, linewidth=2.5)
    for at, value, place in ((0, mean[0], (-8, "right")), (-1, mean[-10:].mean(), (8, "left"))):
        axes.annotate(
            f"{value:.2f}",
            (episodes[at], value),
            (place[0], -16 * number),
            textcoords="offset points",
            ha=place[1],
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.margins(x=0.06)


def draw_plane(axes, metrics: dict, evaluation: dict, colour: str, key: dict[str, dict]) -> None:
    """The run's path in the plane of KL and reward, one dot a step, below the frontier that no policy can cross.

    What stands for all runs, the frontier and best-of-n, is the first's that has it. `key` gathers the legend.
    """
    axes.scatter(metrics["objective/kl"], metrics["env/reward_mean"], s=10, color=colour, alpha=0.4, linewidth=0)
    points = evaluation.get("frontier")
    if points and "best possible" not in key:
        axes.plot([p["kl"] for p in points], [p["reward"] for p in points], color="black", linewidth=1.5)
        key["best possible"] = dict(linewidth=1.5)
    best = evaluation.get("best_of_n")
    if best and not any(what.endswith("drafts") for what in key):
        axes.plot([p["kl"] for p in best], [p["reward"] for p in best], "x", color="black")
        key[f"best of {', '.join(str(p['n']) for p in best)} drafts"] = dict(marker="x", linestyle="")
    for when, marker in (("before", "o"), ("after", "*")):
        if evaluation.get(when):
            at = evaluation[when]["kl"], evaluation[when]["reward"]
            axes.scatter(*at, s=170, marker=marker, color=colour, edgecolor="black", zorder=3)
            key[when] = dict(marker=marker, linestyle="", markersize=9)
    limit = (evaluation.get("gain") or {}).get("limit")
    if limit:
        axes.scatter(limit["kl"], limit["reward"], s=120, marker="D", facecolor="none", edgecolor=colour, linewidth=2)
        key["the limit at this beta"] = dict(marker="D", linestyle="", markerfacecolor="none")


def draw_histogram(axes, evaluation: dict, colour: str) -> None:
    """Distribution of rewards before (outline) and after (filled) training."""
    for when, options in (("before", dict(histtype="step", linewidth=1.5)), ("after", dict(alpha=0.45))):
        if evaluation.get(when):
            scores = np.array([score for *_, score in evaluation[when]["samples"]])
            weights = np.full(len(scores), 1 / len(scores))
            edges = np.linspace(min(0, scores.min()), max(1, scores.max()), 41)
            axes.hist(scores, bins=edges, weights=weights, color=colour, **options)


if __name__ == "__main__":
    hold_streams()
    sys.exit(main())
