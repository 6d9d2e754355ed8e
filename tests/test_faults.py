"""What goes wrong from outside: kills, damaged files, full disks, second processes, gradients that are not finite."""

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import train_ppo
from ppo import PPOTrainer
from support.engine import MAX_SKIPPED
from support.errors import UserError, is_out_of_memory
from support.signals import StopSignal
from tests.helpers import ROOT, SMALL, batch_of, make, rows, small_run
from tools.stress_resume import differences

pytestmark = pytest.mark.usefixtures("without_pictures", "signals_restored")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda c: (c / "policy.safetensors").write_bytes((c / "policy.safetensors").read_bytes()[:-100]),
            "policy.safetensors is damaged",
        ),
        (lambda c: (c / "average.safetensors").unlink(), "No such file"),
        (lambda c: (c / "optimizer.pt").write_bytes(b"not torch"), "optimizer.pt is damaged"),
        (lambda c: (c / "state.json").write_text("{"), "cannot be used"),
        (lambda c: (c / "state.json").write_text("{}"), "cannot be used"),
    ],
    ids=["truncated weights", "missing file", "other optimizer", "truncated state", "empty state"],
)
def test_with_no_usable_checkpoint_resume_says_so(finished, tmp_path, damage, said, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "report.md").unlink()
    for checkpoint in (run_dir / "checkpoints").iterdir():
        damage(checkpoint)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    assert train_ppo.main(["--resume", str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert "no usable checkpoint" in err and err.count("\n") == 1
    assert out.count("cannot be used") == 3 and said in out
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_whole_checkpoint_of_the_same_step_is_not_taken_away(policy, tmp_path):
    from support.checkpoint import save_checkpoint

    trainer = make(policy)
    first = save_checkpoint(trainer, tmp_path, keep=1)
    inode = first.stat().st_ino
    assert save_checkpoint(trainer, tmp_path, keep=1).stat().st_ino == inode
    (first / "policy.safetensors").write_bytes(b"damaged")
    assert save_checkpoint(trainer, tmp_path, keep=1).stat().st_ino != inode
    assert (first / "policy.safetensors").stat().st_size > 1000


def test_a_finished_run_is_left_alone_and_missing_output_is_made_again(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    assert train_ppo.main(["--resume", str(run_dir)]) == 0
    assert "nothing is missing" in capsys.readouterr().out
    shutil.rmtree(run_dir / "model")
    for name in ("rewards.png", "evaluation.json"):
        (run_dir / name).unlink()
    assert train_ppo.main(["--resume", str(run_dir)]) == 0
    assert differences(finished, run_dir) == [] and (run_dir / "rewards.png").exists()


def test_a_run_keeps_where_each_of_its_parts_was_computed(finished, tmp_path, monkeypatch, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "report.md").unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    assert train_ppo.main(["--resume", str(run_dir)]) == 0
    starts = [json.loads(line) for line in (run_dir / "environment.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [start.pop("step") for start in starts] == [1, 3]
    assert [start.pop("Python") for start in starts] == [".".join(map(str, sys.version_info[:3])), "3.99"]
    assert [start.pop("command").split()[2] for start in starts] == ["--preset", "--resume"]
    assert starts[0] == starts[1] and (starts[0]["device"], starts[0]["dtype"]) == ("cpu", "float32")
    assert capsys.readouterr().out.startswith(f"Python 3.99, torch {torch.__version__}, transformers ")


@pytest.mark.parametrize("name", ["nothing", "latest"])
def test_runs_that_cannot_be_resumed(tmp_path, name, capsys):
    assert train_ppo.main(["--resume", name, "--runs_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert train_ppo.main(["--eval_only", str(tmp_path / "nothing")]) == 2


def test_a_second_process_is_refused_and_a_stale_lock_is_not(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "report.md").unlink()
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train_ppo.main(["--resume", str(run_dir)]) == 2
        assert "another process is at work" in capsys.readouterr().err
    assert (run_dir / ".lock").exists()
    assert train_ppo.main(["--resume", str(run_dir)]) == 0


def test_a_run_folder_that_cannot_be_made(tmp_path, demo, capsys):
    (tmp_path / "file").write_text("")
    code, _ = small_run(tmp_path / "file")
    assert code == 2 and "cannot be written: Not a directory" in capsys.readouterr().err


@pytest.fixture
def file_limit():
    """A function that limits the size of every file written, which stands in for a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_names_the_path_and_keeps_earlier_checkpoints(finished, tmp_path, file_limit, capsys):
    """The policy is over the limit, and nothing that is written before it."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints" / "step-000003")
    (run_dir / "report.md").unlink()
    kept = {path: path.is_file() and path.read_bytes() for path in (run_dir / "checkpoints").rglob("*")}
    file_limit((run_dir / "checkpoints" / "step-000002" / "policy.safetensors").stat().st_size - 4096)
    assert train_ppo.main(["--resume", str(run_dir)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"train_ppo.py: error: {run_dir}/checkpoints/step-000003 cannot be written: ")
    left = {path: path.is_file() and path.read_bytes() for path in (run_dir / "checkpoints").rglob("*")}
    assert left == kept


def test_a_file_that_torch_cannot_finish_is_named(tmp_path, file_limit):
    from support.files import disk_errors

    file_limit(1 << 20)
    with pytest.raises(UserError, match="optimizer.pt cannot be written"), disk_errors(tmp_path / "optimizer.pt"):
        torch.save(torch.zeros(1 << 20), tmp_path / "optimizer.pt")


def test_room_needed_is_named_when_the_disk_is_full(tmp_path, monkeypatch):
    from support.files import disk_errors

    with pytest.raises(UserError, match=r"no room to write .*model: it needs about 5 MiB, \d+ MiB are free"):
        with disk_errors(tmp_path / "model", 5 << 20):
            raise OSError(28, "No space left on device")
    with pytest.raises(RuntimeError, match="a bug"):
        with disk_errors(tmp_path):
            raise RuntimeError("a bug")


# --- the terminal


def test_a_run_outlasts_the_reader_of_its_output(finished, tmp_path, demo):
    """As after `| head -1`, or after Ctrl-C with `| tee log`: all files are those of a run that was watched."""
    program = [sys.executable, ROOT / "train_ppo.py", *SMALL, *"--save_every 1 --keep_checkpoints 5".split()]
    reader, broken = os.pipe()
    os.close(reader)
    command = [*program, "--log_samples_every", "1", "--run_name", "run"]
    result = subprocess.run(command, cwd=tmp_path, stdout=broken, stderr=subprocess.PIPE, text=True)
    os.close(broken)
    assert result.returncode == 0 and "BrokenPipe" not in result.stderr
    assert differences(finished, tmp_path / "runs" / "run") == []


def test_a_signal_is_heeded_though_nobody_reads_what_is_said(signals_restored, monkeypatch):
    reader, broken = os.pipe()
    os.close(reader)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(broken, data))
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGTERM)
    os.close(broken)
    assert stop.received == signal.SIGTERM


def test_a_non_finite_gradient_is_skipped_and_counted(policy):
    trainer = make(policy, ppo_epochs=2)
    trainer.reward_unit = 1.0  # of other scores than what follows
    batch = batch_of(trainer, policy)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    stats = trainer.step(*batch[:2], [1e30] * 6)
    assert stats["ppo/skipped"] == 2
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert trainer.step(*batch)["ppo/skipped"] == 0
    assert any(not torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_ten_skipped_steps_in_a_row_end_the_run(policy):
    trainer = make(policy, ppo_epochs=4)
    trainer.reward_unit = 1.0
    batch = batch_of(trainer, policy)
    with pytest.raises(FloatingPointError, match=f"{MAX_SKIPPED} optimiser steps"):
        for _ in range(3):
            trainer.step(*batch[:2], [1e30] * 6)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FloatingPointError("the gradient of 10"), "try a lower --lr"),
        (torch.OutOfMemoryError("CUDA"), "lower --micro_batch_size, also with --resume"),
    ],
)
def test_a_failing_step_is_one_line_and_keeps_the_checkpoint(tmp_path, demo, monkeypatch, capsys, error, said):
    step = PPOTrainer.step

    def failing(self, *args):
        if self.n_steps == 2:
            raise error
        return step(self, *args)

    monkeypatch.setattr(PPOTrainer, "step", failing)
    code, run_dir = small_run(tmp_path, "--save_every", "1")
    assert code == 2 and said in capsys.readouterr().err.splitlines()[-1]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert len(rows(run_dir)) == 2


def raised(function, *arguments) -> Exception:
    with pytest.raises(Exception) as error:
        function(*arguments)
    return error.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised(torch.empty, 1 << 60), True),
        (raised(np.empty, 1 << 50), True),
        (raised(bytearray, 1 << 60), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            True,
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.04 GB, max allowed: 9.07 GB)."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (KeyError("memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_memory_that_ran_out_is_known_under_all_its_names(error, expected):
    assert is_out_of_memory(error) is expected


def test_a_real_bug_keeps_its_traceback(tmp_path, demo, monkeypatch):
    monkeypatch.setattr(PPOTrainer, "step", lambda self, *args: [][0])
    with pytest.raises(IndexError):
        small_run(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_loading_a_checkpoint_runs_nothing(finished, tmp_path):
    """A pickle in the optimizer's place that would run code is not run, even with a matching checksum."""
    import pickle

    from support.checkpoint import FILES, sha256

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "report.md").unlink()
    for checkpoint in (run_dir / "checkpoints").iterdir():
        (checkpoint / FILES[2]).write_bytes(pickle.dumps(Evil()))
        state = json.loads((checkpoint / "state.json").read_text())
        state["sha256"][FILES[2]] = sha256(checkpoint / FILES[2])
        (checkpoint / "state.json").write_text(json.dumps(state))
    assert train_ppo.main(["--resume", str(run_dir)]) == 2
    assert not (tmp_path / "ran").exists()


def test_a_run_goes_on_where_its_device_is_not(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "report.md").unlink()
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    (run_dir / "config.json").write_text(json.dumps(config | {"device": "cuda:7"}), encoding="utf-8")
    assert train_ppo.main(["--resume", str(run_dir)]) == 2
    assert "--device cuda:7: " in (err := capsys.readouterr().err) and "try --device cpu" in err
    assert train_ppo.main(["--resume", str(run_dir), "--device", "cpu"]) == 0
