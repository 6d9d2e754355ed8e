"""Kill a demo run with SIGKILL at random moments, resume it each time, and compare the end with an uninterrupted run.

    python -m tools.stress_resume [--seed 1] [--kills 25]
    python -m tools.stress_resume --every_write [--seconds 600]

About every second kill waits for a checkpoint that is just being written. Prints `kills N, resumed N, differences 0`;
the exit code is 1 where anything differs. The quick suite resumes what a kill would leave at each flush of a file.

With --every_write a small run is killed once at each of the system calls by which it changes the disk, both a new run
and one that goes on past its end with logs that are ahead of its checkpoint; in a random order, until the seconds are
over. Linux, with strace and the right to use it.
"""

import argparse
import contextlib
import csv
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
    for name in ("samples.jsonl", "model/model.safetensors", "evaluation.json", "results.json"):
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


# ----------------------------------------------------------------------------------------------
# At every system call that changes the disk

WRITES = "write,writev,pwrite64,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir,fsync,ftruncate"
SMALL = [*FLAGS, "--eval_samples", "4", "--save_every", "1", "--keep_checkpoints", "1", "--run_name", "run"]


def forked(flags: list[str], strace: list[str] | None = None) -> tuple[int, str]:
    """The exit code of train_ppo.main(flags) in a process forked from this one, -9 where killed; and what it said.

    strace: its options; it is attached before the first flag is read.
    """
    reading, writing = os.pipe()
    if (process := os.fork()) == 0:
        said = io.StringIO()  # no system call, and nobody's terminal
        code = 3
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                if strace:
                    os.kill(os.getpid(), signal.SIGSTOP)
                code = sys.modules["train_ppo"].main(flags)
            finally:
                if not strace:
                    os.write(writing, said.getvalue()[-2000:].encode())
                os._exit(code)
    os.close(writing)
    if strace:
        os.waitpid(process, os.WUNTRACED)
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(process), *strace])
        while "TracerPid:\t0\n" in Path(f"/proc/{process}/status").read_text():
            time.sleep(0.01)
            assert tracer.poll() is None, "strace may not trace here"
        os.kill(process, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if strace:
        tracer.wait()
    with open(reading, encoding="utf-8", errors="replace") as file:
        return code, file.read()


def at_every_write(folder: Path, seed: int, seconds: float) -> tuple[dict[str, list[int]], list[str]]:
    """For each way of starting, how many kills there were and how many calls; and what was wrong after any of them."""
    import torch

    import train_ppo
    from support import run_folder
    from support.files import whole

    def draw(runs, out):  # in place of a picture, which takes longer than the run
        with whole(out) as partial:
            partial.write_bytes(b"a picture")

    torch.set_num_threads(1)
    run_folder.draw = draw
    started, wrong, counts = time.monotonic(), [], {}
    for name, episodes in (("short", 16), ("long", 48)):  # here, so that what is forked has all libraries already
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = train_ppo.main([*SMALL, "--runs_dir", str(folder / name), "--episodes", str(episodes)])
        assert code == 0
    expected, ahead = folder / "long" / "run", folder / "ahead"
    shutil.copytree(folder / "short" / "run", ahead)
    for log in ("metrics.csv", "samples.jsonl"):
        shutil.copy(expected / log, ahead)

    def killed(way: str, strace: list[str]) -> tuple[int, Path]:
        """A run killed as strace's options say: its exit code, and its folder."""
        shutil.rmtree(folder / "killed", ignore_errors=True)
        run_dir = folder / "killed" / "run"
        if way == "new":
            return forked([*SMALL, "--runs_dir", str(run_dir.parent), "--episodes", "48"], strace)[0], run_dir
        shutil.copytree(ahead, run_dir)
        return forked(["--resume", str(run_dir), "--episodes", "48"], strace)[0], run_dir

    moments = []
    for way in ("new", "raised"):
        log = folder / f"{way}.strace"
        code, _ = killed(way, ["-e", f"trace={WRITES}", "-o", str(log)])
        assert code == 0, f"the {way} run ends with {code} below strace"
        calls = Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE))
        counts[way] = [0, calls.total()]
        moments += [(way, call, number) for call in calls for number in range(1, calls[call] + 1)]
    for way, call, number in random.Random(seed).sample(moments, len(moments)):
        if time.monotonic() - started > seconds:
            break
        inject = f"inject={call}:signal=KILL:when={number}"  # strace counts each call by itself
        code, run_dir = killed(way, ["-e", f"trace={call}", "-e", inject, "-o", "/dev/null"])
        counts[way][0] += code == -signal.SIGKILL
        if not (run_dir / "config.json").exists():
            begun = way == "raised" or list(run_dir.glob("checkpoints/*"))  # else nothing had been done there yet
            lost = ["config.json"] if begun else []
        else:
            code, said = forked(["--resume", str(run_dir), "--episodes", "48"])
            lost = [said.strip().splitlines()[-1]] if code else differences(expected, run_dir)
            lost += [str(path.relative_to(run_dir)) for path in run_dir.rglob(".partial-*")]
        if lost:
            wrong.append(f"{way} run, killed at {call} {number}: {', '.join(lost)}")
            print(wrong[-1])
    return counts, wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--every_write", action="store_true")
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.every_write:
            counts, found = at_every_write(Path(folder), args.seed, args.seconds)
            for way, (kills, calls) in counts.items():
                print(f"{way} run: {kills} kills, each at another of its {calls} system calls that change the disk")
            print(f"runs that did not go on to the same end: {len(found)}")
        else:
            done, resumed, found = stress(Path(folder), args.seed, args.kills)
            said = f": {', '.join(found)}" if found else ""
            print(f"kills {done}, resumed {resumed}, differences {len(found)}{said}")
    sys.exit(bool(found))
