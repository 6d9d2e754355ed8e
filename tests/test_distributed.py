"""Runs of several processes: the update, the statistics and the run are those of one."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from config import PPOConfig
from ppo import PPOTrainer
from reward import score_texts
from support import meeting, run_folder
from support.command_line import FINAL, new_run_folder
from support.models import encode_prompt, load_gpt2_config, load_policy, load_tokenizer
from tests.helpers import PROMPTS, ROOT, rows
from tests.ranks import STEP, Ranks, program
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")
RUN = "--preset demo --device cpu --batch_size 16 --minibatch_size 8 --eval_samples 12 --log_samples_every 0".split()


def three_steps(rank, n_processes, gpt2_folder, file):
    """Save weights and statistics of three PPO steps. In the third the last process's first gradient is NaN."""
    meeting.init_process_group()
    tokenizer = load_tokenizer(gpt2_folder)
    model = load_policy(gpt2_folder, load_gpt2_config(gpt2_folder))
    sizes = dict(batch_size=16, minibatch_size=8, micro_batch_size=1, gen_len=8)
    config = PPOConfig(**sizes, ppo_epochs=2, lr=1e-4, dtype="float32", device="cpu")
    trainer = PPOTrainer(config, model, copy.deepcopy(model), tokenizer)
    queries = [encode_prompt(tokenizer, PROMPTS[i % 3]) for i in range(16)]
    states, stats, drawn = [copy.deepcopy(model.state_dict())], [], []
    for step in range(3):
        if step == 2 and rank == n_processes - 1:
            handle = model.transformer.ln_f.weight.register_hook(
                lambda gradient: handle.remove() or gradient * torch.nan
            )
        responses = trainer.generate(queries)
        drawn += responses
        of_many_lengths = [response[: 1 + i % 8] for i, response in enumerate(responses)]
        scores = score_texts(lambda texts: [0.1 * int(text) for text in texts], [str(i % 5) for i in range(16)])
        stats.append(trainer.step(queries, of_many_lengths, scores))
        states.append(copy.deepcopy(model.state_dict()))
    states.append(trainer.policy_for_saving.state_dict())
    torch.save({"states": states, "stats": stats, "drawn": drawn}, file.format(rank))
    if n_processes > 1:
        meeting.exit_process(0)


def distance(one, other) -> float:
    """Norm of the difference of two state dicts."""
    return sum((one[name] - other[name]).double().square().sum().item() for name in one) ** 0.5


def test_the_update_does_not_depend_on_the_number_of_processes(tmp_path, gpt2_folder):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    three_steps(0, 1, gpt2_folder, str(tmp_path / "alone"))
    torch.set_num_threads(threads)
    ranks = Ranks(tmp_path, three_steps, 2, gpt2_folder, "result-{}")
    assert ranks.wait() == [0, 0], ranks.err(0)
    alone = torch.load(tmp_path / "alone")
    for rank in range(2):
        result = torch.load(tmp_path / f"result-{rank}")
        for one, other in zip(alone["states"], result["states"]):
            # Gradients are sums of some 100 float32 terms in another order, an error near 1e-6 of them; Adam's epsilon
            # of 1e-5 lets no weight of a small gradient make more than 100 times as much of it
            assert distance(one, other) < 1e-2 * distance(alone["states"][0], alone["states"][-2])
        assert all(one.equal(other) for one, other in zip(alone["drawn"], result["drawn"]))
        for one, other in zip(alone["stats"][:2], result["stats"]):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert [stats["ppo/skipped"] for stats in result["stats"]] == [0, 0, 1]  # on all ranks or on none


# ----------------------------------------------------------------------------------------------
# Where a run of torchrun lives, and how it goes on


def test_a_restarted_process_finds_the_folder_of_its_run(tmp_path, monkeypatch):
    def name(torchrun_id, restarts):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun_id)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
        return new_run_folder(PPOConfig(runs_dir=str(tmp_path))).name

    assert name("a/job", 0) == name("a/job", 1) == "a-job"  # nothing is there yet
    (tmp_path / "a-job").mkdir()
    assert name("a/job", 0) == "a-job-2" and name("a/job", 1) == "a-job"
    (tmp_path / "a-job-2").mkdir()
    assert name("a/job", 0) == "a-job-3" and name("a/job", 2) == "a-job-2"
    assert name("none", 0) == name("none", 1) == f"torchrun-{os.getppid()}"


def test_a_checkpoint_is_due_when_the_last_is_so_many_minutes_old(tmp_path, monkeypatch):
    """By a clock: steps take four minutes each."""
    now = [0]
    monkeypatch.setattr(run_folder, "time", SimpleNamespace(monotonic=lambda: 240 * now[0]))
    for minutes, expected in ((10, [3, 6]), (0, [])):
        folder = run_folder.RunFolder(tmp_path, PPOConfig(save_every=0, save_every_minutes=minutes), [], {})
        folder.writes, folder.saved_at, saved = False, 0, []
        for now[0] in range(1, 9):
            if folder.checkpoint_due(now[0]):
                saved.append(now[0])
                folder.save_checkpoint(None)
        assert saved == expected


# ----------------------------------------------------------------------------------------------
# Whole runs


def same_curve(one: Path, other: Path) -> bool:
    """A learning rate of 1e-6 moves no policy so far that rounding draws many other tokens in six steps."""
    curves = [[float(row["env/reward_mean"]) for row in rows(run)] for run in (one, other)]
    return len(curves[0]) == 6 and curves[0] == pytest.approx(curves[1], abs=0.02)


def errors(text: str) -> list[str]:
    """The lines in which the program says why it ends."""
    return re.findall("^train_ppo.py: error: .*", text, re.MULTILINE)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, demo):
    """Six steps under the real torchrun, which starts both processes again because the second is killed at step 5; the
    same steps by one process; and what torchrun's processes print."""
    tmp_path = tmp_path_factory.mktemp("several")
    flags = [*RUN, "--reward", "tests.ranks:killed", "--episodes", "96", "--save_every", "2"]
    flags += ["--lr", "1e-6", "--runs_dir", str(tmp_path / "runs")]
    assert main([*flags, "--run_name", "one"]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "--max-restarts", "1", str(ROOT / "train_ppo.py"), *flags, "--run_name", "two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return tmp_path / "runs" / "one", tmp_path / "runs" / "two", result.stdout, result.stderr


def test_a_run_of_two_processes_is_the_run_of_one(runs):
    one, two, *_ = runs
    assert [row["step"] for row in rows(two)] == list("123456") and same_curve(one, two)
    lines = [(run / "samples.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, two)]
    completions = [[json.loads(line)["completion"] for line in part] for part in lines]
    assert len(completions[0]) == len(completions[1]) == 96
    assert sum(a == b for a, b in zip(*completions)) >= 90


def test_only_rank_0_writes_and_prints(runs):
    one, two, output, _ = runs
    assert output.count("run folder") == 2  # once in each start
    assert output.count("model, metrics and report.md are in") == 1
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_after_a_killed_process_torchruns_restart_goes_on_from_the_checkpoint(runs):
    _, two, _, said = runs
    assert 'train_ppo.py", line' not in said  # the other process ends without a traceback
    (lost,) = [line for line in errors(said) if "another process" in line]
    assert f"--resume {two} --reward tests.ranks:killed" in lost
    starts = [json.loads(line) for line in (two / "environment.jsonl").read_text().splitlines()]
    assert [(start["step"], start["processes"]) for start in starts] == [(1, 2), (5, 2)]


def test_a_run_goes_on_with_another_number_of_processes(runs, tmp_path):
    """From a checkpoint of two processes with one, and from one of one process with two."""
    for finished, name in ((runs[0], "two"), (runs[1], "one")):
        run = shutil.copytree(finished, tmp_path / name)
        for output in FINAL[1:]:
            (run / output).unlink()
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "checkpoints" / "step-000006")
    assert main(["--resume", str(tmp_path / "one"), "--reward", "tests.ranks:killed"]) == 0
    ranks = Ranks(tmp_path, program, ["--resume", "two", "--reward", "tests.ranks:killed"], restarts=1)
    assert ranks.wait() == [0, 0], ranks.err(0)
    assert same_curve(runs[0], tmp_path / "one") and same_curve(runs[0], tmp_path / "two")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, demo):
    flags = ["--reward", "tests.ranks:interrupted", "--episodes", "96", "--save_every", "0", "--run_name", "stopped"]
    ranks = Ranks(tmp_path, program, [*RUN, *flags])
    assert ranks.wait() == [128 + signal.SIGINT] * 2, ranks.err(0) + ranks.err(1)
    run = tmp_path / "runs" / "stopped"
    assert len(rows(run)) == STEP and [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{STEP:06d}"]
    assert f"stopped after step {STEP}; go on with: python train_ppo.py --resume runs/stopped" in ranks.out(0)
    assert ranks.out(1) == "" and errors(ranks.err(0) + ranks.err(1)) == []


def test_a_reward_error_on_one_process_ends_all_with_one_message(tmp_path, demo):
    flags = ["--reward", "tests.ranks:fails", "--run_name", "broken", "--save_every", "0"]
    ranks = Ranks(tmp_path, program, [*RUN, *flags])
    assert ranks.wait() == [2, 2]
    (message,) = errors(ranks.err(0) + ranks.err(1))
    assert f"step {STEP}: " in message and "KeyError: 'no such word'" in message
    run = tmp_path / "runs" / "broken"
    assert "KeyError" in (run / "error.log").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step-{STEP - 1:06d}"]
