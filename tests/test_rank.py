"""Rankings: entering, saving and reading them, and using them to train a reward model that PPO can use."""

import json
import math

import pytest
import torch
from transformers import pipeline

from reward import SentimentReward
from support.common.errors import UserError
from tests.helpers import read_json, rows, small_run
from tools import rank, train_reward_model
from tools.rank import Ranking, parse_ranking, read_rankings


@pytest.mark.parametrize(
    ("answer", "order", "ties"),
    [
        ("3 1 4 2", [2, 0, 3, 1], []),
        ("3 1=4 2", [2, 0, 3, 1], [[1, 2]]),
        ("2= 1 =4, 3", [1, 0, 3, 2], [[0, 1], [0, 2], [1, 2]]),
        ("3142", [2, 0, 3, 1], []),
        ("3 > 1 = 4 > 2", [2, 0, 3, 1], [[1, 2]]),
    ],
)
def test_an_answer_is_parsed_into_an_order_with_ties(answer, order, ties):
    assert parse_ranking(answer, 4) == (order, ties)


@pytest.mark.parametrize(
    "answer", ["", "1 2 3", "1 2 3 3", "1 2 3 4 4", "1 2 3 5", "0 1 2 3", "3<1", "1 2 = 3 4 =", "好"]
)
def test_an_answer_that_does_not_name_each_number_once_is_rejected(answer):
    with pytest.raises(ValueError, match="type each number from 1 to 4 once"):
        parse_ranking(answer, 4)


@pytest.fixture
def session(gpt2_folder, tmp_path, monkeypatch, capsys):
    """A function that types lines into the tool, then raises `error`. It returns the sets of texts that were shown."""

    def run(*lines, error=EOFError, out="rankings.jsonl", prompts=("刚收到货,感觉", "衣服")):
        answers = iter(lines)

        def read(question):
            answer = next(answers, None)
            if answer is None:
                raise error
            return answer

        monkeypatch.setattr("builtins.input", read)
        capsys.readouterr()
        monkeypatch.setattr(rank, "BLOCK", 2)
        rank.main(["--model_name", str(gpt2_folder), "--prompts", *prompts, "--out", str(tmp_path / out)])
        printed = capsys.readouterr().out
        return [[line.split("  ")[-1] for line in part.splitlines()[1:5]] for part in printed.split("\n\n")[1:-1]]

    return run


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_session_is_saved_and_the_next_one_shows_new_sets(session, tmp_path, capsys):
    path = tmp_path / "rankings.jsonl"
    first = session("3 1 4 2", "1 2 3", "4 3=2 1", "s", "1 2 3 4", "u", "4 3 2 1", error=KeyboardInterrupt)
    found = lines(path)
    assert [record["prompt"] for record in found] == ["刚收到货,感觉", "衣服"] * 2
    assert found[0]["texts"] == [first[0][i] for i in (2, 0, 3, 1)] and found[0]["ties"] == []
    assert found[1]["texts"] == first[1][::-1] and found[1]["ties"] == [[1, 2]]
    assert found[2]["skipped"] and not found[3]["skipped"]
    assert first[3] == first[5] and found[3]["texts"] == first[5][::-1]  # shown again after `u` undid it
    assert {"seed", "model", "time"} < found[0].keys()

    before = path.read_bytes()
    path.write_bytes(before + before[:40])  # as if killed in the middle of a line
    second = session("1 2 3 4", "q")
    assert path.read_bytes().startswith(before) and len(lines(path)) == 5
    shown = {tuple(texts) for texts in first + second}
    assert len(shown) == 6 and second[0] == first[6]  # the set on screen when the first session ended
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as some editors do
    session("1 2 3 4")
    assert len(lines(path)) == 6
    rankings = read_rankings(path)
    assert rankings[0] == Ranking([f"刚收到货,感觉{text}" for text in found[0]["texts"]], [*ALL])
    assert rankings[1].better == [pair for pair in ALL if pair != (1, 2)] and len(rankings) == 5


ALL = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


def test_rankings_in_the_articles_format_are_read_too(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("很好\t不错\t差\r\n好\u2028的\t差\n", encoding="utf-8")
    assert read_rankings(path) == [
        Ranking(["很好", "不错", "差"], [(0, 1), (0, 2), (1, 2)]),
        Ranking(["好\u2028的", "差"], [(0, 1)]),
    ]


GOOD = '{"prompt": "a", "texts": ["b", "c"]}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a", "texts": ["b", "b"]}\n', "line 2 of .*all different"),
        ('{"prompt": "a", "texts": ["b"]}\n', "line 2 of .*at least two texts"),
        ('{"prompt": "a", "texts": ["ab", "ac"]}\n', "line 2 of .*begin with the prompt 'a'"),
        ('{"prompt": "x", "texts": ["ab", "ac"]}\n', "line 2 of .*begin with the prompt 'a'"),
        ('{"prompt": "a", "texts": ["b", "c"], "ties": [[0, 2]]}\n', "line 2 of .*pairs of positions from 0 to 1"),
        ('{"texts": ["b", "c"]}\n', "line 2 of .*prompt"),
        ('{"prompt": "a", "texts": ["b", 1]}\n', "line 2 of"),
        ('{"prompt": "a"\n' + GOOD, "line 2 of .*is damaged"),
        ("好评\n", "line 2 of .*at least two texts"),
    ],
)
def test_an_unusable_ranking_gives_an_error_with_its_line_number(tmp_path, content, said):
    path = tmp_path / "rankings.jsonl"
    path.write_text(GOOD + content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_rankings(path)


def test_rankings_with_only_ties_an_incomplete_line_and_too_few_rankings_are_reported(tmp_path, capsys):
    path = tmp_path / "rankings.jsonl"
    path.write_text(
        GOOD * 2 + '{"prompt": "a", "texts": ["b", "c"], "ties": [[1, 0]]}\n{"prompt": "a", "te', encoding="utf-8"
    )
    assert read_rankings(path) == [Ranking(["ab", "ac"], [(0, 1)])] * 2
    printed = capsys.readouterr().out
    assert "is incomplete and is ignored" in printed and "1 of 3 rankings have only ties" in printed
    with pytest.raises(UserError, match="has 2 rankings to learn from; at least 10"):
        train_reward_model.main([str(path), "--base", "demo", "--out", str(tmp_path / "model")])
    assert not (tmp_path / "model").exists()


class Lengths(torch.nn.Module):
    """A model that scores a text by its number of tokens."""

    config = type("Config", (), {"max_position_embeddings": 48})

    def forward(self, input_ids, attention_mask, **rest):
        return type("Output", (), {"logits": attention_mask.sum(1, keepdim=True).float()})

    device = torch.device("cpu")


def test_the_loss_is_the_mean_over_the_pairs_of_a_ranking(policy):
    """The scores are 6, 5 and 3, and one ranking ties the last two. The loss of a pair is log(1 + e^-(r_i - r_j))."""
    texts = ["很好很好", "很好的", "好"]
    rankings = [
        Ranking(texts, [(0, 1), (0, 2), (1, 2)]),
        Ranking(texts, [(0, 1), (0, 2)]),
        Ranking(texts[:2], [(1, 0)]),
    ]
    losses = train_reward_model.ranking_losses(Lengths(), policy[1], rankings)
    one, two, three = (math.log(1 + math.exp(-difference)) for difference in (1, 2, 3))
    expected = [(one + two + three) / 3, (one + three) / 2, math.log(1 + math.e)]
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-5)


def test_accuracy_is_a_mean_over_rankings_with_its_standard_error():
    rankings = [Ranking(["a", "bb", "ccc"], ALL[:2] + [(1, 2)]), Ranking(["aa", "b"], [(0, 1)])]
    told = train_reward_model.accuracy_of(lambda texts: torch.tensor([float(len(text)) for text in texts]), rankings)
    assert told == "0.500 (standard error 0.500)"


def test_the_whole_pipeline_from_rankings_to_a_trained_policy(tmp_path, demo, monkeypatch, capsys, without_pictures):
    """Uses the demo models. The classifier simulates the person who ranks texts, and is the judge of the run."""
    monkeypatch.chdir(tmp_path)
    rank.main("--model_name demo --judge demo --simulate 40".split())
    assert sum(not record["skipped"] for record in lines(tmp_path / "rankings.jsonl")) == 40
    judge = SentimentReward(demo[1], torch.device("cpu"))
    for record in lines(tmp_path / "rankings.jsonl")[:10]:
        scores = judge([record["prompt"] + text for text in record["texts"]]).tolist()
        close = [[i, j] for i, j in ALL if len(scores) == 4 and scores[i] - scores[j] < 0.05]
        assert record["skipped"] or (record["ties"] == close and scores == sorted(scores, reverse=True))
    rank.main("--model_name demo --judge demo --simulate 15 --seed 2 --out test.jsonl".split())
    seen = []
    descend = train_reward_model.descend
    monkeypatch.setattr(train_reward_model, "descend", lambda model, *args: (seen.append(model), descend(model, *args)))
    train_reward_model.main("rankings.jsonl --base demo --test test.jsonl --lr 2e-3 --epochs 4".split())
    printed = capsys.readouterr().out
    assert float(printed.split("accuracy ")[1].split()[0]) > 0.8 and printed.endswith("--kl_budget 0.4 --preset demo\n")
    assert "accuracy 0." in (tmp_path / "reward_model" / "README.md").read_text(encoding="utf-8")
    folder = tmp_path / "reward_model"
    assert (folder / "loss.png").stat().st_size > 1000
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode

    texts = ["刚收到货,感觉很不错!", "刚收到货,感觉太差了,要求退货", "好"]
    scores = SentimentReward(tmp_path / "reward_model", torch.device("cpu"))(texts)
    plain = pipeline("text-classification", str(tmp_path / "reward_model"), function_to_apply="none", device="cpu")
    assert scores.tolist() == pytest.approx([plain(text)[0]["score"] for text in texts], abs=1e-4)
    tokenizer = plain.tokenizer
    ids = [tokenizer.encode(text, return_tensors="pt") for text in texts]
    assert scores.tolist() == pytest.approx([seen[0](row).logits.item() for row in ids], abs=1e-4)  # as in training
    assert scores[0] > scores[1]

    flags = (
        "--reward reward_model classifier --reward_weights 1 0 --kl_budget 0.8 --lr 3e-4 --episodes 256 --batch_size 64"
    )
    code, run_dir = small_run(tmp_path, *flags.split(), "--minibatch_size", "64", "--eval_samples", "128")
    assert code == 0 and len(rows(run_dir)) == 4
    judge = read_json(run_dir / "results.json")["rewards"][1]
    assert judge["name"] == "classifier" and judge["after"] > judge["before"] + 2 * judge["error"]


def test_the_weights_with_the_lowest_loss_on_held_out_rankings_are_kept(monkeypatch, policy):
    """The fake losses fall and then rise. Training stops at the first rise."""
    model = torch.nn.Linear(1, 1)
    held_out, told, kept = [0.5, 0.4, 0.6, 0.7, 0.1], iter([0.5, 0.4, 0.6, 0.7, 0.1]), []

    def losses(model, tokenizer, rankings):
        if torch.is_grad_enabled():
            return [model.weight.sum() ** 2] * len(rankings)
        kept.append(model.weight.item())
        return [torch.tensor(next(told))]

    monkeypatch.setattr(train_reward_model, "ranking_losses", losses)
    args = type("Args", (), {"epochs": 5, "batch_size": 2, "lr": 0.1, "seed": 1})
    found = train_reward_model.fit(model, None, [Ranking([], [])] * 4, [Ranking([], [])], args)
    assert [loss for _, loss, of_held_out in found if of_held_out] == pytest.approx(held_out[:3])
    assert model.weight.item() == kept[1] != kept[2]
