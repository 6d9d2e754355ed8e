"""Import a module from its current source, even if this process (a notebook, for example) has imported it before."""

import importlib
import importlib.util
import sys
import sysconfig
from pathlib import Path

OURS = {"config", "gpt2_value_head", "plot_rewards", "ppo", "reward", "support", "tests", "tools", "train_ppo"}
EXECUTED: dict[Path, dict[str, bytes]] = {}  # by folder: its files when its modules were last executed


def import_as_it_is_now(name: str):
    """Import a module. If its file, or that of another module from its folder, may have been edited since it was
    executed, all modules from there are executed again; otherwise they keep their state. This program's own modules are
    never executed again."""
    imported_before = name in sys.modules
    importlib.invalidate_caches()
    module = importlib.import_module(name)
    if not (file := getattr(module, "__file__", None)):
        return module  # a notebook's own cells
    folder = Path(file).parents[name.count(".") + hasattr(module, "__path__")]
    if str(folder) in sysconfig.get_paths().values():
        return module  # Python's library and installed packages
    loaded = loaded_from(folder)
    now = {file: Path(file).read_bytes() for file in {*map(str, folder.glob("*.py")), *loaded.values()}}
    executed = EXECUTED.get(folder, {} if imported_before else now)
    if any(executed.get(file) != now[file] for file in loaded.values()):
        for other, file in loaded.items():
            del sys.modules[other]
            # Python considers a .pyc current if the source's size and second are unchanged
            Path(importlib.util.cache_from_source(file)).unlink(missing_ok=True)
        module = importlib.import_module(name)
    EXECUTED[folder] = now
    return module


def loaded_from(folder: Path) -> dict[str, str]:
    """Return the files of modules that were imported from a folder, by name, except for this program's."""
    found = {}
    for name, module in list(sys.modules.items()):
        file, stem = getattr(module, "__file__", None), folder.joinpath(*name.split("."))
        if file in (f"{stem}.py", str(stem / "__init__.py")) and name.partition(".")[0] not in OURS:
            found[name] = file
    return found
