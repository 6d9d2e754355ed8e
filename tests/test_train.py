"""The whole program on the demo models, as a user runs it."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import PPOConfig
from ppo import PPOTrainer
from reward import SentimentReward
from support import command_line
from support.figures import duration
from support.run_folder import RunFolder
from support.signals import StopSignal
from tests.helpers import ROOT, SMALL, rows, small_run, weights, write_gpt2
from tests.ranks import context
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_the_saved_model_writes_reviews_in_plain_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer("刚收到货,感觉", return_tensors="pt").input_ids
    written = model.generate(ids, max_new_tokens=10)[0]
    text = tokenizer.decode(written, skip_special_tokens=True)
    assert text.startswith("刚收到货,感觉") and len(written) > ids.shape[1]


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "cut")
    (run_dir / "report.md").unlink()
    file = run_dir / "checkpoints" / "step-000003" / "policy.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert main(["--resume", str(run_dir)]) == 0
    assert "step-000003 cannot be used" in capsys.readouterr().out
    assert weights(run_dir) == weights(finished)


def test_eval_only_judges_a_saved_run_again(finished, capsys):
    before = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert main(["--eval_only", str(finished)]) == 0
    assert json.loads((finished / "evaluation.json").read_text(encoding="utf-8")) == before
    assert "mean reward" in capsys.readouterr().out


def test_nothing_is_written_over_an_earlier_run(finished, capsys):
    before = (finished / "metrics.csv").read_bytes()
    code, _ = small_run(finished.parent)
    assert code == 2 and "exists already" in capsys.readouterr().err
    assert (finished / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gen_len", "60"], "64 positions, which leaves"),
        (["--model_name", "{tmp}"], "no config.json"),
        (["--reward_model_name", "{tmp}"], "no config.json"),
        (["--positive_label", "happy"], "'happy' is none of the classifier's labels"),
        (["--reward_model_name", "{gpt2}"], "which label"),
        (["--model_name", "{other}"], "do not belong together"),
    ],
)
def test_models_that_cannot_work_are_one_line(tmp_path, demo, flags, said, capsys):
    other = write_gpt2(tmp_path / "other", vocab_size=30)
    flags = [flag.format(tmp=tmp_path, gpt2=demo[0], other=other) for flag in flags]
    code, run_dir = small_run(tmp_path, *flags)
    err = capsys.readouterr().err
    assert code == 2 and said in err and err.count("\n") == 1
    assert not run_dir.exists()


@pytest.fixture
def in_folder(tmp_path, monkeypatch, signals_restored):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("sends_signal", None)


# --- rewards of one's own


@pytest.fixture
def reward_module(tmp_path, in_folder):
    """A module in the working directory, as a user would write one."""
    (tmp_path / "my_test_reward.py").write_text(
        "calls = 0\n"
        "def varied(texts):\n    return [float(sum(map(ord, text)) % 97) for text in texts]\n"
        "def breaks(texts):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 3: raise KeyError('no such word')\n"
        "    return [0.0] * len(texts)\n",
        encoding="utf-8",
    )
    yield
    sys.modules.pop("my_test_reward", None)


def test_a_reward_of_ones_own(tmp_path, demo, reward_module):
    """Its numbers are logged as they are, and what metrics.csv says of a step follows from them."""
    code, run_dir = small_run(tmp_path, "--reward", "my_test_reward:varied", "--episodes", "16")
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    scores = [sample["score"] for sample in samples]
    assert code == 0
    assert scores == [sum(map(ord, sample["prompt"] + sample["completion"])) % 97 for sample in samples]
    (row,), ordered, mean = rows(run_dir), sorted(scores), sum(scores) / 16
    said = [float(row[f"env/reward_{name}"]) for name in ("mean", "std", "p10", "p90")]
    std = (sum((score - mean) ** 2 for score in scores) / 16) ** 0.5
    expected = [mean, std, (ordered[1] + ordered[2]) / 2, (ordered[13] + ordered[14]) / 2]
    assert said == pytest.approx(expected, rel=1e-5)


def test_a_reward_that_raises_keeps_the_run(tmp_path, demo, reward_module, capsys):
    """Two calls are the evaluation, the third step 1: step 2 fails, and leaves a checkpoint and error.log."""
    code, run_dir = small_run(tmp_path, "--reward", "my_test_reward:breaks")
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert all(
        part in err for part in ("step 2", "KeyError", "no such word", "my_test_reward.py", "line 7", "error.log")
    )
    log = (run_dir / "error.log").read_text(encoding="utf-8")
    assert "Traceback" in log and log.count("刚收到货,感觉") == 16
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


# --- stopping


def reward_with_signal(folder, call: int, number: int) -> str:
    """A reward of one's own that sends its process a signal at one of its calls: 1, 2 and 6 judge, 3 to 5 train."""
    (folder / "sends_signal.py").write_text(
        "import os\ncalls = 0\n"
        "def score(texts):\n    global calls\n    calls += 1\n"
        f"    if calls == {call}:\n        os.kill(os.getpid(), {number})\n"
        "    return [len(text) / 20 for text in texts]\n"
    )
    return "sends_signal:score"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(in_folder, demo, number, code, capfd):
    reward = reward_with_signal(in_folder, 4, number)
    stopped, run_dir = small_run(in_folder, "--reward", reward)
    out, err = capfd.readouterr()
    assert stopped == code and "\nstopping after this step; once more leaves at once\n" in err
    assert out.endswith(f"stopped after step 2; go on with: python train_ppo.py --resume {run_dir} --reward {reward}\n")
    assert [row["step"] for row in rows(run_dir)] == ["1", "2"]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "model").exists()


@pytest.mark.parametrize("call", [1, 6])
def test_ctrl_c_ends_an_evaluation_at_once(in_folder, demo, call, capfd):
    """The first lets nothing be lost, the last a trained model that is in its folder already."""
    reward = reward_with_signal(in_folder, call, signal.SIGINT)
    code, run_dir = small_run(in_folder, "--reward", reward)
    assert code == 130 and capfd.readouterr().err.endswith("\nstopped\n")
    assert (run_dir / "model").exists() == (call == 6) and not (run_dir / "report.md").exists()
    assert call == 1 or main(["--resume", str(run_dir), "--reward", reward]) == 0


def test_after_the_loop_signals_end_the_process_again(in_folder, demo):
    assert small_run(in_folder, "--episodes", "16")[0] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGINT, signal.SIGINT, 130), (signal.SIGINT, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 130)],
)
def test_a_second_signal_leaves_at_once(first, second, code):
    script = (
        "import signal; from support.signals import StopSignal; stop = StopSignal()\n"
        f"print(stop.received, flush=True); signal.raise_signal({first:d}); print(stop.received, flush=True)\n"
        f"signal.raise_signal({second:d}); print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (code, f"0\n{first:d}\n")
    assert result.stderr == "\nstopping after this step; once more leaves at once\n"


def test_below_nohup_a_terminal_that_goes_away_stops_nothing(signals_restored, capfd):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopSignal()
    signal.raise_signal(signal.SIGHUP)
    stop.release()
    assert not stop.received and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what a script starts with &
    stop = StopSignal()
    signal.raise_signal(signal.SIGINT)
    assert stop.received == signal.SIGINT


def test_below_torchrun_which_passes_signals_on_a_second_changes_nothing(monkeypatch, signals_restored, capfd):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    stop = StopSignal()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.raise_signal(number)
        assert stop.received == number
    assert capfd.readouterr().err == ""


def program_in(folder: Path, flags: list[str]) -> None:
    """`python train_ppo.py FLAGS` in this folder, what it says on stderr in the file err."""
    os.chdir(folder)
    os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(flags))


def test_a_second_signal_leaves_a_hanging_reward_at_once(tmp_path, demo):
    """The reward hangs in step 1 (after two calls of the evaluation): one Ctrl-C waits for the step, two do not."""
    (tmp_path / "hangs.py").write_text(
        "import time\ncalls = 0\n"
        "def score(texts):\n    global calls\n    calls += 1\n"
        "    if calls > 2:\n        open('hanging', 'w').close()\n        time.sleep(600)\n"
        "    return [0.0] * len(texts)\n"
    )
    flags = [*SMALL, "--run_name", "run", "--reward", "hangs:score"]
    process = context.Process(target=program_in, args=(tmp_path, flags))
    process.start()
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / "hanging").exists():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    code, err = process.exitcode, (tmp_path / "err").read_text()
    process.kill()
    assert code == 130 and "Traceback" not in err and "once more leaves at once" in err


# --- how far a run is


def test_what_is_no_terminal_gets_lines_and_no_returns_to_the_start_of_one(tmp_path, demo, capfd):
    assert small_run(tmp_path, "--log_samples_every", "0")[0] == 0
    lines = "".join(capfd.readouterr()).split("\n")
    form = r"step (\d)/3  reward ([\d.]+)  KL ([\d.]+)  [\d.]+ s a step, .+ left"
    told = [found.groups() for line in lines if (found := re.fullmatch(form, line))]
    assert [told[0][0], told[-1][0]] == ["1", "3"] and not any("\r" in line or "step/s" in line for line in lines)
    for step, reward, kl in told:
        row = rows(tmp_path / "run")[int(step) - 1]
        said = [float(row["env/reward_mean"]), float(row["objective/kl"])]
        assert [float(reward), float(kl)] == pytest.approx(said, abs=0.006)


def test_a_terminal_gets_a_bar_and_no_such_lines(tmp_path, demo, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    small_run(tmp_path, "--episodes", "16")
    out, err = capsys.readouterr()
    assert "1/1 [" in err and "reward=0." in err and "\nstep 1/1" not in out


def test_between_the_first_step_and_the_last_a_line_comes_every_ten_seconds(tmp_path, monkeypatch, capsys):
    """By a clock: a run goes on at step 3 of 9, and its steps take 4 s each."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    folder = RunFolder(tmp_path, PPOConfig(episodes=9, batch_size=1))
    for step in folder.steps(SimpleNamespace(n_steps=2)):
        now[0] += 4
        folder.tell(step, "figures")
    assert capsys.readouterr().out.splitlines() == [
        f"step {step}/9  figures  4.00 s a step, {left} s left" for step, left in ((3, 24), (6, 12), (9, 0))
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (3600, "1 h 0 min"), (7559, "2 h 5 min")],
)
def test_a_duration_is_told_in_its_two_largest_units(seconds, shown):
    assert duration(seconds) == shown


# --- parts


def test_the_time_of_a_step_is_told_by_its_parts(in_folder, demo, monkeypatch):
    """By a clock that stands still but in what is timed: 2 seconds of sampling, 3 of scoring, 4 of PPO."""
    now = [0.0]

    def takes(seconds, function):
        def timed(*args, **options):
            now[0] += seconds
            return function(*args, **options)

        return timed

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(PPOTrainer, "generate", takes(2, PPOTrainer.generate))
    monkeypatch.setattr(SentimentReward, "__call__", takes(3, SentimentReward.__call__))
    monkeypatch.setattr(PPOTrainer, "step", takes(4, PPOTrainer.step))
    _, run_dir = small_run(in_folder, "--episodes", "32")
    for row in rows(run_dir):
        assert [float(row[f"time/{part}"]) for part in ("sample", "score", "ppo", "step")] == [2, 3, 4, 9]


def test_runs_without_a_name_are_called_after_the_time(in_folder, demo, monkeypatch):
    monkeypatch.setattr(command_line, "datetime", SimpleNamespace(now=lambda: datetime(2031, 2, 3, 14, 5, 6)))
    for name in ("20310203-140506", "20310203-140506-2"):
        assert main([*SMALL, "--episodes", "16"]) == 0
        config = json.loads((in_folder / "runs" / name / "config.json").read_text(encoding="utf-8"))
        assert config["run_name"] == name
    assert command_line.new_run_folder(PPOConfig()).name == "20310203-140506-3"


def test_a_run_holds_its_folder_while_it_is_at_work(in_folder, demo, monkeypatch):
    def locked(self, texts):
        with (in_folder / "run" / ".lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return [0.5] * len(texts)

    monkeypatch.setattr(SentimentReward, "__call__", locked)
    assert small_run(in_folder, "--episodes", "16")[0] == 0


def test_a_run_says_what_it_is_in_the_order_of_its_work(in_folder, demo, capsys):
    _, run_dir = small_run(in_folder, "--log_samples_every", "2")
    out = capsys.readouterr().out
    said = (
        f"run folder {run_dir}, 3 steps of 16 completions",
        "on cpu in float32",
        "step 2, mean reward",
        "mean reward",
    )
    places = [out.index(part) for part in (*said, "| prompt ", f"report.md are in {run_dir}")]
    assert places == sorted(places) and "processes" not in out and out.count("step 2, mean reward") == 1
    assert "step 1, mean" not in out and "step 3, mean" not in out


def test_the_program_does_without_what_windows_and_plain_consoles_lack():
    """Without modules that Windows lacks, and with a console that knows ASCII only."""
    script = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import train_ppo, plot_rewards, ppo, reward\n"
        "from support import run_folder, demo_models, hub, signals\n"
        "import runpy; sys.argv[1:] = ['--run_name', '\U0001f600']\n"
        "runpy.run_path('train_ppo.py', run_name='__main__')\n"
    )
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("train_ppo.py: error: --run_name '\\U0001f600' is no plain name")
