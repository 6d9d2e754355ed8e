"""Read and write files: written whole and flushed or not at all, with the path in every error."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from support.errors import UserError, first_line

MEND_LINE = "mend that line, or remove it"


@contextlib.contextmanager
def path_errors():
    """Raise UserError if the system refuses a path inside: a name that is too long, no permission to look there."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename} cannot be used: {error.strerror}")


@contextlib.contextmanager
def damaged(name, remedy: str):
    """Raise UserError if the content that the block reads from the file `name` is not what the block expects."""
    try:
        yield
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name} is damaged ({first_line(error)}); {remedy}")


def read_text(path: Path, remedy: str, name: str = "", only_whole_lines: bool = False) -> str:
    """Read a UTF-8 text file, with or without a byte order mark.

    only_whole_lines: leave out a last line that has no end, as a kill leaves one. Raises UserError, which calls the
    file `name` or by its path, if it cannot be read or isn't UTF-8.
    """
    try:
        content = path.read_bytes()
        if only_whole_lines:
            content = content[: content.rfind(b"\n") + 1]
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name or path} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name or path} is damaged in line {line}: it isn't UTF-8 text; {remedy}")


def whole_lines(path: Path) -> list[str]:
    """Read the lines of a text file that are whole. Only a line feed ends a line: texts may contain U+2028."""
    return read_text(path, MEND_LINE, only_whole_lines=True).split("\n")[:-1]


def read_json(path: Path, remedy: str, missing: dict | None = None) -> dict:
    """Read a JSON object; `missing`, if it is given and there is no such file. Raises UserError, with the remedy, if
    the file is damaged."""
    if missing is not None and not path.exists():
        return missing
    with damaged(path, remedy):
        value = json.loads(read_text(path, remedy))
        if not isinstance(value, dict):
            raise TypeError(f"an object was expected, not a {type(value).__name__}")
        return value


def read_evaluation(run_dir: Path, remedy: str = "remove it: --resume makes it again") -> dict:
    """Read a run's evaluation.json, {} if there is none yet. Raises UserError as `read_json` does."""
    return read_json(run_dir / "evaluation.json", remedy, missing={})


@contextlib.contextmanager
def whole(path: Path):
    """Give the block another path, beside `path`, to write a file or a folder to; flush that, and put it in place.

    A kill leaves the old or the new, and beside it what the next attempt removes. An error leaves the old one only.
    Raises UserError as `disk_errors` does.
    """
    target = path.resolve()  # a link stays, and what it leads to is replaced
    partial, old = target.with_name(f".partial-{target.name}"), target.with_name(f".partial-old-{target.name}")
    with disk_errors(path):
        clear(target, partial, old)
        try:
            yield partial
            for written in (*partial.rglob("*"), partial):
                flush(written)
            if partial.is_dir() and target.is_dir():  # a folder cannot take another's place
                target.rename(old)
            partial.replace(target)
            flush(target.parent)
        finally:
            clear(target, partial, old)


def clear(target: Path, partial: Path, old: Path) -> None:
    """Remove what a write has left beside its target; put the old one back if the new one never took its place."""
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (partial, old):
        remove(leftover)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file at one stroke: a reader sees the old one or the new one."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or a folder is on disk. Windows cannot open folders for this."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path):
    """Raise UserError, with the path and the free room, if the block cannot write, in whichever library's words."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if not isinstance(error, OSError) and "os error" not in reason and "inline_container" not in reason:
            raise  # neither safetensors' words for an error of the system nor torch's
        place = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
        free = shutil.disk_usage(place).free / 2**20
        raise UserError(f"{path} cannot be written: {reason} ({free:.0f} MiB are free)")
