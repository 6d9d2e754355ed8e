"""Import a module as its source is now, even if this process has imported it before: in a notebook, say, or a sweep."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import sysconfig
from pathlib import Path
from types import CodeType

OURS = {"config", "gpt2_value_head", "plot_rewards", "ppo", "reward", "support", "tests", "tools", "train_ppo"}
EXECUTED: dict[str, bytes] = {}  # what the files of imported modules, and those next to them, were when executed


def import_as_it_is_now(name: str):
    """Import a module. If its file, or that of a module from the same folder, was edited after it was executed, all of
    them are executed again; otherwise they keep their state. Modules of this program are never executed again."""
    for _ in range(2):  # the second time for what was imported, and edited, before this function knew of it
        forget_edited()
        importlib.invalidate_caches()
        note_sources(module := importlib.import_module(name))
    return module


def others() -> dict[str, str]:
    """Return the files of loaded modules that are not this program's, by name."""
    loaded = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return {name: file for name, file in loaded.items() if file and name.partition(".")[0] not in OURS | {"__main__"}}


def forget_edited() -> None:
    """Remove all noted modules from sys.modules if one of them was edited."""
    now = {file: Path(file).read_bytes() if Path(file).exists() else b"" for file in EXECUTED}
    noted = {name: file for name, file in others().items() if file in EXECUTED}
    if any(now[file] != EXECUTED[file] for file in noted.values()):
        for name, file in noted.items():
            del sys.modules[name]
            with contextlib.suppress(OSError):  # Python takes a .pyc for current if size and second are the same
                Path(importlib.util.cache_from_source(file)).unlink()
        EXECUTED.update(now)


def note_sources(module) -> None:
    """Note the files next to a module, and those of loaded modules from the same folder."""
    file, name = getattr(module, "__file__", None), module.__name__
    folder = Path(file).parents[name.count(".") + hasattr(module, "__path__")] if file else None
    if not folder or str(folder) in sysconfig.get_paths().values():
        return  # a notebook's own cells; Python's library and installed packages
    files = {str(file): file.read_bytes() for file in folder.glob("*.py")}
    for name, file in others().items():
        stem = folder.joinpath(*name.split("."))
        if file not in EXECUTED and file in (f"{stem}.py", str(stem / "__init__.py")):
            files[file] = Path(file).read_bytes() if has_functions_of(sys.modules[name], file) else b"unknown"
    EXECUTED.update(files | EXECUTED)


def has_functions_of(module, file: str) -> bool:
    """Whether a module's functions are those of a source file, on the same lines; constants may have been set since."""
    parts = compile(Path(file).read_bytes(), file, "exec", dont_inherit=True).co_consts
    functions = [
        (inspect.unwrap(getattr(module, part.co_name, None)), part) for part in parts if type(part) is CodeType
    ]
    return all(getattr(function, "__code__", code) == code for function, code in functions)
