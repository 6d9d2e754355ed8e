"""What goes wrong from outside: signals, rewards and steps that fail, memory that runs out, lost terminals."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from ppo import PPOTrainer
from support.errors import UserError, is_out_of_memory
from support.signals import StopSignal
from tests.helpers import ROOT, SMALL, count_characters, rows, small_run, tiny_run
from tools.stress_resume import differences

pytestmark = pytest.mark.usefixtures("without_pictures", "signals_restored")


def checkpoints(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def reward_with_signal(call, number):
    """A reward that gets a signal at one of its calls: 1 and 2 judge (the second one fewer texts), 3 to 5 train."""
    calls = []

    def reward(texts):
        calls.append(texts)
        if len(calls) == call:
            signal.raise_signal(number)
        return count_characters(texts)

    return reward


# --- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(policy, tmp_path, number, code, capfd):
    """And the run goes on to the end of one that was not stopped."""
    run_dir = tmp_path / "run"
    assert tiny_run(run_dir, policy, reward_with_signal(4, number), save_every=0) == code
    out, err = capfd.readouterr()
    assert "stopping after this step" in err and out.endswith(f"python train_ppo.py --resume {run_dir}\n")
    assert [row["step"] for row in rows(run_dir)] == ["1", "2"] and checkpoints(run_dir) == ["step-000002"]
    assert not (run_dir / "model").exists()
    assert tiny_run(run_dir, policy, resume=True) == 0 and tiny_run(tmp_path / "whole", policy) == 0
    assert differences(tmp_path / "whole", run_dir) == []


@pytest.mark.parametrize("call", [1, 6])
def test_ctrl_c_ends_an_evaluation_at_once(policy, tmp_path, call):
    """At the first nothing can be lost, and at the last the trained model is in its folder already."""
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", policy, reward_with_signal(call, signal.SIGINT))
    assert (tmp_path / "run" / "model").exists() == (call == 6) and not (tmp_path / "run" / "report.md").exists()


def test_a_second_signal_leaves_at_once():
    script = (
        "import signal; from support.signals import StopSignal; stop = StopSignal()\n"
        "signal.raise_signal(signal.SIGINT); print(stop.received == signal.SIGINT, flush=True)\n"
        "signal.raise_signal(signal.SIGTERM); print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (143, "True\n") and result.stderr.count("\n") == 2


def test_a_terminal_that_goes_away_stops_nothing_below_nohup(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    stop.release()
    assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


# --- rewards and steps that fail


def test_a_reward_that_raises_keeps_the_run(policy, tmp_path):
    """In step 2: a checkpoint of step 1, one line, the traceback with the texts in error.log, and a way on."""
    run_dir, calls = tmp_path / "run", []

    def breaks(texts):
        calls.append(texts)
        if len(calls) == 4:
            raise KeyError("no such word")
        return count_characters(texts)

    with pytest.raises(UserError, match=r"^step 2: .*KeyError.*no such word.*error\.log$"):
        tiny_run(run_dir, policy, breaks, save_every=0)
    log = (run_dir / "error.log").read_text(encoding="utf-8")
    assert "Traceback" in log and all(text in log for text in calls[-1])
    assert checkpoints(run_dir) == ["step-000001"]
    assert tiny_run(run_dir, policy, resume=True) == 0 and tiny_run(tmp_path / "whole", policy) == 0
    assert differences(tmp_path / "whole", run_dir) == []


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
    err = capsys.readouterr().err
    assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err
    assert checkpoints(run_dir) == ["step-000001", "step-000002"] and len(rows(run_dir)) == 2


def test_a_bug_keeps_its_traceback(tmp_path, demo, monkeypatch):
    monkeypatch.setattr(PPOTrainer, "step", lambda self, *args: [][0])
    with pytest.raises(IndexError):
        small_run(tmp_path)


def raised(function, *arguments) -> Exception:
    with pytest.raises(Exception) as error:
        function(*arguments)
    return error.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (raised(torch.empty, 1 << 60), True),
        (raised(np.empty, 1 << 50), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_memory_that_ran_out_is_known_in_every_librarys_words(error, expected):
    assert is_out_of_memory(error) is expected


# --- folders and terminals


def test_a_run_whose_folder_is_renamed_ends_in_one_line_and_goes_on_there(policy, tmp_path):
    """At the next checkpoint; what it lost is made again."""

    calls = []

    def renaming(texts):
        calls.append(texts)
        if len(calls) == 4:
            (tmp_path / "run").rename(tmp_path / "renamed")
        return count_characters(texts)

    with pytest.raises(UserError, match="step-000002 cannot be written: No such file or directory"):
        tiny_run(tmp_path / "run", policy, renaming)
    assert tiny_run(tmp_path / "renamed", policy, resume=True) == 0 and tiny_run(tmp_path / "whole", policy) == 0
    assert differences(tmp_path / "whole", tmp_path / "renamed") == []


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
