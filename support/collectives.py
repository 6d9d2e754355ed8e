"""What the processes of a run exchange, with torch.distributed. Without other processes nothing is exchanged.

Every process holds the whole batch, computes its own rows of it with the models and gets the others' by a sum, so that
all compute rewards, advantages and statistics of the whole batch. DistributedDataParallel averages the gradients.
"""

import os
import socket
import sys
from collections.abc import Callable

from support.errors import UserError


def process_group():
    """torch.distributed if this process is one of several, else None. Imports nothing."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    return process_group().get_rank() if process_group() else 0


def world_size() -> int:
    return process_group().get_world_size() if process_group() else 1


def rows_of_rank(n: int) -> slice:
    """The rows, out of n, that this process computes. The parts are contiguous and differ by at most one row."""
    return slice(n * rank() // world_size(), n * (rank() + 1) // world_size())


def all_reduce_sum(rows):
    """Sum a tensor over the processes, in place. If each filled only its `rows_of_rank`, this fills all rows."""
    if process_group():
        process_group().all_reduce(rows)
    return rows


def all_gather(value) -> list:
    """Every process's value, in the order of ranks."""
    values = [value] * world_size()
    if process_group():
        process_group().all_gather_object(values, value)
    return values


def broadcast_from_rank_0(function: Callable):
    """function() as rank 0 computed it, on every rank. Raises UserError or SystemExit on every rank if rank 0 does."""
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
    """function(), computed by every rank for itself. Raises the first UserError on every rank if any rank raises one,
    with the name of the host if that isn't rank 0's."""
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


def local_rank_0_first(function: Callable):
    """function() on one process of each machine, then on the others, which find what the first fetched or built."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = on_all_ranks(lambda: function() if first else None)
    return on_all_ranks(lambda: result if first else function())


def check_same(values: dict[str, str]) -> None:
    """Raises UserError on every rank if any value differs from that of rank 0."""
    everyone = all_gather((values, socket.gethostname()))
    expected, first_host = everyone[0]
    for found, host in everyone:
        for name, value in expected.items():
            if found[name] != value:
                raise UserError(f"{name} is {value} on host {first_host}, but {found[name]} on host {host}")


def broadcast_weights(model) -> None:
    """Give a model rank 0's weights, in place."""
    for tensor in model.state_dict().values():
        process_group().broadcast(tensor, 0)
