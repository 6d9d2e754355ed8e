"""Plant one bug after the other and see whether the tests notice.

    python -m tools.mutants [--only WORD] [--area NAME] [--nearest] [--jobs N]

The bugs stand in tools/planted/, a file for each part of the program. Each is planted in a copy of the tree and meets
the tests nearest to its file first, then all others. Prints a line for each; exit code 1 if one was not noticed, if the
code that it changes is not there exactly once, or if a change that is said to leave the program the same was noticed.
Needs fork(): Linux or macOS.
"""

import argparse
import importlib
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # a tree whose tests take longer hangs, which is noticed too
LIBRARIES = "pytest numpy torch torch.distributed matplotlib.pyplot huggingface_hub transformers.pipelines".split()
MODELS = "gpt2 bert distilbert auto".split()


class Run:
    """pytest on a tree, in a process forked from this one, which has loaded the libraries already."""

    def __init__(self, tree: Path, tests: list[str]):
        self.started = time.monotonic()
        self.process = os.fork()
        if self.process == 0:
            os.setsid()
            output = os.open(tree / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.chdir(tree)
            sys.path[:] = [str(tree), *(path for path in sys.path if path not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "tools")]:
                del sys.modules[name]
            import pytest

            code = 3
            try:
                code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
            finally:
                sys.stdout.flush()
                os._exit(int(code))

    def passed(self) -> bool | None:
        """Whether all tests passed; None while they run."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if not process and time.monotonic() - self.started < SECONDS:
            return None
        try:
            os.killpg(self.process, signal.SIGKILL)
        except ProcessLookupError:
            pass
        if not process:
            os.waitpid(self.process, 0)
        return bool(process) and os.waitstatus_to_exitcode(status) == 0


def areas() -> dict:
    """The modules of tools/planted, by name."""
    folder = Path(__file__).parent / "planted"
    names = sorted(module.name for module in pkgutil.iter_modules([str(folder)]))
    return {name: importlib.import_module(f"{__package__}.planted.{name}") for name in names}


def test_files(names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names.split()]


def all_others(nearest: list[str]) -> list[str]:
    return sorted({f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")} - set(nearest))


def copy_tree(tree: Path) -> None:
    """The project without what a user has beside it: environments, runs, files of git's."""
    tree.mkdir()
    for folder in ("support", "tests", "tools", "docs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (path for path in ROOT.iterdir() if path.suffix in (".py", ".md", ".toml", ".txt")):
        shutil.copy(path, tree)


def wait_for(run: Run) -> bool:
    while (passed := run.passed()) is None:
        time.sleep(0.05)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only bugs whose file or text has this word")
    parser.add_argument("--area", default="", help="only those of tools/planted/NAME.py")
    parser.add_argument("--nearest", action="store_true", help="leave out all but the nearest tests")
    parser.add_argument("--jobs", type=int, default=2, help="bugs tried at the same time")
    args = parser.parse_args()
    chosen, near = [], {}
    for name, area in areas().items():
        near |= {file: test_files(tests) for file, tests in area.NEAREST.items()}
        bugs = [(*bug, None) for bug in area.BUGS] + area.SAME
        chosen += [bug for bug in bugs if args.area in ("", name) and args.only in "".join(bug[:3])]
    if not chosen:
        sys.exit("no bug has that word")
    os.environ |= {"HF_HUB_OFFLINE": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}  # as tests/conftest.py, before the hub
    for name in [*LIBRARIES, *(f"transformers.models.{name}.modeling_{name}" for name in MODELS)]:
        importlib.import_module(name)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "ppo-chinese-gpt2")
        if cache.exists():
            shutil.copytree(cache, Path(folder) / "cache" / cache.name)
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # bugs in the demo's models make others
        trees = [Path(folder) / f"tree{i}" for i in range(args.jobs)]
        for tree in trees:
            copy_tree(tree)
        first = sorted({test for file, *_ in chosen for test in near[file]})
        if not wait_for(Run(trees[0], first)):
            sys.exit(
                f"the tests fail without any bug:\n{(trees[0] / 'output.txt').read_text(encoding='utf-8')[-3000:]}"
            )
        wrong = try_all(chosen, near, trees, args.nearest)
    same = sum(why is not None for *_, why in chosen)
    print(f"{len(chosen) - same} bugs, and {same} changes to the same program: {wrong} not as they should be")
    return 1 if wrong else 0


def try_all(chosen: list[tuple], near: dict, trees: list[Path], nearest_only: bool) -> int:
    """Try the bugs, as many at a time as there are trees; how many did not end as they should."""
    waiting, free, running, wrong = list(reversed(chosen)), list(trees), [], 0
    while waiting or running:
        while waiting and free:
            bug = waiting.pop()
            file, right, planted, _ = bug
            source = (ROOT / file).read_text(encoding="utf-8")
            if source.count(right) != 1:
                wrong += 1
                print(f"GONE      {file}: {right!r} stands there {source.count(right)} times", flush=True)
                continue
            tree = free.pop()
            (tree / file).write_text(source.replace(right, planted), encoding="utf-8")
            running.append((bug, tree, Run(tree, near[file]), nearest_only))
        time.sleep(0.05)
        for entry in list(running):
            (file, right, planted, why), tree, run, last = entry
            if (passed := run.passed()) is None:
                continue
            running.remove(entry)
            if passed and not last:
                running.append((entry[0], tree, Run(tree, all_others(near[file])), True))
                continue
            (tree / file).write_text((ROOT / file).read_text(encoding="utf-8"), encoding="utf-8")
            free.append(tree)
            wrong += passed == (why is None)
            verdict = {(True, True): "same    ", (True, False): "SURVIVED", (False, True): "NOT SAME"}
            by = "" if passed else first_failure(tree)
            said = verdict.get((passed, why is not None), "noticed ")
            print(f"{said}  {file}: {right!r} -> {planted!r}{f' ({why})' if why else by}", flush=True)
    return wrong


def first_failure(tree: Path) -> str:
    """The test that noticed, from pytest's output."""
    lines = (tree / "output.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    failed = [line.split(" - ")[0] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return f" ({failed[0].split('::')[-1][:90]})" if failed else " (no test failed: it hung, or pytest itself did)"


if __name__ == "__main__":
    sys.exit(main())
