"""Values in any form that users hand over: lists, tensors, arrays, series, Decimals."""

import math
import reprlib
from collections.abc import Iterable, Mapping, Set
from decimal import Decimal
from numbers import Real

import torch


def listed(values) -> list | None:
    """The entries of a list, tuple, tensor, array, series or generator. None for anything else, such as a dict."""
    values = values.tolist() if hasattr(values, "tolist") else values
    ordered = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set))
    return list(values) if ordered else None


def to_float32(values: list) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Numbers of any library as a tensor (n,) float32, and (index, text) of each that isn't a finite number there."""
    floats = []
    for value in values:
        if hasattr(value, "item") and math.prod(value.shape) == 1:
            value = value.item()
        floats.append(float(value) if isinstance(value, (Real, Decimal)) else math.nan)
    numbers = torch.tensor(floats, dtype=torch.float32)
    return numbers, [(i, shown(values[i])) for i in (~numbers.isfinite()).nonzero().flatten().tolist()]


def to_ids(values) -> torch.Tensor | None:
    """Token ids in a list, a 1-d tensor or a 1-d array as int64 on the CPU. None if they aren't integers."""
    try:
        ids = torch.as_tensor(values, device="cpu")
    except Exception:  # torch raises many kinds for texts, None or lists of unequal lengths
        return None
    whole = ids.dtype != torch.bool and torch.can_cast(ids.dtype, torch.int64)
    return ids.long() if ids.dim() == 1 and (whole or not len(ids)) else None


def shown(value) -> str:
    """A value of any type and size in a few words on one line."""
    return " ".join(reprlib.repr(value).split())
