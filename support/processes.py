"""One run on several processes, with torch.distributed: NCCL between GPUs, Gloo between CPUs.

Every process holds the whole batch, which is small, and takes its own rows of it through the models, which is the
work. `all_reduce_sum` puts the rows together, so that everything after it (rewards, advantages, whitening, statistics)
is computed by every process alike, from the whole batch. Gradients are averaged by DistributedDataParallel. In a
process that is alone every function here does nothing.
"""

import ctypes
import os
import sys
from collections.abc import Callable

from config import UserError


def process_group():
    """torch.distributed where this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return process_group().get_rank() if process_group() else 0


def world_size() -> int:
    return process_group().get_world_size() if process_group() else 1


def restart_count() -> int:
    """How often torchrun has started this process anew because one of the run's processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def init_process_group() -> None:
    """Enter the group that torchrun's environment variables describe, if they do. From here on rank 0 alone prints.

    A restarted group must not meet its dead processes' addresses in torchrun's store, so its keys have a prefix.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    import torch
    import torch.distributed as dist

    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"start-{restart_count()}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    if rank:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def exit_process(code: int) -> None:
    """End this process with an exit code. One of several does so at once: while Python takes itself down, the group's
    threads may abort or hang a process whose work is done."""
    if process_group():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def lost_another_process(error: Exception) -> bool:
    """Whether an exception only says that another process of the group is gone."""
    return (
        process_group() is not None
        and isinstance(error, RuntimeError)
        and ("gloo" in str(error) or "NCCL" in str(error))
    )


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks. It hands them back otherwise, and each tensor of logits would come in anew,
    page fault by page fault: a sixth of a step on a CPU (docs/speed.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


# ----------------------------------------------------------------------------------------------
# The batch and its gradient


def rows_of_rank(n: int) -> slice:
    """The rows, of n, that are this process's work: a contiguous part, parts differing by one row at most."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_reduce_sum(rows):
    """A tensor's sum over the processes, in place. Where each filled its `rows_of_rank` only, all rows are filled."""
    if process_group():
        process_group().all_reduce(rows)
    return rows


def all_reduce_mean(tensor):
    """A tensor's mean over the processes, in place."""
    if process_group():
        process_group().all_reduce(tensor.div_(world_size()))
    return tensor


# ----------------------------------------------------------------------------------------------
# Results and errors


def broadcast_from_rank_0(function: Callable):
    """function() as rank 0 computed it, on every process. Where it raises UserError or SystemExit, all raise that."""
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
    """function(), run by every process for itself. Where it raises UserError on any, all raise the first of them."""
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    errors = [error] * world_size()
    if process_group():
        process_group().all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error
    return result


def local_rank_0_first(function: Callable):
    """function() on one process of each machine, then on the others, which find what it fetched or built."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_all_ranks(lambda: function() if first else None)
    return on_all_ranks(lambda: result if first else function())


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if process_group() is None:
        return number
    numbers = [0] * world_size()
    process_group().all_gather_object(numbers, number)
    return max(numbers)
