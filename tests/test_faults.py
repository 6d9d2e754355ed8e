"""Faults during a run: signals, failing rewards, failing steps, and running out of memory."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from ppo import PPOTrainer
from support.common.errors import UserError, is_out_of_memory
from support.run.signals import STOPS, StopSignal
from tests.helpers import (
    ROOT,
    checkpoints,
    count_characters,
    leave_pictures_empty,
    load_gpt2,
    rows,
    small_run,
    tiny_run,
)
from tools import stress_resume
from tools.stress_resume import COMPARED, differences

pytestmark = pytest.mark.usefixtures("without_pictures", "signals_restored")


def reward_at(call, happens):
    """Return a reward that runs happens(texts) in the given call: 1 to 3 evaluate, 4 to 6 train, 7 and 8 evaluate."""
    calls = []

    def reward(texts):
        calls.append(texts)
        if len(calls) == call:
            happens(texts)
        return count_characters(texts)

    return reward


@pytest.fixture(scope="module")
def whole(gpt2_folder, tmp_path_factory):
    """A run without faults, for comparison."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        assert tiny_run(run_dir, load_gpt2(gpt2_folder)) == 0
    return run_dir


def test_differences_finds_a_single_changed_byte(whole, tmp_path, monkeypatch):
    """If it didn't, tests that compare runs would prove nothing."""
    for i, name in enumerate(("metrics.csv", *COMPARED)):
        other = shutil.copytree(whole, tmp_path / str(i))
        content = bytearray((other / name).read_bytes())
        content[content.index(b"e")] += 1
        (other / name).write_bytes(content)
        assert differences(whole, other) == [name]
    monkeypatch.setattr("sys.argv", ["stress_resume"])
    for found in [], ["metrics.csv"]:
        monkeypatch.setattr(stress_resume, "stress", lambda *_: (3, found))
        assert stress_resume.main() == len(found)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_the_run_after_the_step_and_saves_a_checkpoint(policy, whole, tmp_path, number, code, capfd):
    """The resumed run gives the same result as one that was never stopped."""
    run_dir, handler = tmp_path / "run", signal.getsignal(number)
    reward = reward_at(5, lambda _: signal.raise_signal(number))
    assert tiny_run(run_dir, policy, reward, save_every=0) == code and signal.getsignal(number) == handler
    out, err = capfd.readouterr()
    assert "stopping after this step" in err and out.endswith(f"python train_ppo.py --resume {run_dir}\n")
    assert [row["step"] for row in rows(run_dir)] == ["1", "2"] and checkpoints(run_dir) == ["step-000002"]
    assert not (run_dir / "model").exists()
    assert tiny_run(run_dir, policy, resume=True) == 0 and differences(whole, run_dir) == []


@pytest.mark.parametrize("call", [1, 7])
def test_ctrl_c_stops_an_evaluation_immediately(policy, tmp_path, call):
    """The first evaluation has nothing to lose, and the trained model is saved before the last one."""
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", policy, reward_at(call, lambda _: signal.raise_signal(signal.SIGINT)))
    assert (tmp_path / "run" / "model").exists() == (call == 7) and not (tmp_path / "run" / "report.md").exists()


def test_a_second_signal_exits_immediately():
    script = (
        "import signal; from support.run.signals import StopSignal; stop = StopSignal()\n"
        "signal.raise_signal(signal.SIGINT); print(stop.received == signal.SIGINT, flush=True)\n"
        "signal.raise_signal(signal.SIGTERM); print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (143, "True\n") and result.stderr.count("\n") == 2


def test_under_torchrun_a_second_signal_is_ignored(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("os._exit", pytest.fail)
    stop = StopSignal()
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    stop.release()
    assert stop.received == signal.SIGTERM and capfd.readouterr().err == ""


def test_closing_the_terminal_does_not_stop_a_run_under_nohup(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    stop.release()
    assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_programs_can_run_twice_in_one_process_and_in_a_notebook():
    """A notebook's stream has no buffer. Scripts for Chinese consoles wrap stdout's buffer in a second stream."""
    script = (
        "import io, runpy, sys\n"
        "class Cell(io.TextIOBase): write = lambda self, text: sys.stdout.write(text)\n"
        "sys.stderr, sys.stdout = Cell(), io.TextIOWrapper(sys.stdout.buffer, 'utf-8')\n"
        "for program in 2 * ['train_ppo.py', 'plot_rewards.py']:\n"
        "    sys.argv = [program, *['--resume'][: program == 'train_ppo.py'], 'nothing']\n"
        "    try: runpy.run_path(program, run_name='__main__')\n"
        "    except SystemExit as end: print(end.code)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    said = [line.partition(":")[0] for line in result.stdout.splitlines()]
    assert said == 2 * ["train_ppo.py", "2", "plot_rewards.py", "2"] and result.stderr == ""


@pytest.mark.parametrize("call", [5, 7])
def test_a_failed_run_releases_its_lock_and_signal_handlers(policy, tmp_path, call):
    """This works even if the exception is kept alive, as in a notebook."""
    handlers, run_dir = [signal.getsignal(number) for number in STOPS], tmp_path / "run"
    with pytest.raises(UserError, match="KeyError") as failed:
        tiny_run(run_dir, policy, reward_at(call, lambda _: {}["word"]), inputs={"the reward": "1"})
    with pytest.raises(UserError, match="an input has changed") as refused:
        tiny_run(run_dir, policy, resume=True, inputs={"the reward": "2"})
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert tiny_run(run_dir, policy, resume=True, inputs={"the reward": "1"}) == 0
    assert failed.tb and refused.tb


@pytest.mark.parametrize(("call", "where", "kept"), [(1, "evaluation", []), (5, "step 2", ["step-000001"])])
def test_a_run_can_be_resumed_after_its_reward_raised_an_exception(policy, whole, tmp_path, call, where, kept):
    """The error is one line long, and error.log has the traceback and the texts. If no evaluation has finished, the run
    can be resumed with another reward."""
    run_dir, seen = tmp_path / "run", []

    def breaks(texts):
        seen.extend(texts)
        raise KeyError("no such word")

    with pytest.raises(UserError, match=rf"^{where}: .*KeyError.*no such word.*error\.log$"):
        tiny_run(run_dir, policy, reward_at(call, breaks), save_every=0, inputs={"the reward": str(call)})
    log = (run_dir / "error.log").read_text(encoding="utf-8")
    assert "Traceback" in log and all(text in log for text in seen)
    assert checkpoints(run_dir) == kept
    assert tiny_run(run_dir, policy, resume=True, inputs={"the reward": "5"}) == 0
    assert differences(whole, run_dir) == []


def test_a_failing_step_gives_a_one_line_error_and_keeps_the_checkpoints(policy, tmp_path, monkeypatch):
    step = PPOTrainer.step

    def failing(self, *args):
        if self.n_steps == 2:
            raise FloatingPointError("the gradient of 10")
        return step(self, *args)

    monkeypatch.setattr(PPOTrainer, "step", failing)
    with pytest.raises(UserError, match="^step 3: .*try a lower --lr"):
        tiny_run(tmp_path / "run", policy)
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"] and len(rows(tmp_path / "run")) == 2


def test_out_of_memory_gives_a_one_line_error_and_a_bug_keeps_its_traceback(tmp_path, gpt2_folder, monkeypatch, capsys):
    flags = ["--model_name", str(gpt2_folder), "--reward", "tests.helpers:count_characters", "--prompts", "衣服"]
    monkeypatch.setattr("train_ppo.train", lambda *_, **__: torch.empty(1 << 60))
    assert small_run(tmp_path, *flags)[0] == 2
    err = capsys.readouterr().err
    assert "use a small --micro_batch_size (also with --resume)" in err.splitlines()[-1] and "Traceback" not in err
    monkeypatch.setattr("train_ppo.train", lambda *_: signal.raise_signal(signal.SIGINT))
    assert small_run(tmp_path, *flags, name="stopped")[0] == 130 and capsys.readouterr().err.endswith("\nstopped\n")
    monkeypatch.setattr("train_ppo.train", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        small_run(tmp_path, *flags, name="other")


def test_out_of_memory_errors_of_every_library_are_recognised():
    for allocate, size in ((torch.empty, 1 << 60), (np.empty, 1 << 50)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate(size)
        assert is_out_of_memory(error.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
