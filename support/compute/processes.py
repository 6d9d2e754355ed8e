"""The processes of a run under torchrun: how they start, what they exchange, and how they end.

Every process holds the whole batch but runs only its own rows through the models. A sum over the processes then gives
each of them all rows, so all compute rewards, advantages and statistics of the whole batch. DistributedDataParallel
averages the gradients. A single process exchanges nothing.
"""

import os
import re
import socket
import sys
from collections.abc import Callable
from datetime import timedelta

from config import PPOConfig
from support.common.errors import UserError, first_line


def below_torchrun() -> bool:
    """Return whether torchrun has started this process, even if it is the only one."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restart_count() -> int:
    """Return how often torchrun --max-restarts has restarted the processes because one of them died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


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
        store = dist.PrefixStore(f"start-{restart_count()}", store)  # torch 2.13 keeps the addresses of dead processes
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except RuntimeError as error:
        hint = "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network interface between the machines"
        raise UserError(f"host {socket.gethostname()}: can't reach the other processes ({first_line(error)}); {hint}")
    if dist.get_rank():  # because libraries print, too
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def set_timeout(seconds: float) -> None:
    """Set how long a process waits for the others from now on."""
    if process_group():
        # Private, since torch 2.1: the public way needs the time before the command line is known
        process_group().distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


# ----------------------------------------------------------------------------------------------
# What they exchange


def process_group():
    """Return torch.distributed if this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return process_group().get_rank() if process_group() else 0


def world_size() -> int:
    return process_group().get_world_size() if process_group() else 1


def rows_of_rank(n: int) -> slice:
    """Return the rows, out of n, that this process computes. The parts are contiguous and differ by at most one row."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_reduce_sum(rows):
    """Sum a tensor over the processes, in place. If each filled only its `rows_of_rank`, this fills all rows."""
    if process_group():
        process_group().all_reduce(rows)
    return rows


def all_gather(value) -> list:
    """Return the values of all processes, in the order of ranks."""
    values = [value] * world_size()
    if process_group():
        process_group().all_gather_object(values, value)
    return values


def broadcast_from_rank_0(function: Callable):
    """Return rank 0's result of function() on every rank. A UserError or SystemExit is raised on every rank, too."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except (UserError, SystemExit) as error:
            outcome = [None, error]
    if process_group():
        process_group().broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def on_all_ranks(function: Callable):
    """Return function(), called on every rank. If any rank raises a UserError, raises the first one on every rank, with
    the name of the host if that isn't rank 0's."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    outcomes = all_gather((error, socket.gethostname()))
    for error, host in outcomes:
        if error is not None:
            if host != outcomes[0][1]:
                error.args = (f"on host {host}: {error}", *error.args[1:])
            raise error
    return result


def check_same(values: dict[str, str]) -> None:
    """Raise UserError on every rank if any value differs from that of rank 0."""
    everyone = all_gather((values, socket.gethostname()))
    expected, first_host = everyone[0]
    for found, host in everyone:
        for name, value in expected.items():
            if found[name] != value:
                raise UserError(f"{name} must agree on all hosts: {first_host} has {value}, {host} has {found[name]}")


# ----------------------------------------------------------------------------------------------
# How they end


def say_why(line: str) -> None:
    """Print why this process ends, once per machine."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"train_ppo.py: error: {line}", file=sys.stderr)


def lost_process(error: Exception) -> str | None:
    """Return a message if an exception means that another process is lost, None if it means anything else."""
    if process_group() is None or not isinstance(error, RuntimeError) or not re.search("gloo|NCCL", str(error)):
        return None
    return f"another process or machine died or didn't answer within --process_timeout ({first_line(error)})"


def exit_process(code: int) -> None:
    """End this process: one of several without cleanup, since the group's threads may hang or abort during it."""
    if process_group():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)
