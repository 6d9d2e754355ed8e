"""The processes of one run on this machine, with the environment that torchrun gives them, and rewards for them.

They are forked from a server that has loaded the libraries: what each would take seconds for is done once.
"""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from torch import distributed as dist

LIBRARIES = ["torch", "torch.distributed", "torch.multiprocessing", "matplotlib.pyplot", "transformers.pipelines"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert")]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*LIBRARIES, "tests.conftest", "train_ppo", "support.run_folder"])


class Ranks:
    """n processes that call function(rank, *arguments) in `folder`, their output in the files RANK.out and RANK.err.

    on_hosts: each takes itself to be alone on a machine, gpu-1, gpu-2, ..., and works in a folder there, m0, m1, ...
    restarts: how often torchrun has started each anew. store: that of torchrun's agent; without one rank 0 opens it.
    """

    def __init__(self, folder: Path, function, *arguments, n=2, on_hosts=False, restarts=(0, 0, 0, 0), store=None):
        self.folder, self.store, self.processes = folder, store, []
        port = store.port if store else free_port()
        for rank in range(n):
            local = (
                {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1} if on_hosts else {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
            )
            counts = {"RANK": rank, "WORLD_SIZE": n, "TORCHELASTIC_RESTART_COUNT": restarts[rank], **local}
            agent = {"TORCHELASTIC_USE_AGENT_STORE": bool(store), "TORCHELASTIC_RUN_ID": "job"}
            agent |= {"TORCHELASTIC_ERROR_FILE": folder / f"{rank}.json"}
            environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **counts, **agent}
            environment = {name: str(value) for name, value in environment.items()}
            process = context.Process(target=call, args=(folder, environment, on_hosts, function, arguments))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """The exit codes; a run that hangs is killed."""
        deadline = time.monotonic() + 120
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def out(self, rank: int) -> str:
        """Without the lines in which Gloo, in torch 2.9, says to how many it is connected."""
        printed = (self.folder / f"{rank}.out").read_text(encoding="utf-8")
        return re.sub(r"^\[Gloo\] Rank .*\n", "", printed, flags=re.MULTILINE)

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text(encoding="utf-8")


def agents_store() -> dist.TCPStore:
    """A store as torchrun's agent keeps it, which outlives the processes of a start."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def call(folder: Path, environment: dict[str, str], on_hosts: bool, function, arguments) -> None:
    import torch

    os.environ.update(environment)
    rank = int(environment["RANK"])
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # with a buffer, as a file has it
    os.chdir(folder)
    if on_hosts:
        os.makedirs(f"m{rank}", exist_ok=True)
        os.chdir(f"m{rank}")
        socket.gethostname = lambda: f"gpu-{rank + 1}"
    torch.set_num_threads(1)
    function(rank, *arguments)


def program(rank: int, flags: list[str]) -> None:
    """`python train_ppo.py FLAGS`"""
    from support import meeting
    from train_ppo import main

    meeting.exit_process(main(flags))


# ----------------------------------------------------------------------------------------------
# Rewards: tests.ranks:NAME. What they do to rank 1 they do when they are called for the eighth of a batch of 16 that is
# its share, at the fifth step; the judgement's share is a smaller one.

SHARE, STEP = 8, 5
shares = []


def is_time(texts: list[str]) -> bool:
    """Whether this is rank 1, at work on its share of the batch of step 5, in the first start."""
    if len(texts) == SHARE:
        shares.append(texts)
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    return os.environ.get("RANK") == "1" and first_start and len(texts) == SHARE and len(shares) == STEP


def lengths(texts: list[str]) -> list[float]:
    return [len(text) / 20 for text in texts]


def killed(texts: list[str]) -> list[float]:
    if is_time(texts):
        os.kill(os.getpid(), signal.SIGKILL)
    return lengths(texts)


def interrupted(texts: list[str]) -> list[float]:
    if is_time(texts):
        os.kill(os.getpid(), signal.SIGINT)
    return lengths(texts)


def terminated(texts: list[str]) -> list[float]:
    if is_time(texts):
        os.kill(os.getpid(), signal.SIGTERM)
    return lengths(texts)


def fails(texts: list[str]) -> list[float]:
    if is_time(texts):
        raise KeyError("no such word")
    return lengths(texts)
