"""Kill a demo run with SIGKILL at random moments, resume it each time, and compare with an uninterrupted run.

    python -m tools.stress_resume [--seed 1] [--kills 25]

About every second kill comes while a checkpoint is being written. Prints `kills N, resumed N, differences 0`;
the exit code is 1 if anything differs.
"""

import argparse
import csv
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--preset demo --device cpu --episodes 3200 --batch_size 16 --minibatch_size 8 --eval_samples 32".split()
FLAGS += "--save_every 2 --log_samples_every 0".split()
COMPARED = ("samples.jsonl", "model/model.safetensors", "model/value_head.safetensors", "evaluation.json")


def start(runs_dir: Path, name: str) -> subprocess.Popen:
    """Start the run, or resume it if its folder exists. Its output goes to a file."""
    run_dir = runs_dir / name
    resumed = (run_dir / "config.json").exists()
    flags = ["--resume", str(run_dir)] if resumed else [*FLAGS, "--runs_dir", str(runs_dir), "--run_name", name]
    if run_dir.exists() and not resumed:
        shutil.rmtree(run_dir)  # killed between making the folder and writing the config
    with (runs_dir / f"{name}.out").open("w") as out:
        command = [sys.executable, str(ROOT / "train_ppo.py"), *flags]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def finish(runs_dir: Path, name: str) -> None:
    """Start or resume the run and wait until it ends."""
    if start(runs_dir, name).wait():
        sys.exit(f"the run failed:\n{(runs_dir / f'{name}.out').read_text()}")


def steps_logged(run_dir: Path) -> int:
    metrics = run_dir / "metrics.csv"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def kill_at_random(process: subprocess.Popen, run_dir: Path, draw: random.Random) -> bool:
    """Kill after a random number of new steps, perhaps while a checkpoint is written. Returns False if the run ended
    first."""
    first, wanted = steps_logged(run_dir), draw.randrange(5)
    waited, in_checkpoint = draw.uniform(0, 0.3), draw.random() < 0.5
    while process.poll() is None and steps_logged(run_dir) < first + wanted:
        time.sleep(0.01)
    time.sleep(waited)
    while in_checkpoint and process.poll() is None and not list(run_dir.glob("checkpoints/.partial-*")):
        time.sleep(0.0005)
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    return True


def differences(one: Path, other: Path) -> list[str]:
    """Return what differs between two finished runs: metrics except times, samples, weights, evaluation."""
    tables = []
    for run_dir in (one, other):
        with (run_dir / "metrics.csv").open(newline="") as file:
            tables.append([{k: v for k, v in row.items() if not k.startswith("time/")} for row in csv.DictReader(file)])
    found = [] if tables[0] == tables[1] else ["metrics.csv"]
    return found + [name for name in COMPARED if (one / name).read_bytes() != (other / name).read_bytes()]


def stress(runs_dir: Path, seed: int, kills: int) -> tuple[int, list[str]]:
    """Return how often the run was killed and resumed, and what differs at the end."""
    draw = random.Random(seed)
    finish(runs_dir, "whole")
    done = 0
    while done < kills and kill_at_random(start(runs_dir, "killed"), runs_dir / "killed", draw):
        done += 1
    finish(runs_dir, "killed")
    return done, differences(runs_dir / "whole", runs_dir / "killed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=25)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, found = stress(Path(folder), args.seed, args.kills)
    print(f"kills {done}, resumed {done}, differences {len(found)}", *found)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
