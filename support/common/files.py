"""Read and write files. A file is written completely and flushed, or not at all; every error names the path."""

import contextlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from support.common.errors import UserError, first_line, is_out_of_memory

FIX_LINE = "fix that line, or remove it"


@contextlib.contextmanager
def path_errors():
    """Raise UserError if the block can't use a path, for example because of missing permission."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename} cannot be used: {error.strerror}")


@contextlib.contextmanager
def damaged(name, remedy: str):
    """Raise UserError if the block cannot read the file `name`, or fails because its content is wrong."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            raise UserError(f"{name} cannot be read: {error.strerror or error}; {remedy}")
        raise UserError(f"{name} is damaged ({first_line(error)}); {remedy}")


def read_text(path: Path, remedy: str, name: str = "") -> str:
    """Read a UTF-8 text file, with or without a byte order mark. Raises UserError, calling the file `name`."""
    with damaged(name or path, remedy):
        return path.read_bytes().decode("utf-8-sig")


def whole_lines(path: Path) -> list[str]:
    """Read the lines of a log, without a last line that a kill cut short. Texts may contain U+2028."""
    with damaged(path, FIX_LINE):
        content = path.read_bytes()
        return content[: content.rfind(b"\n") + 1].decode("utf-8-sig").split("\n")[:-1]


def read_lines(path: Path) -> list[dict]:
    """Read a file of JSON objects, one per line, that `append_line` writes to; [] if it doesn't exist. A last
    line that a kill cut short is removed from the file. Raises UserError if another line is damaged."""
    if not path.exists():
        return []
    content = path.read_bytes()
    if last := content[content.rfind(b"\n") + 1 :]:
        try:
            json.loads(last)
            path.write_bytes(content + b"\n")  # an editor left out the line break
        except ValueError:
            print(f"the last line of {path} was incomplete and has been removed")
            os.truncate(path, len(content) - len(last))
    records = []
    for number, line in enumerate(whole_lines(path), 1):
        with damaged(f"line {number} of {path}", FIX_LINE):
            records.append(json.loads(line))
    return records


def append_line(path: Path, record: dict) -> None:
    """Append a JSON object to a file, and wait until it is on disk."""
    with disk_errors(path), path.open("a", encoding="utf-8", newline="") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path, remedy: str, missing: dict | None = None) -> dict:
    """Read a JSON object. If the file doesn't exist, returns `missing` if given. Raises UserError if it is damaged."""
    if missing is not None and not path.exists():
        return missing
    with damaged(path, remedy):
        value = json.loads(read_text(path, remedy))
        if not isinstance(value, dict):
            raise TypeError(f"expected a JSON object, not a {type(value).__name__}")
        return value


@contextlib.contextmanager
def whole(path: Path):
    """Give the block a path next to `path` to write a file or a folder to; then flush it and move it into place.

    After an error, only the old one is left. After a kill, the old or the new one is left (neither, if the kill came
    between removing an old folder and renaming the new one), perhaps with a .partial- that the next attempt removes.
    """
    partial = path.with_name(f".partial-{path.name}")
    with disk_errors(path):
        remove(partial)
        try:
            yield partial
            for written in (*partial.rglob("*"), partial):
                flush(written)
            if partial.is_dir() and path.is_dir():  # a folder can't replace another one
                remove(path)
            partial.replace(path)
            flush(path.parent)
        finally:
            remove(partial)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file atomically: a reader sees the old one or the new one."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
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
    """Raise UserError, with the path and the free space, if the block cannot write there."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        if not isinstance(error, OSError) and "os error" not in reason and "inline_container" not in reason:
            raise  # safetensors and torch use their own words for system errors
        place = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
        free = shutil.disk_usage(place).free / 2**20
        raise UserError(f"{path} cannot be written: {reason} ({free:.0f} MiB free)")
