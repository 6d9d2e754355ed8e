"""The command line: one-line errors for bad flags, the run folder, and the user's own reward."""

import importlib.machinery
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from config import PPOConfig
from reward import import_function
from support.common.errors import UserError
from support.run.command_line import read_command_line
from support.run.settings import save_config
from tests.helpers import ROOT, change_json, contents, read_json
from train_ppo import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working folder that isn't on sys.path. Modules imported from it are unloaded afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT)))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def run_dir(folder, gpt2_folder, classifier_folder) -> Path:
    """The folder `run` of an unfinished run that already has a model."""
    models = {"model_name": str(gpt2_folder), "reward_model_name": str(classifier_folder)}
    shutil.copytree(gpt2_folder, "run/model")
    save_config(PPOConfig(preset="demo", episodes=48, device="cpu", **models), Path("run", "config.json"))
    return folder / "run"


def one_line(capsys, *argv) -> str:
    """Run the program on bad input and return its one-line error."""
    assert main([str(arg) for arg in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train_ppo.py: error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lr fast", "--lr: invalid float value: 'fast'"),
        ("--kl_budget 0.4 --init_kl_coef 0.1", "give only one"),
        ("--preset big", "--preset big is unknown"),
        ("--detach_value maybe", "--detach_value: expected True or False"),
        ("--device tpu", "--device tpu: torch can't use tpu"),
        ("--learning_rate 1e-5", "unknown argument --learning_rate; did you mean --lr?"),
        ("--local-rank=0", "unknown argument --local_rank=0; start several processes with torchrun"),
        ("--epochs 4", "--ppo_epochs are passes over each batch, --episodes the length of the run"),
        ("--model-nam=uer/gpt2-chinese-cluecorpussmall", "did you mean --model_name?"),
        ("--mood 1", "unknown argument --mood; python train_ppo.py --help"),
        ("--batch_size 32 --minibatch_size 64", "--minibatch_size 64 is larger than --batch_size 32"),
        ("--reward math:pi", "must be a function, not a float"),
        ("--track swanlab", "pip install swanlab"),
        ("--resume runs/nothing", "runs/nothing is not a run folder"),
        ("--resume latest --runs_dir nowhere", "no run in nowhere"),
    ],
)
def test_a_bad_flag_gives_a_one_line_error_and_creates_no_files(flags, said, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "swanlab", None)
    words = flags.split()
    assert said in one_line(capsys, *([] if "--preset" in words else ["--preset", "demo"]), *words)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--preset demo --run_name run --runs_dir .", "already exists; choose another --run_name, or --resume run"),
        ("--resume run --lr 1", "--lr 1.0 would change the result of run, which was started with 0.0001"),
        ("--resume run --episodes 16", "--episodes 16 is less than the 48 of run"),
        ("--eval_only run --episodes 96", "--episodes 96 would change the result"),
        ("--complete run --eval_samples 9", "--eval_samples 9 would change the result"),
        ("--complete run --prompts 衣服𪚥", "'𪚥'"),
        ("--complete run/model", "run/model is not a run folder"),
        ("--resume run/checkpoints/step-000001", "with a run's settings; did you mean run?"),
    ],
)
def test_a_flag_that_does_not_fit_the_run_gives_a_one_line_error_and_changes_nothing(flags, said, run_dir, capsys):
    before = contents(run_dir.parent)
    assert said in one_line(capsys, *flags.split())
    assert contents(run_dir.parent) == before


def test_eval_only_says_to_resume_a_run_without_a_model(run_dir, capsys):
    shutil.rmtree(run_dir / "model")
    for reward, flags in (None, ""), ("own:score", " --reward own:score"):
        change_json(run_dir / "config.json", reward=reward)
        err = one_line(capsys, "--eval_only", "run")
        assert "isn't finished" in err and err.endswith(f": python train_ppo.py --resume run{flags}\n")


def test_settings_missing_from_an_older_run_get_their_defaults(run_dir, capsys):
    """The preset's defaults are used, and one line lists those that affect training. Unknown settings are rejected."""
    settings = read_json(run_dir / "config.json")
    older = {name: value for name, value in settings.items() if name not in ("adam_epsilon", "lam", "n")}
    (run_dir / "config.json").write_text(json.dumps(older))
    for flags, mode in ("--resume", "resume"), ("--eval_only", "eval_only"), ("--complete", "complete"):
        config, _, found = read_command_line([flags, str(run_dir)])
        assert found == mode and config.adam_epsilon == 1e-5 and config.lr == 1e-4 and config.lam == 0.95
        assert ": adam_epsilon 1e-05, lam 0.95\n" in capsys.readouterr().out
    change_json(run_dir / "config.json", mood=1)
    assert "'mood'" in one_line(capsys, "--resume", run_dir)


def test_a_folder_without_read_permission_gives_a_one_line_error(folder, monkeypatch, capsys):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", denied)
    assert "config.json cannot be used: Permission denied" in one_line(capsys, "--resume", "run")


def test_batch_sizes_must_be_divisible_by_the_number_of_processes(folder, monkeypatch):
    monkeypatch.setattr("support.compute.processes.world_size", lambda: 3)
    for sizes, name in ("128 126", "batch_size 128"), ("126 64", "minibatch_size 64"):
        batch, minibatch = sizes.split()
        with pytest.raises(UserError, match=f"--{name} must be divisible by the number of processes, 3"):
            read_command_line(["--batch_size", batch, "--minibatch_size", minibatch])


def test_resume_latest_opens_the_run_that_was_started_last(folder):
    for name in ("b", "a", "c"):
        (folder / "runs" / name).mkdir(parents=True)
    for name, age in (("b", 200), ("a", 100)):
        (folder / "runs" / name / "config.json").write_text(json.dumps({"preset": "demo", "seed": age}))
        os.utime(folder / "runs" / name / "config.json", (1_000_000 - age, 1_000_000 - age))
    config, run_dir, mode = read_command_line(["--resume", "latest"])
    assert (run_dir.as_posix(), config.seed, config.lr, mode) == ("runs/a", 100, 1e-4, "resume")


def test_a_reward_in_the_working_folder_does_not_shadow_the_programs_modules(folder):
    (folder / "reward.py").write_text("raise SystemExit('the wrong file')\n")
    (folder / "my_own_reward.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    for _ in range(2):
        assert import_function("my_own_reward:score")(["a", "b"]) == [0.5, 0.5]
    assert sys.path.count(str(folder)) == 1
    assert importlib.machinery.PathFinder.find_spec("reward", sys.path).origin == str(ROOT / "reward.py")
    assert import_function("os.path:join")  # a module with a dotted name


BROKEN = {"import sys; sys.exit()": "SystemExit", "import no_such_thing": "No module named 'no_such_thing'"}
BROKEN |= {"other = []": "no attribute 'score'", "class score(list): pass": "must be a function, not a type"}


@pytest.mark.parametrize("module", BROKEN)
def test_a_reward_that_cannot_be_imported_gives_a_one_line_error(folder, module):
    (folder / "broken.py").write_text(module)
    with pytest.raises(UserError, match=f"--reward broken:score .*{BROKEN[module]}"):
        import_function("broken:score")


def test_a_runs_own_reward_code_is_only_executed_if_it_is_named_again(folder, run_dir, capsys):
    change_json(run_dir / "config.json", reward="strange:score")
    (folder / "strange.py").write_text("open('it_ran', 'w').close()\nscore = len\n")
    for flags in (["--resume"], ["--eval_only"], ["--complete"]):
        err = one_line(capsys, *flags, "run")
        assert err.endswith(f"python train_ppo.py {flags[0]} run --reward strange:score\n")
        assert not (folder / "it_ran").exists()
        assert "would change" in one_line(capsys, *flags, "run", "--reward", "os:getcwd")
    assert read_command_line(["--resume", "run", "--reward", "strange:score"])[2] == "resume"
    assert (folder / "it_ran").exists()
