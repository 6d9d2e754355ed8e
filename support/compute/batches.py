"""Prompts and completions as input for the models. Shapes: n completions, T tokens, P tokens of the longest prompt."""

import math
import reprlib
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real

import torch
from torch.nn.utils.rnn import pad_sequence


@dataclass
class Prompts:
    """The distinct prompts of a batch, left-padded, and which of them each completion continues.

    ids (prompts, P) int64. mask (prompts, P) int64, 0 at the padding, or None if all have the same length. index (n,)
    int64 on the CPU: completion i continues prompt index[i]; rows is its copy on the prompts' device, and one_hot is
    (n, prompts) bool. hidden_states (prompts, P, hidden): the output of `SharedPrompts.trunk`, or None.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    index: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def __post_init__(self):
        self.rows = to_device(self.index, self.ids.device)
        self.one_hot = self.rows[:, None] == torch.arange(len(self.ids), device=self.ids.device)

    @classmethod
    def from_tensors(cls, query_tensors: list[torch.Tensor], pad_token_id: int, device) -> "Prompts":
        """Collect the distinct prompts of n 1-d int64 tensors on the CPU, many of which are usually equal."""
        queries = [tuple(query.tolist()) for query in query_tensors]
        rows = {query: row for row, query in enumerate(dict.fromkeys(queries))}
        ids = pad_sequence([torch.tensor(query) for query in rows], True, pad_token_id, padding_side="left")
        padding = torch.tensor([ids.shape[1] - len(query) for query in rows])
        mask = (torch.arange(ids.shape[1]) >= padding[:, None]).long() if padding.any() else None
        index = torch.tensor([rows[query] for query in queries])
        return cls(to_device(ids, device), None if mask is None else to_device(mask, device), index)

    def select(self, rows: torch.Tensor | slice) -> "Prompts":
        """Keep only the prompts of these completions. rows: a slice, or a tensor on the CPU."""
        used, index = self.index[rows].unique(return_inverse=True)
        ids, mask, hidden_states = select_rows(used, self.ids, self.mask, self.hidden_states)
        return Prompts(ids, mask, index, hidden_states)

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        """Repeat a tensor (prompts, ...) of the distinct prompts for each completion, (n, ...). The product with a
        one-hot matrix sums the gradient in float32, always in the same order; indexing would not."""
        return (self.one_hot.to(tensor.dtype) @ tensor.flatten(1)).unflatten(1, tensor.shape[1:])

    def mask_with(self, n_tokens: int) -> torch.Tensor | None:
        """Return the attention mask (n, P + n_tokens) of prompts and n_tokens of their completions, or None."""
        if self.mask is None:
            return None
        mask = self.mask[self.rows]
        return torch.cat([mask, mask.new_ones(len(mask), n_tokens)], dim=1)


@dataclass
class Completions:
    """A batch of completions and the prompts that they continue, on one device.

    ids (n, T) int64, right-padded. mask (n, T) bool, True at the real tokens, including a final [SEP].
    hidden_states (n, T - 1, hidden) as in `prompts`, or None.
    """

    prompts: Prompts
    ids: torch.Tensor
    mask: torch.Tensor
    hidden_states: torch.Tensor | None = None

    def select(self, rows: torch.Tensor | slice) -> "Completions":
        """Keep only these completions. rows: a slice, or a tensor on the CPU."""
        return Completions(self.prompts.select(rows), *select_rows(rows, self.ids, self.mask, self.hidden_states))

    def token_lists(self) -> list[list[int]]:
        """Return the ids of each completion without padding."""
        return [ids[:length] for ids, length in zip(self.ids.tolist(), self.mask.sum(-1).tolist())]


def select_rows(rows: torch.Tensor | slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Select rows of tensors on one device; None stays None. rows: a slice, or a tensor on the CPU."""
    if isinstance(rows, torch.Tensor):
        rows = to_device(rows, tensors[0].device)
    return [None if tensor is None else tensor[rows] for tensor in tensors]


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Move a CPU tensor, without waiting for a CUDA GPU. For an Apple GPU it waits (pytorch issue 189690)."""
    return tensor.to(device, non_blocking=str(device).startswith("cuda"))


# ----------------------------------------------------------------------------------------------
# Numbers and token ids in any form that users may pass: lists, tensors, arrays, series, Decimals


def listed(values) -> list | None:
    """Return the entries of a list, tuple, tensor, array, series or generator; None for anything else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    ordered = isinstance(values, Iterable) and not isinstance(values, (str, bytes, Mapping, Set))
    return list(values) if ordered else None


def to_float32(values: list) -> tuple[torch.Tensor, list[tuple[int, str]]]:
    """Convert numbers of any library to (n,) float32. Also returns (index, text) of each that isn't finite then."""
    floats = []
    for value in values:
        if hasattr(value, "item") and math.prod(value.shape) == 1:
            value = value.item()
        floats.append(float(value) if isinstance(value, (Real, Decimal)) else math.nan)
    numbers = torch.tensor(floats, dtype=torch.float32)
    return numbers, [(i, shown(values[i])) for i in (~numbers.isfinite()).nonzero().flatten().tolist()]


def to_ids(values) -> torch.Tensor | None:
    """Convert token ids in a list, 1-d tensor or 1-d array to int64 on the CPU; None if they aren't integers."""
    try:
        ids = torch.as_tensor(values, device="cpu")
    except Exception:  # torch raises many kinds for texts, None or lists of unequal lengths
        return None
    whole = ids.dtype != torch.bool and torch.can_cast(ids.dtype, torch.int64)
    return ids.long() if ids.dim() == 1 and (whole or not len(ids)) else None


def shown(value) -> str:
    """Return a value of any type and size in a few words on one line."""
    return " ".join(reprlib.repr(value).split())
