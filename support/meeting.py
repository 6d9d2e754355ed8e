"""The processes of a run under torchrun: how they start and how they end."""

import os
import re
import socket
import sys
from datetime import timedelta

from config import PPOConfig
from support.collectives import process_group
from support.errors import UserError, first_line


def restart_count() -> int:
    """How often torchrun has started the processes again because one of them had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def below_torchrun() -> bool:
    """Whether torchrun has started this process, even if it is the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def init_process_group() -> None:
    """Join the other processes of torchrun, if any. From then on only rank 0 prints. Raises UserError if that fails."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=PPOConfig.process_timeout)
    try:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"start-{restart_count()}", store)  # it still has the addresses of dead processes
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        hint = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface between the machines"
        raise UserError(f"host {socket.gethostname()}: found no other process ({first_line(error)}); {hint}")
    if rank:  # libraries print, too
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def set_timeout(seconds: float) -> None:
    """Set how long a process waits for the others from now on."""
    if process_group():
        # Private, since torch 2.1: the public way needs the time before the command line is known
        process_group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def say_why(line: str) -> None:
    """Print why this process ends, once per machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"train_ppo.py: error: {line}", file=sys.stderr)


def lost_process(error: Exception) -> str | None:
    """In words, that an exception means the loss of another process; None if it means anything else."""
    if process_group() is None or not isinstance(error, RuntimeError) or not re.search("gloo|NCCL", str(error)):
        return None
    return f"another process or machine is gone, or was silent for --process_timeout ({first_line(error)})"


def exit_process(code: int) -> None:
    """End this process. One of several ends at once, since the group's threads may hang or abort its shutdown."""
    if process_group():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
