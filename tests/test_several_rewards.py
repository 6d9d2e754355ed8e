"""Several weighted rewards, judges, rewards that get other columns of the prompts, and a person who gives scores."""

import json
import math
import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from config import PPOConfig
from reward import HumanReward, RewardError, Rewards, score_texts
from support.common.errors import UserError
from support.compute import processes
from support.run.evaluation import Results
from support.run.results import results_table, verdict
from support.run.settings import check, read_prompts
from tests.helpers import PROMPTS, evaluation, read_json, rows, small_run, tiny_run
from train_ppo import main


def variety(texts):
    return [len(set(text)) / 10 for text in texts]


def length(texts):
    return [float(len(text)) for text in texts]


def samples(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def pair(policy, tmp_path, without_pictures):
    """A run with two rewards of weights 2 and -0.5."""
    assert tiny_run(tmp_path / "run", policy, Rewards({"variety": variety, "my:length": length}, [2, -0.5])) == 0
    return tmp_path / "run"


def test_the_reward_is_the_weighted_sum_and_each_part_is_logged_and_reported(pair):
    logged = samples(pair)
    texts = [sample["prompt"] + sample["completion"] for sample in logged]
    total = 2 * np.array(variety(texts)) - 0.5 * np.array(length(texts))
    assert [sample["score"] for sample in logged] == pytest.approx(total, abs=1e-5)
    for i, row in enumerate(rows(pair)):
        of_step = texts[8 * i : 8 * i + 8]
        assert float(row["reward/variety"]) == pytest.approx(np.mean(variety(of_step)))
        assert float(row["reward/my:length"]) == pytest.approx(np.mean(length(of_step)))
        assert float(row["env/reward_mean"]) == pytest.approx(total[8 * i : 8 * i + 8].mean())

    found = Results.read(pair / "evaluation.json")
    for when in (found.before, found.after):
        texts = [prompt + text for prompt, text, _ in when.samples]
        assert [part["weight"] for part in when.parts] == [2, -0.5]
        assert when.parts[0]["scores"] == pytest.approx(variety(texts))
        assert when.parts[1]["scores"] == pytest.approx(length(texts))
        total = 2 * np.array(variety(texts)) - 0.5 * np.array(length(texts))
        assert [score for *_, score in when.samples] == pytest.approx(total, abs=1e-5)
        assert when.reward == pytest.approx(total.mean(), abs=1e-5)
    assert [part["name"] for part in found.rewards] == ["variety", "my:length"]
    assert "parts" not in read_json(pair / "results.json")["after"]
    for page in (pair / "report.md", pair / "model" / "README.md"):
        assert "| my:length | -0.5" in page.read_text(encoding="utf-8")


def test_a_judge_does_not_affect_training(policy, tmp_path, without_pictures):
    for name, functions, weights in (
        ("single", {"variety": variety}, None),
        ("with_judge", {"length": length, "variety": variety}, [0, 1]),
    ):
        assert tiny_run(tmp_path / name, policy, Rewards(functions, weights)) == 0
    single, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("single", "with_judge"))
    assert single.keys() == other.keys() and all(torch.equal(single[name], other[name]) for name in single)
    assert [row["env/reward_mean"] for row in rows(tmp_path / "single")] == [
        row["env/reward_mean"] for row in rows(tmp_path / "with_judge")
    ]


def results(rewards, judge, weight=0.0) -> Results:
    """Return the results of a run with two rewards. rewards, judge: the scores of each, before and after training."""
    parts = [[{"name": "first", "weight": 1.0, "scores": a}, {"name": "second", "weight": weight, "scores": b}]
             for a, b in zip(rewards, judge)]  # fmt: skip
    before, after = ([("p", f"t{i}", score) for i, score in enumerate(scores)] for scores in rewards)
    found = Results(
        evaluation(before, parts=parts[0], unique=1.0),
        evaluation(after, kls=[0.1] * len(after), parts=parts[1], unique=1.0),
    )
    found.measure(0.2)
    return found


HALF, MOST = [0.0, 1.0] * 200, [0.0, 1.0, 1.0, 1.0] * 100


@pytest.mark.parametrize(
    ("rewards", "judge", "weight", "hacked"),
    [
        ((HALF, MOST), (MOST, HALF), 0.0, True),
        ((HALF, MOST), (HALF, HALF), 0.0, False),
        ((HALF, MOST), (HALF, [0.0, 1.0] * 180 + [0.0, 0.0] * 20), 0.0, False),  # fell by 0.05, standard error 0.035
        ((HALF, MOST), (MOST, HALF), 0.5, False),  # a part of the reward isn't a judge
        ((MOST, HALF), (MOST, HALF), 0.0, False),  # the reward didn't rise
    ],
)
def test_the_verdict_is_hacked_if_the_reward_rises_and_a_judge_falls(rewards, judge, weight, hacked):
    found = results(rewards, judge, weight)
    told = verdict(found, PPOConfig())
    assert ("but the judge second fell" in told) == hacked
    assert not hacked or told.startswith("hacked: the reward rose from 0.5 to 0.75, but")
    error = math.sqrt(sum(np.var(scores, ddof=1) / len(scores) for scores in judge))
    assert found.rewards[1]["error"] == pytest.approx(error)
    assert ("0, a judge" in results_table(found)) == (weight == 0)


def write_prompts(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return PPOConfig(prompts_file=str(path))


def test_a_reward_gets_the_columns_of_each_texts_prompt(policy, tmp_path, without_pictures):
    """This holds in training, in evaluation, and when the better half of the texts is scored in another order."""
    calls = []

    def score(texts, answer, *, prompt, missing=7):
        assert all(
            text.startswith(begins) and begins == p for text, begins, p in zip(texts, answer, prompt, strict=True)
        )
        calls.append(len(texts))
        return variety(texts)

    columns = {"prompt": PROMPTS[1:], "answer": PROMPTS[1:], "unused": [None] * len(PROMPTS[1:])}
    assert tiny_run(tmp_path / "run", policy, Rewards({"score": score}, columns=columns), eval_samples=80) == 0
    assert {64, 32, 8} <= set(calls)
    decorated = Rewards({"score": lambda *args, **options: variety(*args, **options)}, columns=columns)
    assert decorated.score(["a"], [0]).tolist() == [[pytest.approx(0.1)]]  # it has no parameter for a column
    with pytest.raises(UserError, match="--reward score has a parameter 'answer', .*--prompts_file"):
        Rewards({"score": score})


def test_each_process_passes_on_its_own_share_of_the_columns(monkeypatch):
    monkeypatch.setattr(processes, "rows_of_rank", lambda n: slice(1, 3))
    scores = score_texts(lambda texts, of: [float(text == a) for text, a in zip(texts, of)], [*"abc"], {"of": [*"xbc"]})
    assert scores.tolist() == [0, 1, 1]


def test_a_prompts_file_in_json_lines_can_have_other_columns(tmp_path):
    path = tmp_path / "prompts.jsonl"
    config = write_prompts(path, [{"prompt": "一加一", "answer": 2}, {"answer": [4], "prompt": "二加二"}])
    assert read_prompts(config) == {"prompt": ["一加一", "二加二"], "answer": [2, [4]]}
    for content, said in (
        ('{"prompt": "a"}\n{"prompt": "b", "x": 1}\n', "line 1 has no 'x'; it has 'prompt'"),
        ('{"prompt": "a"}\nb\n', "line 2 of .* is damaged"),
        ('{"text": "a"}\n', "line 1 has no 'prompt'"),
        ('{"prompt": 1}\n', "prompt 1 must be a text that isn't empty, not 1"),
        ('["prompt"]\n', "line 1 of .* is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_prompts(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward": ["score"]}, "--reward score must be module:function, classifier, human"),
        ({"reward": ["a:b", "classifier", "a:b"]}, "--reward a:b is given twice"),
        ({"reward": ["a:b", "classifier"], "reward_weights": [1]}, "got 2 rewards and the weights"),
        ({"reward_weights": [1.0]}, "got 0 rewards"),
        ({"reward": ["a:b"], "reward_weights": [0]}, "not all 0"),
        ({"reward": ["a:b"], "reward_weights": [math.nan]}, "a finite number for each"),
        ({"reward": "a:b"}, "--reward must be list"),
    ],
)
def test_invalid_reward_settings_are_rejected(settings, said):
    with pytest.raises(UserError, match=said):
        check(PPOConfig(**settings))


def test_a_run_with_your_own_reward_a_reward_model_and_the_classifier_as_judge(
    tmp_path, demo, monkeypatch, capsys, without_pictures
):
    """To resume the run, the rewards must be named again, because one of them is code."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_words.py").write_text("def score(texts):\n    return [len(set(text)) / 10 for text in texts]\n")
    model = str(demo[1])
    flags = ["--reward", "own_words:score", model, "classifier", "--reward_weights", "1", "0.5", "0"]
    code, run_dir = small_run(tmp_path, *flags)
    assert code == 0 and "| 0, a judge" in capsys.readouterr().out
    for row in rows(run_dir):
        assert float(row[f"reward/{model}"]) == pytest.approx(float(row["reward/classifier"]), abs=1e-6)
        total = float(row["reward/own_words:score"]) + 0.5 * float(row["reward/classifier"])
        assert float(row["env/reward_mean"]) == pytest.approx(total, abs=1e-5)
    inputs = read_json(run_dir / "inputs.json")
    assert {
        "file of --reward own_words:score",
        f"weights of --reward {model}",
        "weights of --reward_model_name demo",
    } <= {name.removeprefix("the hash of the ") for name in inputs}
    assert main(["--resume", str(run_dir), "--episodes", "64"]) == 2
    line = capsys.readouterr().err
    assert f"--reward own_words:score {model} classifier" in line and line.count("\n") == 1
    assert main(["--resume", str(run_dir), "--episodes", "64", "--reward", "own_words:score", model, "classifier"]) == 0
    assert len(rows(run_dir)) == 4


@pytest.fixture
def typed(monkeypatch):
    """A function that sets the lines that a person types. It returns the questions that were asked."""
    asked = []

    def type_in(*lines):
        answers = iter(lines)

        def read(question):
            asked.append(question)
            answer = next(answers, None)
            if answer is None:
                raise EOFError
            return answer

        monkeypatch.setattr("builtins.input", read)
        return asked

    return type_in


def test_a_person_scores_each_text_only_once_and_no_score_is_lost(tmp_path, typed, capsys):
    path = tmp_path / "scores.jsonl"
    asked = typed("0.5", "good", "nan", "１")
    human = HumanReward(path)
    assert score_texts(human, ["好", "差", "好"]).tolist() == [0.5, 1, 0.5]
    assert len(asked) == 4 and "1 of 2  好" in asked[0] and "2 of 2  差" in asked[1]
    assert score_texts(human, ["差"]).tolist() == [1] and len(asked) == 4
    typed("-2")
    with pytest.raises(RewardError, match=f"your scores so far are in {path}"):
        score_texts(human, ["书", "衣服"])
    path.write_bytes(path.read_bytes() + '{"text": "苹'.encode()[:-1])  # killed while writing
    asked = typed("3")
    assert score_texts(HumanReward(path), ["书", "苹", "好"]).tolist() == [-2, 3, 0.5] and len(asked) == 7
    assert "has the scores of 3 texts" in capsys.readouterr().out
    assert score_texts(HumanReward(path), ["苹"]).tolist() == [3]


def test_a_human_reward_is_never_asked_about_a_text_twice(policy, tmp_path, typed, monkeypatch, without_pictures):
    monkeypatch.chdir(tmp_path)
    draw = random.Random(1)
    asked = typed(*(str(draw.random()) for _ in range(200)))
    assert tiny_run(tmp_path / "run", policy, Rewards({"human": HumanReward()})) == 0
    texts = [question.split("  ")[1].split("\n")[0] for question in asked]
    assert len(set(texts)) == len(texts) and read_json(tmp_path / "run" / "evaluation.json")["before"]["noise"] == 0
