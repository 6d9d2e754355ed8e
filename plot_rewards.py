"""Draw the curves of a run, or of several over each other, and compare these in a table.

python plot_rewards.py                              the newest run below runs/, into its folder as rewards.png
python plot_rewards.py runs/lr-*                    several, into compare.png and compare.md here
python plot_rewards.py runs/a --only reward --out reward.pdf    one panel for a report; --out takes .png, .pdf and .svg
"""

import argparse
import sys
import textwrap
from pathlib import Path

import numpy as np

from support.compare import (
    LEGEND,
    Curve,
    Run,
    curves,
    of_gain,
    read_run,
    remarks,
    reward_decimals,
    table,
    what_does_not_compare,
)
from support.errors import UserError, escaped
from support.files import whole, write_whole
from support.streams import hold_streams

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
CHINESE_FONTS = [
    "Noto Sans CJK SC",
    "Source Han Sans SC",
    "Microsoft YaHei",
    "PingFang SC",
    "WenQuanYi Micro Hei",
    "SimHei",
]
TABLE = Path("compare.md")  # of several runs, in the current folder
STYLES = ["-", "--", ":"]  # of several columns in one panel; a curve keeps its colour
LINE, MARK = {"linewidth": 1}, {"linestyle": ""}  # of an entry in a key


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folders; the newest below runs/ unless given"
    )
    parser.add_argument(
        "--by",
        default="",
        metavar="NAME[,NAME]",
        help="settings that tell curves apart (default: all that differ but the seed); 'run_name' for every run",
    )
    parser.add_argument("--only", choices=BIG, help="this panel alone, 16 cm wide")
    parser.add_argument(
        "--out",
        type=Path,
        help="picture to write, as .png, .pdf or .svg (default: rewards.png in the run's folder; of several runs, "
        "compare.png here)",
    )
    args = parser.parse_args(argv)
    try:
        paths = list({path.resolve(): path for path in args.runs or [newest_run(Path("runs"))]}.values())
        out = args.out or (paths[0] / "rewards.png" if len(paths) == 1 else Path("compare.png"))
        written = draw(paths, out, [name for name in args.by.split(",") if name], args.only)
    except UserError as error:
        print(f"plot_rewards.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


def newest_run(runs_dir: Path) -> Path:
    """The run below `runs_dir` that wrote metrics last."""
    files = sorted(runs_dir.glob("*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"no run with a metrics.csv in {runs_dir}; train first, or name a run folder")
    return files[-1].parent


def draw(paths: list[Path], out: Path, by: list[str] = (), only: str | None = None) -> list[Path]:
    """Draw the runs over each other into `out`. Where they are several, their table is printed and is TABLE.

    What was written. UserError where the runs, `by` or `out` cannot be used; no display is needed.
    """
    runs = [read_run(path) for path in paths]
    drawn = curves(runs, by)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    size, dpi = (9, 200) if only else (12, 100)
    with rc_context({"font.size": size, "font.family": fonts(), "axes.grid": True, "grid.alpha": 0.3}):
        fig = Figure(figsize=(6.3, 3.3), layout="constrained")
        if only:
            BIG[only](fig.add_subplot(), drawn)
        else:
            draw_all(fig, drawn)
        add_names(fig, drawn, what_does_not_compare(runs))
        if only in (None, "reward"):
            add_figures(fig.axes[0], drawn)
        ending = file_type(fig, out)
        with whole(out) as partial:
            fig.savefig(partial, dpi=dpi, format=ending)
            if len(runs) == 1:
                return [out]
            text = "\n\n".join([table(drawn), LEGEND, *remarks(runs, drawn)])
            write_whole(TABLE, text + "\n")
    print(text)
    return [out, TABLE]


def file_type(fig, out: Path) -> str:
    """How to write a picture, by the end of its name; UserError where matplotlib knows no such file."""
    ending = out.suffix[1:].lower() or "png"
    if ending not in fig.canvas.get_supported_filetypes():
        raise UserError(f"{out} cannot be written: no picture ends in .{ending}; take .png, .pdf or .svg")
    return ending


def draw_all(fig, drawn: list[Curve]) -> None:
    """Reward on top, the plane and the rewards before and after below it, and rows of small panels without a gap."""
    panels = [panel for panel in PANELS if changes(panel[1], drawn)]
    n_rows = -(-len(panels) // 4)
    fig.set_size_inches(13, 8 + 2.6 * n_rows)
    # Rows of their own: in one grid of 12 columns the layout would give each column the widest label's room
    rows = fig.add_gridspec(2 + n_rows, height_ratios=[1.5, 1.6] + [1] * n_rows)
    for place, draw_it in zip((rows[0], *rows[1].subgridspec(1, 2)), BIG.values()):
        draw_it(fig.add_subplot(place), drawn)
    for row in range(n_rows):
        some = panels[len(panels) * row // n_rows : len(panels) * (row + 1) // n_rows]
        for place, panel in zip(rows[2 + row].subgridspec(1, len(some)), some):
            draw_small(fig.add_subplot(place), drawn, *panel)


def changes(columns: list[str], drawn: list[Curve]) -> bool:
    """Whether any of these columns takes more than one value."""
    found = [[curve.metrics[name] for curve in drawn if name in curve.metrics] for name in columns]
    return any(len({value for values in of_column for value in values.flat}) > 1 for of_column in found)


def colours(drawn: list[Curve]) -> list[str]:
    """A colour for each curve: matplotlib's ten or, of more curves, as many along the rainbow."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if len(drawn) <= 10:
        return [f"C{number}" for number in range(len(drawn))]
    return [to_hex(colour) for colour in colormaps["turbo"](np.linspace(0, 1, len(drawn)))]


def fonts() -> list[str]:
    """Font families to look characters up in: matplotlib's own, then the installed ones that have Chinese."""
    from matplotlib.font_manager import get_font_names

    return ["DejaVu Sans", *[name for name in CHINESE_FONTS if name in get_font_names()]]


def shown(name: str) -> str:
    """A run's name as the fonts here can write it: Chinese by its code points where no font has them, no formula."""
    name = escaped(name).replace("$", r"\$")
    return name if len(fonts()) > 1 else name.encode("ascii", "backslashreplace").decode()


def add_names(fig, drawn: list[Curve], remark: str) -> None:
    """Which colour is which curve, above the panels, for which the figure grows; below, why curves do not compare."""
    from matplotlib import rcParams
    from matplotlib.lines import Line2D

    letters = int(fig.get_figwidth() * 72 / rcParams["font.size"] / 0.6)  # on a line
    names = [textwrap.fill(shown(curve.label), letters - 8) for curve in drawn]
    handles = [Line2D([], [], color=c, linewidth=3, label=name) for c, name in zip(colours(drawn), names)]
    ncols = max(1, min(4, letters // (8 + max(len(line) for name in names for line in name.splitlines()))))
    rows = sum(max(name.count("\n") + 1 for name in names[row::ncols]) for row in range(-(-len(names) // ncols)))
    fig.set_figheight(fig.get_figheight() + 1.5 * rcParams["font.size"] / 72 * (rows - 1))
    fig.legend(handles=handles, loc="outside upper left", ncols=ncols, frameon=False)
    if remark:
        fig.supxlabel(textwrap.fill(shown(remark), letters), fontsize="small")


def add_key(axes, entries: dict[str, dict]) -> None:
    """A legend that says what marks mean, in black, whichever curves there are."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **{"color": "black", **mark}, label=what) for what, mark in entries.items()]
    axes.legend(handles=handles, loc="best", fontsize="small")


def draw_small(axes, drawn: list[Curve], title: str, columns: list[str], unit: str) -> None:
    """A mean over the runs of each curve, step by step."""
    for curve, colour in zip(drawn, colours(drawn)):
        for column, style in zip(columns, STYLES):
            if column in curve.metrics:
                steps, values = curve.metrics["step"].mean(0), curve.metrics[column].mean(0)
                axes.plot(steps, values, style, color=colour, linewidth=1)
    axes.set(title=title, xlabel="step", ylabel=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(columns) > 1:
        add_key(axes, {name.split("/", 1)[1]: LINE | {"linestyle": style} for name, style in zip(columns, STYLES)})


# ----------------------------------------------------------------------------------------------
# The reward


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over a tenth of the run, (..., steps) twice: it begins with the first step, which no update has seen
    yet, and ends with the mean of the last twentieth."""
    half = max(1, values.shape[-1] // 20)
    reach = [min(half, i) for i in range(values.shape[-1])]
    return np.stack([values[..., i - r : i + r + 1].mean(-1) for i, r in enumerate(reach)], -1)


def draw_reward(axes, drawn: list[Curve]) -> None:
    """Mean reward of each step and smoothed, a band about it, and marks at the steps that raised an alarm.

    The band is the standard deviation of several runs' smoothed lines. About a run alone it is where 95% of the steps'
    means would lie if nothing but the draw of their completions moved them.
    """
    key = {"each step": LINE | {"alpha": 0.4}, "running mean": {"linewidth": 2.5}}
    for curve, colour in zip(drawn, colours(drawn)):
        episodes, reward = curve.metrics["episodes"][0], curve.metrics["env/reward_mean"]
        line, width = smooth(reward).mean(0), None
        axes.plot(episodes, reward.mean(0), color=colour, alpha=0.4, linewidth=1)
        axes.plot(episodes, line, "-" if len(line) > 1 else "o", color=colour, linewidth=2.5)
        if len(reward) > 1:
            band, width = f"standard deviation over the {curve.unit}", smooth(reward).std(0, ddof=1)
        elif len(drawn) == 1 and "env/reward_std" in curve.metrics:
            error = curve.metrics["env/reward_std"][0] / np.sqrt(episodes / curve.metrics["step"][0])
            band, width = "95% interval of a step's mean", 1.96 * smooth(error)
        if width is not None and len(line) > 1:
            axes.fill_between(episodes, line - width, line + width, color=colour, alpha=0.15, linewidth=0)
            key[band] = {"linewidth": 8, "alpha": 0.15, "solid_capstyle": "butt"}
        alarms = [alarm["step"] for run in curve.runs for alarm in run.evaluation.get("alarms") or []]
        if alarms:
            at = [np.interp(alarms, curve.metrics["step"][0], values) for values in (episodes, line)]
            axes.plot(*at, "v", color=colour, markeredgecolor="black", markersize=8, zorder=3)
            key["alarm"] = MARK | {"marker": "v", "markersize": 8}
    axes.set(title="mean reward of each step", xlabel="episodes", ylabel="mean reward")
    add_key(axes, key)


def add_figures(axes, drawn: list[Curve]) -> None:
    """Start and end of each smoothed line in figures beside it, none upon another, those of the higher line above.

    Of starts that read the same there is one, in black. The layout is final from here on.
    """
    from matplotlib import rcParams

    starts, ends, digits = {}, [], reward_decimals(drawn)
    for curve, colour in zip(drawn, colours(drawn)):
        episodes, line = curve.metrics["episodes"][0], smooth(curve.metrics["env/reward_mean"]).mean(0)
        ends.append((f"{line[-1]:.{digits}f}", episodes[-1], line[-1], colour))
        if len(line) > 1:
            text = f"{line[0]:.{digits}f}"
            starts[text] = (text, episodes[0], line[0], "black" if text in starts else colour)
    fig = axes.figure
    layout, to_points = fig.get_layout_engine(), 72 / fig.dpi
    layout.execute(fig)
    size = min(rcParams["font.size"], axes.bbox.height * to_points / 1.25 / len(drawn))
    room = max(len(text) for text, *_ in [*starts.values(), *ends]) * 0.7 * size + 12
    axes.margins(x=room / (axes.bbox.width * to_points - 2 * room))
    axes.autoscale_view()
    layout.execute(fig)
    for side, offset, align in ((list(starts.values()), -8, "right"), (ends, 8, "left")):
        side = [label for label in side if np.isfinite(label[2])]
        places = np.reshape([label[1:3] for label in side], (-1, 2))
        x, y = (axes.transData.transform(places) - axes.bbox.min).T * to_points
        columns = np.split(np.argsort(x), np.flatnonzero(np.diff(np.sort(x)) > room) + 1)
        for column in [column[np.argsort(y[column])] for column in columns]:
            for at, moved in zip(column, apart(y[column], 1.25 * size, axes.bbox.height * to_points)):
                text, *place, colour = side[at]
                axes.annotate(
                    text,
                    place,
                    (offset, moved - y[at]),
                    textcoords="offset points",
                    ha=align,
                    va="center",
                    color=colour,
                    fontsize=size,
                    fontweight="bold",
                )
    fig.set_layout_engine("none")


def apart(at: np.ndarray, gap: float, end: float) -> np.ndarray:
    """Ascending positions moved as little as puts `gap` between each two, and half of it before 0 and `end`.

    Least squares: with i gaps taken off the i-th, it is isotonic regression, by its formula of minima and maxima.
    """
    gaps = gap * np.arange(len(at))
    free = at - gaps
    rising = [max(min(free[i : k + 1].mean() for k in range(j, len(at))) for i in range(j + 1)) for j in range(len(at))]
    return np.clip(rising, gap / 2, end - gap * (len(at) - 0.5)) + gaps


# ----------------------------------------------------------------------------------------------
# Reward against KL, and the rewards before and after


def shared(drawn: list[Curve], of_run) -> list[tuple[np.ndarray, str]]:
    """What `of_run` finds in the runs, each array once, with the colour of its curve; black where several share it."""
    found = {}
    for curve, colour in zip(drawn, colours(drawn)):
        for values in filter(None, map(of_run, curve.runs)):
            values = np.array(values, dtype=float)
            _, owners = found.setdefault(np.round(values, 3).tobytes(), (values, set()))
            owners.add(colour)
    return [(values, owners.pop() if len(owners) == 1 else "black") for values, owners in found.values()]


def place(point: dict | None) -> tuple[float, float] | None:
    return point and (point["kl"], point["reward"])


def draw_plane(axes, drawn: list[Curve]) -> None:
    """Paths in the plane of KL and reward, one dot a step, below the frontier that no policy can cross.

    A frontier, a limit or a start that several curves share is drawn once, in black.
    """
    key = {"a step": MARK | {"marker": ".", "alpha": 0.5}}
    for curve, colour in zip(drawn, colours(drawn)):
        kl, reward = (curve.metrics[name].mean(0) for name in ("objective/kl", "env/reward_mean"))
        axes.scatter(kl, reward, s=10, color=colour, alpha=0.4, linewidth=0)
    frontiers = shared(drawn, lambda run: [place(point) for point in run.evaluation.get("frontier") or []])
    for points, colour in frontiers:
        axes.plot(*points.T, color=colour if len(frontiers) > 1 else "black", linewidth=1.5)
        key["best possible"] = {"linewidth": 1.5}
    best = shared(drawn, lambda run: [(*place(point), point["n"]) for point in run.evaluation.get("best_of_n") or []])
    for points, colour in best:
        axes.plot(*points.T[:2], "x", color=colour if len(best) > 1 else "black")
    if best:
        drafts = sorted({int(n) for points, _ in best for n in points[:, 2]})
        key[f"best of {', '.join(map(str, drafts))} drafts"] = MARK | {"marker": "x"}
    for (kl, reward), colour in shared(drawn, lambda run: place(run.evaluation.get("before"))):
        axes.scatter(kl, reward, s=170, marker="o", color=colour, edgecolor="black", zorder=3)
        key["before"] = MARK | {"marker": "o", "markersize": 9}
    for curve, colour in zip(drawn, colours(drawn)):
        ends = np.array([place(run.evaluation["after"]) for run in curve.runs if run.evaluation.get("after")])
        if len(ends):
            axes.scatter(*ends.mean(0), s=170, marker="*", color=colour, edgecolor="black", zorder=3)
            key["after"] = MARK | {"marker": "*", "markersize": 9}
        if len(ends) > 1:
            kl_sd, reward_sd = ends.std(0, ddof=1)
            axes.errorbar(*ends.mean(0), reward_sd, kl_sd, color=colour, linewidth=1)
            key[f"standard deviation over the {curve.unit}"] = MARK | {"marker": "+", "markersize": 9}
    for (kl, reward), colour in shared(drawn, lambda run: place(of_gain("limit")(run))):
        axes.scatter(kl, reward, s=120, marker="D", facecolor="none", edgecolor=colour, linewidth=2)
        key["the limit at this beta"] = MARK | {"marker": "D", "markerfacecolor": "none"}
    axes.set(title="reward against KL: up is better, right is dearer", xlabel="KL to the reference, nats")
    axes.set_ylabel("mean reward")
    add_key(axes, key)


def draw_histogram(axes, drawn: list[Curve]) -> None:
    """Distribution of rewards before training (outline) and after it (filled or, of several curves, outlines)."""

    def scores(run: Run, when: str) -> list[float]:
        return [score for *_, score in (run.evaluation.get(when) or {"samples": []})["samples"]]

    after = [[score for run in curve.runs for score in scores(run, "after")] for curve in drawn]
    before = shared(drawn, lambda run: scores(run, "before"))
    every = np.concatenate([*after, *(values for values, _ in before)])
    edges = np.linspace(min(0, every.min(initial=0)), max(1, every.max(initial=1)), 41)

    def bars(values, **options) -> None:
        axes.hist(values, bins=edges, weights=np.full(len(values), 1 / len(values)), **options)

    for values, colour in before:
        bars(values, color=colour, histtype="step", linewidth=1.5, linestyle="-" if len(drawn) == 1 else ":")
    for values, colour in zip(after, colours(drawn)):
        if values:
            of_one = dict(alpha=0.45) if len(drawn) == 1 else dict(histtype="step", linewidth=1.5)
            bars(values, color=colour, **of_one)
    lines = "before (line) and after (filled)" if len(drawn) == 1 else "before (dotted) and after (lines)"
    axes.set(title=f"rewards {lines}", xlabel="reward", ylabel="share of completions")


BIG = {"reward": draw_reward, "plane": draw_plane, "histogram": draw_histogram}


if __name__ == "__main__":
    hold_streams()
    sys.exit(main())
