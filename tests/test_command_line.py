"""The command line: one line for each bad flag, the folder that a run gets, and a reward of the user's own."""

import importlib.machinery
import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from config import PPOConfig
from reward import import_function
from support.common.errors import UserError
from support.run import command_line
from support.run.command_line import new_run_folder, read_command_line
from tests.helpers import ROOT, copy_run
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder outside of Python's path; modules that are imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT)))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def one_line(capsys, *argv) -> str:
    """The one line that the program says of bad input."""
    assert main([str(arg) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_ppo.py: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--batch_size 0", "--batch_size must be at least 1"),
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--kl_budget 0.4 --init_kl_coef 0.1", "give only one"),
        ("--dtype float16", "invalid choice: 'float16'"),
        ("--preset big", "--preset big is unknown"),
        ("--detach_value maybe", "--detach_value: expected True or False"),
        ("--device tpu", "--device tpu: torch can't compute there"),
        ("--learning_rate 1e-5", "unknown argument --learning_rate"),
        ("--model-nam=uer/gpt2-chinese-cluecorpussmall", "did you mean --model_name?"),
        ("--prompts", "--prompts: expected at least one argument"),
        ("--prompts_file missing.txt", "missing.txt cannot be read"),
        ("--reward nothing", "give module:function"),
        ("--reward math:pi", "must be a function, not a float"),
        ("--track swanlab", "pip install swanlab"),
        ("--resume runs/nothing", "runs/nothing is not a run folder"),
        ("--resume latest --runs_dir nowhere", "no run in nowhere"),
    ],
)
def test_a_bad_flag_is_one_line_and_leaves_nothing(flags, said, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    words = flags.split()
    assert said in one_line(capsys, *([] if "--preset" in words else ["--preset", "demo"]), *words)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--preset demo --run_name run --runs_dir .", "exists already; choose another --run_name, or --resume run"),
        ("--resume run --lr 1", "--lr 1.0 would change the result of run, which was started with 0.0001"),
        ("--resume run --episodes 16", "--episodes 16 is fewer than the 48 of run"),
        ("--eval_only run --episodes 96", "--episodes 96 would change the result"),
        ("--complete run --eval_samples 9", "--eval_samples 9 would change the result"),
        ("--complete run --n 0", "--n must be at least 1"),
        ("--complete run --prompts 昨天𪚥", "'𪚥'"),
        ("--complete run/model", "run/model"),
    ],
)
def test_a_flag_that_does_not_fit_a_run_is_one_line_and_changes_nothing(flags, said, folder, finished, capsys):
    shutil.copytree(finished, "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert said in one_line(capsys, *flags.split())
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_older_run_is_opened_with_defaults_and_keeps_what_it_has(folder, finished, capsys):
    """By --resume, --eval_only and --complete; a setting that is unknown here is refused."""
    run_dir = shutil.copytree(finished, folder / "run")
    settings = json.loads((run_dir / "config.json").read_text())
    older = {name: value for name, value in settings.items() if name not in ("adam_epsilon", "kl_budget", "n")}
    (run_dir / "config.json").write_text(json.dumps(older))
    for flags, mode in (["--resume"], "nothing"), (["--eval_only"], "eval_only"), (["--complete"], "complete"):
        config, _, found = read_command_line([*flags, str(run_dir)])
        assert found == mode and config.adam_epsilon == 1e-5 and config.lr == 1e-4
        assert "adam_epsilon 1e-05, kl_budget 0.0\n" in capsys.readouterr().out
    (run_dir / "config.json").write_text(json.dumps(settings | {"mood": 1}))
    assert "'mood'" in one_line(capsys, "--resume", run_dir)


def test_latest_is_the_run_that_was_started_last(folder):
    for name in ("b", "a", "c"):
        (folder / "runs" / name).mkdir(parents=True)
    for name, age in (("b", 200), ("a", 100)):
        (folder / "runs" / name / "config.json").write_text(json.dumps({"preset": "demo", "seed": age}))
        os.utime(folder / "runs" / name / "config.json", (1_000_000 - age, 1_000_000 - age))
    config, run_dir, mode = read_command_line(["--resume", "latest"])
    assert (run_dir.as_posix(), config.seed, config.lr, mode) == ("runs/a", 100, 1e-4, "resume")


def test_a_run_without_a_name_is_named_after_the_time(folder, monkeypatch):
    monkeypatch.setattr(command_line, "datetime", SimpleNamespace(now=lambda: datetime(2031, 2, 3, 14, 5, 6)))
    for name in ("20310203-140506", "20310203-140506-2", "20310203-140506-3"):
        assert new_run_folder(PPOConfig()) == Path("runs", name)
        (folder / "runs" / name).mkdir(parents=True)
    assert new_run_folder(PPOConfig(run_name="mine", runs_dir="else")).as_posix() == "else/mine"


# --- a reward of the user's own


def test_a_reward_is_imported_from_the_working_folder_without_hiding_the_programs_files(folder):
    (folder / "reward.py").write_text("raise SystemExit('the wrong file')\n")
    (folder / "my_own_reward.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    for _ in range(2):
        assert import_function("my_own_reward:score")(["a", "b"]) == [0.5, 0.5]
    assert sys.path.count(str(folder)) == 1
    assert importlib.machinery.PathFinder.find_spec("reward", sys.path).origin == str(ROOT / "reward.py")
    assert import_function("os.path:join")  # in a package


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import sys; sys.exit()", "SystemExit"),
        ("import no_such_thing", "No module named 'no_such_thing'"),
        ("def score(texts) 1", "SyntaxError"),
        ("other = []", "no attribute 'score'"),
        ("class score(list): pass", "must be a function, not a type"),
    ],
)
def test_a_reward_that_cannot_be_imported_is_one_line(folder, module, said):
    (folder / "broken.py").write_text(module)
    with pytest.raises(UserError, match=f"--reward broken:score .*{said}"):
        import_function("broken:score")


def test_a_runs_own_reward_runs_only_if_it_is_named_again(folder, finished, capsys):
    copy_run(finished, folder / "run", reward="strange:score", episodes=96)
    (folder / "strange.py").write_text("open('it_ran', 'w').close()\nscore = len\n")
    for flags in (["--resume"], ["--eval_only"], ["--complete"]):
        err = one_line(capsys, *flags, "run")
        assert err.endswith(f"python train_ppo.py {flags[0]} run --reward strange:score\n")
        assert not (folder / "it_ran").exists()
        assert "would change" in one_line(capsys, *flags, "run", "--reward", "os:getcwd")
    assert read_command_line(["--resume", "run", "--reward", "strange:score"])[2] == "resume"
    assert (folder / "it_ran").exists()
