"""Errors that end a run in one line."""

import re

# Control characters, line breaks, changes of writing direction, and unpaired surrogates
STEERING = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """An error that the user can fix: one line on stderr, exit code 2, no traceback."""

    def __init__(self, message: str):
        super().__init__(escaped(message))


class RewardError(UserError):
    """An error in a reward function. `traceback` has its traceback and the texts, for error.log."""

    def __init__(self, message: str, traceback: str = ""):
        super().__init__(message)
        self.traceback = traceback


def escaped(text: str) -> str:
    """Replace the STEERING characters of a text with escape codes: names and files may come from a stranger."""
    return STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


def first_line(error: BaseException) -> str:
    """Return an exception's type and message as one line of at most 200 characters."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200].removesuffix(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch, cuBLAS, cuDNN, NumPy, Python or C++ says that GPU or main memory ran out."""
    names = r"MemoryError|out.of.memory|not enough memory|cannot allocate memory|ALLOC_FAILED|bad_alloc"
    return re.search(names, f"{type(error).__name__}: {error}", re.IGNORECASE) is not None
