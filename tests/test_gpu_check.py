"""The check of a GPU, small and on the CPU: all is well here, and what is not well is said."""

import dataclasses
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gpt2_value_head
from ppo import PPOTrainer
from support.checkpoint import checkpoints
from tools import benchmark, gpu_check


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the table's rows by their first."""
    lines = [line.strip("| ").split(" | ") for line in output.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines[2:]}


@pytest.fixture
def small(monkeypatch):
    """Models that are hardly taught, short runs in this process, and a ceiling that is not measured."""
    run = "--episodes 8 --batch_size 4 --minibatch_size 4 --eval_samples 4".split()
    taught = {"steps": {"gpt2": 3, "sentiment": 3}}
    short = dict(short_run=[*run, "--save_every", "1"], real_run=run)
    sizes = dataclasses.replace(gpu_check.TINY, taught=taught, benchmarks=(4, 8), long_batch=2, **short)
    monkeypatch.setattr(gpu_check, "TINY", sizes)
    monkeypatch.setattr(benchmark, "best_matrix_product", lambda device, dtype: 2e12)

    def as_if_killed(flags, folder):
        gpu_check.train(*flags, "--keep_checkpoints", "9")
        shutil.rmtree(checkpoints(folder / "checkpoints")[-1])
        shutil.rmtree(folder / "model")
        return 1

    monkeypatch.setattr(gpu_check, "start_and_kill", as_if_killed)


def test_all_is_well_on_this_cpu(small, monkeypatch, capsys):
    """All but the reward, which so short a run need not raise."""
    monkeypatch.setitem(gpu_check.LIMITS, "reward", -1.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert gpu_check.main(["--device", "cpu"]) == 0
    output = capsys.readouterr()
    assert f"\ntorch: {torch.__version__}\n" in output.out.partition("\n\n")[0]
    table = rows(output.out)
    assert len(table) >= 16 and {cells[-1] for cells in table.values()} <= {"yes", "left out"}
    left_out = [check for check, cells in table.items() if cells[-1] == "left out"]
    assert {"the other way round", "two processes below torchrun"} <= set(left_out) and len(left_out) <= 3
    numbers = re.findall(r"\r(\d+) of 10: ", output.err)
    assert list(dict.fromkeys(numbers)) == list(map(str, range(1, 11))) and "rror" not in output.err


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


def test_a_row_is_printed_before_the_next_is_worked_out_and_ctrl_c_loses_none(monkeypatch, capsys):
    def looks(machine):
        yield gpu_check.Row("a first row", "", "", True)
        assert capsys.readouterr().out.endswith("| a first row |  |  | yes |\n")
        yield gpu_check.Row("a second row", "", "", True)
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "CHECKS", [looks])
    assert gpu_check.main(["--device", "cpu"]) == 130
    assert capsys.readouterr() == ("| a second row |  |  | yes |\n", "\nstopped\n")


def test_after_an_error_that_the_gpu_does_not_survive_the_others_are_not_run(monkeypatch, capsys):
    def lost(machine):
        """an illegal access"""
        error = RuntimeError("CUDA error: an illegal memory access was encountered")
        monkeypatch.setattr(torch, "ones", lambda *size, device: (_ for _ in ()).throw(error))
        raise error
        yield

    def another(machine):
        """another check"""
        pytest.fail("it was run")
        yield

    monkeypatch.setattr(gpu_check, "CHECKS", [lost, another])
    assert gpu_check.main(["--device", "cpu"]) == 1
    table = rows(capsys.readouterr().out)
    said = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert table == {"an illegal access": [said, "", "**no**"], "another check": ["not run", "", "left out"]}


def test_a_bug_fails_its_check(monkeypatch, capsys):
    def with_padding(mask):
        return torch.arange(mask.shape[1]).expand_as(mask)

    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.lengths])
    monkeypatch.setattr(gpt2_value_head, "position_ids", with_padding)
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert "prompts of different lengths" in capsys.readouterr().out


def test_a_step_in_bfloat16_that_moves_the_weights_elsewhere_fails(monkeypatch, capsys):
    right = PPOTrainer.step

    def twice_as_far(self, *batch):
        if self.engine.dtype == torch.bfloat16:
            self.engine.optimizer.param_groups[0]["lr"] *= 2
        return right(self, *batch)

    monkeypatch.setattr(PPOTrainer, "step", twice_as_far)
    monkeypatch.setattr(gpu_check, "pick_dtype", lambda dtype, device: torch.bfloat16)
    monkeypatch.setattr(gpu_check, "CHECKS", [gpu_check.bfloat16])
    assert gpu_check.main(["--device", "cpu"]) == 1
    assert [cells[-1] for cells in rows(capsys.readouterr().out).values()] == ["yes", "yes", "**no**"]


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """A machine on which nothing is trained: `weights` gives what `saved` holds."""
    machine = gpu_check.Machine(torch.device("cpu"), tmp_path)
    machine.taught, machine.dtype, machine.saved = (tmp_path, tmp_path), "bfloat16", {}
    machine.weights = lambda name: {"weight": torch.tensor(machine.saved.get(name, 1.0))}
    monkeypatch.setattr(gpu_check, "train", lambda *flags: None)
    return machine


@pytest.mark.parametrize(("weight", "ok"), [(1.0, True), (1.0 + 2**-23, False)])
def test_the_same_run_twice_must_give_the_same_bits(stand_in, monkeypatch, weight, ok):
    stand_in.saved["again"] = weight
    monkeypatch.setattr(gpu_check, "unlike", lambda *run: 3e-7)
    (row,) = gpu_check.twice(stand_in)
    figure = "the same bits" if ok else "3.0e-07 of how far they moved"
    assert row == gpu_check.Row("the same run twice in bfloat16: the weights at the end", figure, "the same bits", ok)


def test_two_processes_are_compared_in_float32_and_in_the_dtype_of_a_default_run(stand_in, monkeypatch):
    started = []

    class Process:
        returncode = 0

        def __init__(self, command, **streams):
            started.append([str(word) for word in command])

        def communicate(self, timeout):
            return "", "W1124 a warning\nRuntimeError: of the second\n"

    stand_in.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(gpu_check, "unlike", lambda machine, two, one: {"one-float32": 1e-3, "one-bfloat16": 0.9}[one])
    assert [row.ok for row in gpu_check.two_processes(stand_in)] == [True, False]
    assert [command[-1] for command in started] == ["4", "128"]  # --save_every of a short run, a step of 128
    assert [command[command.index("--dtype") + 1] for command in started] == ["float32", "bfloat16"]
    assert all(command[command.index("--nproc-per-node") + 1] == "2" for command in started)
    Process.returncode = 1
    with pytest.raises(RuntimeError, match="RuntimeError: of the second"):
        list(gpu_check.two_processes(stand_in))


def test_it_starts_where_python_has_no_resource_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    importlib.reload(benchmark)


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
