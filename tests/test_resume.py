"""How a run goes on: what --resume and --eval_only take and refuse, and what a stop at any moment leaves behind."""

import copy
import dataclasses
import fcntl
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import plot_rewards
from config import PPOConfig
from ppo import PPOTrainer
from support.command_line import flags_to_go_on, new_run_folder, read_command_line
from support.errors import UserError
from support.evaluation import before_after_table, results_table
from support.files import remove
from support.run_folder import RunFolder, RunLog
from tests.helpers import rows, small_run, weights
from tools.stress_resume import differences
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")

ANOTHER = dict(  # for every setting but --resume and --eval_only a value that is not that of the finished run
    preset="article", model_name="gpt2", reward_model_name="bert", positive_label="好", reward="builtins:len",
    prompts="好", prompts_file="prompts.txt", gen_len=9, temperature=0.5, episodes=64, batch_size=24, minibatch_size=4,
    ppo_epochs=3, gamma=0.9, lam=0.5, cliprange=0.3, cliprange_value=0.3, vf_coef=0.5, detach_value=False,
    frozen_share=0.5, init_kl_coef=0.3, kl_budget=0.1, kl_controller="adaptive", target=3.0, horizon=99, lr=0.1,
    value_lr=0.1, adam_epsilon=1e-3, average_power=2.0, max_grad_norm=2.0, micro_batch_size=5, seed=2, device="cpu",
    dtype="bfloat16", run_name="other", runs_dir="elsewhere", log_samples_every=0, track="trackio",
    save_every=7, save_every_minutes=3.0, keep_checkpoints=1, process_timeout=30.0, eval_samples=20,
)  # fmt: skip
WHEN_GOING_ON = {
    "episodes", "micro_batch_size", "device", "runs_dir", "log_samples_every", "track", "save_every",
    "save_every_minutes", "keep_checkpoints", "process_timeout",
}  # fmt: skip
WHEN_JUDGING = {"micro_batch_size", "device", "dtype", "runs_dir", "process_timeout", "eval_samples"}


def flags(names) -> list[str]:
    return [word for name in sorted(names) for word in (f"--{name}", str(ANOTHER[name]))]


def copy_of(finished, tmp_path, **changes):
    """A copy of a run's folder, with some settings in its config.json changed."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    (run_dir / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return run_dir


def settings(run_dir) -> dict:
    return json.loads((run_dir / "config.json").read_text(encoding="utf-8"))


def contents(run_dir) -> dict:
    return {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def checkpoints(run_dir) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_table_knows_every_setting():
    assert set(ANOTHER) | {"resume", "eval_only"} == {field.name for field in dataclasses.fields(PPOConfig)}


@pytest.mark.parametrize(("mode", "taken"), [("resume", WHEN_GOING_ON), ("eval_only", WHEN_JUDGING)])
def test_settings_that_decide_the_result_are_refused(finished, mode, taken, capsys):
    before = contents(finished)
    for name in sorted(set(ANOTHER) - taken):
        assert main([f"--{mode}", str(finished), *flags([name])]) == 2, name
        err = capsys.readouterr().err
        assert f"error: --{name} " in err and f"would change the result of {finished}, which was started with" in err
    assert contents(finished) == before


def test_fewer_episodes_and_both_modes_at_once_are_refused(finished, capsys):
    for given, said in (
        (["--resume", str(finished), "--episodes", "47"], "--episodes 47 is fewer than the 48"),
        (["--eval_only", str(finished), "--resume", str(finished)], "--resume"),
        (["--resume", str(finished), "--save_every", "-1"], "--save_every must be at least 0"),
    ):
        assert main(given) == 2 and said in capsys.readouterr().err
    assert read_command_line(["--resume", str(finished), "--episodes", "48"])[2] == "nothing"


def test_a_run_goes_on_with_all_settings_that_do_not_decide_its_result(finished, tmp_path, trackers):
    """And with a flag that says again what the run was started with."""
    run_dir = copy_of(finished, tmp_path, device="auto")
    before = settings(run_dir)
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    evaluation["before"]["ref_logprob"] = -99  # the model before training is measured once
    (run_dir / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    assert main(["--resume", str(run_dir), *flags(WHEN_GOING_ON), "--lr", "1e-4", "--prompts", "刚收到货,感觉"]) == 0
    after = settings(run_dir)
    assert {name: after[name] for name in after if after[name] != before[name]} == {
        name: ANOTHER[name] for name in WHEN_GOING_ON
    }
    assert checkpoints(run_dir) == ["step-000004"] and len(rows(run_dir)) == 4
    evaluation = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["before"]["ref_logprob"] == -99


def test_a_run_is_judged_with_other_settings_and_left_as_it_is(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path, device="auto")
    before = contents(run_dir)
    assert main(["--eval_only", str(run_dir), *flags(WHEN_JUDGING)]) == 0
    after = contents(run_dir)
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed == {"evaluation.json", "results.json", "report.md", "environment.jsonl", "README.md"}
    was, now = (
        json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["after"] for folder in (finished, run_dir)
    )
    assert (was["n"], now["n"]) == (16, 20)
    assert max(abs(a - b) for a, b in zip(was["kls"], now["kls"])) > 1e-4  # bfloat16's rounding


def test_a_judgement_by_fewer_samples_is_printed_and_replaces_none(finished, tmp_path, capsys):
    run_dir = copy_of(finished, tmp_path)
    before = contents(run_dir)
    assert main(["--eval_only", str(run_dir), "--eval_samples", "4"]) == 0
    out = capsys.readouterr().out
    assert f"{run_dir} keeps its judgement by 16 samples, more than these 4\n" in out and "mean reward" in out
    assert contents(run_dir) == before


def test_a_judgement_is_shown_by_all_files_that_hold_one(finished, tmp_path, monkeypatch):
    """By as many samples as the earlier one; a folder that was copied without its curves has no picture."""
    run_dir, drawn = copy_of(finished, tmp_path), []
    monkeypatch.setattr("support.run_folder.draw", lambda runs, out: drawn.append(out))
    (run_dir / "report.md").write_text("stale")
    assert main(["--eval_only", str(run_dir)]) == 0
    report = (run_dir / "report.md").read_text(encoding="utf-8")
    results = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))
    assert results_table(results) in report and before_after_table(results) in report
    assert f"\n    python train_ppo.py --eval_only {run_dir}  # judged again\n" in report
    assert drawn == [run_dir / "rewards.png"]
    (run_dir / "metrics.csv").unlink()
    assert main(["--eval_only", str(run_dir)]) == 0
    assert len(drawn) == 1 and read_command_line(["--resume", str(run_dir)])[2] == "nothing"


def test_no_run_is_judged_while_another_process_is_at_work_there(finished, tmp_path, capsys):
    run_dir = copy_of(finished, tmp_path)
    before = contents(run_dir)
    with (run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["--eval_only", str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert "another process is at work in" in err and "parameters train" not in out
    assert contents(run_dir) == before


def test_a_finished_run_is_left_alone_whatever_else_is_asked(finished, capsys):
    before = contents(finished)
    assert main(["--resume", str(finished), *flags(WHEN_GOING_ON - {"episodes"})]) == 0
    said = "is finished already, nothing is missing; more --episodes would go on, and --eval_only judges it again\n"
    assert capsys.readouterr().out == f"{finished} {said}" and contents(finished) == before


def test_latest_is_the_run_that_was_started_last(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, time in (("a", 100), ("b", 300), ("c", 200)):
        run_dir = tmp_path / "runs" / name
        run_dir.mkdir(parents=True)
        shutil.copy(finished / "config.json", run_dir)
        os.utime(run_dir / "config.json", (time, time))
        (run_dir / "evaluation.json").write_text('{"steps": 3}')
        for output in ("model", "rewards.png", "report.md"):
            (run_dir / output).touch()
    (tmp_path / "runs" / "d").mkdir()
    assert main(["--resume", "latest"]) == 0
    assert capsys.readouterr().out == "runs/b is finished already, nothing is missing\n"


def test_a_finished_run_of_before_there_were_reports_gets_one_and_is_not_trained_again(finished, tmp_path, monkeypatch):
    run_dir = copy_of(finished, tmp_path)
    (run_dir / "report.md").rename(run_dir / "before_after.md")
    (run_dir / "results.json").unlink()
    monkeypatch.delattr(PPOTrainer, "step")
    assert main(["--resume", str(run_dir)]) == 0
    assert differences(finished, run_dir) == [] and not (run_dir / "before_after.md").exists()
    verdict = json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))["verdict"]
    assert f"**{verdict}**" in (run_dir / "report.md").read_text(encoding="utf-8")
    assert read_command_line(["--resume", str(run_dir)])[2] == "nothing"


@pytest.mark.parametrize("missing", ["model", "rewards.png", "report.md", "evaluation.json", "its step 3"])
def test_a_run_is_finished_only_with_its_steps_and_all_that_its_end_writes(finished, tmp_path, missing):
    for name in {"model", "rewards.png", "report.md"} - {missing}:
        (tmp_path / name).touch()
    if missing != "evaluation.json":
        (tmp_path / "evaluation.json").write_text(json.dumps({"steps": 2 if missing == "its step 3" else 3}))
    shutil.copy(finished / "config.json", tmp_path)
    assert read_command_line(["--resume", str(tmp_path)])[2] == "resume"
    (tmp_path / "evaluation.json").write_text('{"steps": 3}')
    if missing in ("model", "rewards.png", "report.md"):
        (tmp_path / missing).touch()
    assert read_command_line(["--resume", str(tmp_path)])[2] == "nothing"
    assert read_command_line(["--resume", str(tmp_path), "--episodes", "49"])[2] == "resume"


def test_runs_that_begin_at_the_same_time_do_not_share_a_folder(tmp_path):
    """One with a name of its own is refused, and one without takes another name."""
    named, unnamed = PPOConfig(runs_dir=str(tmp_path), run_name="mine"), PPOConfig(runs_dir=str(tmp_path))
    with pytest.raises(UserError, match="mine cannot be written: File exists"):
        for folder in [RunFolder(new_run_folder(named), named) for _ in range(2)]:
            folder.make()
    folders = [RunFolder(new_run_folder(config), config) for config in [copy.copy(unnamed) for _ in range(3)]]
    for folder in folders:
        folder.make()
    assert len({folder.path for folder in folders}) == len(list(tmp_path.iterdir())) - 1 == 3
    assert [folder.config.run_name for folder in folders] == [folder.path.name for folder in folders]


# --- a stranger's run folder


@pytest.mark.parametrize("mode", ["resume", "eval_only"])
@pytest.mark.parametrize("reward", ["subprocess:getoutput", "run.inside:score"])
def test_a_run_folder_runs_no_code_that_was_not_named_here(finished, tmp_path, monkeypatch, mode, reward, capsys):
    """Neither a function of any library, as a shell, nor a file that lies in the folder."""
    run_dir = copy_of(finished, tmp_path, reward=reward, prompts=["touch ran #"])
    (run_dir / "inside.py").write_text("open('ran', 'w')\nscore = len\n")
    (run_dir / "report.md").unlink()  # not finished
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    for given in ([], ["--save_every" if mode == "resume" else "--eval_samples", "5"]):
        assert main([f"--{mode}", "run", *given]) == 2
        own = f"run has a reward of its own, {reward}, and code runs only where you name it"
        again = " ".join(["python train_ppo.py", f"--{mode} run", *given, f"--reward {reward}"])
        said = f"train_ppo.py: error: {own}: {again}\n"
        assert capsys.readouterr().err == said
    assert main([f"--{mode}", "run", "--reward", "builtins:len"]) == 2
    assert f"--reward builtins:len would change the result of run, which was started with {reward}" in (
        capsys.readouterr().err
    )
    assert plot_rewards.main(["run", "--out", "run/rewards.png"]) == 0
    before[tmp_path / "run" / "rewards.png"] = (run_dir / "rewards.png").read_bytes()
    assert contents(tmp_path) == before


def test_a_reward_that_is_named_again_goes_on_and_judges(finished, tmp_path, monkeypatch):
    """What is finished needs no name, since nothing runs."""
    run_dir = copy_of(finished, tmp_path, reward="own_reward:score")
    (tmp_path / "own_reward.py").write_text("def score(texts):\n    return [0.25] * len(texts)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for given in ([], ["--reward", "own_reward:score"]):
        assert read_command_line(["--resume", "run", *given])[2] == "nothing"
    assert main(["--resume", "run", "--reward", "own_reward:score", "--episodes", "64"]) == 0
    assert rows(run_dir)[-1]["env/reward_mean"] == "0.25"
    assert main(["--eval_only", "run", "--reward", "own_reward:score"]) == 0
    assert settings(run_dir)["reward"] == "own_reward:score"


@pytest.mark.parametrize("reward", ["a:b; touch ran", "a b:c", "my_reward:score\n", "nothing", ""])
def test_a_reward_in_a_run_folder_that_is_no_name_is_not_offered(finished, tmp_path, reward, capsys):
    run_dir = copy_of(finished, tmp_path, reward=reward)
    assert main(["--resume", str(run_dir)]) == 2
    assert f"--reward {reward!r} must be module:function" in capsys.readouterr().err


def test_any_number_of_processes_judges(finished, monkeypatch):
    monkeypatch.setattr("support.collectives.world_size", lambda: 3)
    assert read_command_line(["--eval_only", str(finished)])[2] == "eval_only"
    with pytest.raises(UserError, match="--batch_size 16 does not divide by the 3 processes"):
        read_command_line(["--resume", str(finished), "--episodes", "64"])


def test_the_way_on_can_be_pasted(tmp_path):
    said = flags_to_go_on(tmp_path / "my run", PPOConfig(reward="my_reward:score"))
    assert shlex.split(said) == ["--resume", str(tmp_path / "my run"), "--reward", "my_reward:score"]


# --- stopped at any moment


@pytest.fixture(scope="module")
def killed(tmp_path_factory, demo):
    """A finished run of four steps, and its folder as a kill would have left it at each flush of a file to disk."""
    runs_dir, copies, fsync = tmp_path_factory.mktemp("runs"), [], os.fsync

    def copying(descriptor):
        copies.append(shutil.copytree(runs_dir / "run", runs_dir / f"killed-{len(copies)}"))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", copying)
        patch.setattr("support.run_folder.draw", lambda runs, out: out.touch())
        code, whole = small_run(
            runs_dir, "--episodes", "64", "--save_every", "2", "--keep_checkpoints", "1", "--log_samples_every", "0"
        )
    assert code == 0 and checkpoints(whole) == ["step-000004"]
    return whole, copies


MOMENTS = {  # what the folder of checkpoints holds then
    "in the first checkpoint": [".partial-step-000002"],
    "in a later checkpoint": [".partial-step-000004", "step-000002"],
    "before an older one is removed": ["step-000002", "step-000004"],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_end(killed, moment, capsys):
    whole, copies = killed
    run_dir = [copy for copy in copies if (copy / "checkpoints").exists() and checkpoints(copy) == MOMENTS[moment]][-1]
    assert main(["--resume", str(run_dir)]) == 0
    assert differences(whole, run_dir) == []
    assert list(run_dir.rglob(".partial-*")) == []
    out = capsys.readouterr().out
    assert ("the run starts from the beginning" in out) == (moment == "in the first checkpoint")
    assert "mean reward 0" not in out.split("commonest")[0]  # --log_samples_every 0 is kept


def test_what_a_kill_left_of_the_last_files_is_written_over(killed):
    whole, copies = killed
    run_dir = copies[-2]  # before the last file takes its place
    assert [path.name for path in run_dir.glob(".partial-*")] == [".partial-report.md"]
    (run_dir / ".partial-model").mkdir()
    (run_dir / ".partial-model" / "model.safetensors").write_bytes(b"half")
    (run_dir / ".partial-model" / "leftover").touch()
    assert main(["--resume", str(run_dir)]) == 0
    assert differences(whole, run_dir) == [] and list(run_dir.rglob(".partial-*")) == []
    assert not (run_dir / "model" / "leftover").exists()


def test_half_written_last_lines_are_left_out(finished, tmp_path):
    """A row of step 12 that ends after its first digit, and a sample that ends inside a character.

    A prompt may hold U+2028, at which some take a line to end.
    """
    run_dir = copy_of(finished, tmp_path)
    for name in ("checkpoints/step-000003", "model"):
        shutil.rmtree(run_dir / name)
    (run_dir / "checkpoints" / ".partial-step-000009").mkdir()
    samples = (run_dir / "samples.jsonl").read_bytes().replace("刚".encode(), "\u2028".encode(), 1)
    (run_dir / "samples.jsonl").write_bytes(samples + '{"step": 3, "prompt": "刚'.encode()[:-1])
    (run_dir / "metrics.csv").write_bytes((run_dir / "metrics.csv").read_bytes() + b"1")
    assert main(["--resume", str(run_dir)]) == 0
    assert (run_dir / "samples.jsonl").read_bytes() == samples
    assert [row["step"] for row in rows(run_dir)] == ["1", "2", "3"]
    assert differences(finished, run_dir) == ["samples.jsonl"] and list(run_dir.rglob(".partial-*")) == []


def test_a_half_written_header_is_written_again(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    for name in ("checkpoints", "model"):
        shutil.rmtree(run_dir / name)
    (run_dir / "evaluation.json").unlink()
    (run_dir / "metrics.csv").write_bytes(b"step,epis")
    assert main(["--resume", str(run_dir)]) == 0
    assert differences(finished, run_dir) == []


HEADER = "step,episodes,env/reward_mean,objective/kl"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.csv", f"{HEADER}\r\n1,16,0,0\r\nx,16,0,0\r\n", "line 3 of "),
        ("metrics.csv", f"{HEADER}\n1,16,0,0\n2,32,0,0,0\n", "line 3 of "),
        ("samples.jsonl", '{"step": 1}\n[]\n', "line 2 of "),
        ("samples.jsonl", '{"step": 1}\n{}\n', "line 2 of "),
    ],
)
def test_a_damaged_log_is_left_as_it_is_and_so_is_the_other(tmp_path, name, content, said):
    (tmp_path / "metrics.csv").write_bytes(f"{HEADER}\n1,16,0,0\n9,16,0,0\n".encode())
    (tmp_path / "samples.jsonl").write_bytes(b'{"step": 1}\n{"step": 9}\n')
    (tmp_path / name).write_bytes(content.encode())
    before = contents(tmp_path)
    with pytest.raises(UserError, match=said):
        RunLog(tmp_path, 3)
    assert contents(tmp_path) == before


def test_a_row_with_other_columns_than_the_table_gets_its_own_names(tmp_path, capsys):
    """As where an earlier version of this program began the table; a mark that an editor put before it is no name."""
    old = f"\ufeff{HEADER},old\r\n1,16,0.5,0,7\r\n2,32,0.25,0,7\r\n3,48,0,0,7\r\n"
    (tmp_path / "metrics.csv").write_bytes(old.encode())
    log = RunLog(tmp_path, 2)
    for step in (3, 4):
        log.write({"step": step, "new": 0.75, "episodes": 99, "newer": 1}, [])
    assert (tmp_path / "metrics.csv").read_bytes().decode().split("\r\n") == [
        f"{HEADER},old,new,newer", "1,16,0.5,0,7,nan,nan", "2,32,0.25,0,7,nan,nan",
        "3,99,nan,nan,nan,0.75,1", "4,99,nan,nan,nan,0.75,1", "",
    ]  # fmt: skip
    assert capsys.readouterr().out == ""
    RunLog(tmp_path, 7)
    assert "metrics.csv ends with step 4; the steps up to 7 are lost from it" in capsys.readouterr().out


def test_logs_are_on_disk_before_the_checkpoint_that_counts_on_them(tmp_path, monkeypatch):
    order, fsync = [], os.fsync

    def watched(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    folder = RunFolder(tmp_path / "run", PPOConfig(run_name="run"))
    engine = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    trainer = SimpleNamespace(n_steps=0, engine=engine, n_parameters=2, n_trained=1)
    folder.open(trainer, resume=False)
    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr("support.run_folder.save_checkpoint", lambda *_: order.append("checkpoint"))
    folder.save_checkpoint(trainer)
    assert order == ["metrics.csv", "samples.jsonl", "checkpoint"]


@pytest.mark.parametrize("removed", [["checkpoints"], ["checkpoints/*"], ["checkpoints", "model"]])
def test_without_its_checkpoints_a_run_does_not_begin_again(finished, tmp_path, removed, capsys):
    run_dir = copy_of(finished, tmp_path)
    for path in [path for name in removed for path in run_dir.glob(name)]:
        shutil.rmtree(path)
    before = contents(run_dir)
    assert main(["--resume", str(run_dir), "--episodes", "64"]) == 2
    assert "checkpoints holds no checkpoint to go on from, and step 1 would replace the logs" in capsys.readouterr().err
    assert contents(run_dir) == before


# --- what was loaded is no more what it was


def other_weights(path: Path) -> None:
    weights = torch.load(path)
    weights[min(weights)] += 1
    torch.save(weights, path)


CHANGES = {  # file, how, what is said to differ
    "weights": ("gpt2/pytorch_model.bin", other_weights, "the hash of the weights of --model_name "),
    "vocabulary": (
        "gpt2/vocab.txt",
        lambda path: path.write_text(path.read_text("utf-8").replace("书", "画"), "utf-8"),
        "the hash of the tokenizer of --model_name ",
    ),
    "classifier": ("sentiment/pytorch_model.bin", other_weights, "the hash of the weights of --reward_model_name "),
    "prompts": ("p.txt", lambda path: path.write_text("衣服\n这本书\n", "utf-8"), "the hash of the prompts is "),
}


@pytest.fixture(scope="module")
def with_own_files(tmp_path_factory, gpt2_folder, classifier_folder) -> Path:
    """A folder with two models, a prompts file, and a run of one step that was made with them."""
    here = tmp_path_factory.mktemp("own")
    shutil.copytree(gpt2_folder, here / "gpt2")
    shutil.copytree(classifier_folder, here / "sentiment")
    (here / "p.txt").write_text("衣服\n苹果\n", "utf-8")
    flags = ["--model_name", here / "gpt2", "--reward_model_name", here / "sentiment", "--prompts_file", here / "p.txt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.run_folder.draw", lambda runs, out: out.touch())
        assert small_run(here, "--episodes", "16", *map(str, flags))[0] == 0
    return here


@pytest.mark.parametrize("what", CHANGES)
def test_what_changed_since_the_start_is_told_and_nothing_is_done(with_own_files, what, capsys):
    name, change, said = CHANGES[what]
    file, run_dir = with_own_files / name, with_own_files / "run"
    original, before = file.read_bytes(), contents(run_dir)
    change(file)
    try:
        for flags in (["--resume", str(run_dir), "--episodes", "32"], ["--eval_only", str(run_dir)]):
            assert main(flags) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"train_ppo.py: error: this is not what {run_dir} was started with: {said}")
            assert f"remove {run_dir / 'inputs.json'} to go on with what is there now" in err
    finally:
        file.write_bytes(original)
    assert contents(run_dir) == before


def test_what_is_as_it_was_goes_on_in_another_dtype_too_and_so_does_an_older_run(with_own_files, tmp_path):
    run_dir = shutil.copytree(with_own_files / "run", tmp_path / "run")
    assert main(["--eval_only", str(run_dir), "--dtype", "bfloat16"]) == 0
    known = (run_dir / "inputs.json").read_bytes()
    (run_dir / "inputs.json").unlink()
    assert main(["--resume", str(run_dir), "--episodes", "32"]) == 0
    assert (run_dir / "inputs.json").read_bytes() == known and len(rows(run_dir)) == 2


def test_a_run_keeps_the_users_own_files_as_they_were(with_own_files, tmp_path, demo, monkeypatch, capsys):
    """Of a reward that was changed both, once the user has said to go on with it."""
    (kept,) = (with_own_files / "run" / "inputs").iterdir()
    assert kept.name.startswith("p-") and kept.read_text("utf-8") == "衣服\n苹果\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    sources = [f"def score(texts):\n    return [0.{digit}] * len(texts)\n" for digit in (25, 375)]
    (tmp_path / "judge_of_two.py").write_text(sources[0])
    code, run_dir = small_run(tmp_path, "--episodes", "16", "--reward", "judge_of_two:score")
    (tmp_path / "judge_of_two.py").write_text(sources[1])
    del sys.modules["judge_of_two"]
    go_on = ["--resume", str(run_dir), "--episodes", "32", "--reward", "judge_of_two:score"]
    assert code == 0 and main(go_on) == 2
    assert ": the hash of the file of --reward judge_of_two:score is " in capsys.readouterr().err
    (run_dir / "inputs.json").unlink()
    assert main(go_on) == 0 and [row["env/reward_mean"] for row in rows(run_dir)] == ["0.25", "0.375"]
    assert sorted(path.read_text() for path in (run_dir / "inputs").glob("judge_of_two-*.py")) == sources


def test_a_reward_that_failed_before_anything_was_judged_is_mended_and_the_run_goes_on(tmp_path, demo, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ["--reward", "judge_to_mend:score"]
    (tmp_path / "judge_to_mend.py").write_text("def score(texts):\n    return [1 / 0]\n")
    code, run_dir = small_run(tmp_path, "--episodes", "16", *flags)
    assert code == 2 and "ZeroDivisionError" in (run_dir / "error.log").read_text()
    (tmp_path / "judge_to_mend.py").write_text("def score(texts):\n    return [0.25] * len(texts)\n")
    del sys.modules["judge_to_mend"]
    assert main(["--resume", str(run_dir), *flags]) == 0
    assert [row["env/reward_mean"] for row in rows(run_dir)] == ["0.25"]


@pytest.mark.parametrize("left", ["evaluation.json", "model", "checkpoints"])
def test_any_one_result_belongs_to_the_inputs_it_was_made_with(finished, tmp_path, left, capsys):
    run_dir = copy_of(finished, tmp_path)
    for result in {"evaluation.json", "report.md", "model", "checkpoints"} - {left}:
        remove(run_dir / result)
    hashes = json.loads((run_dir / "inputs.json").read_text())
    (run_dir / "inputs.json").write_text(json.dumps(hashes | {"the hash of the prompts": "another"}))
    assert main(["--resume", str(run_dir)]) == 2
    assert f"this is not what {run_dir} was started with" in capsys.readouterr().err


def test_the_demos_models_may_differ_in_the_last_digits(finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    hashes = json.loads((run_dir / "inputs.json").read_text())
    (run_dir / "inputs.json").write_text(
        json.dumps(dict.fromkeys(hashes, "another") | {"the hash of the prompts": hashes["the hash of the prompts"]})
    )
    assert main(["--resume", str(run_dir), "--episodes", "64"]) == 0


# --- the folder goes away


@pytest.mark.parametrize(
    ("gone", "at"),
    [
        ("renamed", "before a row"),
        ("removed", "before a checkpoint"),
        ("another in its place", "before the last checkpoint"),
    ],
)
def test_a_run_whose_folder_goes_away_keeps_its_state(finished, tmp_path, monkeypatch, capsys, gone, at):
    """It goes on from there to the same model."""
    run_dir, calls = tmp_path / "run", {"before a row": 1, "before a checkpoint": 2, "before the last checkpoint": 3}
    loser = (RunLog, "write") if at != "before a row" else (PPOTrainer, "step")
    method, called = getattr(*loser), []

    def losing(self, *args):
        called.append(method(self, *args))
        if len(called) == calls[at]:
            shutil.rmtree(run_dir) if gone == "removed" else run_dir.rename(tmp_path / "renamed")
            if gone == "another in its place":
                run_dir.mkdir()
        return called[-1]

    monkeypatch.setattr(*loser, losing)
    code, _ = small_run(tmp_path, "--save_every", "2")
    monkeypatch.setattr(*loser, method)
    kept = tmp_path / f"run-step-{calls[at]}"
    err = capsys.readouterr().err.splitlines()[-1]
    assert code == 1 and f"{run_dir} was removed or renamed while the run was at work there; " in err
    assert err.endswith(f"is in {kept}: python train_ppo.py --resume {kept}")
    assert not run_dir.exists() or list(run_dir.iterdir()) == []
    assert main(["--resume", str(kept)]) == 0 and weights(kept) == weights(finished)


# --- raised


def test_a_raised_run_equals_one_that_was_as_long_from_the_start(killed, finished, tmp_path):
    run_dir = copy_of(finished, tmp_path)
    assert main(["--resume", str(run_dir), "--episodes", "64"]) == 0
    assert differences(killed[0], run_dir) == [] and weights(run_dir) != weights(finished)


def test_a_raised_run_that_was_stopped_is_not_finished(finished, tmp_path, monkeypatch, signals_restored, capsys):
    """The command that it prints goes on, though the files of its first end are there."""
    run_dir, step = copy_of(finished, tmp_path), PPOTrainer.step

    def stopped_step(self, *args):
        signal.raise_signal(signal.SIGINT)
        return step(self, *args)

    monkeypatch.setattr(PPOTrainer, "step", stopped_step)
    assert main(["--resume", str(run_dir), "--episodes", "80"]) == 130
    out = capsys.readouterr().out
    assert out.startswith("32 completions more: 48 -> 80\n")
    assert f"stopped after step 4; go on with: python train_ppo.py --resume {run_dir}" in out
    for name in ("model/model.safetensors", "evaluation.json", "report.md", "rewards.png"):
        assert (run_dir / name).read_bytes() == (finished / name).read_bytes()
    monkeypatch.setattr(PPOTrainer, "step", step)
    assert main(["--resume", str(run_dir)]) == 0
    assert len(rows(run_dir)) == 5 and weights(run_dir) != weights(finished)


def test_a_raised_run_that_ends_before_its_table_is_not_finished(finished, tmp_path, monkeypatch):
    """Its evaluation is the new one, and the picture and the table would be those of its first end."""
    run_dir = copy_of(finished, tmp_path)

    def stopped(runs, out):
        raise KeyboardInterrupt

    monkeypatch.setattr("support.run_folder.draw", stopped)
    assert main(["--resume", str(run_dir), "--episodes", "64"]) == 130
    assert json.loads((run_dir / "evaluation.json").read_text(encoding="utf-8"))["steps"] == 4
    assert read_command_line(["--resume", str(run_dir)])[2] == "resume"


# --- checkpoints in time


@pytest.mark.parametrize(("every", "due"), [(0, [5]), (1, [1, 2, 3, 4, 5]), (2, [2, 4, 5]), (5, [5]), (9, [5])])
def test_a_checkpoint_is_due_every_so_many_steps_and_after_the_last(tmp_path, every, due):
    config = PPOConfig(batch_size=4, minibatch_size=4, episodes=17, save_every=every, save_every_minutes=0)
    folder = RunFolder(tmp_path, config)
    assert [step for step in range(1, 6) if folder.checkpoint_due(step)] == due
