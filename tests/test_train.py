"""The whole program on the demo models, as a user runs it."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import UserError
from support import demo_models
from tests.conftest import ROOT, write_gpt2
from train_ppo import draw_prompts, main

SMALL = [
    "--preset",
    "demo",
    "--device",
    "cpu",
    "--episodes",
    "48",
    "--batch_size",
    "16",
    "--minibatch_size",
    "8",
    "--eval_samples",
    "16",
]


def small_run(tmp_path, *flags, name="run"):
    code = main([*SMALL, "--runs_dir", str(tmp_path), *(("--run_name", name) if name else ()), *flags])
    return code, tmp_path / str(name)


def rows(run_dir):
    with (run_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def without_times(run_dir):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows(run_dir)]


def weights(run_dir):
    return (run_dir / "model" / "model.safetensors").read_bytes()


def test_the_run_folder_holds_what_was_promised(finished):
    assert {path.name for path in finished.iterdir()} >= {
        "config.json", "metrics.csv", "samples.jsonl", "model", "rewards.png", "evaluation.json", "before_after.md",
        "checkpoints",
    }  # fmt: skip
    table = rows(finished)
    assert list(table[0])[:4] == ["step", "episodes", "env/reward_mean", "env/reward_std"]
    assert {
        "objective/kl",
        "objective/kl_coef",
        "objective/entropy",
        "ppo/loss/policy",
        "ppo/loss/value",
        "ppo/policy/approxkl",
    } <= set(table[0])
    assert {"time/sample", "time/score", "time/ppo", "time/step"} <= set(table[0])
    assert [row["step"] for row in table] == ["1", "2", "3"] and table[-1]["episodes"] == "48"
    samples = [json.loads(line) for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(samples) == 48 and set(samples[0]) == {"step", "prompt", "completion", "score"}
    first = [sample["score"] for sample in samples if sample["step"] == 1]
    assert float(table[0]["env/reward_mean"]) == pytest.approx(np.mean(first), abs=1e-6)
    assert float(table[0]["env/reward_std"]) == pytest.approx(np.std(first), abs=1e-6)
    assert not any(" " in sample["completion"] or "[" in sample["completion"] for sample in samples)
    assert (finished / "rewards.png").read_bytes().startswith(b"\x89PNG")


def test_the_saved_model_writes_reviews_in_plain_transformers(finished):
    model = AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer("[CLS]刚收到货,感觉", add_special_tokens=False, return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=10)[0], skip_special_tokens=True)
    assert text.replace(" ", "").startswith("刚收到货,感觉") and len(text.replace(" ", "")) > 8


def test_the_same_seed_gives_the_same_run_to_the_bit(finished, tmp_path):
    code, again = small_run(tmp_path, name="again")
    assert code == 0
    assert without_times(again) == without_times(finished)
    assert (again / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert weights(again) == weights(finished)
    code, other = small_run(tmp_path, "--seed", "2", name="other")
    assert without_times(other) != without_times(finished)


def test_a_resumed_run_equals_the_uninterrupted_one(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "cut")
    for path in (run_dir / "checkpoints" / "step-000003", run_dir / "checkpoints" / "step-000002", run_dir / "model"):
        shutil.rmtree(path)
    assert main(["--resume", str(run_dir), "--log_samples_every", "0"]) == 0
    assert without_times(run_dir) == without_times(finished)
    assert (run_dir / "samples.jsonl").read_bytes() == (finished / "samples.jsonl").read_bytes()
    assert weights(run_dir) == weights(finished)


def test_resume_refuses_flags_that_would_change_the_result(finished, capsys):
    before = weights(finished)
    for flags, said in (
        (["--lr", "1"], "--lr 1.0 would change"),
        (["--seed", "7"], "--seed 7"),
        (["--episodes", "16"], "fewer than the 48"),
    ):
        assert main(["--resume", str(finished), *flags]) == 2
        assert said in capsys.readouterr().err
    assert weights(finished) == before


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "cut")
    (run_dir / "before_after.md").unlink()
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


def test_runs_without_a_name_get_a_time_stamp(tmp_path, demo):
    for _ in range(2):
        small_run(tmp_path, "--episodes", "16", name=None)
    assert len(list(tmp_path.iterdir())) == 2


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


# --- rewards of one's own


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """A module in the working directory, as a user would write one."""
    (tmp_path / "my_test_reward.py").write_text(
        "calls = 0\n"
        "def short(texts):\n    return [-float(len(text)) for text in texts]\n"
        "def breaks(texts):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 2: raise KeyError('no such word')\n"
        "    return [0.0] * len(texts)\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("my_test_reward", None)


def test_a_reward_of_ones_own(tmp_path, demo, reward_module):
    code, run_dir = small_run(tmp_path, "--reward", "my_test_reward:short")
    assert code == 0
    assert all(-30 < float(row["env/reward_mean"]) < -6 for row in rows(run_dir))


def test_a_reward_that_raises_keeps_the_run(tmp_path, demo, reward_module, capsys):
    """The first call is the evaluation, the second step 1: step 2 fails, and leaves a checkpoint and error.log."""
    code, run_dir = small_run(tmp_path, "--reward", "my_test_reward:breaks")
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 2
    assert all(
        part in err for part in ("step 2", "KeyError", "no such word", "my_test_reward.py", "line 7", "刚收到货,感觉")
    )
    assert "Traceback" in (run_dir / "error.log").read_text(encoding="utf-8")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000001"]


# --- stopping


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, demo, number, code):
    command = [
        sys.executable,
        str(ROOT / "train_ppo.py"),
        *SMALL,
        "--episodes",
        "4800",
        "--runs_dir",
        str(tmp_path),
        "--run_name",
        "run",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    )
    metrics = tmp_path / "run" / "metrics.csv"
    deadline = time.time() + 60
    while time.time() < deadline and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.1)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err and f"--resume {tmp_path / 'run'}" in out
    steps = len(rows(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:06d}").is_dir()


def test_a_second_signal_leaves_a_hanging_reward_at_once(tmp_path, demo):
    """The reward hangs in step 1 (the first call is the evaluation): one Ctrl-C waits for the step, two do not."""
    (tmp_path / "hangs.py").write_text(
        "import time\ncalls = 0\n"
        "def score(texts):\n    global calls\n    calls += 1\n"
        "    if calls > 1:\n        open('hanging', 'w').close()\n        time.sleep(600)\n"
        "    return [0.0] * len(texts)\n"
    )
    command = [sys.executable, str(ROOT / "train_ppo.py"), *SMALL, "--run_name", "run", "--reward", "hangs:score"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / "hanging").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130 and "Traceback" not in err and "once more leaves at once" in err


# --- parts


def test_prompts_are_drawn_evenly_in_changing_order():
    drawn = [draw_prompts(3, 1, step, 8) for step in (1, 2, 3)]
    flat = sum(drawn, [])
    assert all(sorted(flat[i : i + 3]) == [0, 1, 2] for i in range(0, 24, 3))
    assert len({tuple(flat[i : i + 3]) for i in range(0, 24, 3)}) > 1
    assert drawn[1] == draw_prompts(3, 1, 2, 8) != draw_prompts(3, 2, 2, 8)


def test_demo_models_are_the_same_every_time_and_made_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models, "STEPS", {"gpt2": 2, "sentiment": 2})
    folders = []
    for cache in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        folders.append(demo_models.demo_models())
    for first, second in zip(*folders):
        tensors = [torch.load(folder / "pytorch_model.bin") for folder in (first, second)]
        assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    started = time.time()
    assert demo_models.demo_models() == folders[1] and time.time() - started < 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setattr(demo_models, "fit", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo_models.demo_models()
    assert list((tmp_path / "c" / "ppo-chinese-gpt2").iterdir()) == []


def test_demo_models_do_without_a_home_folder_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models, "STEPS", {"gpt2": 2, "sentiment": 2})
    (tmp_path / "home").write_text("a file where a folder should be")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert demo_models.demo_models()[0].is_relative_to(tmp_path / "temporary")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "home"))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to another folder"):
        demo_models.demo_models()


def test_a_console_that_lacks_a_character_does_not_end_the_run(tmp_path):
    command = [sys.executable, str(ROOT / "train_ppo.py"), "--preset", "demo", "--prompts", "\U0001f600"]
    environment = dict(os.environ, PYTHONIOENCODING="ascii")
    result = subprocess.run(
        [*command, "--positive_label", "\U0001f600好"], env=environment, capture_output=True, cwd=tmp_path
    )
    assert result.returncode == 2 and b"Traceback" not in result.stderr
    assert b"--positive_label '??'" in result.stderr


def test_nothing_imports_what_windows_lacks():
    code = (
        "import sys; sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "import train_ppo, plot_rewards, ppo, reward\n"
        "from support import run_folder, demo_models, hub, signals\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
