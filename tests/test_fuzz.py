"""tools/fuzz.py: what it holds against a program, and a few of its cases."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from support.checkpoint import FILES, sha256
from tests.ranks import context
from tools import fuzz


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What a case starts from: a reward, and two runs of little more than names."""
    folder = tmp_path_factory.mktemp("fuzz") / "files"
    for run in (folder / "finished", folder / "killed"):
        (run / "model").mkdir(parents=True)
        (run / "config.json").write_text('{"lr": 0.5}')
        (run / "metrics.csv").write_text("step,episodes,env/reward_mean,objective/kl\n1,2,0.5,0.25\n2,4,0.5,0.25\n")
        (run / "samples.jsonl").write_text('{"step": 1}\n{"step": 1}\n{"step": 2}\n')
        (run / "report.md").write_text("| prompt |\n")
        (run / "model" / "config.json").write_text("{}")
        save_file({"weight": torch.ones(2)}, run / "model" / "model.safetensors")
        for step in (1, 2):
            checkpoint = run / "checkpoints" / f"step-{step:06d}"
            checkpoint.mkdir(parents=True)
            for name in FILES:
                (checkpoint / name).write_bytes(bytes(100))
            state = {
                "step": step,
                "kl_coef": 0.5,
                "skipped_in_a_row": 0,
                "sha256": {name: sha256(checkpoint / name) for name in FILES},
            }
            (checkpoint / "state.json").write_text(json.dumps(state))
    (folder / "odd.py").write_text("def score(texts): return []\n")
    return folder


def says(line, code):
    print(line, file=sys.stderr)
    return code


RUN = Path("killed")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit may be one in name only")


@pytest.mark.parametrize(
    ("does", "complaint"),
    [
        (lambda: 0, None),
        (lambda: says("program.py: error: no", 2), None),
        (lambda: 130, None),
        (lambda: 1, "exit code 1"),
        (lambda: sys.exit("no"), "exit code 99"),
        (lambda: [][0], "traceback: IndexError: list index out of range"),
        pytest.param(lambda: bytes(fuzz.MEMORY) and 0, "traceback: MemoryError", marks=LINUX),
        (lambda: says("program.py: error: no\nmore", 2), "1 error lines, and the last line is ['more']"),
        (lambda: says("program.py: error: no\nprogram.py: error: no", 2), "2 error lines"),
        (lambda: says("no", 2), "0 error lines"),
        (lambda: says("program.py: error: no", 0), "exit code 0 after"),
        (lambda: (RUN / "config.json").write_text("{") - 1, "killed/config.json is no longer whole"),
        (lambda: (RUN / "metrics.csv").write_text("step") - 4, "killed/metrics.csv no longer begins with step 1"),
        (lambda: (RUN / "samples.jsonl").write_text("{\n") - 2, "killed/samples.jsonl is no longer whole"),
        (lambda: (RUN / "model" / "model.safetensors").write_bytes(b"x") - 1, "model.safetensors is no longer whole"),
        (lambda: (RUN / "new.json").write_text("{") - 1, "killed/new.json is left, and not whole"),
        (lambda: (RUN / ".partial-x").touch(), "killed/.partial-x is left"),
        (lambda: shutil.rmtree(RUN / "model"), "model/config.json is gone"),
        (lambda: (RUN / "report.md").unlink(), None),
        (lambda: shutil.rmtree(RUN / "checkpoints" / "step-000001"), None),
        (lambda: shutil.rmtree(RUN / "checkpoints"), "killed has no whole checkpoint any more"),
        (lambda: Path("finished/config.json").write_text("{}") - 2, "finished/config.json has changed, and is none"),
    ],
)
def test_each_thing_that_should_not_happen_is_noticed(files, monkeypatch, does, complaint):
    program = SimpleNamespace(__name__="program", main=lambda argv: does() or 0)
    monkeypatch.setattr(fuzz, "COMMANDS", [(program, "killed", "odd.py")])
    _, _, wrong = fuzz.try_case(1, files)
    assert complaint is None and wrong == [] or any(complaint in line for line in wrong)


def test_a_number_stands_for_one_case(files, tmp_path):
    """The same number does the same to a file, and another number something else."""
    done = []
    for seed in (1, 1, *range(2, 30)):
        place = shutil.copytree(files, tmp_path / str(len(done)))
        path = place / "killed" / random.Random(seed).choice(["config.json", "metrics.csv", "samples.jsonl"])
        before = path.read_bytes()
        fuzz.damage(path, random.Random(seed), place)
        done.append(path.read_bytes() if path.is_file() else None)
        assert done[-1] != before or seed not in (1, 2, 3)
    assert done[0] == done[1] and len(set(done)) > 20


def test_a_hash_may_be_made_to_fit_the_damage(files, tmp_path):
    place = shutil.copytree(files, tmp_path / "place")
    path = place / "killed" / "checkpoints" / "step-000002" / "optimizer.pt"
    for seed in range(100):
        if fuzz.damage(path, random.Random(seed), place).endswith("with its hash") and path.stat().st_size > 0:
            break
    assert path.read_bytes() != bytes(100) and fuzz.is_whole(path.with_name("state.json"))


def few_cases(out: Path) -> None:
    sys.argv = ["fuzz.py", "--first", "100", "--cases", "4"]
    sys.stdout = open(out, "w", encoding="utf-8")
    sys.exit(fuzz.main())


def test_a_few_cases_end_as_they_should(tmp_path):
    process = context.Process(target=few_cases, args=(tmp_path / "out",))
    process.start()
    process.join()
    said = (tmp_path / "out").read_text(encoding="utf-8")
    assert process.exitcode == 0 and "4 cases, 100 to 103, in" in said, said
