"""Resuming a run after a stop at any moment, with other settings or changed inputs, and evaluating it again."""

import contextlib
import copy
import fcntl
import json
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from config import PPOConfig
from support.common.errors import UserError
from support.common.files import remove
from support.models.pretrained import encode_prompt
from support.run.command_line import read_command_line
from support.run.folders import new_run_folder
from support.run.load import input_hashes
from support.run.run_folder import RunFolder, RunLog
from tests.helpers import (
    as_rewards,
    change_json,
    checkpoints,
    contents,
    leave_pictures_empty,
    load_gpt2,
    make,
    read_json,
    rows,
    tiny_run,
    weights,
)
from tools.stress_resume import differences
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")

ANOTHER = dict(  # values that differ from those of the finished run
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


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run on the demo models."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="module")
def killed(tmp_path_factory, gpt2_folder):
    """A policy, a finished run of three steps, and the run folder as it would be after a kill at each flush."""
    policy, runs_dir, copies, fsync = load_gpt2(gpt2_folder), tmp_path_factory.mktemp("runs"), [], os.fsync

    def copying(descriptor):
        copies.append(shutil.copytree(runs_dir / "run", runs_dir / f"killed-{len(copies)}"))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", copying)
        leave_pictures_empty(patch)
        assert tiny_run(runs_dir / "run", policy, save_every=2, keep_checkpoints=1) == 0
    return policy, runs_dir / "run", copies


def test_a_run_killed_at_any_flush_can_be_resumed_with_the_same_result(killed, tmp_path):
    """Each set of files that existed at some point is tested once. Without config.json, the run hasn't started."""
    policy, whole, copies = killed
    seen = set()
    different = {tuple(sorted(path.relative_to(copy) for path in copy.rglob("*"))): copy for copy in copies}
    for copied in different.values():
        run_dir = shutil.copytree(copied, tmp_path / copied.name)
        if (run_dir / "config.json").exists():
            seen.update(path.name for path in run_dir.rglob(".partial-*"))
            assert tiny_run(run_dir, policy, resume=True, save_every=2, keep_checkpoints=1) == 0
            assert differences(whole, run_dir) == [] and list(run_dir.rglob(".partial-*")) == []
            assert checkpoints(run_dir)[-1] == "step-000003"
        else:
            assert not (run_dir / "evaluation.json").exists() and not list(run_dir.glob("checkpoints/*"))
    expected = ("step-000002", "step-000003", "model", "evaluation.json", "report.md")
    assert seen >= {f".partial-{name}" for name in expected}


@pytest.mark.parametrize("kept", [1, 100])
def test_a_run_killed_while_writing_a_log_can_be_resumed_with_the_same_result(killed, tmp_path, kept):
    """kept: how many bytes of the first step after the checkpoint were written."""
    policy, whole, copies = killed
    first = next(copy for copy in copies if (copy / "checkpoints" / "step-000002").exists())
    run_dir = shutil.copytree(first, tmp_path / "run")
    for name in ("metrics.csv", "samples.jsonl"):
        there, complete = (run_dir / name).read_bytes(), (whole / name).read_bytes()
        (run_dir / name).write_bytes(complete[: len(there) + kept])
    assert tiny_run(run_dir, policy, resume=True) == 0 and differences(whole, run_dir) == []


@pytest.mark.parametrize("failing", range(0, 50, 20))
def test_a_full_disk_loses_nothing(killed, tmp_path, monkeypatch, failing):
    """The disk is full from some flush on. Once there is space again, the run can be resumed with the same result."""
    policy, whole, _ = killed
    run_dir, flushes, fsync = tmp_path / "run", [], os.fsync

    def full(descriptor):
        flushes.append(descriptor)
        if len(flushes) > failing:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"^{run_dir}.* cannot be written: No space left on device"):
        tiny_run(run_dir, policy, save_every=2)
    monkeypatch.setattr(os, "fsync", fsync)
    if not (run_dir / "config.json").exists():
        remove(run_dir)
    assert tiny_run(run_dir, policy, resume=run_dir.exists(), save_every=2) == 0
    assert differences(whole, run_dir) == []


def test_a_log_that_cannot_be_written_stops_the_run_with_a_one_line_error(killed, tmp_path, monkeypatch):
    write = RunLog.write

    def full(self, row, samples):
        write(self, row, samples)
        if row["step"] == 3:
            self.metrics.close()
            self.metrics = open("/dev/full", "w")
            write(self, row, samples)

    monkeypatch.setattr(RunLog, "write", full)
    with pytest.raises(UserError, match="run cannot be written: No space left on device"):
        tiny_run(tmp_path / "run", killed[0], save_every=2)
    assert checkpoints(tmp_path / "run") == ["step-000002"]


HEADER = "step,episodes,env/reward_mean,objective/kl"


@pytest.mark.parametrize(
    ("name", "content"), [("metrics.csv", f"{HEADER}\n2,32,0,0,0\n"), ("samples.jsonl", '{"step": 1}\n{}\n')]
)
def test_a_damaged_log_gives_an_error_and_both_logs_stay_unchanged(tmp_path, name, content):
    (tmp_path / "metrics.csv").write_text(f"{HEADER}\n1,16,0,0\n9,16,0,0\n")
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"step": 9}\n')
    (tmp_path / name).write_text(content)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path / name}.*; fix that line, or remove it"):
        RunLog(tmp_path, 3)
    assert contents(tmp_path) == before


def test_a_resumed_run_keeps_the_columns_of_its_log(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(f"{HEADER},old\r\n1,16,0.5,0,7\r\n".encode())
    log = RunLog(tmp_path, 1)
    log.write({"step": 2, "episodes": 32, "env/reward_mean": 1, "objective/kl": 2, "new": 3}, [])
    lines = (tmp_path / "metrics.csv").read_bytes().decode().split("\r\n")
    assert lines == [f"{HEADER},old", "1,16,0.5,0,7", "2,32,1,2,nan", ""]


def test_logs_are_on_disk_before_the_checkpoint_that_depends_on_them(policy, tmp_path, monkeypatch):
    order, fsync = [], os.fsync

    def watched(descriptor):
        order.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    monkeypatch.setattr("support.run.run_folder.save_checkpoint", lambda *_: order.append("checkpoint"))
    assert tiny_run(tmp_path / "run", policy, episodes=8) == 0
    i = order.index("checkpoint")
    assert order[i - 2 : i] == ["metrics.csv", "samples.jsonl"]


@pytest.mark.parametrize("removed", [["checkpoints/*"], ["checkpoints", "model"]])
def test_a_run_that_lost_its_checkpoints_does_not_start_over(killed, tmp_path, removed):
    run_dir = shutil.copytree(killed[1], tmp_path / "run")
    for path in [path for name in removed for path in run_dir.glob(name)]:
        remove(path)
    before = contents(run_dir)
    with pytest.raises(UserError, match="has no checkpoint to continue from"):
        tiny_run(run_dir, killed[0], resume=True, episodes=32)
    assert contents(run_dir) == before


@pytest.mark.parametrize(("mode", "taken"), [("resume", WHEN_GOING_ON), ("eval_only", WHEN_JUDGING)])
def test_settings_that_affect_the_result_cannot_be_changed(finished, mode, taken):
    for name in sorted(set(ANOTHER) - taken):
        with pytest.raises(UserError, match=f"--{name} .* would change the result of {finished}"):
            read_command_line([f"--{mode}", str(finished), *flags([name])])


def test_settings_that_do_not_affect_the_result_can_be_changed_on_resume(copied, trackers):
    """A flag may also repeat the value that the run was started with."""
    change_json(copied / "config.json", device="auto")
    before = read_json(copied / "config.json")
    evaluation = read_json(copied / "evaluation.json")
    evaluation["before"]["ref_logprob"] = -99  # the model before training is only evaluated once
    change_json(copied / "evaluation.json", **evaluation)
    assert main(["--resume", str(copied), *flags(WHEN_GOING_ON), "--lr", "1e-4", "--prompts", "刚收到货,感觉"]) == 0
    after = read_json(copied / "config.json")
    changed = {name: after[name] for name in after if after[name] != before[name]}
    assert changed == {name: ANOTHER[name] for name in WHEN_GOING_ON}
    assert (trackers / "trackio.calls").read_text().endswith('["finish", {}]\n')
    assert checkpoints(copied) == ["step-000004"] and len(rows(copied)) == 4
    assert read_json(copied / "evaluation.json")["before"]["ref_logprob"] == -99


def test_an_extended_run_matches_a_run_of_that_length(policy, tmp_path):
    """The coefficient that --kl_budget found is not reset."""
    run_dir, changes = tmp_path / "run", dict(kl_budget=0.1, kl_controller="adaptive", target=0.01, horizon=20)
    assert tiny_run(run_dir, policy, eval_samples=64, **changes) == 0
    short = weights(run_dir)
    budget = {"init_kl_coef": read_json(run_dir / "config.json")["init_kl_coef"]}  # as main() reads it
    assert tiny_run(run_dir, policy, resume=True, episodes=40, eval_samples=64, **changes | budget) == 0
    assert tiny_run(tmp_path / "long", policy, episodes=40, eval_samples=64, **changes) == 0
    assert differences(tmp_path / "long", run_dir) == [] and weights(run_dir) != short


def test_a_finished_run_is_not_changed_and_missing_output_is_recreated(finished, copied, capsys, monkeypatch):
    before, timeouts = contents(copied), []
    monkeypatch.setattr("support.compute.processes.set_timeout", timeouts.append)
    assert main(["--resume", str(copied), *flags(WHEN_GOING_ON - {"episodes"})]) == 0
    assert "is already finished" in capsys.readouterr().out and contents(copied) == before and timeouts == [30.0]
    for name in ("report.md", "rewards.png", "evaluation.json", "model"):
        remove(copied / name)
        assert read_command_line(["--resume", str(copied)])[2] == "resume"
    assert main(["--resume", str(copied)]) == 0
    assert differences(finished, copied) == [] and (copied / "rewards.png").exists()


def test_unnamed_runs_started_in_the_same_second_get_different_folders(policy, tmp_path):
    """A name that the user gave is never changed."""
    for name, refused in ((None, contextlib.nullcontext()), ("mine", pytest.raises(UserError, match="mine already"))):
        trainer = make(policy, runs_dir=str(tmp_path), run_name=name)
        path = new_run_folder(trainer.config)
        path.mkdir()  # created by another run
        with refused, RunFolder.create(path, trainer, {}, []) as folder:
            assert trainer.config.run_name == folder.path.name != path.name and folder.path.is_dir()


def test_eval_only_can_use_other_settings_and_changes_only_the_evaluation(finished, copied, capsys, monkeypatch):
    """An evaluation with fewer samples is only printed."""
    change_json(copied / "config.json", device="auto")
    before = contents(copied)
    assert main(["--eval_only", str(copied), "--eval_samples", "4"]) == 0
    out = capsys.readouterr().out
    assert "keeps its evaluation with 16 samples, more than these 4" in out and "mean reward" in out
    assert contents(copied) == before
    monkeypatch.setattr("support.run.evaluation.noise", lambda *_: 0.01)
    assert main(["--eval_only", str(copied), *flags(WHEN_JUDGING)]) == 0
    assert read_json(copied / "evaluation.json")["before"]["noise"] == 0.01
    after = contents(copied)
    changed = {path.name for path in before | after if before.get(path) != after.get(path)}
    assert changed == {"evaluation.json", "results.json", "report.md", "environment.jsonl", "README.md"}
    was, now = (read_json(folder / "evaluation.json")["after"] for folder in (finished, copied))
    assert (was["n"], now["n"]) == (16, 20)
    assert max(abs(a - b) for a, b in zip(was["kls"], now["kls"])) > 1e-4  # bfloat16's rounding
    assert f"python train_ppo.py --eval_only {copied}" in (copied / "report.md").read_text(encoding="utf-8")


def test_a_running_run_is_locked_and_a_stale_lock_is_ignored(finished, copied, capsys):
    """Evaluating the run again with its own settings gives the same evaluation."""
    (copied / "report.md").unlink()
    before = contents(copied)
    with (copied / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for mode in ("--resume", "--eval_only"):
            assert main([mode, str(copied)]) == 2
            assert "another process is using" in capsys.readouterr().err and contents(copied) == before
    assert main(["--eval_only", str(copied)]) == 0 and (copied / "report.md").exists()
    assert read_json(copied / "evaluation.json") == read_json(finished / "evaluation.json")
    change_json(copied / "inputs.json", **{"the hash of the prompts": "0"})
    assert main(["--eval_only", str(copied)]) == 2 and "an input has changed" in capsys.readouterr().err


def test_changed_inputs_give_an_error_that_names_them_and_nothing_is_written(killed, tmp_path):
    policy, run_dir = killed[0], tmp_path / "run"
    used = {"the weights": "1", "the prompts": "2", "--model_name demo": "3"}
    assert tiny_run(run_dir, policy, inputs=used) == 0
    before = contents(run_dir)
    with pytest.raises(UserError, match=f"{run_dir} was started: the prompts is 0, but was 2; .*inputs.json"):
        tiny_run(run_dir, policy, resume=True, episodes=32, inputs=used | {"the prompts": "0"})
    assert contents(run_dir) == before
    # The demo models may differ in the last digits on another machine, and an older run may have fewer hashes
    other = used | {"--model_name demo": "0", "new": "4"}
    assert tiny_run(run_dir, policy, resume=True, episodes=32, inputs=other) == 0
    (run_dir / "inputs.json").unlink()
    assert tiny_run(run_dir, policy, resume=True, episodes=40, inputs={"the prompts": "0"}) == 0


def test_each_input_has_its_own_hash(policy, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "judge_a.py").write_text("score = len\n")
    import judge_a

    def hashes(model=policy[0], tokenizer=policy[1], prompts=("衣服",), reference=policy[0]):
        config = PPOConfig(model_name="m", reference="r", reward=["judge_a:score"])
        queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        return input_hashes(config, model, tokenizer, as_rewards(judge_a.score), [*prompts], queries, reference)

    one, (other_model, other_tokenizer) = hashes(), copy.deepcopy(policy)
    other_model.v_head.summary.bias.data += 1
    other_tokenizer.add_tokens("画")
    changed = {
        "weights of --model_name m": hashes(model=other_model),
        "weights of --reference r": hashes(reference=other_model),
        "tokenizer of --model_name m": hashes(tokenizer=other_tokenizer),
        "prompts": hashes(prompts=("衣服", "衣服")),
    }
    (tmp_path / "judge_a.py").write_text("score = max\n")
    changed["file of --reward judge_a:score"] = hashes()
    for name, others in changed.items():
        assert [key for key in one if others[key] != one[key]] == [f"the hash of the {name}"]


def test_environment_jsonl_records_each_start_of_a_run(killed, tmp_path, monkeypatch):
    run_dir = shutil.copytree(killed[1], tmp_path / "run")
    monkeypatch.setattr("platform.python_version", lambda: "3.99")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("衣服\n", encoding="utf-8")
    assert tiny_run(run_dir, killed[0], resume=True, episodes=32, prompts_file=str(prompts)) == 0
    assert [path.read_bytes() for path in (run_dir / "inputs").iterdir()] == [prompts.read_bytes()]
    starts = [json.loads(line) for line in (run_dir / "environment.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [start.pop("step") for start in starts] == [1, 4]
    assert [start.pop("Python") for start in starts] == [".".join(map(str, sys.version_info[:3])), "3.99"]
    assert [start.pop("command") for start in starts] == ["python train_ppo.py", "python train_ppo.py --resume"]
    assert starts[0] == starts[1] and (starts[0]["device"], starts[0]["dtype"]) == ("cpu", "float32")


def test_an_extended_run_that_was_stopped_does_not_count_as_finished(killed, tmp_path, monkeypatch):
    """It is stopped in training, or before the last file is written. Files from when it first finished still exist."""
    for stopped in "ppo.PPOTrainer.step", "train_ppo.finish":
        run_dir = shutil.copytree(killed[1], tmp_path / stopped)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stopped, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            tiny_run(run_dir, killed[0], resume=True, episodes=40)
        config = read_json(run_dir / "config.json")
        change_json(run_dir / "config.json", model_name="demo", reward_model_name="demo")
        assert config["episodes"] == 40 and read_command_line(["--resume", str(run_dir)])[2] == "resume"
        assert weights(run_dir) == weights(killed[1]) or stopped == "train_ppo.finish"


@pytest.mark.parametrize(("every", "minutes", "due"), [(0, 0, [8]), (3, 0, [3, 6, 8]), (0, 10, [3, 6, 8])])
def test_checkpoints_are_saved_by_steps_by_time_and_after_the_last_step(tmp_path, monkeypatch, every, minutes, due):
    """A step takes four minutes."""
    now, saved = [0], []
    monkeypatch.setattr("time.monotonic", lambda: 240 * now[0])
    config = PPOConfig(batch_size=4, minibatch_size=4, episodes=31, save_every=every, save_every_minutes=minutes)
    trainer = SimpleNamespace(config=config)
    folder = RunFolder(tmp_path, trainer, None)
    for now[0] in range(1, 9):
        trainer.n_steps = now[0]
        if folder.checkpoint_due():
            saved.append(now[0])
            folder.save_checkpoint()
    assert saved == due
