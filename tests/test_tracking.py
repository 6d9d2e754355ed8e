"""Tracking runs with other packages: what they receive, and what happens if they fail. The packages are fakes."""

import contextlib
import importlib.util
import json
import signal
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from support.common.errors import UserError
from support.run import tracking
from tests.helpers import TRACKER, read_json, rows, tiny_run

pytestmark = pytest.mark.usefixtures("without_pictures")
PACKAGES = ["wandb", "swanlab", "trackio"]


def calls(trackers, package) -> list[list]:
    file = trackers / f"{package}.calls"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@pytest.mark.parametrize("package", PACKAGES)
def test_settings_metrics_samples_and_results_are_tracked(policy, tmp_path, trackers, package):
    run_dir = tmp_path / "run"
    assert tiny_run(run_dir, policy, track=package, log_samples_every=2, kl_budget=0.1, eval_samples=64) == 0
    (_, options), *steps, (_, results, at), finish = calls(trackers, package)
    assert options["config"] == read_json(run_dir / "config.json") and options["config"]["init_kl_coef"] != 0.2
    assert finish == ["finish", {}]

    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    second = [[s["prompt"], s["completion"], s["score"]] for s in samples if s["step"] == 2]
    tables = [data.pop("samples", None) for _, data, _ in steps]
    assert tables == [None, {"columns": ["prompt", "completion", "score"], "data": second}, None] and len(second) == 8
    expected = [{name: float(value) for name, value in row.items()} for row in rows(run_dir)]
    assert [data for _, data, _ in steps] == expected and [step for *_, step in steps] == [1, 2, 3]

    evaluated = read_json(run_dir / "evaluation.json")
    assert at is None and results["evaluation/steps"] == 3
    for when in ("before", "after"):
        assert results[f"evaluation/{when}/reward"] == evaluated[when]["reward"]


def test_each_package_gets_its_own_options_and_resumes_its_run(policy, tmp_path, trackers, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    run_dir, project = tmp_path / "run", {"project": "ppo-chinese-gpt2", "config": 0}
    for i, package in enumerate(PACKAGES):
        tiny_run(run_dir, policy, resume=i > 0, track=package, episodes=8 + 16 * i)
        tiny_run(run_dir, policy, resume=True, track=package, episodes=16 + 16 * i)
    inits = {name: [call[1] for call in calls(trackers, name) if call[0] == "init"] for name in PACKAGES}
    options = {name: [each | {"config": 0} for each in init] for name, init in inits.items()}
    ids = read_json(run_dir / "tracking.json")
    assert list(ids) == PACKAGES and len({*ids.values()}) == 3
    by_id = {"resume": "allow", "id": ids["wandb"], "dir": str(run_dir)}
    assert options["wandb"] == [project | by_id | {"name": "run"}] * 2
    by_id = {"resume": "allow", "id": ids["swanlab"], "logdir": str(run_dir / "swanlog")}
    assert options["swanlab"] == [project | {"project": "mine", "experiment_name": "run"} | by_id] * 2
    name = f"run-{ids['trackio'][:6]}"  # trackio resumes by this name
    assert options["trackio"] == [project | {"name": name, "resume": resume} for resume in ("never", "allow")]


FAILURES = {
    "init": "def init(**options): raise ConnectionError('no way to the server\\nsecond line')\n",
    "log": "def log(data, step=None): raise ValueError('not today')\n",
    "finish": "def finish(**how): 1 / 0\n",
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_package_that_raises_is_reported_once_and_the_run_continues(policy, tmp_path, trackers, how, capsys):
    (trackers / "wandb.py").write_text(TRACKER + FAILURES[how])
    assert tiny_run(tmp_path / "run", policy, track="wandb") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "wandb failed and is now off" in line]
    assert len(said) == 1 and len(rows(tmp_path / "run")) == 3


def test_only_the_first_process_tracks_a_run(tmp_path, trackers, monkeypatch):
    monkeypatch.setattr("support.compute.processes.rank", lambda: 1)
    with tracking.Tracker(tmp_path, {"track": "wandb"}) as tracker:
        tracker.log({"loss": 1.0})
    assert calls(trackers, "wandb") == []


def test_a_run_opened_from_inside_its_folder_keeps_its_name(tmp_path, trackers, monkeypatch):
    (tmp_path / "films").mkdir()
    monkeypatch.chdir(tmp_path / "films")
    with tracking.Tracker(Path("."), {"track": "trackio"}):
        assert calls(trackers, "trackio")[0][1]["name"].startswith("films-")


def test_runs_with_the_same_name_stay_separate(tmp_path, trackers):
    for folder in "a", "b":
        (tmp_path / folder / "run").mkdir(parents=True)
        for package in PACKAGES:
            with tracking.Tracker(tmp_path / folder / "run", {"track": package}):
                pass
    for package, key in ("wandb", "id"), ("swanlab", "id"), ("trackio", "name"):
        first, second = (call[1][key] for call in calls(trackers, package) if call[0] == "init")
        assert first != second


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(
    ("happens", "error", "why"),
    [
        (lambda: signal.raise_signal(signal.SIGTERM), contextlib.nullcontext(), "stopped before its end"),
        (lambda: 1 / 0, pytest.raises(UserError), "UserError: step 2: the reward function raised ZeroDivisionError"),
    ],
    ids=["a signal", "a reward"],
)
def test_a_run_that_does_not_finish_is_marked_as_failed(
    policy, tmp_path, trackers, package, happens, error, why, signals_restored
):
    """Once it has been resumed and has finished, it is marked as finished."""

    def reward(texts):
        if len(calls(trackers, package)) == 2:
            happens()
        return [0.1 * i for i in range(len(texts))]

    with error:
        assert tiny_run(tmp_path / "run", policy, reward, track=package) == 128 + signal.SIGTERM
    *_, (_, how) = calls(trackers, package)
    assert how.pop("error", why).startswith(why)
    assert how == {"wandb": {"exit_code": 1}, "swanlab": {"state": "crashed"}, "trackio": {}}[package]
    assert tiny_run(tmp_path / "run", policy, reward, track=package, resume=True) == 0
    assert calls(trackers, package)[-1] == ["finish", {}]


def test_a_package_that_is_not_installed_gives_a_one_line_error(tmp_path, monkeypatch):
    """A folder that a package left next to the program isn't mistaken for the package."""
    (tmp_path / "swanlab").mkdir()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    for package in ("wandb", "swanlab"):
        with pytest.raises(UserError, match=f"pip install {package}"):
            tracking.check_installed(package)
