"""The check of a GPU, small and on the CPU: all is well here, and what is not well is said."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

import gpt2_value_head
from tools import benchmark, gpu_check


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the table's rows by their first."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


@pytest.fixture
def small(monkeypatch):
    """Models that are hardly taught, short runs, and a ceiling that is not measured: all checks in seconds."""
    run = "--episodes 8 --batch_size 4 --minibatch_size 4 --eval_samples 4".split()
    taught = {"steps": {"gpt2": 3, "sentiment": 3}}
    sizes = dataclasses.replace(gpu_check.TINY, taught=taught, benchmarks=(4, 8), long_batch=2, real_run=run)
    monkeypatch.setattr(gpu_check, "TINY", sizes)
    monkeypatch.setattr(benchmark, "best_matrix_product", lambda device, dtype: 2e12)


def test_all_is_well_on_this_cpu(small, monkeypatch, capsys):
    """All but the reward, which so short a run need not raise."""
    monkeypatch.setitem(gpu_check.LIMITS, "reward", -1.0)
    assert gpu_check.main(["--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"CPU, torch {torch.__version__}, transformers ")
    table = rows(output.out)
    assert len(table) >= 15 and {cells[-1] for cells in table.values()} <= {"yes", "left out"}
    left_out = [check for check, cells in table.items() if cells[-1] == "left out"]
    assert {"the other way round", "two processes below torchrun"} <= set(left_out) and len(left_out) <= 3
    assert re.findall(r"(\d) of 9: ", output.err) == list("123456789") and "rror" not in output.err


@pytest.mark.parametrize(("after", "ok"), [(0.65, "yes"), (0.55, "**no**")])
def test_a_whole_run_must_raise_the_reward_by_a_tenth(small, monkeypatch, capsys, tmp_path, after, ok):
    def trained(*flags):
        folder = Path(flags[flags.index("--runs_dir") + 1], "real")
        folder.mkdir()
        results = {"before": {"reward": 0.5}, "after": {"reward": after}, "gain": {"gain": None}}
        (folder / "evaluation.json").write_text(json.dumps(results))

    monkeypatch.setattr(gpu_check, "train", trained)
    monkeypatch.setattr(gpu_check.Machine, "taught", (tmp_path, tmp_path))
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.real_run])
    assert gpu_check.main(["--device", "cpu"]) == (ok != "yes")
    ((figure, limit, verdict),) = rows(capsys.readouterr().out).values()
    assert figure.startswith(f"0.500 -> {after:.3f}, gain unknown, ") and (limit, verdict) == ("+0.1", ok)


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
