"""Files and folders that are there whole or not at all, and what goes wrong with the disk in one line."""

import contextlib
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from support.errors import UserError


@contextlib.contextmanager
def whole(path: Path, needed: int = 0):
    """A path beside `path`, on which the block writes a file or a folder: flushed to disk, it then replaces `path`.

    A kill leaves the old or the new, and beside it what the next attempt removes; an error leaves the old alone. What
    is no file, as /dev/stdout, is written where it stands. UserError as in `disk_errors`.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with disk_errors(path):
            yield path
        return
    target = path.resolve()  # what a link leads to
    partial, old = target.with_name(f".partial-{target.name}"), target.with_name(f".partial-old-{target.name}")
    with disk_errors(path, needed):
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
    """Remove what a writing has left beside its target; the old stands again where the new never took its place."""
    if old.exists() and not target.exists():
        old.rename(target)
    for leftover in (partial, old):
        remove(leftover)


def write_whole(path: Path, text: str) -> None:
    """Replace a text file at one stroke: a reader sees the old one or the new one."""
    with whole(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file or folder is on disk; a folder only where the system opens one (Windows does not)."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except PermissionError:
        if path.is_dir():
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def disk_errors(path: Path, needed: int = 0):
    """What goes wrong with the disk, in any library's words, as a UserError with the path and the room needed."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        place = next(parent for parent in (path, *path.parents) if os.path.exists(parent))
        free = shutil.disk_usage(place).free
        reason = getattr(error, "strerror", None) or str(error)
        if free < needed or "No space left" in reason:
            room = f"it needs about {max(needed, 1 << 20) / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free"
            raise UserError(f"no room to write {path}: {room}")
        of_disk = (
            isinstance(error, OSError) or "os error" in reason or "inline_container" in reason
        )  # safetensors, torch
        if not of_disk:
            raise
        raise UserError(f"{path} cannot be written: {reason.splitlines()[0]}")
