"""plot_rewards.py: what it draws, value by value, and what it says of growing, damaged and missing runs."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.font_manager  # writes that list before a test starts a process
import numpy as np
import pytest

import plot_rewards
from plot_rewards import draw, main
from support.compare import read_metrics
from support.errors import UserError
from tests.helpers import COLUMNS, MEAN, ROOT, STD, judged, points, words, write_evaluation, write_run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
PANELS = {  # title: (y axis, {column: (style, name in the key)})
    "KL to the reference": ("nats a completion", {"objective/kl": ("-", None)}),
    "KL coefficient": ("reward a nat", {"objective/kl_coef": ("-", None)}),
    "policy loss": ("", {"ppo/loss/policy": ("-", None)}),
    "value loss": ("", {"ppo/loss/value": ("-", None)}),
    "entropy": ("nats a token", {"objective/entropy": ("-", None)}),
    "clip fraction": (
        "share of tokens",
        {"ppo/policy/clipfrac": ("-", "policy/clipfrac"), "ppo/val/clipfrac": ("--", "val/clipfrac")},
    ),
    "completion length": ("tokens", {"tokens/completion_length": ("-", None)}),
    "time": (
        "seconds a step",
        {"time/sample": ("-", "sample"), "time/score": ("--", "score"), "time/ppo": (":", "ppo")},
    ),
}
REWARD_TITLE = "mean reward of each step"
PLANE_TITLE = "reward against KL: up is better, right is dearer"
HISTOGRAM_TITLE = "rewards before (line) and after (filled)"
OF_SEVERAL = "rewards before (dotted) and after (lines)"


def titles(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes}


def pairs(xs, ys) -> list[list[float]]:
    return [list(pair) for pair in zip(xs, ys, strict=True)]


def is_colour(artist, number: int) -> bool:
    from matplotlib.colors import to_rgb

    return to_rgb(artist.get_color()) == to_rgb(f"C{number}")


def face(artist) -> tuple:
    return tuple(np.ravel(artist.get_facecolor())[:3])


def face_of(number: int) -> tuple:
    from matplotlib.colors import to_rgb

    return to_rgb(f"C{number}")


# ----------------------------------------------------------------------------------------------
# The panels


def test_each_panel_draws_its_columns_over_the_steps(tmp_path, figures):
    runs = [write_run(tmp_path / name, steps, seed=steps) for name, steps in (("a", 30), ("b", 7))]
    draw(runs, tmp_path / "x.png")
    drawn, metrics = titles(figures[0][0]), [read_metrics(run) for run in runs]
    assert list(drawn) == [REWARD_TITLE, PLANE_TITLE, OF_SEVERAL, *PANELS]
    for title, (unit, columns) in PANELS.items():
        axes = drawn[title]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", unit)
        expected = [(number, column) for number in range(2) for column in columns]
        for line, (number, column) in zip(axes.lines, expected, strict=True):
            assert points(line) == pairs(metrics[number]["step"], metrics[number][column])
            assert line.get_linestyle() == columns[column][0] and is_colour(line, number)
        if len(columns) == 1:
            assert axes.get_legend() is None
        else:
            key = axes.get_legend()
            styles = list(columns.values())
            assert list(zip((line.get_linestyle() for line in key.get_lines()), words(key))) == styles
            assert {line.get_color() for line in key.get_lines()} == {"black"}


@pytest.mark.parametrize(
    ("panels", "rows"), [(8, [4, 4]), (7, [3, 4]), (6, [3, 3]), (5, [2, 3]), (4, [4]), (2, [2]), (1, [1]), (0, [])]
)
def test_panels_fill_rows_of_four_at_most_below_reward_plane_and_histogram(tmp_path, figures, panels, rows):
    left_out = [column for _, columns in list(PANELS.values())[max(1, panels) :] for column in columns]
    still = {"objective/kl": 0.0} if panels == 0 else {}
    draw([write_run(tmp_path / "run", without=left_out, **still)], tmp_path / "x.png")
    figure, options = figures[0]
    places = [axes.get_subplotspec() for axes in figure.axes]
    cells = [(spec.get_topmost_subplotspec().num1, spec.num1, spec.get_gridspec().ncols) for spec in places]
    assert cells[:3] == [(0, 0, 1), (1, 0, 2), (1, 1, 2)]
    assert cells[3:] == [(2 + row, i, n) for row, n in enumerate(rows) for i in range(n)]
    assert figure.get_size_inches() == pytest.approx([13, 8 + len(rows) * 2.6])
    assert options["dpi"] == 100
    assert {tuple(axes.title.get_fontfamily()) for axes in figure.axes} == {tuple(plot_rewards.fonts())}


@pytest.mark.filterwarnings("error")
def test_a_wide_label_takes_room_from_its_own_row_alone(tmp_path, laid_out):
    runs = [write_run(tmp_path / f"{kl}", 5, **{"objective/kl_coef": kl}) for kl in (0.18, 0.18018)]
    draw(runs, tmp_path / "x.png")
    panels = titles(laid_out[0])
    assert max(len(label.get_text()) for label in panels["KL coefficient"].get_yticklabels()) >= len("0.18015")
    width, height = laid_out[0].bbox.size
    assert panels.pop(REWARD_TITLE).bbox.width > 0.9 * width
    assert panels.pop(PLANE_TITLE).bbox.width > 0.4 * width and panels.pop(OF_SEVERAL).bbox.width > 0.4 * width
    assert len(panels) == 8
    assert all(axes.bbox.width > 0.17 * width and axes.bbox.height > 0.09 * height for axes in panels.values())


def test_one_panel_alone_is_as_wide_as_a_page(tmp_path, figures):
    run = write_run(tmp_path / "run")
    for only, title in {"reward": REWARD_TITLE, "plane": PLANE_TITLE, "histogram": HISTOGRAM_TITLE}.items():
        assert main([str(run), "--only", only]) == 0
        figure, options = figures[-1]
        assert [axes.get_title() for axes in figure.axes] == [title]
        assert figure.get_figwidth() == pytest.approx(16 / 2.54, abs=0.01) and options["dpi"] == 200
        assert figure.axes[0].title.get_fontsize() < 12


def test_pyplot_which_may_need_a_display_is_not_used(tmp_path):
    run = write_run(tmp_path / "run", 2, without=COLUMNS[1:])
    script = "import sys, plot_rewards; plot_rewards.main(sys.argv[1:]); sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script, str(run)], cwd=ROOT, check=True)


def test_what_never_changes_in_any_run_has_no_panel(tmp_path, figures):
    same = {"objective/kl_coef": 0.2, "ppo/policy/clipfrac": 0, "ppo/val/clipfrac": 0, "time/sample": 1}
    same |= {"ppo/loss/policy": 0.5, "ppo/loss/value": 0.5}
    runs = [write_run(tmp_path / "a", **same)]
    draw(runs, tmp_path / "x.png")
    left = ["KL to the reference", "entropy", "completion length", "time"]
    assert list(titles(figures[0][0]))[3:] == left
    assert figures[0][0].get_size_inches() == pytest.approx([13, 8 + 2.6])
    runs.append(write_run(tmp_path / "b", **same | {"objective/kl_coef": 0.3, "ppo/val/clipfrac": np.arange(30) / 90}))
    draw(runs, tmp_path / "x.png")
    assert list(titles(figures[1][0]))[3:] == [left[0], "KL coefficient", left[1], "clip fraction", *left[2:]]


def test_a_run_of_an_earlier_version_is_drawn_as_far_as_it_goes(tmp_path, figures):
    old = write_run(tmp_path / "old", without=[STD, "ppo/loss/value", "time/score"])
    draw([old, write_run(tmp_path / "new")], tmp_path / "x.png")
    drawn = titles(figures[0][0])
    (line,) = drawn["value loss"].lines
    assert is_colour(line, 1)
    assert [line.get_linestyle() for line in drawn["time"].lines] == ["-", ":", "-", "--", ":"]
    draw([old], tmp_path / "x.png")
    assert "value loss" not in titles(figures[1][0]) and not titles(figures[1][0])[REWARD_TITLE].collections


def test_each_run_has_its_colour_and_its_name_in_the_key(tmp_path, figures, monkeypatch):
    from matplotlib.colors import to_rgb

    runs = [write_run(tmp_path / f"run{i}", 2, seed=i, without=COLUMNS[1:]) for i in range(11)]
    monkeypatch.chdir(runs[0])
    draw([Path("."), *runs[1:10]], tmp_path / "x.png")
    draw(runs, tmp_path / "x.png")
    for (figure, _), n in zip(figures, (10, 11)):
        (key,) = figure.legends
        assert words(key) == [f"run{i}" for i in range(n)] and key._ncols == 4
        colours = [line.get_color() for line in key.get_lines()]
        assert len(set(map(to_rgb, colours))) == n
        assert [line.get_color() for line in titles(figure)[REWARD_TITLE].lines] == [c for c in colours for _ in "12"]
    assert all(is_colour(line, number) for number, line in enumerate(figures[0][0].legends[0].get_lines()))


def test_long_names_stand_below_one_another(tmp_path, figures):
    draw([write_run(tmp_path / ("long" * 30 + name), 2) for name in "abc"], tmp_path / "x.png")
    assert figures[0][0].legends[0]._ncols == 1


# ----------------------------------------------------------------------------------------------
# The reward of each step


def test_the_reward_is_drawn_with_its_mean_over_a_tenth_of_the_run(tmp_path, figures):
    """Of squares the mean over r neighbours on either side is i^2 + r (r + 1) / 3. r shrinks towards the start, which
    is the model before training; the last mean is that of the last six steps."""
    squares = np.arange(100) ** 2
    draw([write_run(tmp_path / "run", 100, **{MEAN: squares})], tmp_path / "x.png")
    axes = titles(figures[0][0])[REWARD_TITLE]
    raw, smoothed = axes.lines
    episodes = [128 * step for step in range(1, 101)]
    assert points(raw) == pairs(episodes, squares)
    reach = np.array([0, 1, 2, 3, 4, *[5] * 90])
    assert smoothed.get_xdata().tolist() == episodes
    assert smoothed.get_ydata()[:95] == pytest.approx(squares[:95] + reach * (reach + 1) / 3)
    assert smoothed.get_ydata()[95:] == pytest.approx([squares[i - 5 :].mean() for i in range(95, 100)])
    assert raw.get_linewidth() < smoothed.get_linewidth() and raw.get_alpha() < 1
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("episodes", "mean reward")
    assert words(axes.get_legend()) == ["each step", "running mean", "95% interval of a step's mean"]


@pytest.mark.parametrize(("values", "smoothed"), [([9], [9]), ([9, 0], [9, 4.5]), ([9, 0, 3, 6], [9, 4, 3, 4.5])])
def test_the_mean_over_a_short_run_is_over_three_steps(values, smoothed):
    assert plot_rewards.smooth(np.array(values)).tolist() == smoothed
    assert plot_rewards.smooth(np.array([values, values])).tolist() == [smoothed] * 2


def corners(band) -> dict[float, list[float]]:
    """The lowest and the highest value of a band by episodes."""
    found = {}
    for x, y in band.get_paths()[0].vertices.tolist():
        low, high = found.get(x, (y, y))
        found[x] = [min(low, y), max(high, y)]
    return found


def test_the_band_of_one_run_is_what_chance_alone_makes_of_a_step_s_mean(tmp_path, figures):
    """Of 128 completions of standard deviation 0.4: 1.96 * 0.4 / sqrt(128) to either side."""
    run = write_run(tmp_path / "run", 10, **{MEAN: 0.5, STD: 0.4})
    draw([run], tmp_path / "x.png")
    (band,) = titles(figures[0][0])[REWARD_TITLE].collections
    half = 1.96 * 0.4 / np.sqrt(128)
    assert corners(band) == {128.0 * step: pytest.approx([0.5 - half, 0.5 + half]) for step in range(1, 11)}
    assert band.get_alpha() < 0.3
    draw([run, write_run(tmp_path / "other", 10)], tmp_path / "x.png")
    assert not titles(figures[1][0])[REWARD_TITLE].collections


def test_of_runs_that_differ_in_the_seed_the_mean_and_the_standard_deviation_are_drawn(tmp_path, figures):
    """Of lines at 0.2, 0.4 and 0.9: 0.5, and the root of (0.09 + 0.01 + 0.16) / 2."""
    runs = [
        write_run(tmp_path / f"{seed}", 4, seed, settings={"seed": seed}, **{MEAN: mean})
        for seed, mean in enumerate([0.2, 0.4, 0.9])
    ]
    draw([*runs, write_run(tmp_path / "4", settings={"lr": 0.5})], tmp_path / "x.png")
    axes = titles(figures[0][0])[REWARD_TITLE]
    for line in axes.lines[:2]:
        assert line.get_ydata() == pytest.approx([0.5] * 4) and is_colour(line, 0)
    (band,) = axes.collections
    assert corners(band) == {128.0 * step: pytest.approx([0.5 - 0.13**0.5, 0.5 + 0.13**0.5]) for step in range(1, 5)}
    assert words(axes.get_legend())[-1] == "standard deviation over the seeds"
    assert words(figures[0][0].legends[0]) == ["lr 1e-4, 3 seeds", "lr 0.5"]
    assert titles(figures[0][0])["entropy"].lines[0].get_ydata() == pytest.approx(
        np.mean([read_metrics(run)["objective/entropy"] for run in runs], axis=0)
    )


def test_a_step_that_raised_an_alarm_has_a_mark_on_the_line(tmp_path, figures):
    run = write_run(tmp_path / "run", 30, **{MEAN: np.arange(30) / 10})
    write_evaluation(run, alarms=[{"step": 3, "alarm": "x"}, {"step": 21, "alarm": "y", "more": 1}])
    draw([run], tmp_path / "x.png")
    axes = titles(figures[0][0])[REWARD_TITLE]
    marks = axes.lines[-1]
    assert points(marks) == [[384, pytest.approx(0.2)], [2688, pytest.approx(2.0)]]
    assert (marks.get_marker(), marks.get_linestyle()) == ("v", "None") and is_colour(marks, 0)
    assert words(axes.get_legend())[-1] == "alarm"


def test_start_and_end_of_the_smoothed_line_stand_in_figures(tmp_path, figures):
    """The mean of steps 29 and 30 ends the line; starts that read the same are one, in black."""
    rising = np.arange(30) / 10
    runs = [write_run(tmp_path / "a", **{MEAN: rising}), write_run(tmp_path / "b", 4, **{MEAN: 0.75})]
    draw([*runs, write_run(tmp_path / "c", 4, **{MEAN: [0.754, 1, 1, 1]})], tmp_path / "x.png")
    axes = titles(figures[0][0])[REWARD_TITLE]
    lines = axes.lines[1::2]
    notes = {note.get_text(): note for note in axes.texts}
    assert [note.get_text() for note in axes.texts] == ["0.00", "0.75", "0.75", "1.00", "2.85"]
    for note, (number, at) in zip(axes.texts, [(0, 0), (1, 0), (1, -1), (2, -1), (0, -1)]):
        x, y = points(lines[number])[at]
        assert note.xy == (x, pytest.approx(y, abs=0.005)) and f"{y:.2f}" == note.get_text()
        assert note.get_ha() == ("right" if at == 0 else "left") and (note.xyann[0] < 0) == (at == 0)
    assert axes.texts[1].get_color() == "black" and is_colour(notes["2.85"], 0) and is_colour(notes["1.00"], 2)
    assert axes.margins()[0] > 0.03  # room for them beside the curves


def boxes(axes) -> list:
    return [note.get_window_extent() for note in axes.texts]


@pytest.fixture
def laid_out(monkeypatch) -> list:
    """The figures that are drawn, laid out as they would be written."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, out, **options: (drawn.append(self), out.touch()))
    return drawn


def test_a_line_that_ends_elsewhere_moves_no_figure_but_one_that_ends_close_by_does(tmp_path, laid_out):
    runs = [write_run(tmp_path / f"{steps}", steps, **{MEAN: 0.5 + steps / 1e4}) for steps in (10, 49, 50)]
    draw(runs, tmp_path / "x.png", only="reward")
    (axes,) = laid_out[0].axes
    short, *long = [note for note in axes.texts if note.get_ha() == "left"]
    assert short.xyann[1] == pytest.approx(0) and short.xy[0] == 1280
    assert not long[0].get_window_extent().overlaps(long[1].get_window_extent())


@pytest.mark.parametrize("n", [2, 9, 20])
def test_no_figure_lies_on_another_nor_on_the_ticks_and_the_higher_line_has_the_higher(tmp_path, laid_out, n):
    """Ends 0.001 apart; of 20 curves the figures are smaller."""
    ends = np.random.default_rng(0).permutation(n) / 1000 + 0.5
    starts = 0.1 + np.arange(n) / 100
    runs = [
        write_run(tmp_path / f"{i}", 2, without=COLUMNS[1:], **{MEAN: [start, 2 * end - start]})
        for i, (start, end) in enumerate(zip(starts, ends))
    ]
    draw(runs, tmp_path / "x.png", only="reward")
    (axes,) = laid_out[0].axes
    assert len(axes.texts) == 2 * n
    for i, box in enumerate(boxes(axes)):
        assert axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
        assert axes.bbox.y0 - 1 < box.y0 and box.y1 < axes.bbox.y1 + 1
        assert not any(box.overlaps(other) for other in boxes(axes)[:i])
    for side in (axes.texts[:n], axes.texts[n:]):
        heights = [(note.xy[1], note.get_window_extent().y0) for note in side]
        assert [y for _, y in sorted(heights)] == sorted(y for _, y in heights)


@pytest.mark.parametrize(
    ("at", "moved"),
    [
        ([50], [50]),
        ([50, 54], [47, 57]),  # 10 apart, each as far from where it was
        ([20, 50, 54], [20, 47, 57]),
        ([48, 50, 52], [40, 50, 60]),
        ([1, 2], [5, 15]),  # half a gap before the end
        ([98, 99], [85, 95]),
    ],
)
def test_labels_move_as_little_as_keeps_them_apart(at, moved):
    assert plot_rewards.apart(np.array(at, dtype=float), 10, 100) == pytest.approx(np.array(moved, dtype=float))


def test_one_step_is_a_dot_with_one_figure(tmp_path, figures):
    draw([write_run(tmp_path / "run", 1, **{MEAN: 0.5})], tmp_path / "x.png")
    axes = titles(figures[0][0])[REWARD_TITLE]
    assert [note.get_text() for note in axes.texts] == ["0.50"] and axes.lines[1].get_marker() == "o"
    assert not axes.collections and words(axes.get_legend()) == ["each step", "running mean"]


# ----------------------------------------------------------------------------------------------
# Reward against KL


@pytest.fixture
def judged_runs(tmp_path):
    """A growing run, a whole one, and another with fewer samples, which has a frontier and drafts of its own."""
    growing = write_run(tmp_path / "growing", 1)
    write_evaluation(growing, before=judged(0.61, 0.0, [0.5, 0.7]))
    whole, other = write_run(tmp_path / "whole", 12, seed=1), write_run(tmp_path / "other", 5, seed=2)
    write_evaluation(
        whole,
        before=judged(0.62, 0.01, [0.0, 1.0]),
        after=judged(0.84, 0.41, [1.0, 1.0]),
        frontier=[{"beta": 1, "reward": 0.7, "kl": 0.1}, {"beta": 0.2, "reward": 0.9, "kl": 0.45}],
        best_of_n=[{"n": 2, "reward": 0.8, "kl": 0.19, "gain": 0.8}, {"n": 3, "reward": 0.83, "kl": 0.43, "gain": 1}],
        gain={"gain": 0.5, "limit": {"reward": 0.93, "kl": 0.52, "J": 0.82}},
    )
    write_evaluation(
        other,
        before=judged(0.63, 0.02, [0.0, 1.0]),
        after=judged(0.75, 0.32, [1.0, 1.0]),
        frontier=[{"beta": 1, "reward": 0.5, "kl": 0.3}],
        best_of_n=[{"n": 2, "reward": 0.55, "kl": 0.19, "gain": None}],
        gain={"gain": None, "why": "too few samples", "limit": {"reward": 0.99, "kl": 0.7}},
    )
    return [growing, whole, other]


def plane_of(figure):
    return titles(figure)[PLANE_TITLE]


def test_a_dot_of_each_step_lies_at_its_kl_and_reward(judged_runs, tmp_path, figures):
    draw(judged_runs, tmp_path / "x.png")
    plane = plane_of(figures[0][0])
    dots = [c for c in plane.collections if len(c.get_offsets()) in (1, 12, 5) and c.get_sizes()[0] < 20]
    for number, (run, dot) in enumerate(zip(judged_runs, dots, strict=True)):
        metrics = read_metrics(run)
        assert dot.get_offsets().tolist() == pairs(metrics["objective/kl"], metrics[MEAN])
        assert face(dot) == face_of(number)
    assert (plane.get_xlabel(), plane.get_ylabel()) == ("KL to the reference, nats", "mean reward")


def test_before_after_and_limit_have_marks_of_their_own(judged_runs, tmp_path, figures):
    from matplotlib.markers import MarkerStyle

    draw(judged_runs, tmp_path / "x.png")
    *_, dots = (c for c in plane_of(figures[0][0]).collections if c.get_sizes()[0] < 20)
    marks = [c for c in plane_of(figures[0][0]).collections if c.get_sizes()[0] > 50]
    expected = [
        ("o", [0.0, 0.61], 0),
        ("o", [0.01, 0.62], 1),
        ("o", [0.02, 0.63], 2),
        ("*", [0.41, 0.84], 1),
        ("*", [0.32, 0.75], 2),
        ("D", [0.52, 0.93], 1),
    ]  # of the last run the gain is not known, and no limit is drawn
    for mark, (marker, at, number) in zip(marks, expected, strict=True):
        assert mark.get_offsets().tolist() == [at]
        style = MarkerStyle(marker)
        outline = style.get_path().transformed(style.get_transform())
        assert mark.get_paths()[0].vertices.tolist() == outline.vertices.tolist()
        if marker == "D":
            assert not len(mark.get_facecolor()) and tuple(mark.get_edgecolor()[0, :3]) == face_of(number)
        else:
            assert face(mark) == face_of(number) and mark.get_edgecolor().tolist() == [[0, 0, 0, 1]]
            assert mark.get_zorder() > dots.get_zorder()


def test_frontiers_and_drafts_that_differ_are_each_in_the_colour_of_their_run(judged_runs, tmp_path, figures):
    draw(judged_runs, tmp_path / "x.png")
    lines = plane_of(figures[0][0]).lines
    expected = [
        ([[0.1, 0.7], [0.45, 0.9]], "-", "None", 1),
        ([[0.3, 0.5]], "-", "None", 2),
        ([[0.19, 0.8], [0.43, 0.83]], "None", "x", 1),
        ([[0.19, 0.55]], "None", "x", 2),
    ]
    for line, (at, style, marker, number) in zip(lines, expected, strict=True):
        assert points(line) == at and is_colour(line, number)
        assert (line.get_linestyle(), line.get_marker()) == (style, marker)


def test_what_several_runs_share_is_drawn_once_in_black(judged_runs, tmp_path, figures):
    """Another run of the same models has the same frontier, drafts, start and limit, up to rounding."""
    again = write_run(tmp_path / "again", 5, seed=3)
    evaluation = json.loads((judged_runs[1] / "evaluation.json").read_text())
    evaluation["frontier"][0]["kl"] += 1e-9
    write_evaluation(again, **evaluation | {"after": judged(0.75, 0.32, [1.0])})
    draw([judged_runs[1], again], tmp_path / "x.png")
    plane = plane_of(figures[0][0])
    assert [line.get_color() for line in plane.lines] == ["black"] * 2
    before, *after, limit = [c for c in plane.collections if c.get_sizes()[0] > 50]
    assert before.get_offsets().tolist() == [[0.01, 0.62]] and face(before) == (0, 0, 0)
    assert limit.get_offsets().tolist() == [[0.52, 0.93]] and tuple(limit.get_edgecolor()[0, :3]) == (0, 0, 0)
    assert [face(mark) for mark in after] == [face_of(0), face_of(1)]
    draw([again], tmp_path / "x.png")
    assert {line.get_color() for line in plane_of(figures[1][0]).lines} == {"black"}


def test_of_several_seeds_the_mean_of_what_they_reached_and_its_standard_deviation_are_drawn(tmp_path, figures):
    runs = [write_run(tmp_path / f"{seed}", 3, seed, settings={"seed": seed}) for seed in range(2)]
    write_evaluation(runs[0], after=judged(0.8, 0.4, [0.8]))
    write_evaluation(runs[1], after=judged(0.6, 0.1, [0.6]))
    draw(runs, tmp_path / "x.png")
    plane = plane_of(figures[0][0])
    _, star, *_ = plane.collections
    assert star.get_offsets()[0].tolist() == pytest.approx([0.25, 0.7])
    bars = [np.ptp(c.get_segments()[0], axis=0) for c in plane.collections[2:]]
    assert np.sum(bars, axis=0) == pytest.approx([2 * 0.3 / 2**0.5, 2 * 0.2 / 2**0.5])
    assert words(plane.get_legend()) == ["a step", "after", "standard deviation over the seeds"]
    kl, reward = (np.mean([read_metrics(run)[name] for run in runs], axis=0) for name in ("objective/kl", MEAN))
    assert np.asarray(plane.collections[0].get_offsets()) == pytest.approx(np.stack([kl, reward], 1))


def test_the_key_of_the_plane_names_what_is_there(judged_runs, tmp_path, figures):
    growing, whole, _ = judged_runs
    draw([growing], tmp_path / "x.png")
    draw(judged_runs, tmp_path / "x.png")
    draw([write_run(tmp_path / "not judged")], tmp_path / "x.png")
    keys = [plane_of(figure).get_legend() for figure, *_ in figures]
    assert words(keys[0]) == ["a step", "before"] and words(keys[2]) == ["a step"]
    marks = [(line.get_marker(), line.get_linestyle(), name) for line, name in zip(keys[1].get_lines(), words(keys[1]))]
    assert marks == [
        (".", "None", "a step"),
        ("None", "-", "best possible"),
        ("x", "None", "best of 2, 3 drafts"),
        ("o", "None", "before"),
        ("*", "None", "after"),
        ("D", "None", "the limit at this beta"),
    ]


# ----------------------------------------------------------------------------------------------
# Rewards before and after


def bins_of(patches) -> tuple[list[float], list[float]]:
    """Edges and heights of bars."""
    lefts = [bar.get_x() for bar in patches]
    return [*lefts, patches[-1].get_x() + patches[-1].get_width()], [bar.get_height() for bar in patches]


def tops(outline) -> dict[int, float]:
    """Heights of an outline at the edges of its bins that are not empty."""
    found = {}
    for x, y in outline.get_xy():
        found[round(x * 40)] = max(y, found.get(round(x * 40), 0))
    return {x: top for x, top in found.items() if top}


def test_rewards_of_one_run_are_drawn_as_shares_before_as_a_line_and_after_filled(tmp_path, figures):
    run = write_run(tmp_path / "run")
    write_evaluation(run, before=judged(0, 0, [0.01, 0.01, 0.512, 0.99]), after=judged(1, 1, [0.26, 0.99]))
    draw([run], tmp_path / "x.png")
    axes = titles(figures[0][0])[HISTOGRAM_TITLE]
    before, *bars = axes.patches
    edges, heights = bins_of(bars)
    assert edges == pytest.approx(np.arange(41) / 40)
    assert {i: height for i, height in enumerate(heights) if height} == {10: 0.5, 39: 0.5}
    assert all(bar.get_fill() and face(bar) == face_of(0) and bar.get_alpha() < 1 for bar in bars)
    assert tops(before) == {0: 0.5, 1: 0.5, 20: 0.25, 21: 0.25, 39: 0.25, 40: 0.25}
    assert not before.get_fill() and tuple(before.get_edgecolor()[:3]) == face_of(0)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("reward", "share of completions")


def test_rewards_of_several_runs_are_outlines_all_seeds_in_one_and_a_shared_start_in_black(tmp_path, figures):
    runs = [write_run(tmp_path / f"{i}", settings={"seed": i % 2, "lr": i // 2 + 1.0}) for i in range(3)]
    for run, scores in zip(runs, ([0.26], [0.99], [0.0, 0.0, 0.31, 0.31])):
        write_evaluation(run, before=judged(0, 0, [0.31, 0.99]), after=judged(1, 1, scores))
    draw(runs, tmp_path / "x.png")
    before, *after = titles(figures[0][0])[OF_SEVERAL].patches
    assert tops(before) == {12: 0.5, 13: 0.5, 39: 0.5, 40: 0.5}
    assert tuple(before.get_edgecolor()[:3]) == (0, 0, 0)
    assert [tops(outline) for outline in after] == [
        {10: 0.5, 11: 0.5, 39: 0.5, 40: 0.5},
        {0: 0.5, 1: 0.5, 12: 0.5, 13: 0.5},
    ]
    assert [tuple(outline.get_edgecolor()[:3]) for outline in after] == [face_of(0), face_of(1)]
    assert not any(outline.get_fill() for outline in after) and before.get_linestyle() != after[0].get_linestyle()


def test_rewards_outside_0_to_1_have_bars_too(tmp_path, figures):
    run = write_run(tmp_path / "run")
    write_evaluation(run, after=judged(0, 0, [-2.0, 0.5, 3.0, 6.0]))
    draw([run], tmp_path / "x.png")
    edges, heights = bins_of(titles(figures[0][0])[HISTOGRAM_TITLE].patches)
    assert edges == pytest.approx(np.arange(-20, 61, 2) / 10)
    assert {i: height for i, height in enumerate(heights) if height} == {0: 0.25, 12: 0.25, 25: 0.25, 39: 0.25}


WHOLE = {"before": judged(0.5, 0, [0.2, 0.8]), "gain": {"gain": 0.5, "limit": {"kl": 1, "reward": 2}}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "it is no JSON (Expecting value: line 1 column 1 (char 0))"),
        ('{"before": {"rew', "it is no JSON (Unterminated string starting at: line 1 column 13 (char 12))"),
        ("[" * 100_000, "it is no JSON (maximum recursion depth exceeded"),
        (b"\xff\xfe", "in line 1: it is no UTF-8 text"),
        ([1], "it is missing, or not what it should be"),
        ({"before": {"kl": 0.0}}, "before.reward is missing, or not what it should be"),
        (WHOLE | {"before": judged(0.5, 0, [0.2, "good"])}, "before.samples.1.2 is missing"),
        (WHOLE | {"before": judged(0.5, 10**400, [0.2])}, "before.kl is missing"),
        (WHOLE | {"before": judged(0.5, True, [0.2])}, "before.kl is missing"),
        (WHOLE | {"after": judged(0.5, 0, [])}, "after.samples is missing"),
        (WHOLE | {"frontier": [{"kl": 1, "reward": 1}, {"kl": 1}]}, "frontier.1.reward is missing"),
        (WHOLE | {"best_of_n": [{"kl": 1, "reward": 1, "n": 2.5}]}, "best_of_n.0.n is missing"),
        (WHOLE | {"best_of_n": [{"kl": 1, "reward": 1, "n": True}]}, "best_of_n.0.n is missing"),
        (WHOLE | {"gain": {"limit": [1, 2]}}, "gain.limit is missing"),
        (WHOLE | {"before": {"kl": 0, "reward": 0, "samples": [["p", "x", 0.5, 1]]}}, "before.samples.0 is missing"),
        (WHOLE | {"more": "\ud800"}, "it holds half a character"),
    ],
)
def test_a_damaged_evaluation_is_told_and_the_run_is_drawn_without_it(tmp_path, figures, content, said, capsys):
    """Beside another, which is drawn whole."""
    runs = [write_run(tmp_path / name, 2, without=COLUMNS[1:]) for name in "ab"]
    write_evaluation(runs[1], **WHOLE)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (runs[0] / "evaluation.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main([*map(str, runs), "--out", str(tmp_path / "x.png")]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {runs[0] / 'evaluation.json'} is damaged") and said in err
    assert err.endswith("; the run is drawn without it\n") and err.count("\n") == 1
    drawn = titles(figures[0][0])
    assert len(drawn[OF_SEVERAL].patches) == 1 and len(drawn[PLANE_TITLE].collections) == 4


def test_of_an_evaluation_is_drawn_what_is_there(tmp_path, figures, capsys):
    """A byte order mark does not count; what an earlier version or a growing run lacks may be absent or empty."""
    run = write_run(tmp_path / "run", 2)
    parts = WHOLE | {"after": None, "frontier": [], "best_of_n": [], "gain": {"gain": None, "why": "beta is 0"}}
    (run / "evaluation.json").write_text(json.dumps(parts), encoding="utf-8-sig")
    draw([run], tmp_path / "x.png")
    assert capsys.readouterr().err == ""
    assert len(titles(figures[0][0])[HISTOGRAM_TITLE].patches) == 1


# ----------------------------------------------------------------------------------------------
# The program


def test_several_runs_go_into_one_picture_without_a_display(judged_runs, tmp_path):
    out = tmp_path / "all.png"
    command = [sys.executable, str(ROOT / "plot_rewards.py"), *map(str, judged_runs), "--out", "all.png"]
    fonts = matplotlib.get_cachedir()  # in a new home it builds its list of fonts, and says so after five seconds
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MPLCONFIGDIR": fonts}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    table = (tmp_path / "compare.md").read_text()
    assert result.stdout == f"{table}wrote all.png and compare.md\n" and "| whole " in table
    assert out.read_bytes().startswith(b"\x89PNG")
    assert struct.unpack(">II", out.read_bytes()[16:24]) == (1300, 1320)
    assert not list(tmp_path.glob("*/rewards.png"))


def test_the_run_that_wrote_metrics_last_is_drawn_into_its_folder(tmp_path, monkeypatch, capsys, figures):
    """Neither the last by name, nor the folder that changed last, nor one without metrics."""
    runs = [write_run(tmp_path / "runs" / name, 2) for name in ("first", "new", "old")]
    (tmp_path / "runs" / "zzz").mkdir()
    for seconds, run in enumerate((runs[2], runs[0], runs[1]), 1):
        os.utime(run / "metrics.csv", (seconds, seconds))
        os.utime(run, (100 - seconds, 100 - seconds))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert capsys.readouterr().out == f"wrote {os.path.join('runs', 'new', 'rewards.png')}\n"
    assert list(tmp_path.rglob("*.png")) == [runs[1] / "rewards.png"]


def test_a_comparison_takes_no_runs_picture(tmp_path, monkeypatch, capsys, figures):
    runs = [write_run(tmp_path / "runs" / name, 2) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert main([str(run) for run in runs]) == 0
    assert capsys.readouterr().out.endswith("wrote compare.png and compare.md\n")
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "metrics.csv"]
    assert sorted(written) == [tmp_path / "compare.md", tmp_path / "compare.png"]
    assert main([str(runs[0]), "runs/a"]) == 0  # the same run twice is one
    assert capsys.readouterr().out == f"wrote {os.path.join('runs', 'a', 'rewards.png')}\n"


@pytest.mark.parametrize("fails", ["the picture", "the table"])
def test_picture_and_table_are_written_both_or_not_at_all(tmp_path, monkeypatch, figures, fails):
    from matplotlib.figure import Figure

    runs = [write_run(tmp_path / name, 2, without=COLUMNS[1:]) for name in "ab"]
    old = {tmp_path / "x.png": b"earlier", tmp_path / "compare.md": b"table"}
    for path, content in old.items():
        path.write_bytes(content)

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    if fails == "the picture":
        monkeypatch.setattr(Figure, "savefig", full)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="no room to write"):
        draw(runs, tmp_path / "x.png")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == old


@pytest.mark.parametrize(("ending", "start"), [("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_a_picture_for_a_report_is_a_pdf_or_an_svg_by_its_name(tmp_path, ending, start):
    out = tmp_path / f"reward.{ending}"
    assert main([str(write_run(tmp_path / "run", 2)), "--only", "reward", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(start)


def test_a_picture_without_an_ending_is_written_where_it_is_wanted(tmp_path, capsys):
    out = tmp_path / "compare"
    assert main([str(write_run(tmp_path / "run", 2, without=COLUMNS[1:])), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tail", ["31,3968,0.", "31", "31,3968,0.9,0.3,0.4,0.2,-0.01,0.1,0.9"])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    run = write_run(tmp_path / "run")
    whole = read_metrics(run)
    with (run / "metrics.csv").open("a") as file:
        file.write(tail)
    growing = read_metrics(run)
    assert list(growing) == list(whole)
    assert all(growing[name].tolist() == whole[name].tolist() for name in whole)
    assert whole["step"].tolist() == list(range(1, 31)) and whole["episodes"][-1] == 3840


HEADER = f"step,episodes,{MEAN},{STD},objective/kl"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "has no step yet: the run has not finished one"),
        (b"step,epi", "has no step yet: the run has not finished one"),
        (f"{HEADER}\n".encode(), "has no step yet: the run has not finished one"),
        (f"{HEADER}\n1,128,0.5,".encode(), "has no step yet: the run has not finished one"),
        (f"{HEADER}\n".encode("utf-16"), "is damaged in line 1: it is no UTF-8 text; {mend}"),
        (f"{HEADER}\n1,128,0,0,0\n2,感\n".encode("gbk"), "is damaged in line 3: it is no UTF-8 text; {mend}"),
        (b"a,b\n1,2\n", "is damaged in line 1: it names no column step; {form}; {mend}"),
        (f"step,{MEAN},{STD}\n".encode(), "is damaged in line 1: it names no column episodes; {form}; {mend}"),
        (f"# mine\n{HEADER}\n".encode(), "is damaged in line 1: it names no column step; {form}; {mend}"),
        (f"{HEADER.replace(',', ';')}\n".encode(), "is damaged in line 1: it names no column step; {form}; {mend}"),
        (f"{HEADER}\n1,128,high,0,0\n".encode(), "line 2: could not convert string to float: 'high'; {form}; {mend}"),
        (f"{HEADER}\n\n1,128,\0,0,0\n".encode(), "line 3: could not convert string to float: '\\x00'; {form}; {mend}"),
        (f"{HEADER}\n1,128,0,0,0\n2,256\n".encode(), "line 3: 2 values below 5 names; {form}; {mend}"),
        (f'{HEADER}\n1,128,"0,5","0,1",0\n'.encode(), "line 2: 7 values below 5 names; {form}; {mend}"),
    ],
)
def test_missing_or_damaged_runs_are_one_line(tmp_path, content, said, capsys):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.csv").write_bytes(content)
    assert main([str(run)]) == 2
    said = said.format(form="numbers have points, and commas between them", mend="mend that line, or remove it")
    said = f"is damaged in {said}" if said.startswith("line") else said
    assert capsys.readouterr() == ("", f"plot_rewards.py: error: {run / 'metrics.csv'} {said}\n")
    assert not (run / "rewards.png").exists()


def test_a_metrics_file_in_a_folders_place_is_one_line(tmp_path, capsys):
    (tmp_path / "run" / "metrics.csv").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "run")]) == main([str(tmp_path / "file")]) == 2
    error = f"plot_rewards.py: error: {tmp_path}"
    assert capsys.readouterr().err.splitlines() == [
        f"{error}/run/metrics.csv cannot be read: Is a directory",
        f"{error}/file/metrics.csv cannot be read: Not a directory",
    ]


@pytest.mark.parametrize(
    "saved",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\r\n", "\n"),
        lambda text: text.replace("\r\n", "\r\n\r\n") + "\r\n",
        lambda text: '"' + text.replace(",", '","').replace("\r\n", '"\r\n"')[:-1],
        lambda text: text.replace(",", ", "),
    ],
    ids=["byte order mark", "line feeds alone", "empty lines", "quotes", "spaces"],
)
def test_metrics_that_another_program_saved_are_read_where_no_doubt_is_left(tmp_path, saved):
    run = write_run(tmp_path / "run", 5)
    whole, file = read_metrics(run), run / "metrics.csv"
    file.write_bytes(saved(file.read_bytes().decode()).encode())
    again = read_metrics(run)
    assert list(again) == list(whole) and all(again[name].tolist() == whole[name].tolist() for name in whole)


def test_a_shortened_flag_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--ou", "x.png"])
    assert end.value.code == 2 and "unrecognized arguments: --ou" in capsys.readouterr().err


def test_no_run_at_all_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    error = "plot_rewards.py: error: no run with a metrics.csv in runs; train first, or name a run folder\n"
    assert capsys.readouterr() == ("", error)


def test_a_picture_that_cannot_be_written_is_one_line_and_leaves_no_figure(tmp_path, capsys):
    import matplotlib.pyplot as plt

    run = write_run(tmp_path / "run", 2, without=COLUMNS[1:])
    missing = tmp_path / "missing" / "x.png"
    with pytest.raises(UserError) as error:
        draw([run], missing)
    assert str(error.value) == f"{missing} cannot be written: No such file or directory"
    assert main([str(run), "--out", str(tmp_path / "x.unknown")]) == 2
    assert (
        "x.unknown cannot be written: no picture ends in .unknown; take .png, .pdf or .svg\n" in capsys.readouterr().err
    )
    assert plt.get_fignums() == []


def test_what_stops_the_drawing_leaves_the_earlier_picture(tmp_path, monkeypatch):
    """A full disk after the first bytes; a kill leaves what the next picture removes."""
    from matplotlib.figure import Figure

    run = write_run(tmp_path / "run", 2)
    (run / "rewards.png").write_bytes(b"earlier")

    def savefig(self, out, **options):
        Path(out).write_bytes(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(UserError, match="no room to write .*rewards.png"):
        draw([run], run / "rewards.png")
    assert (run / "rewards.png").read_bytes() == b"earlier"
    assert sorted(path.name for path in run.iterdir()) == ["metrics.csv", "rewards.png"]


def test_a_chinese_name_is_written_without_boxes(tmp_path, monkeypatch, recwarn):
    """By its code points where no font has them."""
    from matplotlib import font_manager

    draw([write_run(tmp_path / "第一次", 2, without=COLUMNS[1:])], tmp_path / "x.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    monkeypatch.setattr(font_manager, "get_font_names", lambda: ["DejaVu Sans", "SimSun"])
    assert plot_rewards.shown("第1次") == r"\u7b2c1\u6b21"
    monkeypatch.setattr(font_manager, "get_font_names", lambda: ["SimHei", "DejaVu Sans", "PingFang SC"])
    assert plot_rewards.shown("第1次") == "第1次"
    assert plot_rewards.fonts() == ["DejaVu Sans", "PingFang SC", "SimHei"]


def test_a_name_is_no_formula_and_holds_no_character_without_a_picture(tmp_path, recwarn):
    draw([write_run(tmp_path / "$\\frac{$\x1b[31m", 2, without=COLUMNS[1:])], tmp_path / "x.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert plot_rewards.shown("$a$\x1b") == r"\$a\$\x1b"
