"""The processes of one run, with the environment that torchrun gives them, and rewards for them.

They are forked from a server that has loaded the libraries, so that not each of them takes seconds for that.
"""

import multiprocessing
import os
import re
import signal
import sys
from pathlib import Path

from torch.distributed import TCPStore

LIBRARIES = ["torch", "torch.distributed", "torch.multiprocessing", "matplotlib.pyplot", "transformers.pipelines"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bert")]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*LIBRARIES, "tests.conftest", "train_ppo", "support.run_folder"])


class Ranks:
    """n processes that call function(rank, *arguments) in `folder`; what they print is in the files RANK.out, RANK.err.
    restarts: how often torchrun has started them before."""

    def __init__(self, folder: Path, function, *arguments, n=2, restarts=0):
        self.folder, self.processes = folder, []
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(n):
            environment = {"RANK": rank, "WORLD_SIZE": n, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": n}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
            environment |= {"TORCHELASTIC_RESTART_COUNT": restarts, "TORCHELASTIC_RUN_ID": "job"}
            environment |= {"TORCHELASTIC_USE_AGENT_STORE": True}
            environment = {name: str(value) for name, value in environment.items()}
            process = context.Process(target=call, args=(folder, environment, function, arguments))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """The exit codes. Kills a run that hangs."""
        for process in self.processes:
            process.join(240)
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]

    def out(self, rank: int) -> str:
        """stdout, without the lines that Gloo in torch 2.9 prints about its connections."""
        printed = (self.folder / f"{rank}.out").read_text(encoding="utf-8")
        return re.sub(r"^\[Gloo\] Rank .*\n", "", printed, flags=re.MULTILINE)

    def err(self, rank: int) -> str:
        return (self.folder / f"{rank}.err").read_text(encoding="utf-8")


def call(folder: Path, environment: dict[str, str], function, arguments) -> None:
    import torch

    os.environ.update(environment)
    rank = int(environment["RANK"])
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # with a buffer, as a file has it
    os.chdir(folder)
    torch.set_num_threads(1)
    function(rank, *arguments)


def program(rank: int, flags: list[str]) -> None:
    """`python train_ppo.py FLAGS`, without the picture."""
    from support import meeting, run_folder
    from train_ppo import main

    run_folder.draw = lambda runs, out: out.touch()
    meeting.exit_process(main(flags))


# ----------------------------------------------------------------------------------------------
# Rewards, as tests.ranks:NAME. Something happens to rank 1 at step 5 of the first start, if its share of a batch is 8.

SHARE, STEP = 8, 5
shares = []


def lengths(texts: list[str], happens) -> list[float]:
    shares.extend([texts] if len(texts) == SHARE else [])
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if os.environ.get("RANK") == "1" and first_start and len(texts) == SHARE and len(shares) == STEP:
        happens()
    return [len(text) / 20 for text in texts]


def killed(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: os.kill(os.getpid(), signal.SIGKILL))


def interrupted(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: os.kill(os.getpid(), signal.SIGINT))


def fails(texts: list[str]) -> list[float]:
    return lengths(texts, lambda: {}["no such word"])
