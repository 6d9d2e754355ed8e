"""plot_rewards.py on whole, growing, damaged and missing runs."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from config import UserError
from plot_rewards import draw, main, read_metrics
from tests.conftest import ROOT

COLUMNS = [
    "step",
    "episodes",
    "env/reward_mean",
    "env/reward_std",
    "objective/kl",
    "objective/kl_coef",
    "ppo/loss/policy",
    "env/reward_p10",
    "env/reward_p90",
]


def write_run(folder, steps=30, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, steps + 1):
            mean = 0.7 + 0.2 * step / steps + rng.normal(0, 0.02)
            writer.writerow([step, 128 * step, mean, 0.3, 0.4 * step / steps, 0.2, -0.01 * step, 0.1, 0.99])
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, to look into."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **options: (saved.append(self), save(self, *args, **options))
    )
    return saved


def titles(figure) -> dict:
    return {axes.get_title(): axes for axes in figure.axes}


def test_the_newest_run_is_drawn(tmp_path, monkeypatch, capsys):
    import os

    old, new = write_run(tmp_path / "runs" / "old"), write_run(tmp_path / "runs" / "new")
    os.utime(old / "metrics.csv", (1, 1))
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    assert (new / "rewards.png").exists() and not (old / "rewards.png").exists()
    assert "rewards.png" in capsys.readouterr().out


def test_several_runs_go_into_one_picture_without_a_display(tmp_path):
    runs = [str(write_run(tmp_path / name, seed=i)) for i, name in enumerate("abc")]
    out = tmp_path / "all.png"
    command = [sys.executable, str(ROOT / "plot_rewards.py"), *runs, "--out", str(out)]
    result = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout == f"wrote {out}\n"
    assert out.read_bytes().startswith(b"\x89PNG") and out.stat().st_size > 20_000


@pytest.mark.parametrize("tail", ["31,3968,0.", "31", "31,3968,0.9,0.3,0.4,0.2,-0.01,0.1,0.9"])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    run = write_run(tmp_path / "run")
    with (run / "metrics.csv").open("a") as file:
        file.write(tail)
    assert len(read_metrics(run)["step"]) == 30
    assert main([str(run)]) == 0


def test_reward_against_kl_is_drawn_with_its_evaluation(tmp_path, figures):
    run = write_run(tmp_path / "run")
    samples = [["p", "x", float(s)] for s in np.linspace(0, 1, 50)]
    point = {"reward": 0.7, "kl": 0.0, "samples": samples}
    evaluation = {
        "before": point,
        "after": {**point, "kl": 0.4},
        "frontier": [{"beta": 1, "reward": 0.7, "kl": 0.1}, {"beta": 0.2, "reward": 0.9, "kl": 0.4}],
        "best_of_n": [{"n": 2, "reward": 0.8, "kl": 0.19, "gain": 0.8}],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    growing = write_run(tmp_path / "growing", steps=0)
    (growing / "metrics.csv").write_text("\n".join((run / "metrics.csv").read_text().splitlines()[:2]) + "\n")
    draw([growing, run], tmp_path / "x.png")
    plane = titles(figures[0])["reward against KL: up is better, right is dearer"]
    frontier, best_of_n = plane.lines
    assert frontier.get_xydata().tolist() == [[0.1, 0.7], [0.4, 0.9]]
    assert best_of_n.get_xydata().tolist() == [[0.19, 0.8]]
    assert [0.4, 0.7] in [point for c in plane.collections for point in c.get_offsets().tolist()]
    assert sum(len(c.get_offsets()) for c in plane.collections) == 1 + 30 + 2
    assert len(titles(figures[0])["rewards before (line) and after (filled)"].patches) > 1
    words = [text.get_text() for text in plane.get_legend().get_texts()]
    assert words == ["a step", "best possible", "best of 2 drafts", "before", "after"]


def test_the_reward_curve_starts_and_ends_where_the_run_did(tmp_path, figures):
    run = write_run(tmp_path / "run")
    draw([run], tmp_path / "x.png")
    metrics = read_metrics(run)
    axes = next(axes for title, axes in titles(figures[0]).items() if title.startswith("mean reward"))
    raw, smoothed = (line.get_ydata() for line in axes.lines)
    assert raw.tolist() == metrics["env/reward_mean"].tolist()
    assert smoothed[0] == raw[0] and smoothed[1] == pytest.approx(raw[:3].mean()) and smoothed[-1] == raw[-1]
    ends = [text.get_text() for text in axes.texts]
    assert ends == [f"{raw[0]:.2f}", f"{raw[-10:].mean():.2f}"]
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (0.1, 0.99)


def test_what_never_changes_has_no_panel(tmp_path, figures):
    runs = [write_run(tmp_path / name) for name in "ab"]
    draw(runs[:1], tmp_path / "x.png")
    assert "policy loss" in titles(figures[0]) and "KL coefficient" not in titles(figures[0])
    text = (runs[1] / "metrics.csv").read_text().replace(",0.2,", ",0.3,")
    (runs[1] / "metrics.csv").write_text(text)
    draw(runs, tmp_path / "x.png")
    assert "KL coefficient" in titles(figures[1])
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["a", "b"]


def test_a_chinese_name_is_written_without_boxes(tmp_path, figures, recwarn):
    import plot_rewards

    draw([write_run(tmp_path / "第一次")], tmp_path / "x.png")
    name = figures[0].legends[0].get_texts()[0].get_text()
    assert name == ("第一次" if len(plot_rewards.fonts()) > 1 else r"\u7b2c\u4e00\u6b21")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_run_of_an_earlier_version_has_no_band(tmp_path, figures):
    run = write_run(tmp_path / "run")
    lines = [",".join(line.split(",")[:7]) for line in (run / "metrics.csv").read_text().splitlines()]
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")
    draw([run], tmp_path / "x.png")
    assert not next(a for title, a in titles(figures[0]).items() if title.startswith("mean reward")).collections


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read: No such file"),
        ("", "is empty"),
        (",".join(COLUMNS) + "\n", "has no step yet"),
        ("a,b\n1,2\n", "holds no metrics of a run"),
        (",".join(COLUMNS) + "\n1,128,high,0,0,0,0\n", "damaged in line 2"),
        (",".join(COLUMNS) + "\n1,128\n", "damaged in line 2"),
    ],
)
def test_missing_or_empty_runs_are_one_line(tmp_path, content, said, capfd):
    run = tmp_path / "run"
    run.mkdir()
    if content is not None:
        (run / "metrics.csv").write_text(content)
    assert main([str(run)]) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1 and str(run) in err
    assert not (run / "rewards.png").exists()


def test_no_run_at_all_and_no_place_to_write(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2 and "no run with a metrics.csv" in capsys.readouterr().err
    run = write_run(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        draw([run], tmp_path / "missing" / "x.png")
    assert main([str(run), "--out", str(tmp_path / "x.unknown")]) == 2
