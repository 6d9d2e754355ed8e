"""What ends a run in one line."""

import re


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line on stderr, exit code 2, no traceback."""


def first_line(error: Exception) -> str:
    """An exception as one line."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU's or this machine's memory ran out, in the words of torch, cuBLAS, cuDNN, numpy, Python or C++."""
    words = r"MemoryError|out.of.memory|not enough memory|cannot allocate memory|ALLOC_FAILED|bad_alloc"
    return re.search(words, f"{type(error).__name__}: {error}", re.IGNORECASE) is not None
