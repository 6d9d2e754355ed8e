"""The check of a GPU, small and on the CPU: all is well here, and what is not well is said."""

import os
import re
import subprocess
import sys

import pytest
import torch

import gpt2_value_head
from tests import gpu_check
from tests.conftest import ROOT


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the table's rows by their first."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_all_is_well_on_this_cpu():
    command = [sys.executable, "-m", "tests.gpu_check", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # models as small as these are faster so
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"CPU, torch {torch.__version__}, transformers ")
    table = rows(result.stdout)
    assert len(table) >= 15 and {cells[-1] for cells in table.values()} <= {"yes", "left out"}
    left_out = [check for check, cells in table.items() if cells[-1] == "left out"]
    assert {"the other way round", "two processes below torchrun"} <= set(left_out) and len(left_out) <= 3
    assert re.findall(r"(\d) of 9: ", result.stderr) == list("123456789") and "rror" not in result.stderr


def broken(machine):
    """a check that raises"""
    yield gpu_check.Row("a row before it", "", "", True)
    raise KeyError("no such word")


def test_what_is_not_well_is_said_and_the_others_still_run(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "CHECKS", [broken, gpu_check.float32])
    monkeypatch.setitem(gpu_check.LIMITS, "float32", -1.0)
    assert gpu_check.main(["--device", "cpu"]) == 1
    table = rows(capsys.readouterr().out)
    assert table.pop("a row before it") == ["", "", "yes"]
    assert table.pop("a check that raises") == ["KeyError: 'no such word'", "", "**no**"]
    assert [cells[-1] for cells in table.values()] == ["**no**", "yes", "yes"]


def test_a_bug_fails_its_check(monkeypatch, capsys):
    def with_padding(mask):
        return torch.arange(mask.shape[1]).expand_as(mask)

    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.lengths])
    assert gpu_check.main(["--device", "cpu"]) == 0
    monkeypatch.setattr(gpt2_value_head, "position_ids", with_padding)
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert "prompts of different lengths" in capsys.readouterr().out


@pytest.mark.parametrize("value", [1e-9, float("nan")])
def test_a_figure_over_its_limit_or_not_a_number_fails(monkeypatch, value):
    monkeypatch.setitem(gpu_check.LIMITS, "float32", 1e-10)
    assert gpu_check.at_most("check", value, "float32").ok is False


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    output = capsys.readouterr()
    message = "gpu_check: error: torch sees no GPU here; --device cpu runs the same checks small\n"
    assert (output.out, output.err) == ("", message)
