"""The gain of runs against one of their settings, as a picture for a report.

    python -m tools.gain_figure lr runs/lr-*                             gain.png here
    python -m tools.gain_figure episodes runs/n-* --out episodes.pdf     or .svg, or .png

A line joins the means over the seeds. Runs that differ in another setting too have a line for each of its values.
"""

import argparse
from pathlib import Path

import numpy as np

from plot_rewards import add_key, add_names, colours, file_type, fonts
from support.compare import Curve, Run, curves, of_gain, read_run, short, told, what_does_not_compare
from support.errors import UserError, exits_on_user_error
from support.files import whole


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("setting", help="a number in the runs' config.json, as lr, episodes or batch_size")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("gain.png"), help="picture to write (default: gain.png here)")
    args = parser.parse_args(argv)
    runs = [read_run(path) for path in args.runs]
    for run in runs:
        if type(run.settings.get(args.setting)) not in (int, float):
            raise UserError(f"the config.json of {run.name} has no number called {args.setting}; name another setting")
        if of_gain("gain")(run) is None:
            raise UserError(f"the gain of {run.name} is not known: see its report.md; leave this run out")
    values = sorted({run.settings[args.setting] for run in runs})
    if len(values) < 2:
        raise UserError(f"all these runs have {args.setting} {values[0]}; a figure needs runs of several values")
    draw(args.setting, values, runs, args.out)
    print(f"wrote {args.out}")


def draw(setting: str, values: list[float], runs: list[Run], out: Path) -> None:
    """Dots for runs, with the error of judging them; their means as a line, with the standard deviation as a band."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    others = [name for name in told(runs) if name != setting]
    lines = curves(runs, others) if others else [Curve({}, runs, "runs")]
    key = {"mean": {"linewidth": 2}, "a run, with the standard error of judging it": {"marker": ".", "alpha": 0.6}}
    with rc_context({"font.size": 9, "font.family": fonts(), "axes.grid": True, "grid.alpha": 0.3}):
        fig = Figure(figsize=(6.3, 3.3), layout="constrained")
        axes = fig.add_subplot()
        for line, colour in zip(lines, colours(lines)):
            at, gains, errors = np.array(
                [(run.settings[setting], of_gain("gain")(run), of_gain("gain_se")(run)) for run in line.runs]
            ).T
            own = np.unique(at)
            mean = np.array([gains[at == value].mean() for value in own])
            axes.errorbar(at, gains, errors, fmt=".", color=colour, alpha=0.6, linewidth=1)
            axes.plot(own, mean, color=colour, linewidth=2)
            if all(np.sum(at == value) > 1 for value in own):
                sd = np.array([gains[at == value].std(ddof=1) for value in own])
                axes.fill_between(own, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
                key["standard deviation over the seeds"] = {"linewidth": 8, "alpha": 0.15, "solid_capstyle": "butt"}
        if values[0] > 0 and values[-1] >= 10 * values[0]:
            axes.set_xscale("log")
            axes.minorticks_off()
        axes.set_xticks(values, [short(setting, value) for value in values])
        axes.set(xlabel=setting, ylabel="gain")
        add_names(fig, lines, what_does_not_compare(runs))
        add_key(axes, key)
        with whole(out) as partial:
            fig.savefig(partial, dpi=200, format=file_type(fig, out))


if __name__ == "__main__":
    with exits_on_user_error("gain_figure"):
        main()
