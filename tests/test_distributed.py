"""Runs with several processes: updates, statistics and files match those of a single process."""

import copy
import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from config import PPOConfig
from reward import score_texts
from support.common.errors import UserError
from support.common.files import remove
from support.compute import processes
from support.models.pretrained import encode_prompt
from support.run.command_line import read_command_line
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import PROMPTS, checkpoints, leave_pictures_empty, load_gpt2, rows
from tests.ranks import STEP, Ranks, program
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")


def three_steps(rank, n_processes, gpt2_folder):
    """Save weights and statistics of three PPO steps. In the third, the last process's first gradient is NaN."""
    processes.init_process_group()
    model, tokenizer = load_gpt2(gpt2_folder)
    sizes = dict(batch_size=16, minibatch_size=8, micro_batch_size=1, gen_len=8)
    config = PPOConfig(**sizes, ppo_epochs=2, lr=1e-4, dtype="float32", device="cpu")
    trainer = TextPPOTrainer(config, model, copy.deepcopy(model), tokenizer)
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
    torch.save({"states": states, "stats": stats, "drawn": drawn}, f"{rank}-of-{n_processes}")
    processes.exit_process(0)


def distance(one, other) -> float:
    """Return the norm of the difference between two state dicts."""
    return sum((one[name] - other[name]).double().square().sum().item() for name in one) ** 0.5


def test_the_update_does_not_depend_on_the_number_of_processes(tmp_path, gpt2_folder):
    for n in (1, 2):
        ranks = Ranks(tmp_path, three_steps, n, gpt2_folder, n=n)
        assert ranks.wait() == [0] * n, ranks.err(0)
    single, *results = [torch.load(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2")]
    for result in results:
        for one, other in zip(single["states"], result["states"]):
            # Gradients sum about 100 float32 terms in a different order, which causes relative errors near 1e-6. With
            # Adam's epsilon of 1e-5, weights with small gradients amplify them at most 100 times
            assert distance(one, other) < 1e-2 * distance(single["states"][0], single["states"][-2])
        assert all(one.equal(other) for one, other in zip(single["drawn"], result["drawn"]))
        for one, other in zip(single["stats"][:2], result["stats"]):
            assert other == pytest.approx(one, rel=1e-3, abs=1e-5)
        assert [stats["ppo/skipped"] for stats in result["stats"]] == [0, 0, 1]  # all ranks skip a step, or none does


def same_curve(one: Path, other: Path) -> bool:
    """Check that two runs have the same rewards. With lr 1e-6, rounding changes few sampled tokens in six steps."""
    curves = [[float(row["env/reward_mean"]) for row in rows(run)] for run in (one, other)]
    return len(curves[0]) == 6 and curves[0] == pytest.approx(curves[1], abs=0.02)


def errors(text: str) -> list[str]:
    """Return the lines that say why the program stops."""
    return re.findall("^train_ppo.py: error: .*", text, re.MULTILINE)


@pytest.fixture(scope="module")
def flags(gpt2_folder) -> list[str]:
    sizes = "--batch_size 16 --minibatch_size 8 --eval_samples 12 --episodes 96 --gen_len 6 --lr 1e-6"
    names = ["--preset", "demo", "--device", "cpu", "--model_name", str(gpt2_folder), "--prompts", *PROMPTS]
    return [*names, *sizes.split(), *"--log_samples_every 0 --save_every 2 --runs_dir runs".split()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, flags):
    """A run of six steps with one process, and one with two, restarted by torchrun after rank 1 is killed in step 5."""
    folder = tmp_path_factory.mktemp("several")
    flags = [*flags, "--reward", "tests.ranks:killed", "--run_name"]
    with pytest.MonkeyPatch.context() as patch:
        leave_pictures_empty(patch)
        patch.chdir(folder)
        assert main([*flags, "one"]) == 0
    ranks = Ranks(folder, program, [*flags, "two"], torchrun=True)
    assert ranks.wait() == [0], ranks.err("torchrun")
    return folder / "runs" / "one", folder / "runs" / "two", ranks


def test_a_run_with_two_processes_matches_a_run_with_one(runs):
    one, two, _ = runs
    assert [row["step"] for row in rows(two)] == list("123456") and same_curve(one, two)
    lines = [(run / "samples.jsonl").read_text(encoding="utf-8").splitlines() for run in (one, two)]
    completions = [[json.loads(line)["completion"] for line in part] for part in lines]
    assert len(completions[0]) == len(completions[1]) == 96
    assert sum(a == b for a, b in zip(*completions)) >= 90
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def test_a_torchrun_restart_after_a_killed_process_continues_from_the_checkpoint(runs):
    """The other process stops with a one-line error and no traceback. Only rank 0 prints."""
    _, two, ranks = runs
    assert ranks.out(0).count("run folder") == 2 and ranks.out(1) == ""
    assert ranks.out(0).count("model, metrics and report.md are in") == 1
    assert "Traceback" not in ranks.err(0)
    (lost,) = errors(ranks.err(0))
    assert "another process" in lost and "--resume runs/two --reward tests.ranks:killed" in lost
    starts = [json.loads(line) for line in (two / "environment.jsonl").read_text().splitlines()]
    assert [(start["step"], start["processes"]) for start in starts] == [(1, 2), (5, 2)]


def test_a_torchrun_restart_only_resumes_a_named_run_that_has_started(runs, flags, monkeypatch):
    one, *_ = runs
    monkeypatch.chdir(one.parent.parent)
    flags = [*flags, "--reward", "tests.ranks:killed", "--episodes", "192", "--run_name"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert read_command_line([*flags, "one"])[2] == "resume" and read_command_line([*flags, "new"])[2] == "train"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="one already exists"):
        read_command_line([*flags, "one"])


def test_a_run_can_be_resumed_with_another_number_of_processes(runs, tmp_path):
    """A run with two processes is resumed with one, and a run with one process is resumed with two."""
    for finished, name in ((runs[0], "two"), (runs[1], "one")):
        run = shutil.copytree(finished, tmp_path / name)
        for output in ("report.md", "model", "checkpoints/step-000006"):
            remove(run / output)
    assert main(["--resume", str(tmp_path / "one"), "--reward", "tests.ranks:killed"]) == 0
    ranks = Ranks(tmp_path, program, ["--resume", "two", "--reward", "tests.ranks:killed"])
    assert ranks.wait() == [0, 0], ranks.err(0)
    assert same_curve(runs[0], tmp_path / "one") and same_curve(runs[0], tmp_path / "two")


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path, flags):
    flags = [*flags, "--reward", "tests.ranks:interrupted", "--run_name", "stopped", "--save_every", "0"]
    ranks = Ranks(tmp_path, program, flags)
    assert ranks.wait() == [128 + signal.SIGINT] * 2, ranks.err(0) + ranks.err(1)
    run = tmp_path / "runs" / "stopped"
    assert len(rows(run)) == STEP and checkpoints(run) == [f"step-{STEP:06d}"]
    assert f"stopped after step {STEP}; continue with: python train_ppo.py --resume runs/stopped" in ranks.out(0)
    assert ranks.out(1) == "" and errors(ranks.err(0) + ranks.err(1)) == []


def test_a_reward_error_on_one_process_stops_all_with_one_message(tmp_path, flags):
    flags = [*flags, "--reward", "tests.ranks:fails", "--run_name", "broken", "--save_every", "0"]
    ranks = Ranks(tmp_path, program, flags)
    assert ranks.wait() == [2, 2]
    (message,) = errors(ranks.err(0) + ranks.err(1))
    assert f"step {STEP}: " in message and "KeyError: 'no such word'" in message
    run = tmp_path / "runs" / "broken"
    assert "KeyError" in (run / "error.log").read_text() and checkpoints(run) == [f"step-{STEP - 1:06d}"]


def test_a_run_continues_if_nothing_reads_its_output_any_more(runs, flags, tmp_path):
    """For example, with `| head -1`, or after Ctrl-C with `| tee log`. The run writes the same files as any other."""
    flags = [*flags, "--reward", "tests.ranks:killed", "--run_name", "unread", "--log_samples_every", "1"]
    ranks = Ranks(tmp_path, program, flags, False, n=1)
    assert ranks.wait() == [0] and "BrokenPipe" not in ranks.err(0)
    run = tmp_path / "runs" / "unread"
    assert same_curve(runs[0], run) and {path.name for path in run.iterdir()} == {
        path.name for path in runs[0].iterdir()
    }
