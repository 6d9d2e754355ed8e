"""Kill a demo run with SIGKILL at random moments, resume it each time, and compare the end with an uninterrupted run.

    python -m tools.stress_resume [--seed 1] [--kills 25]

About every second kill waits for a checkpoint that is just being written. Prints `kills N, resumed N, differences 0`;
the exit code is 1 where anything differs. The quick suite resumes what a kill would leave at each flush of a file.
"""

import argparse
import csv
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = [
    "--preset",
    "demo",
    "--device",
    "cpu",
    "--episodes",
    "3200",
    "--batch_size",
    "16",
    "--minibatch_size",
    "8",
    "--eval_samples",
    "32",
]
FLAGS += ["--save_every", "2", "--log_samples_every", "0"]


def start(runs_dir: Path, name: str) -> subprocess.Popen:
    """Start the run, or resume it where its folder is there."""
    run_dir = runs_dir / name
    resumed = (run_dir / "config.json").exists()
    flags = ["--resume", str(run_dir)] if resumed else [*FLAGS, "--runs_dir", str(runs_dir), "--run_name", name]
    if run_dir.exists() and not resumed:
        shutil.rmtree(run_dir)  # killed between making the folder and writing the config
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train_ppo.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_at_random(process: subprocess.Popen, run_dir: Path, draw: random.Random) -> bool:
    """SIGKILL after a random number of new steps, perhaps in the midst of a checkpoint; False where it ended before."""
    metrics, in_checkpoint = run_dir / "metrics.csv", draw.random() < 0.5
    lines_at_start = metrics.read_text().count("\n") if metrics.exists() else 0
    wanted, waited = draw.randrange(0, 5), draw.uniform(0, 0.3)
    while (
        process.poll() is None
        and (metrics.read_text().count("\n") if metrics.exists() else 0) - lines_at_start < wanted
    ):
        time.sleep(0.01)
    time.sleep(waited)
    while in_checkpoint and process.poll() is None and not list(run_dir.glob("checkpoints/.partial-*")):
        time.sleep(0.0005)
    if process.poll() is not None:
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two finished runs: metrics but times, samples, weights, evaluation."""
    found = []
    tables = []
    for run_dir in (one, other):
        with (run_dir / "metrics.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)])
    if tables[0] != tables[1]:
        found.append("metrics.csv")
    for name in ("samples.jsonl", "model/model.safetensors", "evaluation.json", "before_after.md"):
        if (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    return found


def stress(runs_dir: Path, seed: int, kills: int) -> tuple[int, int, list[str]]:
    """Kills, resumes, and what differs at the end."""
    draw = random.Random(seed)
    process = start(runs_dir, "whole")
    assert process.wait() == 0, process.stdout.read()
    done = resumed = 0
    while done < kills:
        process = start(runs_dir, "killed")
        resumed += done > 0
        if not kill_at_random(process, runs_dir / "killed", draw):
            break
        done += 1
    process = start(runs_dir, "killed")
    resumed += 1
    assert process.wait() == 0, process.stdout.read()
    return done, resumed, differences(runs_dir / "whole", runs_dir / "killed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, resumed, found = stress(Path(folder), args.seed, args.kills)
    print(f"kills {done}, resumed {resumed}, differences {len(found)}" + (f": {', '.join(found)}" if found else ""))
    sys.exit(bool(found))
