"""`--complete`: what a run's model writes to any prompts, before training and now, while the run is as it was."""

import json
import re
import shutil

import pytest
from filelock import FileLock
from safetensors.torch import load_file

from config import PPOConfig
from support.text_trainer import TextPPOTrainer
from tests.helpers import contents, copy_run, read_json
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")
JUDGE = 20_170_707


def complete(capsys, run_dir, *flags) -> list[list[str]]:
    """The rows of the table; the folder holds what it held."""
    before = contents(run_dir)
    assert main(["--complete", str(run_dir), *flags]) == 0
    assert contents(run_dir) == before
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


@pytest.fixture
def unfinished(finished, tmp_path):
    """As it is after two of three steps, at work: the checkpoints of both, and its lock held."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    for name in ("model", "checkpoints/step-000003"):
        shutil.rmtree(run_dir / name)
    for name in ("report.md", "rewards.png"):
        (run_dir / name).unlink()
    results = read_json(run_dir / "evaluation.json")
    (run_dir / "evaluation.json").write_text(json.dumps({"before": results["before"]}), encoding="utf-8")
    with FileLock(run_dir / ".lock"):
        yield run_dir


def test_the_draws_are_those_of_the_judgement(finished, capsys):
    """The run's own prompt and five completions by default: the table that its end wrote."""
    rows = complete(capsys, finished)
    assert len(rows) == 5 and [row[0] for row in rows] == ["刚收到货,感觉"] * 5
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    assert lines in re.sub(" +", " ", (finished / "report.md").read_text(encoding="utf-8"))


def test_each_prompt_is_completed_n_times(finished, capsys):
    rows = complete(capsys, finished, "--n", "3", "--prompts", "天天", "昨天")
    assert [row[0] for row in rows] == ["天天"] * 3 + ["昨天"] * 3
    trainer = TextPPOTrainer.from_pretrained(finished / "model", PPOConfig(preset="demo", device="cpu"))
    queries = trainer.encode(["天天", "昨天"] * 3)
    texts = trainer.decode(trainer.generate(queries, seed=JUDGE, step=0))
    assert [row[3] for row in rows] == texts[::2] + texts[1::2]


def test_a_run_at_work_is_tried_with_the_average_of_its_newest_checkpoint(unfinished, capsys):
    """And refused without a checkpoint."""
    rows = complete(capsys, unfinished, "--prompts", "昨天", "--n", "8")
    trainer = TextPPOTrainer.from_pretrained("demo", PPOConfig(preset="demo", device="cpu"))
    queries = trainer.encode(["昨天"] * 8)
    before = trainer.decode(trainer.generate(queries, seed=JUDGE, step=0))
    average = load_file(unfinished / "checkpoints" / "step-000002" / "average.safetensors")
    trainer.model.load_state_dict(average, strict=False)
    after = trainer.decode(trainer.generate(queries, seed=JUDGE, step=0))
    assert [[row[1], row[3]] for row in rows] == [[*pair] for pair in zip(before, after)] and before != after
    shutil.rmtree(unfinished / "checkpoints")
    assert main(["--complete", str(unfinished)]) == 2
    assert "has no checkpoint yet, and no model; wait for one" in capsys.readouterr().err


def test_a_run_that_goes_on_past_its_end_shows_the_step_that_it_has_reached(finished, tmp_path, capsys):
    """If its checkpoints are gone, it shows the model that it had."""
    run_dir = copy_run(finished, tmp_path / "longer", episodes=96)
    for said in ("after step 3 of 6:", "after training:"):
        assert main(["--complete", str(run_dir), "--n", "1"]) == 0
        assert said in capsys.readouterr().out
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def test_another_model_than_the_runs_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished / "model", tmp_path / "other")
    run_dir = copy_run(finished, tmp_path / "run", model_name=str(tmp_path / "other"))
    inputs = read_json(run_dir / "inputs.json")
    moved = {name.replace("model_name demo", f"model_name {tmp_path / 'other'}"): it for name, it in inputs.items()}
    (run_dir / "inputs.json").write_text(json.dumps(moved))
    assert main(["--complete", str(run_dir)]) == 2
    assert "is not what" in capsys.readouterr().err


def test_given_prompts_replace_a_runs_file(finished, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("昨天\n刚收到货,感觉\n", encoding="utf-8")
    run_dir = copy_run(finished, tmp_path / "run", prompts_file=str(tmp_path / "prompts.txt"))
    assert [row[0] for row in complete(capsys, run_dir, "--n", "1")] == ["昨天", "刚收到货,感觉"]
    assert [row[0] for row in complete(capsys, run_dir, "--n", "1", "--prompts", "天天")] == ["天天"]


def test_a_users_reward_scores_them_and_its_failure_is_one_line(finished, tmp_path, capsys, monkeypatch):
    run_dir = copy_run(finished, tmp_path / "run", reward="own_length:score")
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
