"""One run on several processes, with torch.distributed: NCCL between GPUs, Gloo between CPUs.

Every process holds the whole batch, which is small, and takes its own share of it through the models, which is the work.
`whole` puts the shares together, so that everything after it (rewards, advantages, whitening, statistics) is computed by
every process alike, from the whole batch. Gradients are averaged by DistributedDataParallel. In a process that is alone
every function here does nothing.
"""

import os
import sys
from collections.abc import Callable

from config import UserError


def group():
    """torch.distributed where this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return group().get_rank() if group() else 0


def world_size() -> int:
    return group().get_world_size() if group() else 1


def restarts() -> int:
    """How often torchrun has started this process anew because one of the run's processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join() -> None:
    """Enter the group that torchrun's environment variables describe, if they do. From here on rank 0 alone prints.

    A restarted group must not meet its dead processes' addresses in torchrun's store, so its keys have a prefix.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    import torch.distributed as dist

    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start-{restarts()}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if rank:
        sys.stdout = open(os.devnull, "w")


def end(code: int) -> None:
    """End this process with an exit code. One of several does so at once: while Python takes itself down, the group's
    threads may abort or hang a process whose work is done."""
    if group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def died(error: Exception) -> bool:
    """Whether an exception only says that another process of the group is gone."""
    return group() is not None and isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))


# ----------------------------------------------------------------------------------------------
# The batch and its gradient


def share(n: int) -> slice:
    """The rows, of n, that are this process's work: a contiguous part, parts differing by one row at most."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def whole(rows):
    """A tensor that each process filled at its own `share` and left 0 elsewhere -> the same tensor filled, in place."""
    if group():
        group().all_reduce(rows)
    return rows


def mean(tensor):
    """A tensor's mean over the processes, in place."""
    if group():
        group().all_reduce(tensor.div_(world_size()))
    return tensor


# ----------------------------------------------------------------------------------------------
# Results and errors


def from_rank_0(function: Callable):
    """function() as rank 0 computed it, on every process. Where it raises UserError or SystemExit, all raise that."""
    outcome = [None, None]
    if rank() == 0:
        try:
            outcome = [function(), None]
        except (UserError, SystemExit) as error:
            outcome = [None, error]
    if group():
        group().broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


def together(function: Callable):
    """function(), which every process runs for itself. Where it raises UserError on any, all raise the first of them."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    errors = [error] * world_size()
    if group():
        group().all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    return result


def once_per_machine(function: Callable):
    """function() on one process of each machine, then on the others, which find what it fetched or built."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = together(lambda: function() if first else None)
    return together(lambda: result if first else function())


def largest(number: int) -> int:
    """The largest of the processes' numbers."""
    if group() is None:
        return number
    numbers = [0] * world_size()
    group().all_gather_object(numbers, number)
    return max(numbers)
