"""How many lines one has to read to follow a step, and that imports only go down."""

import ast
import inspect
import sys
from collections import Counter
from pathlib import Path

from support.run.log import progress
from tests.helpers import ROOT, batch_of, make, tiny_run


class Trace:
    """Records which of the project's functions are called in a `with` block, including generators and properties."""

    def __enter__(self) -> "Trace":
        self.codes = set()
        sys.setprofile(lambda frame, event, _: self.codes.add(frame.f_code) if event == "call" else None)
        return self

    def __exit__(self, *error) -> None:
        sys.setprofile(None)

    def lines(self) -> Counter:
        """Count non-blank lines per file, including docstrings. A lambda or comprehension is part of its function."""
        found = {}
        for code in self.codes:
            file = Path(code.co_filename)
            ours = file.parent == ROOT or file.is_relative_to(ROOT / "support")
            if ours and not code.co_name.startswith("<"):
                source, first = inspect.getsourcelines(code)
                numbers = [first + i for i, line in enumerate(source) if line.strip()]
                found.setdefault(str(file.relative_to(ROOT)), set()).update(numbers)
        return Counter({file: len(numbers) for file, numbers in found.items()})


def test_the_number_of_lines_in_a_step_of_your_own_loop(policy):
    trainer = make(policy, micro_batch_size=2, minibatch_size=3)
    batch = batch_of(trainer, policy)
    with Trace() as trace:
        trainer.step(*batch)
    lines = trace.lines()
    assert sum(lines.values()) <= 599 and len(lines) <= 8, lines


def test_the_number_of_lines_in_an_iteration_of_train_ppo(policy, tmp_path, monkeypatch, without_pictures):
    """Traces what runs between the lines that are printed after the first and the second step."""
    trace, seen = Trace(), []

    def watched(row, last_step):
        if row["step"] == 1:
            trace.__enter__()
        elif row["step"] == 2:
            trace.__exit__()
            seen.append(trace.lines())
        return progress(row, last_step)

    monkeypatch.setattr("support.run.log.progress", watched)
    tiny_run(tmp_path / "run", policy, save_every=0, log_samples_every=1)
    (lines,) = seen
    assert sum(lines.values()) <= 865 and len(lines) <= 15, lines


FLOORS = [  # from the ground up; a file only imports from its own floor and those below
    {"config"},
    {"support.common"},
    {"gpt2_value_head", "support.compute"},
    {"support.models"},
    {"reward", "ppo"},
    {"support.run"},
    {"plot_rewards"},
    {"train_ppo"},
]


def floor(module: str) -> int | None:
    """Return the floor of a module of this project, by its name in an import; None for any other module."""
    room = ".".join(module.split(".")[:2]) if module.startswith("support.") else module
    return next((i for i, names in enumerate(FLOORS) if room in names), None)


def test_imports_only_go_down():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*/*.py")]
    found = {file: floor(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in files}
    assert len(files) > 30 and None not in found.values()
    for file, own in found.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for name in names:
                assert floor(name) is None or floor(name) <= own, (file.name, name)
