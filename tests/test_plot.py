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
]


def write_run(folder, steps=30, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(1, steps + 1):
            writer.writerow(
                [step, 128 * step, 0.7 + 0.2 * step / steps + rng.normal(0, 0.02), 0.3, 0.4 * step / steps, 0.2, -0.01]
            )
    return folder


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


@pytest.mark.parametrize("tail", ["31,3968,0.", "31", "31,3968,0.9,0.3,0.4,0.2,-0.01"])
def test_a_half_written_last_line_is_left_out(tmp_path, tail):
    run = write_run(tmp_path / "run")
    with (run / "metrics.csv").open("a") as file:
        file.write(tail)
    assert len(read_metrics(run)["step"]) == 30
    assert main([str(run)]) == 0


def test_reward_against_kl_is_drawn_with_its_evaluation(tmp_path):
    import matplotlib.figure

    run = write_run(tmp_path / "run")
    samples = [["p", "x", float(s)] for s in np.linspace(0, 1, 50)]
    point = {"reward": 0.7, "kl": 0.0, "samples": samples}
    evaluation = {
        "before": point,
        "after": {**point, "kl": 0.4},
        "frontier": [{"beta": 1, "reward": 0.7, "kl": 0.1}, {"beta": 0.2, "reward": 0.9, "kl": 0.4}],
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    figures = []
    save = matplotlib.figure.Figure.savefig
    try:
        matplotlib.figure.Figure.savefig = lambda self, *args, **kwargs: (
            figures.append(self),
            save(self, *args, **kwargs),
        )[1]
        draw([run], tmp_path / "x.png")
    finally:
        matplotlib.figure.Figure.savefig = save
    titles = {axes.get_title(): axes for axes in figures[0].axes}
    assert {
        "mean reward",
        "KL to the reference",
        "KL coefficient",
        "policy loss",
        "value loss",
        "entropy",
        "clip fraction",
        "completion length",
        "time",
    } <= set(titles)
    plane = titles["reward against KL: up is better, right is dearer"]
    assert plane.lines[0].get_xydata().tolist() == [[0.1, 0.7], [0.4, 0.9]]
    assert [0.4, 0.7] in [point for c in plane.collections for point in c.get_offsets().tolist()]
    assert sum(len(c.get_offsets()) for c in plane.collections) == 30 + 2
    assert len(titles["rewards before and after"].patches) > 1


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
