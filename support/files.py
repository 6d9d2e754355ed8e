"""Files: written whole and flushed or not at all, and read with the path in every error."""

import contextlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

from safetensors import SafetensorError

from support.errors import UserError

MEND_LINE = "mend that line, or remove it"


@contextlib.contextmanager
def path_errors():
    """What the system says of any path, as that one may not look there or that its name is too long, in one line."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UserError(f"{error.filename} cannot be used: {error.strerror}")


def refuse_device(path: Path, name: str = "") -> None:
    """UserError where a path leads to a device or a pipe, which may never end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{name or path} is no file, but a device or a pipe; save what it gives in a file")


def read_text(path: Path, remedy: str, only_whole_lines: bool = False, name: str = "") -> str:
    """A UTF-8 text file, perhaps without a last line that has no end yet; a byte order mark does not count.

    UserError, which calls it `name` or by its path, where it is none.
    """
    name = name or str(path)
    try:
        refuse_device(path, name)
        content = path.read_bytes()
        if only_whole_lines:
            content = content[: content.rfind(b"\n") + 1]
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{name} is damaged in line {line}: it is no UTF-8 text; {remedy}")


def whole_lines(path: Path) -> list[str]:
    """The lines of a text file that are whole. They end at a line feed alone: texts may hold U+2028."""
    return read_text(path, MEND_LINE, only_whole_lines=True).split("\n")[:-1]


def read_json(path: Path, shape, remedy: str):
    """What a JSON file holds, which can be written again. UserError, with the remedy, where it is not of the shape."""
    value = parse_json(read_text(path, remedy), shape, path, remedy)
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{path} is damaged: it holds half a character; {remedy}")
    return value


def read_evaluation(run_dir: Path, shape: dict, remedy: str = "remove it: --resume makes it again") -> dict:
    """A run's evaluation.json, or nothing where there is none yet. UserError as in read_json."""
    path = run_dir / "evaluation.json"
    return read_json(path, shape, remedy) if path.exists() else {}


def parse_json(text: str, shape, name, remedy: str):
    """The value of a JSON text that is called `name`. UserError where it is none, or not of the shape, see `misfit`."""
    try:
        value = json.loads(text, object_pairs_hook=once_each)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged: it is no JSON ({error}); {remedy}")
    if (place := misfit(value, shape)) is not None:
        raise UserError(f"{name} is damaged: {place or 'it'} is missing, or not what it should be; {remedy}")
    return value


def once_each(pairs: list[tuple]) -> dict:
    """The names and values of a JSON object. ValueError where a name stands there twice."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]!r} stands there twice")
    return value


def misfit(value, shape, place: str = "") -> str | None:
    """The first part of a JSON value that is not of a shape, as 'before.samples.3'; None where all of it is.

    A shape is a type, where float takes whole numbers too; a list, for one or more of its only item; a tuple, for just
    these items; or a dict, for an object with at least these names, of which one with a '?' may be missing or empty.
    """
    if isinstance(shape, type):
        fits = type(value) is shape or (shape is float and type(value) is int)
        return None if fits and (type(value) is not int or abs(value) < 2**63) else place
    if type(value) is not (dict if isinstance(shape, dict) else list):
        return place
    if isinstance(value, list):
        shape = shape if isinstance(shape, tuple) else shape * max(1, len(value))
        if len(value) != len(shape):
            return place
        value, shape = ({str(i): item for i, item in enumerate(items)} for items in (value, shape))
    for name, part in shape.items():
        if name.endswith("?") and not value.get(name[:-1]):
            continue
        name = name.rstrip("?")
        if (found := misfit(value.get(name), part, f"{place}.{name}".lstrip("."))) is not None:
            return found
    return None


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
