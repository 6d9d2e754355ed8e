"""`--complete` shows what a run's model writes before and after training, and doesn't change the run."""

import json
import re
import shutil

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from config import PPOConfig
from support.common.files import remove
from support.run.command_line import read_command_line
from support.run.settings import read_prompts
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import change_json, contents, copy_run, read_json
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")


def complete(capsys, run_dir, *flags) -> list[list[str]]:
    """Run `--complete` and return the rows of its table. Checks that the run folder is unchanged."""
    before = contents(run_dir)
    assert main(["--complete", str(run_dir), *flags]) == 0
    assert contents(run_dir) == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def drawn(trainer, prompts) -> list[str]:
    """Return the completions that an evaluation samples."""
    return trainer.decode(trainer.generate(trainer.encode(prompts), seed=20_170_707, step=0))


def test_the_completions_are_those_of_the_evaluation(finished, capsys):
    """By default, it shows five completions of the run's own prompt, like the table in report.md."""
    rows = complete(capsys, finished)
    assert len(rows) == 5 and [row[0] for row in rows] == ["刚收到货,感觉"] * 5
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert lines in re.sub(" +", " ", (finished / "report.md").read_text(encoding="utf-8"))


def test_each_prompt_is_completed_n_times(finished, capsys):
    rows = complete(capsys, finished, "--n", "3", "--prompts", "天天", "昨天")
    assert [row[0] for row in rows] == ["天天"] * 3 + ["昨天"] * 3
    trainer = TextPPOTrainer.from_pretrained(finished / "model", PPOConfig(preset="demo", device="cpu"))
    texts = drawn(trainer, ["天天", "昨天"] * 3)
    assert [row[3] for row in rows] == texts[::2] + texts[1::2]


def test_a_running_run_uses_the_averaged_weights_of_its_newest_checkpoint(finished, tmp_path, capsys):
    """The run has finished two of three steps and holds its lock. Without a checkpoint, this is an error."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    for name in ("model", "checkpoints/step-000003", "report.md", "rewards.png"):
        remove(run_dir / name)
    (run_dir / "evaluation.json").write_text(json.dumps({"before": read_json(run_dir / "evaluation.json")["before"]}))
    with FileLock(run_dir / ".lock"):
        rows = complete(capsys, run_dir, "--prompts", "昨天", "--n", "8")
    trainer = TextPPOTrainer.from_pretrained("demo", PPOConfig(preset="demo", device="cpu"))
    before = drawn(trainer, ["昨天"] * 8)
    average = load_file(run_dir / "checkpoints" / "step-000002" / "average.safetensors")
    trainer.model.load_state_dict(average, strict=False)
    after = drawn(trainer, ["昨天"] * 8)
    assert [[row[1], row[3]] for row in rows] == [[*pair] for pair in zip(before, after)] and before != after
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["--complete", str(run_dir)]) == 2
    assert "has neither a checkpoint nor a model yet; wait for one" in capsys.readouterr().err


def test_an_extended_run_shows_the_step_that_it_has_reached(finished, tmp_path, capsys):
    """If its checkpoints are gone, `--complete` shows the model from before the extension."""
    run_dir = copy_run(finished, tmp_path / "longer", episodes=96)
    for said in ("after step 3 of 6:", "after training:"):
        assert main(["--complete", str(run_dir), "--n", "1"]) == 0
        assert said in capsys.readouterr().out
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def test_prompts_on_the_command_line_replace_the_runs_prompts_file(finished, tmp_path):
    (tmp_path / "prompts.txt").write_text("昨天\n刚收到货,感觉\n", encoding="utf-8")
    run_dir = copy_run(finished, tmp_path / "run", prompts_file=str(tmp_path / "prompts.txt"))
    for flags, expected in ([], ["昨天", "刚收到货,感觉"]), (["--prompts", "天天"], ["天天"]):
        assert read_prompts(read_command_line(["--complete", str(run_dir), *flags])[0])["prompt"] == expected


def test_your_own_reward_scores_the_completions(finished, tmp_path, capsys, monkeypatch):
    """A reward that fails, or whose file has changed since the run, gives a one-line error."""
    run_dir = copy_run(finished, tmp_path / "run", reward=["own_length:score"])
    (tmp_path / "own_length.py").write_text(
        "def score(texts):\n    assert 'no' not in texts[0]\n    return [len(text) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = complete(capsys, run_dir, "--reward", "own_length:score", "--n", "2")
    assert [float(row[4]) for row in rows] == [len(row[0] + row[3]) for row in rows]
    monkeypatch.setattr("own_length.score", lambda texts: 1 / 0)
    before = contents(run_dir)
    assert main(["--complete", str(run_dir), "--reward", "own_length:score"]) == 2
    err = capsys.readouterr().err
    assert "the reward function raised ZeroDivisionError" in err and err.count("\n") == 1
    assert contents(run_dir) == before
    change_json(run_dir / "inputs.json", **{"the hash of the file of --reward own_length:score": "0"})
    assert main(["--complete", str(run_dir), "--reward", "own_length:score"]) == 2
    assert "an input has changed" in capsys.readouterr().err
