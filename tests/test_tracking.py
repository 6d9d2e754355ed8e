"""Runs in other packages: what arrives there, and what becomes of a run when they fail. The packages are stand-ins."""

import csv
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from support import collectives, tracking
from support.command_line import read_command_line
from support.errors import UserError
from support.run_folder import RunFolder, RunLog
from support.settings import load_config
from tests.helpers import ROOT, SMALL, TRACKER, small_run
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")
PACKAGES = ["wandb", "swanlab", "trackio"]


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy of a finished run of three steps, with samples every two."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    (run_dir / "config.json").write_text(json.dumps(config | {"log_samples_every": 2}), encoding="utf-8")
    return run_dir


def calls(trackers, package) -> list[list]:
    file = trackers / f"{package}.calls"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def logged(trackers, package) -> list[tuple[dict, int]]:
    return [(data, step) for name, data, step in (call for call in calls(trackers, package) if call[0] == "log")]


def track(run_dir, package="wandb"):
    tracking.start(run_dir, package)
    tracking.finish()


def expected_rows(run_dir) -> dict[int, dict]:
    """The columns of metrics.csv but for the step, by step."""
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader(file)]
    return {int(row.pop("step")): row for row in rows}


@pytest.mark.parametrize("package", PACKAGES)
def test_settings_every_column_samples_and_results_arrive(run_dir, trackers, package, capsys):
    track(run_dir, package)
    (_, options), *_, last = calls(trackers, package)
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert options.pop("config") == config and options["project"] == "ppo-chinese-gpt2" and last == ["finish"]
    assert options["experiment_name" if package == "swanlab" else "name"] == "run"

    *steps, (results, at) = logged(trackers, package)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    second = [[s["prompt"], s["completion"], s["score"]] for s in samples if s["step"] == 2]
    assert len(second) == 16
    table = steps[1][0].pop("samples")
    assert table == {"columns": ["prompt", "completion", "score"], "data": second}
    assert {step: data for data, step in steps} == expected_rows(run_dir) and len(steps) == 3

    judged = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert at is None and results.pop("verdict") == {"columns": ["verdict"], "data": [[judged["verdict"]]]}
    pairs = results.pop("before and after")["data"]
    assert len(pairs) == 16 and pairs[3] == [*judged["before"]["samples"][3], *judged["after"]["samples"][3][1:]]
    for name in ("reward", "kl", "distinct_2", "unique", "n"):
        assert results[f"evaluation/after/{name}"] == judged["after"][name]
        assert results[f"evaluation/before/{name}"] == judged["before"][name]
    assert results["evaluation/steps"] == 3 and all(type(value) in (int, float) for value in results.values())
    said = capsys.readouterr().out
    assert said == f"{package} tracks this run; what it says is in {run_dir / 'tracking.log'}\n"


def test_each_package_is_asked_in_its_own_words(run_dir, trackers, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    for package in PACKAGES * 2:
        track(run_dir, package)
    ids = {name: record["id"] for name, record in json.loads((run_dir / "tracking.json").read_text()).items()}
    assert len({*ids.values()}) == 3 and all(value.isalnum() for value in ids.values())
    options = {name: [call[1] for call in calls(trackers, name) if call[0] == "init"] for name in PACKAGES}
    for first, again in options.values():
        assert first.pop("config") == again.pop("config")
    project, by_id = {"project": "ppo-chinese-gpt2"}, {"resume": "allow", "id": ids["wandb"], "dir": str(run_dir)}
    assert options["wandb"] == [project | by_id | {"name": "run"}] * 2
    by_id = {"resume": "allow", "id": ids["swanlab"], "logdir": str(run_dir / "swanlog")}
    assert options["swanlab"] == [{"project": "mine", "experiment_name": "run"} | by_id] * 2
    assert options["trackio"] == [project | {"name": "run", "resume": resume} for resume in ("never", "allow")]


def test_a_run_that_goes_on_is_the_same_there_and_gives_what_is_new(run_dir, trackers):
    """From wherever it was stopped: the line that is not whole and the results are those of the longer run."""
    content = (run_dir / "metrics.csv").read_bytes()
    expected = expected_rows(run_dir)
    for cut in (content.rfind(b"\n", 0, -2) + 30, len(content)):
        (run_dir / "metrics.csv").write_bytes(content[:cut])
        track(run_dir)
    (_, first), (_, second) = (call for call in calls(trackers, "wandb") if call[0] == "init")
    assert first == second
    steps = logged(trackers, "wandb")
    assert [step for _, step in steps] == [1, 2, 3, None] and steps[2][0] == expected[3]
    assert json.loads((run_dir / "tracking.json").read_text())["wandb"] == {"id": first["id"], "step": 3}
    track(run_dir, "trackio")  # which has seen none of it
    assert [step for _, step in logged(trackers, "trackio")] == [1, 2, 3, None]


def wait_until(true, seconds=30):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_steps_arrive_while_the_run_goes_on(run_dir, trackers, monkeypatch):
    """Also when the header has got more columns since the last look, as in a run that an earlier version began."""
    content = (run_dir / "metrics.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (run_dir / "metrics.csv").write_text("")
    tracking.start(run_dir, "wandb")
    header = content[0].strip()
    (run_dir / "metrics.csv").write_text(f"{header}\n{content[1]}")
    wait_until(lambda: len(logged(trackers, "wandb")) == 1)
    table = [f"{header},new\n", f"{content[1].strip()},nan\n", f"{content[2].strip()},7\n"]
    (run_dir / "metrics.csv").write_text("".join(table))
    wait_until(lambda: len(logged(trackers, "wandb")) == 2)
    data, step = logged(trackers, "wandb")[1]
    assert step == 2 and data["new"] == 7 and len(data["samples"]["data"]) == 16
    tracking.finish()
    assert [call[0] for call in calls(trackers, "wandb")] == [
        "init",
        "log",
        "log",
        "finish",
    ]  # no results: step 3 lacks


FAILURES = {
    "import": ("import no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module'"),
    "start": (
        "def init(**options): raise ConnectionError('no way to the server\\nsecond line')\n",
        "no way to the server)",
    ),
    "log": ("def log(*data, **step): sys.exit('not today')\n", "(SystemExit: not today)"),
    "finish": ("def finish(): 1 / 0\n", "(ZeroDivisionError: division by zero)"),
    "crash": ("import os\ndef init(**options): os._exit(7)\n", "(its process ended with exit code 7)"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_package_that_fails_is_told_of_once(run_dir, trackers, how, capsys):
    code, why = FAILURES[how]
    (trackers / "wandb.py").write_text(TRACKER + code)
    tracking.start(run_dir, "wandb")
    if how != "finish":
        tracking.tracker.process.join()
        tracking.look()
        tracking.look()
    tracking.finish()
    _, said = capsys.readouterr().out.splitlines()
    assert said.startswith("warning: wandb tracks this run no more (") and why in said
    assert said.endswith("; metrics.csv has all of it")
    if how == "log":
        assert "Traceback" in (run_dir / "tracking.log").read_text()


@pytest.mark.parametrize("where", ["init(**options)", "log(*data, **step)", "finish()"])
def test_a_package_that_hangs_is_stopped(run_dir, trackers, where, monkeypatch, capsys):
    (trackers / "wandb.py").write_text(
        f"{TRACKER}\nimport time\nimport signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"def {where}:\n    note('hangs')\n    time.sleep(1000)\n"
    )
    monkeypatch.setattr(tracking, "DEADLINE", 0.3)
    tracking.start(run_dir, "wandb")
    process = tracking.tracker.process
    if where != "finish()":
        wait_until(lambda: ["hangs"] in calls(trackers, "wandb"))
    tracking.look()
    tracking.finish()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    _, said = capsys.readouterr().out.splitlines()
    assert "(it did not finish within 0.3 s)" in said


def test_ctrl_c_at_the_end_does_not_wait(run_dir, trackers, monkeypatch, capsys):
    (trackers / "wandb.py").write_text("import time\ntime.sleep(1000)\n")
    tracking.start(run_dir, "wandb")
    process = tracking.tracker.process
    join = process.join

    def interrupted(timeout=None):
        monkeypatch.setattr(process, "join", join)
        raise KeyboardInterrupt

    monkeypatch.setattr(process, "join", interrupted)
    tracking.finish()
    process.join()
    assert "did not finish" in capsys.readouterr().out


def test_a_killed_run_is_finished_there(run_dir, trackers):
    """And no process of it stays."""
    program = (
        "import os, sys\nfrom pathlib import Path\nfrom support import tracking\n"
        "if __name__ == '__main__':\n    tracking.start(Path(sys.argv[1]), 'wandb')\n    os._exit(9)\n"
    )
    script = run_dir.parent / "killed.py"
    script.write_text(program)
    path = {"PYTHONPATH": f"{ROOT}:{trackers}", "PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, script, run_dir], env=path).returncode == 9
    wait_until(lambda: ["finish"] in calls(trackers, "wandb"))
    assert [step for _, step in logged(trackers, "wandb")] == [1, 2, 3, None]


def test_a_damaged_record_is_told_of(run_dir, trackers, capsys):
    (run_dir / "tracking.json").write_text('{"wandb": {"id": 5}}')
    track(run_dir)
    said = capsys.readouterr().out
    assert f"{run_dir / 'tracking.json'} is damaged: wandb.id is missing" in said and "remove it" in said
    assert calls(trackers, "wandb") == []


def test_a_package_that_is_not_there_is_one_line_before_anything_is_loaded(tmp_path, monkeypatch, finished, capsys):
    """The folder that wandb leaves beside the program is no package."""
    (tmp_path / "swanlab").mkdir()
    find = importlib.util.find_spec

    def without(name, *package):
        return PathFinder.find_spec(name, [str(tmp_path)]) if name in PACKAGES else find(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    for package in ("wandb", "swanlab"):
        with pytest.raises(UserError) as refused:
            tracking.check_installed(package)
        assert str(refused.value) == (
            f"--track {package} needs the package {package}: pip install {package}, or --track none"
        )
    for flags in (SMALL, ["--resume", str(finished), "--episodes", "64"]):
        with pytest.raises(UserError, match="needs the package swanlab"):
            read_command_line([*flags, "--runs_dir", str(tmp_path), "--track", "swanlab"])
    assert read_command_line(["--resume", str(finished), "--track", "swanlab"])[2] == "nothing"


def test_a_run_is_tracked_from_its_first_step_to_its_results(tmp_path, trackers, demo):
    """With the KL coefficient that --kl_budget found."""
    code, run_dir = small_run(tmp_path, "--track", "wandb", "--kl_budget", "0.4", "--log_samples_every", "1")
    assert code == 0 and tracking.tracker is None
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert calls(trackers, "wandb")[0][1]["config"] == config and config["init_kl_coef"] != 0.15
    *steps, (results, _) = logged(trackers, "wandb")
    assert [len(data.pop("samples")["data"]) for data, _ in steps] == [16] * 3
    assert {step: data for data, step in steps} == expected_rows(run_dir) and "evaluation/after/reward" in results
    assert "track" not in json.loads((run_dir / "changes.json").read_text(encoding="utf-8"))


def test_a_failure_is_told_while_the_run_goes_on(run_dir, trackers, monkeypatch, capsys):
    """Which took the package from its settings. It costs the run nothing."""
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    (run_dir / "config.json").write_text(json.dumps(config | {"track": "wandb"}), encoding="utf-8")
    (trackers / "wandb.py").write_text("1 / 0\n")
    start, finish = tracking.start, tracking.finish

    def start_and_fail(*what):
        start(*what)
        tracking.tracker.process.join()

    monkeypatch.setattr(tracking, "start", start_and_fail)
    monkeypatch.setattr(tracking, "finish", lambda: None)
    assert main(["--resume", str(run_dir), "--episodes", "80"]) == 0
    told = "warning: wandb tracks this run no more (ZeroDivisionError: division by zero)"
    assert capsys.readouterr().out.count(told) == 1 and len(expected_rows(run_dir)) == 5
    finish()
    assert capsys.readouterr().out == ""


def test_only_rank_0_tracks_and_only_where_it_is_asked_for(run_dir, trackers, monkeypatch):
    config = load_config(run_dir / "config.json")
    RunFolder(run_dir, config).track()
    assert tracking.tracker is None
    config.track = "wandb"
    with monkeypatch.context() as another:
        another.setattr(collectives, "rank", lambda: 1)
        RunFolder(run_dir, config).track()
    assert tracking.tracker is None
    RunFolder(run_dir, config).track()
    tracking.finish()
    assert calls(trackers, "wandb")[-1] == ["finish"]


def test_a_step_s_samples_are_written_before_its_row(tmp_path):
    log, seen = RunLog(tmp_path, 0), []
    log.add_columns(["step"])
    log.metrics.flush = lambda: seen.append((tmp_path / "samples.jsonl").read_text())
    log.write({"step": 1}, [{"step": 1, "score": 0.5}])
    assert seen == ['{"step": 1, "score": 0.5}\n']
