"""What the processes of a run exchange, with torch.distributed.

Every process holds the whole batch, which is small, and takes its own rows of it through the models, which is the
work. `all_reduce_sum` puts the rows together, so that everything after it (rewards, advantages, whitening, statistics)
is computed by every process alike, from the whole batch. Gradients are averaged by DistributedDataParallel. In a
process that is alone every function here does nothing.
"""

import os
import socket
import sys
from collections.abc import Callable

from support.errors import UserError


def process_group():
    """torch.distributed where this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return process_group().get_rank() if process_group() else 0


def world_size() -> int:
    return process_group().get_world_size() if process_group() else 1


# ----------------------------------------------------------------------------------------------
# The batch


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


def all_reduce_max(number: int) -> int:
    """The largest of the processes' numbers."""
    if process_group() is None:
        return number
    import torch

    largest = torch.tensor(number)
    process_group().all_reduce(largest, process_group().ReduceOp.MAX)
    return int(largest)


# ----------------------------------------------------------------------------------------------
# Results and errors


def all_gather(value) -> list:
    """Every process's value, by rank."""
    values = [value] * world_size()
    if process_group():
        process_group().all_gather_object(values, value)
    return values


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
    """function(), run by every process for itself. Where it raises UserError on any, all raise the first of them.

    A message from another machine than rank 0's says from which.
    """
    result = error = None
    try:
        result = function()
    except UserError as raised:
        error = raised
    outcomes = all_gather((error, socket.gethostname()))
    for error, host in outcomes:
        if error is not None and host != outcomes[0][1]:
            error.args = (f"on host {host}: {error}", *error.args[1:])
        if error is not None:
            raise error
    return result


def local_rank_0_first(function: Callable):
    """function() on one process of each machine, then on the others, which find what it fetched or built."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_all_ranks(lambda: function() if first else None)
    return on_all_ranks(lambda: result if first else function())


def check_same(values: dict[str, str]) -> None:
    """UserError, on all processes, where a value is not that of rank 0."""
    everyone = all_gather((values, socket.gethostname()))
    expected, first_host = everyone[0]
    for found, host in everyone:
        for name, value in expected.items():
            if found[name] != value:
                difference = f"{name} is {value} on host {first_host} and {found[name]} on host {host}"
                raise UserError(f"{difference}: all processes need the same")


def broadcast_weights(model) -> None:
    """Give a model rank 0's weights, in place."""
    for tensor in model.state_dict().values():
        process_group().broadcast(tensor, 0)
