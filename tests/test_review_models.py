"""tools/review_models.py: which reviews it reads, and that both models learn from them."""

import csv
import math
import random
import re
import zipfile

import pytest
import torch

from reward import SentimentReward
from support.common.errors import UserError
from support.models import demo_models
from support.models.pretrained import encode_prompt, load_policy, read_policy_folder
from tools import exits_on_user_error, review_models
from tools.review_models import batches, evaluate, main, read_reviews, write_vocab


def write_csv(path, reviews, encoding="utf-8"):
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([("cat", "label", "review"), *(("书籍", label, text) for text, label in reviews)])
    return path


SMALL = {
    "GPT2_SIZES": {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2},
    "CLASSIFIER_SIZES": demo_models.CLASSIFIER_SIZES | {"hidden_size": 32, "num_hidden_layers": 1},
    "EPOCHS": {"sentiment": 2, "gpt2": 2}, "LR": {"sentiment": 5e-3, "gpt2": 1e-2}, "BATCH": 16, "WARMUP": 10,
}  # fmt: skip


def test_the_tool_trains_models_that_the_program_can_open(tmp_path, monkeypatch, capsys):
    """Both models beat chance: 50%, and log(vocabulary) nats per token. A random thirtieth is held out."""
    draw = random.Random(3)
    reviews = dict(demo_models.write_review(draw) for _ in range(800))
    by_label = sorted(reviews.items(), key=lambda review: review[1])
    file, out, used = write_csv(tmp_path / "reviews.csv", by_label), tmp_path / "models", []
    for name, value in SMALL.items():
        monkeypatch.setattr(review_models, name, value)
    monkeypatch.setattr(review_models, "batches", lambda found, draw: used.append(found) or batches(found, draw))
    rates, descend = [], review_models.descend
    monkeypatch.setattr(
        review_models, "descend", lambda *args: rates.append(args[3].get_last_lr()[0]) or descend(*args)
    )
    main([str(file), str(out)])
    assert {path.name for path in out.iterdir()} == {"gpt2", "sentiment"}
    assert min(rates) > 0  # every step trains, including the first and the last
    *lines, command = capsys.readouterr().out.splitlines()
    assert command == f"python train_ppo.py --model_name {out / 'gpt2'} --reward_model_name {out / 'sentiment'}"
    found = [re.fullmatch(r"on 26 held-out reviews: (accuracy )?([\d.]+)(%| nats per token)", line) for line in lines]
    assert [line[3] for line in found] == ["%", "%", " nats per token", " nats per token"]

    config, tokenizer = read_policy_folder(out / "gpt2")
    load_policy(out / "gpt2", config)
    assert config.n_positions == 48 and len(encode_prompt(tokenizer, "刚收到货,感觉")) == 8
    assert float(found[3][2]) < math.log(config.vocab_size) / 2
    draw.seed(4)
    unseen = [review for review in (demo_models.write_review(draw) for _ in range(300)) if review[0] not in reviews]
    scores = SentimentReward(out / "sentiment", "cpu")([text for text, _ in unseen])
    assert sum((score > 0.5) == label for score, (_, label) in zip(scores, unseen)) > 0.75 * len(unseen)

    training, held_out = used[:2]
    assert used == [training, held_out] * 4  # two epochs of each of the two models
    tokenizer = demo_models.BertTokenizer(str(out / "gpt2" / "vocab.txt"))
    examples = [(tokenizer(text)["input_ids"][:48], label) for text, label in by_label]
    random.Random(1).shuffle(examples)
    assert held_out + training == examples and len(held_out) == len(reviews) // 30


@pytest.mark.parametrize("name", ["gpt2", "sentiment"])
def test_evaluation_weights_all_tokens_or_texts_equally_and_ignores_padding(name):
    torch.manual_seed(0)
    sizes = {"gpt2": {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}}
    sizes["sentiment"] = demo_models.CLASSIFIER_SIZES | {"hidden_size": 16, "num_hidden_layers": 1}
    new = {"gpt2": demo_models.new_gpt2, "sentiment": demo_models.new_classifier}[name]
    model = new(20, sizes[name] | {"initializer_range": 1.0}).eval()
    draw = random.Random(0)
    examples = [([draw.randrange(1, 20) for _ in range(2 + i % 14)], i % 2) for i in range(100)]
    lengths = [mask.sum(1) for _, mask, _ in batches(examples * 9, draw)]
    assert all(n.max() - n.min() <= 3 for n in lengths)  # texts of similar length share a batch
    assert (means := [n.double().mean() for n in lengths]) != sorted(means)  # not sorted by length
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids, _ in examples]
    if name == "gpt2":
        nats = [-row[:-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]] for row, (ids, _) in zip(logits, examples)]
        assert float(evaluate(model, examples, draw).split()[0]) == pytest.approx(
            torch.cat(nats).mean().item(), abs=0.0011
        )
    else:
        accuracy = sum(row.argmax() == label for row, (_, label) in zip(logits, examples)) / 100
        assert evaluate(model, examples, draw) == f"accuracy {accuracy:.1%}"


def test_duplicate_and_blank_reviews_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(review_models, "FEWEST", 3)
    rows = [("好,很\n好", 1), ("差", 0), ("  ", 1), ("差", 0), ("\ufeff一般", 0)]
    expected = [("好,很\n好", 1), ("差", 0), ("\ufeff一般", 0)]
    assert read_reviews(write_csv(tmp_path / "a.csv", rows)) == expected
    bom = write_csv(tmp_path / "b.csv", rows, "utf-8-sig")
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(bom, "folder/b.csv")
        archive.writestr("readme.txt", "x")
    assert read_reviews(tmp_path / "c.zip") == expected == read_reviews(bom)
    with zipfile.ZipFile(tmp_path / "c.zip", "a") as archive:
        archive.write(bom, "other.csv")
    with pytest.raises(UserError, match="contains 2 .csv files"):
        read_reviews(tmp_path / "c.zip")


def test_the_vocabulary_has_every_piece_of_every_text_in_a_fixed_order(tmp_path):
    write_vocab(tmp_path / "vocab.txt", ["Ab1好！", "好 b,差", "１c\ufeff"])
    pieces = ["##1", "##b", "##c", ",", "a", "b", "好", "差", "！", "１"]
    expected = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines() == expected


def test_an_unusable_file_gives_a_one_line_error_and_nothing_is_written(tmp_path, capsys):
    lines, file = "label,review\n" + "".join(f"{i % 2},第{i}条很好\n" for i in range(100)), tmp_path / "reviews.csv"
    for content, line in (
        (lines.removesuffix("1,第99条很好\n"), "has 99 different reviews; at least 100"),
        (lines.replace("\n0,", "\n1,"), "has 100 different reviews; at least 100 with both labels"),
        (lines + "5,好\n", "line 102: expected columns label .0 or 1."),
    ):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=f"{file}.*{line}"):
            main([str(file), str(tmp_path / "models")])
        with pytest.raises(SystemExit) as stop, exits_on_user_error("review_models"):
            main([str(file), str(tmp_path / "models")])
        assert stop.value.code == 2 and capsys.readouterr().err.startswith("review_models: error: ")
        assert not (tmp_path / "models").exists()
    file.write_text(lines, encoding="utf-8")
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="models already exists"):
        main([str(file), str(tmp_path / "models")])
