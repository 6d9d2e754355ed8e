"""Starts the processes of one run in the environment that torchrun gives them, and has rewards for such runs.

The processes are forked from a server that has already imported the libraries, which saves seconds per process.
"""

import multiprocessing
import os
import re
import runpy
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

from torch.distributed import TCPStore

from tests.helpers import ROOT

context = multiprocessing.get_context("forkserver")
GPT2 = "transformers.models.gpt2.modeling_gpt2"
context.set_forkserver_preload(["tests.conftest", "train_ppo", "support.run.load", "support.run.run_folder", GPT2])
if multiprocessing.current_process().name == "MainProcess":
    forkserver.ensure_running()  # imports the libraries while other tests run


class Ranks:
    """n processes that call function(rank, *arguments) in `folder` and print to the files RANK.out and RANK.err.
    If `torchrun` is True, torchrun's own agent starts them, and restarts them once if one dies."""

    def __init__(self, folder: Path, function, *arguments, n=2, torchrun=False):
        self.folder, self.processes = folder, []
        if torchrun:
            self.start(launch, folder, n, function, arguments)
            return
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(n):
            environment = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "TORCHELASTIC_RUN_ID": "job"}
            environment |= {"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_USE_AGENT_STORE": True}
            self.start(call, folder, function, arguments, {name: str(value) for name, value in environment.items()})

    def start(self, target, *arguments) -> None:
        process = context.Process(target=target, args=arguments)
        process.start()
        self.processes.append(process)

    def wait(self) -> list[int]:
        """Wait for all processes and return their exit codes. Processes that hang are killed."""
        for process in self.processes:
            process.join(240)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def out(self, rank: int) -> str:
        """Return a rank's stdout, without the lines that Gloo in torch 2.9 prints about its connections."""
        printed = (self.folder / f"{rank}.out").read_text(encoding="utf-8")
        return re.sub(r"^\[Gloo\] Rank .*\n", "", printed, flags=re.MULTILINE)

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text(encoding="utf-8")


def redirect(folder: Path, name: str) -> None:
    out, err = (os.open(folder / f"{name}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND) for kind in ("out", "err"))
    os.dup2(err, 2)
    print_to(out)


def print_to(descriptor: int) -> None:
    os.dup2(descriptor, 1)
    sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # buffered, like a file


def launch(folder: Path, n: int, function, arguments) -> None:
    """Start processes like `torchrun --standalone --nproc-per-node n --max-restarts 1`."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from support.compute import processes

    redirect(folder, "torchrun")
    processes.exit_process = sys.exit  # the agent waits forever for a process without a return value
    config = LaunchConfig(1, 1, n, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=1)
    config.start_method, config.monitor_interval = "fork", 0.1
    elastic_launch(config, call)(folder, function, arguments)


def call(folder: Path, function, arguments, environment={}) -> None:
    import torch

    os.environ.update(environment)
    redirect(folder, os.environ["RANK"])
    os.chdir(folder)
    torch.set_num_threads(1)
    function(int(os.environ["RANK"]), *arguments)


def program(rank: int, flags: list[str], read=True) -> None:
    """Run `python train_ppo.py FLAGS` without drawing. read: whether anything reads its output."""
    import plot_rewards

    if not read:
        reader, broken = os.pipe()
        os.close(reader)
        print_to(broken)
    plot_rewards.draw = lambda runs, out: out.touch()
    sys.argv = ["train_ppo.py", *flags]
    runpy.run_path(str(ROOT / "train_ppo.py"), run_name="__main__")


SHARE, STEP = 8, 5
shares = []


def lengths(texts: list[str], happens) -> list[float]:
    """Score texts by their length, and call happens() on rank 1 in step 5 of the first attempt.

    Only calls with 8 texts, a rank's share of a training batch, count as steps.
    """
    shares.extend([texts] if len(texts) == SHARE else [])
    process = os.environ.get("RANK"), os.environ.get("TORCHELASTIC_RESTART_COUNT")
    if process == ("1", "0") and len(texts) == SHARE and len(shares) == STEP:
        happens()
    return [len(text) / 20 for text in texts]


def killed(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: signal.raise_signal(signal.SIGKILL))


def interrupted(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: signal.raise_signal(signal.SIGINT))


def fails(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: {}["no such word"])
