"""What ends a run in one line."""

import contextlib
import re
import sys
import traceback

# What steers a terminal, breaks a line or turns its direction, and halves of characters
STEERING = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line on stderr, an exit code, no traceback."""

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(escaped(message))


class FolderGone(UserError):
    """A run lost its folder while it was at work, and has kept its state elsewhere."""

    exit_code = 1


@contextlib.contextmanager
def exits_on_user_error(program: str):
    """A UserError inside ends the program, exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(2)


def escaped(text: str, but: str = "") -> str:
    """A text whose STEERING characters, but those named, stand as their codes: names and files may be a stranger's."""
    return STEERING.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


def words(error: BaseException) -> str:
    """An exception's type and message, also where its own str() fails."""
    return f"{type(error).__name__}: {str(traceback.TracebackException.from_exception(error)).strip()}"


def first_line(error: BaseException) -> str:
    """An exception as one line."""
    return words(error).splitlines()[0][:200].removesuffix(": ")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or this machine's memory ran out, in the words of torch, cuBLAS, cuDNN, numpy, Python or C++."""
    names = r"MemoryError|out.of.memory|not enough memory|cannot allocate memory|ALLOC_FAILED|bad_alloc"
    return re.search(names, words(error), re.IGNORECASE) is not None
