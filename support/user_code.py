"""A user's own code: what it sets stays its own, and what it hands over is read in any usual form."""

import contextlib
import importlib
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real

import torch

from support.errors import UserError, first_line

SETTINGS = [  # (read, write) of what holds for the whole process
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, torch.set_default_device),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    (torch.get_num_threads, torch.set_num_threads),
    (os.getcwd, os.chdir),
]
its_own = {}  # how the user's code left them, by the function that writes them


@contextlib.contextmanager
def apart():
    """Run a user's code under the settings that it left last, and put the program's own back after it.

    The random generators are shared: nothing in training draws from them, and checkpoints keep their state. It sees no
    command line: the flags are not meant for it.
    """
    global its_own
    ours, argv = {write: read() for read, write in SETTINGS}, sys.argv
    sys.argv = argv[:1]
    with torch.inference_mode(False):  # at its end also what was switched on inside is off
        for write, value in its_own.items():
            write(value)
        try:
            yield
        finally:
            its_own = {write: value for read, write in SETTINGS if (value := read()) != ours[write]}
            for write in its_own:
                write(ours[write])
            sys.argv = argv


def import_function(spec: str) -> Callable:
    """Import the function that 'module:function' names, from the working directory or Python's path.

    This runs the module's code. Raises UserError if that fails or if there is no such function.
    """
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a reward.py there doesn't hide this program's
    try:
        with apart():
            function = getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {spec} cannot be imported ({first_line(error)}); give module:function")
    if not callable(function) or isinstance(function, type):
        raise UserError(f"--reward {spec} must be a function, not a {type(function).__name__}")
    return function


def listed(values) -> list | None:
    """The entries of a list, tuple, tensor, array, series or generator; None of what has none, or none in order."""
    values = values.tolist() if hasattr(values, "tolist") else values
    ordered = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set))
    return list(values) if ordered else None


def to_float32(values: list) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Numbers of any library as (n,) float32 on the CPU; and which are no finite numbers there, with how they look."""
    floats = [to_float(value) for value in values]
    numbers = torch.tensor(floats, dtype=torch.float32, device="cpu")
    wrong = (~numbers.isfinite()).nonzero().flatten().tolist()
    return numbers, [(i, shown(values[i]) if math.isnan(floats[i]) else str(floats[i])) for i in wrong]


def to_float(value) -> float:
    """A number of Python's, NumPy's or torch's; NaN for anything else, infinity beyond all floats."""
    if hasattr(value, "item") and math.prod(value.shape) == 1:
        value = value.item()
    try:
        return float(value) if isinstance(value, (Real, Decimal)) else math.nan
    except OverflowError:
        return math.inf


def to_ids(values) -> torch.Tensor | None:
    """Whole numbers, in a list or 1-d in a tensor or array, as int64 on the CPU; None of anything else."""
    try:
        ids = torch.as_tensor(values, device="cpu")
    except Exception:  # texts, None, lists of unequal lists: torch has many words for what it cannot read
        return None
    whole = ids.dtype != torch.bool and torch.can_cast(ids.dtype, torch.int64)
    return ids.long() if ids.dim() == 1 and (whole or not len(ids)) else None


def shown(value) -> str:
    """A value of any kind and size as a few words on one line."""
    return " ".join(reprlib.repr(value).split())
