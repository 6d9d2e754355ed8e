"""The folder of a run: its name, its settings when a run goes on, its lock and its log.

runs/<name>/
    config.json       the settings that the run was started with
    metrics.csv       one row a step
    samples.jsonl     one line a completion
    evaluation.json   how good the policy was before and after
    checkpoints/      see checkpoint.py
    model/  rewards.png  before_after.md      what the end of a run writes
"""

import csv
import dataclasses
import fcntl
import json
import os
import re
from datetime import datetime
from pathlib import Path

from config import PPOConfig, UserError, load_config
from support import processes

# Settings that may differ when a run goes on, since none of them changes what it computes (but for how long); and when a
# saved run is judged again.
HARMLESS = {"runs_dir", "device", "log_samples_every", "save_every", "keep_checkpoints", "micro_batch_size", "episodes"}
FOR_JUDGING = {"runs_dir", "device", "dtype", "micro_batch_size", "eval_samples"}
FINAL = ("model", "rewards.png", "before_after.md")  # what the end of a run writes, the last of them last


def new_run_folder(config: PPOConfig) -> Path:
    """Where a new run will live; nothing is written yet. UserError where the name is taken.

    Without --run_name a run is called after the time. Below torchrun its processes may be restarted and must find the folder
    again, so there it is called after torchrun's --rdzv-id, or, where torchrun knows none, after torchrun's process number.
    A later run of the same name is NAME-2; a restarted one takes the last that is there.
    """
    runs = Path(config.runs_dir)
    if config.run_name is None:
        name = os.environ.get("TORCHELASTIC_RUN_ID", datetime.now().strftime("%Y%m%d-%H%M%S"))
        name = f"torchrun-{os.getppid()}" if name == "none" else re.sub(r"[^\w.\-]", "-", name)
        names = [name]
        while (runs / names[-1]).exists():
            names.append(f"{name}-{len(names) + 1}")
        config.run_name = names[-2] if processes.restart_count() and len(names) > 1 else names[-1]
    run_dir = runs / config.run_name
    if run_dir.exists() and not processes.restart_count():
        raise UserError(
            f"--run_name {config.run_name}: {run_dir} exists already; choose another name, or --resume {run_dir}"
        )
    return run_dir


def find_run_folder(config: PPOConfig, name: str) -> Path:
    """The folder of an earlier run; 'latest' is the newest below --runs_dir."""
    if name == "latest":
        runs = sorted(Path(config.runs_dir).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"no run to resume in {config.runs_dir}")
        return runs[-1].parent
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is no run folder: it has no config.json")
    return Path(name)


def saved_config(run_dir: Path, config: PPOConfig, given: set[str], allowed: set[str]) -> PPOConfig:
    """A run's own config with the allowed flags of this command line. UserError for flags that would change the result."""
    saved = load_config(run_dir / "config.json")
    for name in sorted(given):
        old, new = getattr(saved, name), getattr(config, name)
        if name not in allowed and old != new:
            change = f"--{name} {new} would change the result of {run_dir}, which was started with {old}"
            raise UserError(f"{change}; start a new run for that")
        if name == "episodes" and new < old:
            raise UserError(f"--episodes {new} is fewer than the {old} of {run_dir}; they can only be raised")
    config = dataclasses.replace(saved, **{name: getattr(config, name) for name in given & allowed})
    config.check()
    return config


def lock_folder(run_dir: Path):
    """Hold a run folder for this process; the lock ends with it, however it dies. UserError where another holds it."""
    lock = (run_dir / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {run_dir}; wait for it, or stop it")
    return lock


class RunLog:
    """metrics.csv, one row a step, and samples.jsonl, one line a completion; both flushed at every step."""

    def __init__(self, run_dir: Path, last_step: int):
        self.run_dir = run_dir
        self.drop_after(last_step)
        self.metrics = (run_dir / "metrics.csv").open("a", encoding="utf-8", newline="")
        self.samples = (run_dir / "samples.jsonl").open("a", encoding="utf-8")

    def drop_after(self, last_step: int) -> None:
        """Remove what was logged after the checkpoint that the run goes on from."""
        from support.checkpoint import write_whole

        for name, step_of in (
            ("metrics.csv", lambda line: int(line.split(",")[0])),
            ("samples.jsonl", lambda line: json.loads(line)["step"]),
        ):
            path = self.run_dir / name
            if not path.exists():
                continue
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            header, rows = (lines[:1], lines[1:]) if name == "metrics.csv" else ([], lines)
            kept = header + [line for line in rows if line.endswith("\n") and step_of(line) <= last_step]
            write_whole(path, "".join(kept))

    def write(self, row: dict, samples: list[dict]) -> None:
        writer = csv.DictWriter(self.metrics, row.keys())
        if self.metrics.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        self.samples.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        self.metrics.flush()
        self.samples.flush()
