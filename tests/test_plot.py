"""plot_rewards.py: what it draws, and what it reports for unfinished, damaged and missing runs."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text

from plot_rewards import BIG, CHINESE, PANELS, draw, main, smooth
from support.common.errors import UserError
from support.run.compare import read_metrics
from tests.helpers import MEAN, STD, write_run

pytestmark = pytest.mark.usefixtures("in_tmp_path")
REWARD = "mean reward of each step"
PLANE = "reward against KL"
HISTOGRAM = "rewards before and after training"


def evaluated(reward, kl, scores):
    return {
        "n": len(scores),
        "reward": reward,
        "kl": kl,
        "unique": 0.9,
        "samples": [["p", "x", score] for score in scores],
    }


def write_evaluation(folder, **evaluation):
    (folder / "evaluation.json").write_text(json.dumps(evaluation))


def words(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def points(*lines) -> list[list[float]]:
    (line,) = lines
    return line.get_xydata().tolist()


def panels(figures) -> dict:
    return {axes.get_title(): axes for axes in figures[-1][0].axes}


def lines(axes, label: str) -> list:
    """Return the lines that have this label in a panel's legend."""
    return [line for line in axes.lines if line.get_label() == label]


WHOLE = {
    "before": evaluated(0.62, 0.01, [0.01, 0.01, 0.51, 0.99]),
    "after": evaluated(0.8, 0.4, [0.26, 0.99]),
    "frontier": [{"beta": 1, "reward": 0.7, "kl": 0.1}, {"beta": 0.2, "reward": 0.9, "kl": 0.45}],
    "best_of_n": [{"n": 2, "reward": 0.8, "kl": 0.19, "gain": 0.8}, {"n": 3, "reward": 0.83, "kl": 0.43, "gain": 1}],
    "gain": {"gain": 0.5, "gain_se": 0.1, "limit": {"reward": 0.93, "kl": 0.52, "J": 0.82}},
}


def test_the_reward_is_smoothed_over_a_tenth_of_the_run_and_the_legend_shows_both_ends(tmp_path, figures):
    """The mean of squares over r neighbours on either side is i^2 + r (r + 1) / 3, and r shrinks towards the start.
    The standard deviation of the first step sets the number of decimals."""
    squares, spread = np.arange(100) ** 2, np.array([40.0] + [0.001] * 99)
    run = write_run(tmp_path / "run", 100, **{MEAN: squares, STD: spread})
    write_evaluation(run, alarms=[{"step": 1, "alarm": "x"}, {"step": 6, "alarm": "y"}])
    draw([run], tmp_path / "x.png")
    raw, smoothed, alarms = panels(figures)[REWARD].lines
    assert points(raw) == np.stack([128 * np.arange(1, 101), squares], 1).tolist()
    reach = np.array([0, 1, 2, 3, 4, *[5] * 90])
    means = [*(squares[:95] + reach * (reach + 1) / 3), *(squares[i - 5 :].mean() for i in range(95, 100))]
    assert np.allclose(points(smoothed), np.stack([128 * np.arange(1, 101), means], 1))
    assert points(alarms) == [[128, 0], [768, 35]]
    (band,) = panels(figures)[REWARD].collections  # the 95% interval of a mean of 128 completions
    first = [y for x, y in band.get_paths()[0].vertices if x == 128]
    assert [max(first), min(first)] == pytest.approx([1.96 * 40 / np.sqrt(128), -1.96 * 40 / np.sqrt(128)])
    assert words(figures[0][0].legends[0]) == [f"run: reward 0 to {squares[94:].mean():.0f}"]
    assert smooth(np.array([9, 0, 3, 6])).tolist() == [9, 4, 3, 4.5] and smooth(np.array([9])).tolist() == [9]


def test_runs_that_only_differ_in_the_seed_are_drawn_as_mean_and_standard_deviation(tmp_path, figures):
    """The curves are at 0.2, at 0.4 and, after smoothing, at 0.9, 1, 1, 0.9. In the middle, their mean is 1.6 / 3 and
    their variance 0.52 / 3. The histogram shows the scores 0.26, 0.99, -2 and 6 in 40 bins of width 0.2."""
    rewards = [0.2, 0.4, np.array([0.9, 1.2, 0.9, 0.9])]
    runs = [write_run(tmp_path / f"{m}", 4, i, settings={"seed": i}, **{MEAN: m}) for i, m in enumerate(rewards)]
    for run, evaluation in zip(runs, (WHOLE, {"after": evaluated(0.6, 0.1, [-2.0, 6.0])})):
        write_evaluation(run, **evaluation)
    draw([*runs, write_run(tmp_path / "4", settings={"lr": 0.5})], tmp_path / "x.png")
    drawn = panels(figures)
    assert lines(drawn[REWARD], "running mean")[0].get_ydata() == pytest.approx([0.5, 1.6 / 3, 1.6 / 3, 0.5])
    (band,) = drawn[REWARD].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert [min(heights), max(heights)] == pytest.approx([1.6 / 3 - (0.52 / 3) ** 0.5, 1.6 / 3 + (0.52 / 3) ** 0.5])
    assert words(figures[0][0].legends[0])[0] == "lr 0.0001, 3 runs: reward 0.50 to 0.50"
    means = np.mean([read_metrics(run)["objective/entropy"] for run in runs], axis=0)
    assert drawn["entropy"].lines[0].get_ydata() == pytest.approx(means)
    assert np.allclose(points(*lines(drawn[PLANE], "after")), [[0.25, 0.7]])
    before, after = (outline.get_data() for outline in drawn[HISTOGRAM].patches)
    assert after.edges == pytest.approx(np.arange(-20, 61, 2) / 10)
    assert {i: share for i, share in enumerate(before.values) if share} == {10: 0.5, 12: 0.25, 14: 0.25}
    assert {i: share for i, share in enumerate(after.values) if share} == {0: 0.25, 11: 0.25, 14: 0.25, 39: 0.25}


def test_a_stopped_run_can_be_drawn_and_a_single_panel_gets_its_own_file(tmp_path, figures):
    """The gain is null until the run is evaluated again. rewards.png, which the report shows, is kept."""
    run = write_run(tmp_path / "run", 3)
    write_evaluation(run, before=WHOLE["before"], after=None, gain=None, frontier=[], best_of_n=[])
    assert (
        main([str(run)]) == main([str(run), "--only", "plane"]) == main([str(run), str(run), "--by", "run_name"]) == 0
    )
    assert {path.name for path in run.glob("*.png")} == {"rewards.png", "plane.png"}


def test_the_reward_kl_plane_shows_what_is_known(tmp_path, figures):
    """An unfinished run has only been evaluated before training. If the gain is unknown, there is no limit."""
    run, gain = write_run(tmp_path / "run", 3), {"gain": None, "limit": {"reward": 1, "kl": 1}}
    metrics, shown = read_metrics(run), []
    for evaluation in (WHOLE, {"before": evaluated(0.61, 0.0, [0.5, 0.7]), "frontier": [], "gain": gain}):
        write_evaluation(run, **evaluation)
        draw([run], tmp_path / "x.png")
        plane = panels(figures)[PLANE]
        shown.append({label: points(*lines(plane, label)) for label in words(plane.get_legend())})
    steps = np.stack([metrics["objective/kl"], metrics[MEAN]], 1).tolist()
    assert shown[1] == {"a step": steps, "before": [[0.0, 0.61]]}
    assert shown[0] == {
        "a step": steps,
        "best possible": [[0.1, 0.7], [0.45, 0.9]],
        "best of n drafts": [[0.19, 0.8], [0.43, 0.83]],
        "before": [[0.01, 0.62]],
        "after": [[0.4, 0.8]],
        "the limit at this beta": [[0.52, 0.93]],
    }


def test_each_run_has_its_own_colour_and_shared_points_are_drawn_once_in_black(tmp_path, figures):
    """Runs of the same models have the same frontier, drafts, start and limit, up to rounding."""
    runs = [write_run(tmp_path / name, steps, seed=steps) for name, steps in (("a", 30), ("b", 7), ("c", 3))]
    rounded = json.loads(json.dumps(WHOLE))
    rounded["frontier"][0]["kl"] += 1e-9
    other = {"frontier": [{"reward": 0.5, "kl": 0.3}], "before": evaluated(0.2, 0, [0.2])}
    for run, evaluation in zip(runs, (WHOLE, rounded | {"after": evaluated(0.75, 0.3, [1.0])}, other)):
        write_evaluation(run, **evaluation)
    draw(runs, tmp_path / "x.png")
    drawn, metrics = panels(figures), [read_metrics(run) for run in runs]
    assert list(drawn) == [REWARD, PLANE, HISTOGRAM, *(title for title, *_ in PANELS)]
    colours = [line.get_color() for line in figures[0][0].legends[0].get_lines()]
    for title, columns, _ in PANELS:
        expected = [(number, column) for number in range(3) for column in columns]
        for line, (number, column) in zip(drawn[title].lines, expected, strict=True):
            assert points(line) == np.stack([metrics[number]["step"], metrics[number][column]], 1).tolist()
            assert line.get_color() == colours[number]
    assert words(drawn["time"].get_legend()) == ["sample", "score", "ppo"] and not drawn[REWARD].collections
    assert drawn[HISTOGRAM].patches[0].get_data().edges[[0, -1]].tolist() == [0, 1]  # wider than the rewards' range
    of_third = {"best possible": 1, "best of n drafts": 0, "before": 1, "the limit at this beta": 0}
    for label, number in of_third.items():
        assert [line.get_color() for line in lines(drawn[PLANE], label)] == ["black", *colours[2:] * number]
    assert [star.get_color() for star in lines(drawn[PLANE], "after")] == colours[:2]
    draw([write_run(tmp_path / f"{lr}", 2, settings={"lr": lr}) for lr in range(12)], tmp_path / "x.png")
    assert len({line.get_color() for line in figures[-1][0].legends[0].get_lines()}) == 12


def test_the_gain_is_drawn_against_a_setting_with_its_standard_error_over_seeds(tmp_path, figures, capsys):
    """The mean of 0.5 and 0.7 is 0.6; its standard error is their standard deviation, 0.1 sqrt(2), over sqrt(2). The
    single run at 5e-4 gets the standard deviation of the other runs around their means, sqrt(0.065 / 2)."""
    gains, runs = {1e-4: (0.5, 0.7), 5e-4: (0.9,), 4e-4: (0.8, 0.5, None)}, []
    for lr, seed, gain in [(lr, seed, gain) for lr, of_lr in gains.items() for seed, gain in enumerate(of_lr)]:
        runs.append(str(write_run(tmp_path / f"{lr}-{seed}", 2, settings={"lr": lr, "seed": seed})))
        write_evaluation(Path(runs[-1]), gain=WHOLE["gain"] | {"gain": gain})
    assert main([*runs, "--against", "lr"]) == 0
    (axes,) = figures[0][0].axes
    assert sorted(points(lines(axes, "a run")[0])) == [[1e-4, 0.5], [1e-4, 0.7], [4e-4, 0.5], [4e-4, 0.8], [5e-4, 0.9]]
    mean = next(line for line in axes.lines if line.get_linestyle() == "-")
    assert np.allclose(points(mean), [[1e-4, 0.6], [4e-4, 0.65], [5e-4, 0.9]])
    bars = [segment[:, 1] for segment in axes.collections[0].get_segments()]
    assert np.allclose(bars, [[0.5, 0.7], [0.5, 0.8], [0.9 - 0.0325**0.5, 0.9 + 0.0325**0.5]])
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("lr", "gain", "log")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.0001", "0.0004", "0.0005"]
    assert capsys.readouterr().out.endswith("wrote gain.png and compare.md\n")


def test_runs_without_a_step_are_left_out_if_other_runs_have_steps(tmp_path, figures, capsys, monkeypatch):
    """A failed attempt leaves a folder behind, often the newest one."""
    monkeypatch.chdir(tmp_path)
    runs = [write_run(tmp_path / "runs" / name, 2, settings={"lr": lr}) for name, lr in (("a", 1e-4), ("b", 2e-4))]
    failed = tmp_path / "runs" / "failed"
    shutil.copytree(runs[0], failed)
    header = (runs[0] / "metrics.csv").read_text().splitlines(keepends=True)[0]
    (failed / "metrics.csv").write_text(header)
    assert main([]) == 0 and "wrote runs/" in capsys.readouterr().out
    assert main([str(path) for path in (*runs, failed)]) == 0
    assert capsys.readouterr().out.startswith(f"skipping runs without a finished step: {failed}\n")
    assert len(lines(figures[-1][0].axes[0], "running mean")) == 2


@pytest.fixture
def chinese_font(monkeypatch):
    """A function that fakes the fonts of a machine: those that matplotlib knows, and new ones on the disk."""

    def pretend(known=(), found=()):
        names = ["DejaVu Sans", *known]

        def add(path):
            if path == "broken":
                raise RuntimeError("cannot open face")
            names.append(path)

        monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: names)
        monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: ["broken", *found])
        monkeypatch.setattr("matplotlib.font_manager.fontManager.addfont", add)

    return pretend


def test_all_pictures_can_be_labelled_in_chinese(tmp_path, figures, chinese_font):
    """Only the names of settings and runs and a few technical terms stay in Latin letters."""
    runs = []
    for lr, seed in (3e-5, 1), (3e-5, 2), (1.5e-4, 1), (1.5e-4, 2):
        metrics, settings = {MEAN: 0.5, "reward/评委": 0.5}, {"lr": lr, "seed": seed}
        runs.append(write_run(tmp_path / f"{lr}-{seed}", 4, settings=settings, **metrics))
        parts = {"parts": [{"name": "评委", "weight": 0.0, "scores": [0.0, 1.0]}]}
        write_evaluation(runs[-1], alarms=[{"step": 2, "alarm": "x"}], **WHOLE | {"before": WHOLE["before"] | parts})
    chinese_font(["WenQuanYi Micro Hei"])
    for options in [{}, *({"only": name} for name in BIG), {"against": "lr"}]:
        draw(runs, tmp_path / "x.png", **options, lang="zh")
    draw(runs[:1], tmp_path / "x.png", lang="zh")
    texts = {text.get_text() for figure, _ in figures for text in figure.findobj(Text)}
    latin = {word for text in texts for word in re.findall("[A-Za-z]{2,}", text)}
    assert latin == {"KL", "nat", "beta", "best", "of", "token", "PPO", "gain", "lr"}
    assert set(CHINESE.values()) <= texts
    assert {"全部，4 次训练", "lr 3e-05，2 次训练：奖励 0.50 → 0.50"} <= texts
    assert [axes.get_xscale() for axes in figures[-2][0].axes] == ["log"]  # rounding puts 1.5e-4 / 3e-5 just below 5


def test_a_newly_installed_chinese_font_is_found_and_a_missing_one_is_reported(tmp_path, figures, chinese_font, capsys):
    """matplotlib caches the list of fonts from its first start."""
    run = str(write_run(tmp_path / "run", 2))
    chinese_font(found=["Noto Sans CJK JP"])
    assert main([run, "--lang", "zh"]) == 0
    chinese_font()
    capsys.readouterr()
    assert main([run, "--lang", "zh"]) == 2 and "apt install fonts-noto-cjk" in capsys.readouterr().err
    assert main([run]) == 0


def test_the_file_name_sets_the_format_and_the_printed_table_is_saved_with_the_picture(tmp_path, capsys):
    """A run's name isn't parsed as a formula."""
    names = ("a", r"$\frac{$")
    runs = [str(write_run(tmp_path / name, 3, settings={"init_kl_coef": i + 0.5})) for i, name in enumerate(names)]
    assert main([*runs, "--only", "plane"]) == 0
    written = (tmp_path / "compare.md").read_text()
    assert capsys.readouterr().out == f"{written}wrote compare.png and compare.md\n"
    assert "These runs differ in init_kl_coef" in written and "| init_kl_coef 0.5 |" in written
    assert main([*runs, "--by", "lr,run_name", "--only", "histogram", "--out", "x.svg"]) == 0
    assert "| lr 0.0001, run_name a " in (tmp_path / "compare.md").read_text()
    starts = [(tmp_path / name).read_bytes()[:4] for name in ("compare.png", "x.svg")]
    assert starts == [b"\x89PNG", b"<?xm"]


def test_the_old_picture_is_kept_if_the_disk_is_full(tmp_path, monkeypatch, capsys):
    def full(self, out, **options):
        out.write_text("half")
        raise OSError(28, "No space left on device")

    run = write_run(tmp_path / "run", 2)
    (run / "rewards.png").write_text("old")
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main([str(run)]) == 2 and "No space left" in capsys.readouterr().err
    assert (run / "rewards.png").read_text() == "old"


def test_by_default_the_run_that_wrote_metrics_last_is_drawn(tmp_path, capsys, figures):
    """It is neither the last run by name nor one without metrics."""
    runs = [write_run(tmp_path / "runs" / name, 2) for name in ("zz", "first", "new")]
    for seconds, run in enumerate(runs, 1):
        os.utime(run / "metrics.csv", (seconds, seconds))
    (tmp_path / "runs" / "zzz").mkdir()
    assert main([]) == 0
    assert capsys.readouterr().out == f"wrote {Path('runs/new/rewards.png')}\n"
    assert list(tmp_path.rglob("*.png")) == [runs[2] / "rewards.png"] and not (tmp_path / "compare.md").exists()


HEADER = f"step,episodes,{MEAN},{STD},objective/kl"


@pytest.mark.parametrize(
    ("flags", "file", "content", "said"),
    [
        ("", "", "", "no run in runs has finished a step; train first, or give a run folder"),
        ("run --out x.unknown", "", "", "x.unknown: the name of a picture must end in .png, .pdf or .svg"),
        ("run --by lr,rate", "", "", "--by rate: no run here has such a setting; choose from preset, run_name"),
        ("run --against lr", "", "", "--against lr needs two runs with known gains and different numbers"),
        ("missing", "", "", "missing has no metrics.csv; give the folder of a run"),
        ("run", "metrics.csv", f"{HEADER}\n1,128,0.5,0,0", "has no rows yet"),  # an incomplete line
        ("run", "metrics.csv", f"{HEADER}\n1,128,0,0,0\n2,256\n", "line 3 of"),
        ("run", "evaluation.json", "{", "evaluation.json is damaged"),
    ],
)
def test_unusable_flags_and_files_give_one_line_errors(tmp_path, flags, file, content, said, capsys):
    run = write_run(tmp_path / "run", 2)
    if file:
        (run / file).write_text(content)
    assert main(flags.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("plot_rewards.py: error: ") and said in err and err.count("\n") == 1 and not out
    assert not list(tmp_path.rglob("*.png"))


def test_each_of_several_rewards_has_a_panel_and_judges_are_drawn_next_to_the_reward(tmp_path, figures):
    """Rewards are drawn against KL, in standard deviations of the scores before training: 1 around a mean of 1, and 2
    around a mean of 4. The last point is the mean of the last two steps."""
    metrics = {MEAN: np.array([1, 2, 3, 4]), "objective/kl": np.array([0, 0.1, 0.2, 0.3])}
    run = write_run(tmp_path / "run", 4, **metrics, **{"reward/a:f": 5.0, "reward/judge": np.array([4, 3, 2, 1])})
    parts = [{"name": "a:f", "weight": 1.0, "scores": [0, 9]}, {"name": "judge", "weight": 0.0, "scores": [2.0, 6.0]}]
    write_evaluation(run, before=evaluated(1, 0, [0.0, 2.0]) | {"parts": parts})
    with pytest.raises(UserError, match="--only judges needs a run with a judge"):
        draw([write_run(tmp_path / "other", 4)], tmp_path / "x.png", only="judges")
    for only in ("", "judges"):
        draw([run], tmp_path / "x.png", only=only)
        panel = panels(figures)["rewards against KL"]
        kl = [0, 0.1, 0.2, 0.25]
        assert np.allclose(points(*lines(panel, "what PPO maximises")), np.stack([kl, [0, 1, 2, 2.5]], 1))
        assert np.allclose(points(*lines(panel, "judge")), np.stack([kl, [0, -0.5, -1, -1.25]], 1))
    drawn = panels(figures[:1])
    assert [drawn[name].lines[0].get_ydata().tolist() for name in ("a:f", "judge")] == [[5] * 4, [4, 3, 2, 1]]
