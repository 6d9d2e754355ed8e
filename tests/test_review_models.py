"""tools/review_models.py: which reviews it reads, and that both models learn from them what the program needs."""

import csv
import os
import random
import re
import zipfile

import pytest
import torch

from reward import SentimentReward
from support import demo_models
from support.errors import UserError
from support.models import load_gpt2_config, load_policy, load_tokenizer
from tools import review_models
from tools.review_models import batches, judge, main, read_reviews, write_vocab

PROMPT = "刚收到货,感觉"


def write_csv(path, reviews, encoding="utf-8"):
    """A file like the published one."""
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([("cat", "label", "review"), *(("书籍", label, text) for text, label in reviews)])
    return path


@pytest.fixture
def small(monkeypatch):
    """Models that take a second."""
    monkeypatch.setattr(review_models, "GPT2_SIZES", {"n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2})
    monkeypatch.setattr(
        review_models, "CLASSIFIER_SIZES", demo_models.CLASSIFIER_SIZES | {"hidden_size": 32, "num_hidden_layers": 1}
    )
    monkeypatch.setattr(review_models, "BATCH", 16)
    monkeypatch.setattr(review_models, "WARMUP", 10)
    monkeypatch.setattr(review_models, "EPOCHS", {"sentiment": 2, "gpt2": 2})
    monkeypatch.setattr(review_models, "LR", {"sentiment": 5e-3, "gpt2": 1e-2})


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, int]]:
    draw = random.Random(3)
    return list(dict(demo_models.write_review(draw) for _ in range(800)).items())


def test_a_file_of_reviews_becomes_models_that_the_program_opens(small, reviews, tmp_path, capsys):
    file, out = write_csv(tmp_path / "reviews.csv", reviews), tmp_path / "models"
    main([str(file), str(out)])
    assert {path.name for path in tmp_path.iterdir()} == {"reviews.csv", "models"}
    assert {path.name for path in out.iterdir()} == {"gpt2", "sentiment"}
    *told, command = capsys.readouterr().out.splitlines()
    assert command == f"python train_ppo.py --model_name {out / 'gpt2'} --reward_model_name {out / 'sentiment'}"
    told = [
        re.fullmatch(r"26 reviews that it has not seen: ([\d.]+)(% told right| nats a token)", line) for line in told
    ]
    assert [line[2] for line in told] == ["% told right"] * 2 + [" nats a token"] * 2
    assert float(told[1][1]) > 95 and float(told[3][1]) < 1.6
    policy = load_policy(out / "gpt2", load_gpt2_config(out / "gpt2"))
    tokenizer = load_tokenizer(out / "gpt2")
    assert policy.config.n_positions == 48 and len(tokenizer) == policy.config.vocab_size
    assert tokenizer.unk_token_id not in tokenizer.encode(PROMPT)
    happy, unhappy = SentimentReward(out / "sentiment", "cpu")(
        [f"{PROMPT}很不错,值得拥有", f"{PROMPT}很失望,再也不会买了"]
    )
    assert happy > 0.8 and unhappy < 0.2


def test_the_same_reviews_give_the_same_files(small, reviews, tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        review_models.make_review_models(tmp_path / name, reviews[:200])
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*")]
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name", ["gpt2", "sentiment"])
def test_held_back_reviews_are_judged_as_each_would_be_alone(name):
    """Without the padding of a batch, and each token or each text as much as any other."""
    torch.manual_seed(0)
    sizes = {"gpt2": {"n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 1}}
    sizes["sentiment"] = demo_models.CLASSIFIER_SIZES | {"hidden_size": 16, "num_hidden_layers": 1}
    new = {"gpt2": demo_models.new_gpt2, "sentiment": demo_models.new_classifier}[name]
    model = new(20, sizes[name] | {"initializer_range": 1.0}).eval()
    draw = random.Random(0)
    examples = [([draw.randrange(1, 20) for _ in range(2 + i % 14)], i % 2) for i in range(100)]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids, _ in examples]
    if name == "gpt2":
        predicted = [row[:-1].log_softmax(-1) for row in logits]
        found = torch.cat([-row[range(len(row)), ids[1:]] for row, (ids, _) in zip(predicted, examples)])
        expected = f"{found.mean():.3f} nats a token"
    else:
        expected = f"{sum(row.argmax() == label for row, (_, label) in zip(logits, examples)) / 100:.1%} told right"
    assert judge(model, examples, draw) == expected


def test_batches_hold_every_review_once_beside_others_of_its_length():
    draw = random.Random(0)
    examples = [([i + 1] * (1 + i % 7), i) for i in range(200)]
    found = list(batches(examples, draw))
    assert sorted(len(ids) for ids, *_ in found) == [8, 64, 64, 64]
    rows = [(row[mask == 1].tolist(), label.item()) for batch in found for row, mask, label in zip(*batch)]
    assert sorted(rows, key=lambda row: row[1]) == examples
    assert all(mask.sum(1).max() - mask.sum(1).min() <= 3 and mask.any(0).all() for _, mask, _ in found)
    again = list(batches(examples, draw))
    assert [row[0].tolist() for *row, _ in found] != [row[0].tolist() for *row, _ in again]


def test_an_interrupt_leaves_nothing(small, reviews, tmp_path, monkeypatch):
    file = write_csv(tmp_path / "reviews.csv", reviews[:200])
    monkeypatch.setattr(review_models, "write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        main([str(file), str(tmp_path / "models")])
    assert list(tmp_path.iterdir()) == [file]


# --- the reviews


def test_texts_are_read_once_each_and_blank_ones_not(tmp_path, monkeypatch):
    monkeypatch.setattr(review_models, "FEWEST", 3)
    rows = [("好,很\n好", 1), ("差", 0), ("  ", 1), ("差", 0), ("\ufeff一般", 0)]
    expected = [("好,很\n好", 1), ("差", 0), ("\ufeff一般", 0)]
    assert read_reviews(write_csv(tmp_path / "a.csv", rows)) == expected
    bom = write_csv(tmp_path / "b.csv", rows, "utf-8-sig")
    assert read_reviews(bom) == expected
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(bom, "folder/b.csv")
        archive.writestr("readme.txt", "x")
    assert read_reviews(tmp_path / "c.zip") == expected


def test_a_vocabulary_has_every_piece_of_every_text_in_one_order(tmp_path):
    write_vocab(tmp_path / "vocab.txt", ["Ab1好！", "好 b,差", "１c\ufeff"])
    pieces = ["##1", "##b", "##c", ",", "a", "b", "好", "差", "！", "１"]
    expected = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8").splitlines() == expected


ROWS = [(f"第{i}条很好", i % 2) for i in range(100)]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "cannot be read: No such file"),
        (ROWS[:99], "has 99 different reviews; 100 are needed"),
        ([(text, 1) for text, _ in ROWS], "has 100 different reviews; 100 are needed, happy and unhappy ones"),
        ([*ROWS, ("好", 5)], "is damaged in line 102: a review, and 0 or 1"),
        (b"label,text\n1,x\n", "has no column review; its first line must name the columns label and review"),
        (b"", "has no column label"),
        (b"label,review\n1\n", "is damaged in line 2: a review, and 0 or 1"),
        ("label,review\n1,很好\n".encode("gbk"), "is damaged in line 2: it is no UTF-8 text; save it as UTF-8"),
        (b"label,review\n1," + b"x" * 200_000 + b"\n", "is damaged in line 2: field larger"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(rows, said, tmp_path):
    file = tmp_path / "reviews.csv"
    if isinstance(rows, bytes):
        file.write_bytes(rows)
    elif rows is not None:
        write_csv(file, rows)
    with pytest.raises(UserError) as refused:
        main([str(file), str(tmp_path / "models")])
    assert said in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"readme.txt": b"x"}, "holds 0 .csv files; unpack it, and name one"),
        ({"a.csv": b"x", "b.csv": b"x"}, "holds 2 .csv files"),
        ({"a.csv": "label,review\n1,很好\n".encode("gbk")}, "a.csv is damaged in line 2: it is no UTF-8 text"),
    ],
)
def test_a_zip_holds_one_file_of_reviews(files, said, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=re.escape(said)):
        read_reviews(tmp_path / "a.zip")


def test_a_damaged_zip_is_downloaded_again(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.csv", "label,review\n" * 100)
    content = bytearray((tmp_path / "a.zip").read_bytes())
    content[40:44] = b"\xff" * 4
    (tmp_path / "a.zip").write_bytes(content)
    with pytest.raises(UserError, match="cannot be unpacked: .*; download it again"):
        read_reviews(tmp_path / "a.zip")


def test_a_device_and_a_name_that_is_too_long_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no file, but a device or a pipe"):
        read_reviews(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot be used: File name too long"):
        main([str(write_csv(tmp_path / "a.csv", ROWS)), str(tmp_path / ("x" * 300))])


def test_a_folder_that_is_there_stays_as_it_is(tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(UserError, match="models is there already; name another folder, or remove it"):
        main([str(write_csv(tmp_path / "a.csv", ROWS)), str(tmp_path / "models")])
    assert list((tmp_path / "models").iterdir()) == []
