"""Plot the curves of a run, or of several runs in the same panels with a table that compares them.

python plot_rewards.py                              the newest run below runs/, to rewards.png in its folder
python plot_rewards.py runs/lr-*                    several, to compare.png and compare.md here
python plot_rewards.py runs/lr-* --only reward --out reward.pdf    one panel for a report, as .png, .pdf or .svg
python plot_rewards.py runs/lr-* --against lr       the gain of the trained models against a setting, to gain.png
python plot_rewards.py --lang zh                    with Chinese text in the picture
"""

import argparse
import contextlib
import re
import sys
import textwrap
from pathlib import Path

import numpy as np

from support.common.errors import UserError
from support.common.files import whole, write_whole
from support.run.compare import (
    Curve,
    Run,
    comparison,
    curves,
    differences,
    known_gain,
    lacks_steps,
    read_run,
    reward_decimals,
    short,
    spreads,
)
from support.run.streams import hold_streams

PANELS = [  # (title, columns drawn as lines, y axis)
    ("KL to the reference", ["objective/kl"], "nats per completion"),
    ("KL coefficient", ["objective/kl_coef"], "reward per nat"),
    ("policy loss", ["ppo/loss/policy"], ""),
    ("value loss", ["ppo/loss/value"], ""),
    ("entropy", ["objective/entropy"], "nats per token"),
    ("clip fraction", ["ppo/policy/clipfrac", "ppo/val/clipfrac"], "share of tokens"),
    ("completion length", ["tokens/completion_length"], "tokens"),
    ("time", ["time/sample", "time/score", "time/ppo"], "seconds per step"),
]
CHINESE_FONTS = ["Noto Sans CJK SC", "Source Han Sans SC", "Microsoft YaHei", "PingFang SC", "WenQuanYi Micro Hei"]
CHINESE_FONTS += ["WenQuanYi Zen Hei", "Source Han Sans CN", "SimHei", "Hiragino Sans GB", "Heiti TC"]
CHINESE_FONTS += ["Noto Sans CJK JP", "Droid Sans Fallback"]  # JP: all that matplotlib before 3.11 sees of Noto
CHINESE = {  # the words of the pictures, with --lang zh
    "mean reward of each step": "每步的平均奖励",
    "episodes": "续写条数",
    "mean reward": "平均奖励",
    "each step": "单步",
    "running mean": "滑动平均",
    "standard deviation over the runs": "各次训练之间的标准差",
    "95% interval of a step's mean": "单步均值的 95% 区间",
    "alarm": "警告",
    "reward against KL": "奖励与 KL 散度",
    "KL to the reference, nats": "与参考模型的 KL 散度（nat）",
    "a step": "训练中的一步",
    "best possible": "理论边界",
    "best of n drafts": "best-of-n",
    "before": "训练前",
    "after": "训练后",
    "the limit at this beta": "当前 beta 下的理论上限",
    "rewards before and after training": "训练前后的奖励分布",
    "reward": "奖励",
    "share of completions": "续写所占比例",
    "KL to the reference": "与参考模型的 KL 散度",
    "nats per completion": "nat / 条",
    "KL coefficient": "KL 系数",
    "reward per nat": "奖励 / nat",
    "policy loss": "策略损失",
    "value loss": "价值损失",
    "entropy": "熵",
    "nats per token": "nat / token",
    "clip fraction": "截断比例",
    "policy/clipfrac": "策略",
    "val/clipfrac": "价值",
    "share of tokens": "token 占比",
    "completion length": "续写长度",
    "tokens": "token 数",
    "time": "用时",
    "sample": "采样",
    "score": "打分",
    "ppo": "PPO 更新",
    "seconds per step": "秒 / 步",
    "rewards against KL": "各奖励与 KL 散度",
    "rise in SD before training": "升幅（以训练前的标准差为单位）",
    "what PPO maximises": "PPO 优化的奖励",
    "step": "训练步数",
    "gain": "gain（实际提升占理论最大提升的比例）",
    "a run": "单次训练",
    "mean, standard error": "均值与标准误",
}
TABLE = Path("compare.md")  # of several runs, in the current folder


def main(argv: list[str] | None = None) -> int:
    """Run the program. Returns the exit code."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: the newest in runs/)")
    parser.add_argument("--by", default="", metavar="NAME[,NAME]", help="settings that separate curves, e.g. lr,seed")
    parser.add_argument("--only", choices=BIG, help="draw only this panel, 16 cm wide")
    parser.add_argument("--against", metavar="NAME", help="draw the gain against this numeric setting, 16 cm wide")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language of the text in the picture")
    parser.add_argument("--out", type=Path, help="picture to write, as .png, .pdf or .svg (default: see above)")
    args = parser.parse_args(argv)
    try:
        paths = args.runs or [newest_run(Path("runs"))]
        default = Path("gain.png" if args.against else "compare.png")
        if len(paths) == 1 and not args.against:
            default = paths[0] / f"{args.only or 'rewards'}.png"
        out, by = args.out or default, [name for name in args.by.split(",") if name]
        written = draw(paths, out, by, args.only, args.against, args.lang)
    except UserError as error:
        print(f"plot_rewards.py: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


def newest_run(runs_dir: Path) -> Path:
    """Return the run in `runs_dir` with the newest metrics.csv that has a step. Raises UserError if there is none."""
    written = [path for path in runs_dir.glob("*/metrics.csv") if not lacks_steps(path.parent)]
    newest = max(written, key=lambda path: path.stat().st_mtime, default=None)
    if not newest:
        raise UserError(f"no run in {runs_dir} has finished a step; train first, or give a run folder")
    return newest.parent


def draw(paths: list[Path], out: Path, by=(), only: str = "", against: str = "", lang: str = "en") -> list[Path]:
    """Draw runs into one picture, `out`. If there are several, print their table and write it to TABLE. Returns the
    files written. Raises UserError if the runs, `by`, `against` or `out` can't be used, or if `lang` is "zh" but no
    font is installed for it."""
    if out.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"cannot write {out}: the name of a picture must end in .png, .pdf or .svg")
    from matplotlib import colormaps, rc_context
    from matplotlib.figure import Figure  # not pyplot, which may need a display

    empty = [path for path in paths if lacks_steps(path)]
    if 0 < len(empty) < len(paths):
        print(f"skipping runs without a finished step: {', '.join(map(str, empty))}")
        paths = [path for path in paths if path not in empty]
    runs = [read_run(path) for path in paths]
    compared = drawn = curves(runs, by or None)
    if against:
        known = [run for run in runs if known_gain(run) and type(run.settings.get(against)) in (int, float)]
        if len({run.settings[against] for run in known}) < 2:
            raise UserError(f"--against {against} needs two runs with known gains and different numbers for {against}")
        drawn = curves(known, [name for name in by or differences(known) if name != against])
    if only == "judges" and not any(map(judges, drawn)):
        raise UserError("--only judges needs a run with a judge (a reward of weight 0) that has been evaluated")
    palette = colormaps["tab10" if len(drawn) <= 10 else "turbo"].resampled(max(10, len(drawn)))
    for number, curve in enumerate(drawn):
        curve.colour = palette(number)
    style = {
        "font.family": ["DejaVu Sans", *chinese_fonts(lang == "zh")],
        "text.parse_math": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
    }
    with rc_context(style | {"font.size": 9 if only or against else 12}):
        fig = Figure(figsize=(6.3, 3.3) if only or against else (13, 13.2), layout="constrained")
        if against:
            draw_gain(fig.add_subplot(), drawn, against)
        elif only:
            BIG[only](fig.add_subplot(), drawn)
        else:
            draw_all(fig, drawn)
        add_names(fig, drawn, [curve.label if against else name_and_ends(curve, drawn) for curve in drawn])
        if lang == "zh":
            put_into_chinese(fig)
        with whole(out) as partial:
            fig.savefig(partial, dpi=200 if only or against else 100)
    if len(runs) == 1:
        return [out]
    text = comparison(runs, compared)
    write_whole(TABLE, text + "\n")
    print(text)
    return [out, TABLE]


def chinese_fonts(needed: bool) -> list[str]:
    """Return the installed fonts that have Chinese characters, best first. Raises UserError if one is needed but
    none is installed."""
    from matplotlib import font_manager

    listed = {font.fname for font in font_manager.fontManager.ttflist}
    if not set(CHINESE_FONTS) & set(font_manager.get_font_names()):
        for path in set(font_manager.findSystemFonts()) - listed:  # installed after matplotlib built its list of fonts
            with contextlib.suppress(OSError, RuntimeError):
                font_manager.fontManager.addfont(path)
    fonts = [name for name in CHINESE_FONTS if name in font_manager.get_font_names()]
    if needed and not fonts:
        install = "install one, on Debian or Ubuntu with: sudo apt install fonts-noto-cjk"
        raise UserError(f"--lang zh needs a font with Chinese characters, and none is installed; {install}")
    return fonts


def put_into_chinese(fig) -> None:
    """Translate the words of a figure with CHINESE. Names of settings and runs stay as they are."""
    from matplotlib.text import Text

    for text in fig.findobj(Text):
        words = CHINESE.get(text.get_text(), text.get_text())
        words = re.sub("^all(?=,)", "全部", words)
        words = re.sub(r", (\d+)\s+runs", r"，\1 次训练", words)
        text.set_text(re.sub(r":\s+reward\s+(\S+)\s+to\s+(\S+)$", r"：奖励 \1 → \2", words))


def name_and_ends(curve: Curve, drawn: list[Curve]) -> str:
    """Return a curve's label with its first and last smoothed reward, such as "lr 0.0001: reward 0.55 to 0.93"."""
    line, digits = smooth(curve.metrics["env/reward_mean"]).mean(0), reward_decimals(drawn)
    return f"{curve.label}: reward {line[0]:.{digits}f} to {line[-1]:.{digits}f}"


def add_names(fig, drawn: list[Curve], names: list[str]) -> None:
    """Add a legend of the curves above the panels, and make the figure taller to fit it."""
    from matplotlib import lines, rcParams

    letters = int(fig.get_figwidth() * 72 / rcParams["font.size"] / 0.55)  # per line
    names = [textwrap.fill(name, letters - 6) for name in names]
    handles = [lines.Line2D([], [], color=curve.colour, linewidth=3, label=name) for curve, name in zip(drawn, names)]
    columns = max(1, min(4, letters // (6 + max(map(len, names)))))
    height = 1.5 * rcParams["font.size"] / 72 * sum(name.count("\n") + 1 for name in names) / columns
    fig.set_figheight(fig.get_figheight() + height)
    fig.legend(handles=handles, loc="outside upper left", ncols=columns, frameon=False)


def add_key(axes) -> None:
    """Add a legend with one entry for each kind of mark."""
    kinds = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    if kinds:
        axes.legend(kinds.values(), kinds, loc="best", fontsize="small")


def draw_all(fig, drawn: list[Curve]) -> None:
    """Draw the reward at the top, the plane and the histogram below it, then PANELS against steps, four per row."""
    several = dict.fromkeys(name for curve in drawn for name in curve.metrics if name.startswith("reward/"))
    panels = PANELS + [(short(name.removeprefix("reward/")), [name], "mean reward") for name in several]
    titles = [title for title, *_ in panels] + ["."] * (-len(panels) % 4)
    small = [titles[i : i + 4] for i in range(0, len(titles), 4)]
    middle = ["plane", "judges", "histogram"] if any(map(judges, drawn)) else ["plane", "histogram"]
    rows = [["reward"] * 12, [name for name in middle for _ in range(12 // len(middle))]]
    rows += [[title for title in row for _ in range(3)] for row in small]
    fig.set_figheight(fig.get_figheight() + 2.6 * (len(small) - 2))
    axes = fig.subplot_mosaic(rows, height_ratios=[1.5, 1.6, *[1] * len(small)])
    for name in ("reward", *middle):
        BIG[name](axes[name], drawn)
    for title, columns, unit in panels:
        for curve in drawn:
            for column, style in zip(columns, ["-", "--", ":"]):
                if column in curve.metrics:
                    label = column.split("/", 1)[1] if len(columns) > 1 else None
                    steps, values = curve.metrics["step"].mean(0), curve.metrics[column].mean(0)
                    axes[title].plot(steps, values, style, color=curve.colour, linewidth=1, label=label)
        axes[title].set(title=title, xlabel="step", ylabel=unit)
        add_key(axes[title])


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over a tenth of the run, (..., steps). It starts at the value of the first step."""
    half = max(1, values.shape[-1] // 20)
    reach = [min(half, i) for i in range(values.shape[-1])]
    return np.stack([values[..., i - r : i + r + 1].mean(-1) for i, r in enumerate(reach)], -1)


def draw_reward(axes, drawn: list[Curve]) -> None:
    """Draw each step's mean reward, its running mean with a band, and marks at the steps that raised an alarm."""
    for curve in drawn:
        episodes, reward = curve.metrics["episodes"][0], curve.metrics["env/reward_mean"]
        line, width = smooth(reward).mean(0), None
        axes.plot(episodes, reward.mean(0), color=curve.colour, alpha=0.4, linewidth=1, label="each step")
        axes.plot(episodes, line, ".-", color=curve.colour, markersize=2, linewidth=2.5, label="running mean")
        if len(reward) > 1:
            band, width = "standard deviation over the runs", smooth(reward).std(0, ddof=1)
        elif len(drawn) == 1:
            error = curve.metrics["env/reward_std"][0] / np.sqrt(episodes / curve.metrics["step"][0])
            band, width = "95% interval of a step's mean", 1.96 * smooth(error)
        if width is not None:
            axes.fill_between(episodes, line - width, line + width, color=curve.colour, alpha=0.15, lw=0, label=band)
        if alarms := [alarm["step"] for run in curve.runs for alarm in run.evaluation.get("alarms", [])]:
            at = [np.interp(alarms, curve.metrics["step"][0], values) for values in (episodes, line)]
            axes.plot(*at, "v", color=curve.colour, markeredgecolor="black", zorder=3, label="alarm")
    axes.set(title="mean reward of each step", xlabel="episodes", ylabel="mean reward")
    add_key(axes)


def shared(drawn: list[Curve], of_run) -> list[tuple[np.ndarray, str]]:
    """Return the distinct sets of points (n, 2) that `of_run` gives, with the curve's colour, or black if shared."""
    found = {}
    for curve in drawn:
        for points in filter(None, map(of_run, curve.runs)):
            points = np.array([(point["kl"], point["reward"]) for point in points], dtype=float)
            _, owners = found.setdefault(np.round(points, 3).tobytes(), (points, set()))
            owners.add(curve.colour)
    return [(points, owners.pop() if len(owners) == 1 else "black") for points, owners in found.values()]


def draw_plane(axes, drawn: list[Curve]) -> None:
    """Draw reward against KL, one dot per step, and the frontier that no policy can cross."""
    for curve in drawn:
        kl, reward = (curve.metrics[name].mean(0) for name in ("objective/kl", "env/reward_mean"))
        axes.plot(kl, reward, ".", color=curve.colour, alpha=0.4, markeredgewidth=0, label="a step")
    for points, colour in shared(drawn, lambda run: run.evaluation.get("frontier")):
        axes.plot(*points.T, color=colour, linewidth=1.5, label="best possible")
    for points, colour in shared(drawn, lambda run: run.evaluation.get("best_of_n")):
        axes.plot(*points.T, "x", color=colour, label="best of n drafts")
    big = {"markersize": 13, "markeredgecolor": "black", "zorder": 3}
    for points, colour in shared(drawn, lambda run: evaluated(run, "before")):
        axes.plot(*points.T, "o", color=colour, **big, label="before")
    for curve in drawn:
        ends = [(each["kl"], each["reward"]) for run in curve.runs for each in evaluated(run, "after")]
        if ends:
            axes.plot(*np.mean(ends, 0), "*", color=curve.colour, **big, label="after")
    for points, colour in shared(drawn, lambda run: known_gain(run) and [known_gain(run)["limit"]]):
        axes.plot(*points.T, "D", color=colour, markersize=10, fillstyle="none", label="the limit at this beta")
    axes.set(title="reward against KL", xlabel="KL to the reference, nats", ylabel="mean reward")
    add_key(axes)


def judges(curve: Curve) -> list[dict]:
    """Return a curve's judges, the rewards that PPO doesn't maximise, with their scores before training."""
    return [
        part for each in evaluated(curve.runs[0], "before") for part in each.get("parts", []) if part["weight"] == 0
    ]


def draw_judges(axes, drawn: list[Curve]) -> None:
    """Draw how much the judges and the reward that PPO maximises rise with KL, in standard deviations of the scores
    before training."""
    for curve in filter(judges, drawn):
        scores = [reward for *_, reward in curve.runs[0].evaluation["before"]["samples"]]
        lines = [("env/reward_mean", scores, "-", "what PPO maximises")]
        lines += [(f"reward/{part['name']}", part["scores"], "--", short(part["name"])) for part in judges(curve)]
        for column, before, style, label in lines:
            kl, reward = (smooth(curve.metrics[name]).mean(0) for name in ("objective/kl", column))
            axes.plot(kl, (reward - np.mean(before)) / np.std(before), style, color=curve.colour, label=label)
    axes.set(title="rewards against KL", xlabel="KL to the reference, nats", ylabel="rise in SD before training")
    add_key(axes)


def draw_histogram(axes, drawn: list[Curve]) -> None:
    """Draw the distribution of rewards before training (dotted) and after it (solid)."""

    def scores(curve: Curve, when: str) -> list[float]:
        return [score for run in curve.runs for each in evaluated(run, when) for *_, score in each["samples"]]

    every = [0, 1, *(score for curve in drawn for when in ("before", "after") for score in scores(curve, when))]
    edges = np.linspace(min(every), max(every), 41)
    for curve in drawn:
        for when, style in (("before", ":"), ("after", "-")):
            counts = np.histogram(scores(curve, when), edges)[0]
            if counts.any():
                axes.stairs(counts / counts.sum(), edges, color=curve.colour, linestyle=style, label=when)
    axes.set(title="rewards before and after training", xlabel="reward", ylabel="share of completions")
    add_key(axes)


def evaluated(run: Run, when: str) -> list[dict]:
    """Return a list with a run's evaluation "before" or "after" training, empty if there is none yet."""
    return [run.evaluation[when]] if run.evaluation.get(when) else []


BIG = {"reward": draw_reward, "plane": draw_plane, "judges": draw_judges, "histogram": draw_histogram}


def draw_gain(axes, drawn: list[Curve], setting: str) -> None:
    """Draw the gain of each run as a dot, and the means over the seeds as a line with their standard errors."""
    for curve in drawn:
        points = sorted(curves(curve.runs, [setting]), key=lambda point: point.runs[0].settings[setting])
        at = [point.runs[0].settings[setting] for point in points]
        gains = [[known_gain(run)["gain"] for run in point.runs] for point in points]
        errors = [(spread or 0) / np.sqrt(len(each)) for spread, each in zip(spreads(points), gains)]
        dots = np.repeat(at, list(map(len, gains))), np.concatenate(gains)
        axes.plot(*dots, ".", color=curve.colour, alpha=0.5, label="a run")
        axes.errorbar(
            at, list(map(np.mean, gains)), errors, color=curve.colour, capsize=3, label="mean, standard error"
        )
    values = sorted({run.settings[setting] for curve in drawn for run in curve.runs})
    if values[0] > 0 and values[-1] / values[0] > 4.999:  # in floats, 1.5e-4 / 3e-5 < 5
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(values, map(short, values))
    axes.set(xlabel=setting, ylabel="gain")
    add_key(axes)


if __name__ == "__main__":
    hold_streams()
    sys.exit(main())
