"""A run where people already look: in wandb, swanlab or trackio, whichever is installed and asked for.

A process of its own follows the run folder and hands on what is written there. Whatever a package does, fails at or
waits for is that process's: training goes on at its own pace, and metrics.csv stays the truth. A step that is done
again after a kill stays there as it was handed on first.

    tracking.json     by package, the id of the tracked run and the last step handed on, from which --resume goes on
    tracking.log      what the package says: the address of the run, or how to upload what was recorded offline
"""

import csv
import importlib.util
import json
import multiprocessing
import os
import secrets
import signal
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from support.errors import UserError, first_line
from support.files import read_evaluation, read_json, whole_lines, write_whole

PROJECT = "ppo-chinese-gpt2"  # unless WANDB_PROJECT, SWANLAB_PROJECT or TRACKIO_PROJECT names another
EVERY = 1.0  # seconds between looks at the run folder
DEADLINE = 10.0  # seconds that a package has to finish in when the run has ended

# ----------------------------------------------------------------------------------------------
# In the process of the run


def check_installed(package: str) -> None:
    """UserError where there is no such package; a folder of its name, as wandb leaves in the current one, is none."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(f"--track {package} needs the package {package}: pip install {package}, or --track none")


class Tracker:
    """The process that tracks a run. What ends it before its time is told in one line, once."""

    def __init__(self, run_dir: Path, package: str):
        self.package, self.told = package, False
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=follow, args=(run_dir, package, theirs), daemon=True)
        self.process.start()
        theirs.close()
        print(f"{package} tracks this run; what it says is in {run_dir / 'tracking.log'}")

    def look(self) -> None:
        """Tell why the process has ended, if it has."""
        if not self.told and self.connection.poll():
            try:
                self.tell(self.connection.recv())
            except (EOFError, OSError):
                self.process.join()
                self.tell(f"its process ended with exit code {self.process.exitcode}")

    def finish(self) -> None:
        """Have the package finish; where it has not in DEADLINE seconds, or somebody presses Ctrl-C, it is stopped."""
        with suppress(OSError):  # it has ended
            self.connection.send("the run has ended")
        with suppress(KeyboardInterrupt):
            self.process.join(DEADLINE)
        if self.process.is_alive():
            self.process.kill()
            self.tell(f"it did not finish within {DEADLINE:g} s")
        elif self.process.exitcode:
            self.look()

    def tell(self, why: str) -> None:
        self.told = True
        tqdm.write(f"warning: {self.package} tracks this run no more ({why}); metrics.csv has all of it")


tracker = None  # of this process


def start(run_dir: Path, package: str) -> None:
    global tracker
    tracker = Tracker(run_dir, package)


def look() -> None:
    if tracker:
        tracker.look()


def finish() -> None:
    global tracker
    if tracker:
        tracker.finish()
    tracker = None


# ----------------------------------------------------------------------------------------------
# In a process of its own


def follow(run_dir: Path, package: str, connection) -> None:
    """Hand a run folder on to a package until the run ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which says when it is over
    if hasattr(os, "setsid"):  # which Windows lacks
        os.setsid()
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=(connection, ended), daemon=True).start()
    try:
        said = os.open(run_dir / "tracking.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(said, 1)
        os.dup2(said, 2)
        hand_on(run_dir, package, ended)
    except BaseException as error:  # SystemExit, too
        traceback.print_exc()
        connection.send(first_line(error))
        os._exit(1)


def wait_for_end(connection, ended: threading.Event) -> None:
    with suppress(EOFError, OSError):  # the run was killed
        connection.recv()
    ended.set()
    time.sleep(2 * DEADLINE)
    os._exit(1)  # whom a killed run leaves behind ends by itself


def hand_on(run_dir: Path, package: str, ended: threading.Event) -> None:
    """Settings, every step that has not been handed on yet, and the results, where the run has come to its end."""
    path, config = run_dir / "tracking.json", json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    remedy = "remove it: the run is tracked anew"
    record = read_json(path, remedy, missing={})
    goes_on = package in record
    mine = record.setdefault(package, {"id": secrets.token_hex(8), "step": 0})
    project = os.environ.get(f"{package.upper()}_PROJECT", PROJECT)
    log, table, close = PACKAGES[package](project, run_dir, mine["id"], goes_on, config)

    steps, last = Steps(run_dir, config["log_samples_every"]), False
    while not last:
        last = ended.wait(EVERY)
        for row, samples in steps.new():
            step = int(row.pop("step"))
            if step > mine["step"]:
                if samples:
                    row["samples"] = table(["prompt", "completion", "score"], samples)
                log(row, step=step)
                mine["step"] = step
        write_whole(path, json.dumps(record) + "\n")

    results = read_evaluation(run_dir)
    if results.get("steps") == mine["step"]:
        columns = ["prompt", "before", "score before", "after", "score after"]
        pairs = zip(results["before"]["samples"], results["after"]["samples"])
        judged = table(columns, [[prompt, *before, *after] for (prompt, *before), (_, *after) in pairs])
        verdict = table(["verdict"], [[results["verdict"]]])
        log({**numbers(results, "evaluation"), "before and after": judged, "verdict": verdict})
    close()


class Steps:
    """The steps of a run, as they are logged."""

    def __init__(self, run_dir: Path, samples_every: int):
        self.metrics, self.samples = run_dir / "metrics.csv", run_dir / "samples.jsonl"
        self.samples_every = samples_every
        self.n_rows = self.n_samples = 0  # that were seen

    def new(self) -> list[tuple[dict[str, float], list[list]]]:
        """Of each step since the last call its row of metrics.csv and, of every `samples_every`-th, the prompt,
        completion and score of all its samples."""
        header, *lines = whole_lines(self.metrics) or [""]
        rows = [{name: float(x) for name, x in row.items()} for row in csv.DictReader([header, *lines[self.n_rows :]])]
        self.n_rows = len(lines)
        samples = {row["step"]: [] for row in rows if self.samples_every and row["step"] % self.samples_every == 0}
        if samples:
            lines = whole_lines(self.samples)
            for sample in map(json.loads, lines[self.n_samples :]):
                samples.get(sample["step"], []).append([sample["prompt"], sample["completion"], sample["score"]])
            self.n_samples = len(lines)
        return [(row, samples.get(row["step"], [])) for row in rows]


def numbers(value, name: str) -> dict[str, float]:
    """The numbers of a JSON value outside its lists, by their path."""
    if isinstance(value, dict):
        return {path: x for key, part in value.items() for path, x in numbers(part, f"{name}/{key}").items()}
    return {name: value} if isinstance(value, (int, float)) else {}


# ----------------------------------------------------------------------------------------------
# The packages. Each gives log({name: number or table}, step), table(columns, rows), and what ends the tracked run


def start_wandb(project: str, run_dir: Path, run_id: str, goes_on: bool, config: dict):
    import wandb

    run = wandb.init(project=project, name=run_dir.name, id=run_id, resume="allow", config=config, dir=run_dir)
    return run.log, lambda columns, rows: wandb.Table(columns=columns, data=rows), run.finish


def start_swanlab(project: str, run_dir: Path, run_id: str, goes_on: bool, config: dict):
    import swanlab

    def table(columns, rows):
        made = swanlab.echarts.Table()
        made.add(columns, rows)
        return made

    name, folder = run_dir.name, str(run_dir / "swanlog")
    swanlab.init(project=project, experiment_name=name, id=run_id, resume="allow", config=config, logdir=folder)
    return swanlab.log, table, swanlab.finish


def start_trackio(project: str, run_dir: Path, run_id: str, goes_on: bool, config: dict):
    """By its name, since trackio takes no id."""
    import trackio

    trackio.init(project=project, name=run_dir.name, resume="allow" if goes_on else "never", config=config)
    return trackio.log, lambda columns, rows: trackio.Table(columns=columns, data=rows), trackio.finish


PACKAGES = {"wandb": start_wandb, "swanlab": start_swanlab, "trackio": start_trackio}
