"""What goes wrong from outside: signals, rewards and steps that fail, memory that runs out."""

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
    """A reward at one of whose calls something happens: 1 to 3 judge, 4 to 6 train, and 7 and 8 judge again."""
    calls = []

    def reward(texts):
        calls.append(texts)
        if len(calls) == call:
            happens(texts)
        return count_characters(texts)

    return reward


@pytest.fixture(scope="module")
def whole(gpt2_folder, tmp_path_factory):
    """A run in which nothing goes wrong."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        assert tiny_run(run_dir, load_gpt2(gpt2_folder)) == 0
    return run_dir


def test_runs_that_differ_in_one_byte_differ(whole, tmp_path, monkeypatch):
    """Otherwise no test would notice that a run goes on otherwise."""
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
def test_a_signal_stops_after_the_step_with_a_checkpoint(policy, whole, tmp_path, number, code, capfd):
    """And the run goes on to the end of one that was not stopped."""
    run_dir, handler = tmp_path / "run", signal.getsignal(number)
    reward = reward_at(5, lambda _: signal.raise_signal(number))
    assert tiny_run(run_dir, policy, reward, save_every=0) == code and signal.getsignal(number) == handler
    out, err = capfd.readouterr()
    assert "stopping after this step" in err and out.endswith(f"python train_ppo.py --resume {run_dir}\n")
    assert [row["step"] for row in rows(run_dir)] == ["1", "2"] and checkpoints(run_dir) == ["step-000002"]
    assert not (run_dir / "model").exists()
    assert tiny_run(run_dir, policy, resume=True) == 0 and differences(whole, run_dir) == []


@pytest.mark.parametrize("call", [1, 7])
def test_ctrl_c_ends_an_evaluation_at_once(policy, tmp_path, call):
    """At the first nothing can be lost, and at the last the trained model is in its folder already."""
    with pytest.raises(KeyboardInterrupt):
        tiny_run(tmp_path / "run", policy, reward_at(call, lambda _: signal.raise_signal(signal.SIGINT)))
    assert (tmp_path / "run" / "model").exists() == (call == 7) and not (tmp_path / "run" / "report.md").exists()


def test_a_second_signal_leaves_at_once():
    script = (
        "import signal; from support.run.signals import StopSignal; stop = StopSignal()\n"
        "signal.raise_signal(signal.SIGINT); print(stop.received == signal.SIGINT, flush=True)\n"
        "signal.raise_signal(signal.SIGTERM); print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (143, "True\n") and result.stderr.count("\n") == 2


def test_below_torchrun_a_second_signal_is_a_repetition(monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr("os._exit", pytest.fail)
    stop = StopSignal()
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
    stop.release()
    assert stop.received == signal.SIGTERM and capfd.readouterr().err == ""


def test_a_terminal_that_goes_away_stops_nothing_below_nohup(capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    stop.release()
    assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_program_may_run_twice_in_one_process_and_in_a_notebook():
    """A notebook's stream has no buffer. stdout is a second one on its buffer, as scripts for Chinese consoles make."""
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
def test_a_failed_run_leaves_the_process_as_it_was(policy, tmp_path, call):
    """No lock and no signal handler, even while the error is kept, as a notebook keeps it."""
    handlers, run_dir = [signal.getsignal(number) for number in STOPS], tmp_path / "run"
    with pytest.raises(UserError, match="KeyError") as failed:
        tiny_run(run_dir, policy, reward_at(call, lambda _: {}["word"]), inputs={"the reward": "1"})
    with pytest.raises(UserError, match="is not what") as refused:
        tiny_run(run_dir, policy, resume=True, inputs={"the reward": "2"})
    assert [signal.getsignal(number) for number in STOPS] == handlers
    assert tiny_run(run_dir, policy, resume=True, inputs={"the reward": "1"}) == 0
    assert failed.tb and refused.tb


@pytest.mark.parametrize(("call", "where", "kept"), [(1, "evaluation", []), (5, "step 2", ["step-000001"])])
def test_a_reward_that_raises_keeps_the_run(policy, whole, tmp_path, call, where, kept):
    """One line, the traceback with the texts in error.log, and a way on; with another reward if none has judged."""
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


def test_a_failing_step_is_one_line_and_keeps_the_checkpoint(policy, tmp_path, monkeypatch):
    step = PPOTrainer.step

    def failing(self, *args):
        if self.n_steps == 2:
            raise FloatingPointError("the gradient of 10")
        return step(self, *args)

    monkeypatch.setattr(PPOTrainer, "step", failing)
    with pytest.raises(UserError, match="^step 3: .*try a lower --lr"):
        tiny_run(tmp_path / "run", policy)
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"] and len(rows(tmp_path / "run")) == 2


def test_full_memory_is_one_line_and_a_bug_keeps_its_traceback(tmp_path, gpt2_folder, monkeypatch, capsys):
    flags = ["--model_name", str(gpt2_folder), "--reward", "tests.helpers:count_characters", "--prompts", "衣服"]
    monkeypatch.setattr("train_ppo.train", lambda *_, **__: torch.empty(1 << 60))
    assert small_run(tmp_path, *flags)[0] == 2
    err = capsys.readouterr().err
    assert "lower --micro_batch_size, also with --resume" in err.splitlines()[-1] and "Traceback" not in err
    monkeypatch.setattr("train_ppo.train", lambda *_: signal.raise_signal(signal.SIGINT))
    assert small_run(tmp_path, *flags, name="stopped")[0] == 130 and capsys.readouterr().err.endswith("\nstopped\n")
    monkeypatch.setattr("train_ppo.train", lambda *_, **__: [][0])
    with pytest.raises(IndexError):
        small_run(tmp_path, *flags, name="other")


def test_memory_that_ran_out_is_known_in_every_librarys_words():
    for allocate, size in ((torch.empty, 1 << 60), (np.empty, 1 << 50)):
        with pytest.raises((RuntimeError, MemoryError)) as error:
            allocate(size)
        assert is_out_of_memory(error.value)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
