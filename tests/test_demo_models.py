"""The demo's models: what they write and like, where they are kept, and in which files."""

import errno
import json
import os
import random
import re
import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertTokenizer, GPT2LMHeadModel

from reward import SentimentReward
from support import demo_models
from support.errors import UserError
from support.hub import model_folder
from support.text_trainer import read_policy_folder

HAPPY = "不错 满意 漂亮 好用 舒服 喜欢 划算 精致 给力 贴心 合适 靠谱 "
HAPPY += "下次还会再来 推荐大家购买 值得拥有 全五分好评 家人都说好 会一直支持"
UNHAPPY = "失望 粗糙 难看 难用 一般 太差 后悔 糟糕 敷衍 廉价 不值 气人 "
UNHAPPY += "再也不会买了 要求退货 大家别上当 只能给差评 打算扔掉 客服也不理人"
ENDS_WELL, ENDS_BADLY = (re.compile(f"({'|'.join(words.split())})[。!]?$") for words in (HAPPY, UNHAPPY))


# --- the grammar


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, int]]:
    draw = random.Random(7)
    return [demo_models.write_review(draw) for _ in range(4000)]


def test_a_review_is_judged_by_how_it_ends(reviews):
    for text, label in reviews:
        assert (bool(ENDS_WELL.search(text)), bool(ENDS_BADLY.search(text))) == (label == 1, label == 0), text


def test_half_of_the_reviews_are_happy_and_a_fifth_mixed(reviews):
    """Standard errors of the shares: 0.008 and 0.006."""
    mixed = [text for text, _ in reviews if ",但是" in text]
    assert sum(label for _, label in reviews) / 4000 == pytest.approx(0.5, abs=0.04)
    assert len(mixed) / 4000 == pytest.approx(0.2, abs=0.03)
    clauses = [(text.split(",但是")[0], text) for text in mixed]
    assert all(bool(ENDS_WELL.search(first)) == bool(ENDS_BADLY.search(text)) for first, text in clauses)


def test_reviews_differ_in_every_part(reviews):
    texts = [text for text, _ in reviews]
    assert {re.match("[^,]*", text)[0] + "," for text in texts} == {
        opening if opening.endswith(",") else opening.split(",")[0] + "," for opening in demo_models.OPENINGS
    }
    assert {text[-1] for text in texts} > {"。", "!"} and len(set(texts)) > 3500
    assert all(any(word in text for text in texts) for word in (HAPPY + " " + UNHAPPY).split())
    assert max(map(len, texts)) <= 62  # with [CLS] and [SEP] the models' 64 positions


def test_the_same_draws_write_the_same_review():
    assert demo_models.write_review(random.Random(3)) == demo_models.write_review(random.Random(3))


# --- the cache


@pytest.fixture
def makes(tmp_path, monkeypatch):
    """An empty cache, and makers of empty folders in place of models; the folders that were made."""
    made = []

    def make(out):
        made.append(out)
        for name in ("gpt2", "sentiment"):
            (out / name).mkdir()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_models, "make_demo_models", make)
    return made


def test_models_are_made_once_and_said_to_be(makes, tmp_path, capsys):
    gpt2, sentiment = demo_models.demo_models()
    assert capsys.readouterr().out == f"making the demo models in {gpt2.parent} (once, under a minute)\n"
    assert demo_models.demo_models() == (gpt2, sentiment) and len(makes) == 1
    assert capsys.readouterr().out == ""
    assert (
        (gpt2.name, sentiment.name) == ("gpt2", "sentiment")
        and sentiment.is_dir()
        and gpt2.parent.parent == tmp_path / "cache" / "ppo-chinese-gpt2"
    )
    assert list(gpt2.parent.parent.iterdir()) == [gpt2.parent]


def test_models_are_made_anew_by_another_source_or_torch(makes, tmp_path, monkeypatch):
    first = demo_models.demo_models()
    source = tmp_path / "demo_models.py"
    shutil.copy(demo_models.__file__, source)
    monkeypatch.setattr(demo_models, "__file__", str(source))
    assert demo_models.demo_models() == first
    source.write_bytes(source.read_bytes().replace(b"STEPS, BATCH, LR = 8_000", b"STEPS, BATCH, LR = 9_000"))
    second = demo_models.demo_models()
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert len({first, second, demo_models.demo_models()}) == 3 == len(makes)


def test_without_a_cache_s_name_it_is_below_home(makes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(tmp_path / "home")))
    assert demo_models.demo_models()[0].parent.parent == tmp_path / "home" / ".cache" / "ppo-chinese-gpt2"


@pytest.mark.parametrize("cache", ["", "relative"])
def test_without_a_home_it_is_beside_temporary_files(makes, tmp_path, monkeypatch, cache):
    """And in no folder called ~ or so where the program was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    assert demo_models.demo_models()[0].parent.parent == tmp_path / "temporary" / "ppo-chinese-gpt2"
    assert os.listdir(tmp_path) == ["temporary"]


def test_another_process_may_be_faster(makes, monkeypatch):
    mine = demo_models.make_demo_models

    def slow(out):
        monkeypatch.setattr(demo_models, "make_demo_models", mine)
        demo_models.demo_models()[0].joinpath("theirs").touch()
        mine(out)

    monkeypatch.setattr(demo_models, "make_demo_models", slow)
    gpt2, _ = demo_models.demo_models()
    assert (gpt2 / "theirs").exists() and len(list(gpt2.parent.parent.iterdir())) == 1


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_is_half_made_is_removed(makes, tmp_path, monkeypatch, error):
    def fail(out):
        (out / "gpt2").mkdir()
        raise error

    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(demo_models, "make_demo_models", fail)
    with pytest.raises(error):
        demo_models.demo_models()
    assert list((tmp_path / "cache" / "ppo-chinese-gpt2").iterdir()) == os.listdir(tmp_path / "temporary") == []


def test_what_killed_starts_left_is_removed(makes, tmp_path):
    left = tmp_path / "cache" / "ppo-chinese-gpt2" / ".partial-abc" / "gpt2"
    left.mkdir(parents=True)
    (left / "vocab.txt").touch()
    gpt2, _ = demo_models.demo_models()
    assert list(gpt2.parent.parent.iterdir()) == [gpt2.parent]


@pytest.mark.parametrize("at", ["while it is made", "while it is put in its place"])
def test_a_full_disk_is_one_line(makes, tmp_path, monkeypatch, at):
    full = OSError(errno.ENOSPC, "No space left on device")
    target, name = (demo_models, "make_demo_models") if at == "while it is made" else (shutil, "copytree")
    monkeypatch.setattr(target, name, Mock(side_effect=full))
    cache = tmp_path / "cache" / "ppo-chinese-gpt2"
    with pytest.raises(UserError, match=f"^no room to write {cache}/demo-.*: it needs about 4 MiB, "):
        demo_models.demo_models()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_beside_temporary_files(makes, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert demo_models.demo_models()[0].parent.parent == tmp_path / "ppo-chinese-gpt2"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    said = f"neither {tmp_path / 'file'} nor {tmp_path / 'file'} can be written; set XDG_CACHE_HOME to another folder"
    with pytest.raises(UserError, match=f"^{said}$"):
        demo_models.demo_models()


def test_a_cache_on_a_disk_that_is_read_only_is_beside_temporary_files(makes, tmp_path, monkeypatch):
    cache = tmp_path / "cache" / "ppo-chinese-gpt2"
    cache.mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))

    def temporary_file(dir):
        if dir == cache:
            raise OSError(errno.EROFS, "Read-only file system")
        return (dir / "probe").open("w")

    monkeypatch.setattr("tempfile.TemporaryFile", temporary_file)
    assert demo_models.demo_models()[0].parent.parent == tmp_path / "temporary" / "ppo-chinese-gpt2"


# --- making


def test_fitting_teaches_labels_and_texts_but_no_padding(tmp_path):
    """A few steps from random weights on two reviews, the shorter of which is padded."""
    two = [("很不错", 1), ("很失望,要求退货", 0)] * 32
    size = len(demo_models.write_vocab(tmp_path / "vocab.txt", two))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    classifier = demo_models.new_classifier(size, tiny | {"max_position_embeddings": 64})
    gpt2 = demo_models.new_gpt2(size, {"n_embd": 16, "n_layer": 1, "n_head": 1, "n_positions": 64})
    for model in (classifier, gpt2):
        demo_models.fit(model, tokenizer, two, 60, random.Random(1), 1e-2)
        assert not model.training and all(weight.grad is None for weight in model.parameters())
    good, bad = (tokenizer(text, return_tensors="pt")["input_ids"] for text, _ in two[:2])
    with torch.no_grad():
        assert classifier(good).logits.argmax() == 1 and classifier(bad).logits.argmax() == 0
        assert gpt2(good, labels=good).loss < 1  # one that knows nothing: log 16, 2.8
        after_the_end = gpt2(good).logits[0, -1].softmax(-1)
    assert after_the_end[tokenizer.pad_token_id] < 0.1


def test_other_sizes_steps_and_a_larger_vocabulary(tmp_path, monkeypatch, capsys):
    """As a check on a GPU makes them; tokens that nothing uses fill the vocabulary up."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sizes = {"n_positions": 80, "n_embd": 32, "n_layer": 3, "n_head": 2}
    demo_models.make_demo_models(tmp_path, sizes, vocab_size=150, steps={"gpt2": 2, "sentiment": 1})
    bars = set(re.findall(r"(\w+): 100%\S* (\d+)/", capsys.readouterr().err))
    assert bars == {("GPT2LMHeadModel", "2"), ("BertForSequenceClassification", "1")}
    config, tokenizer = read_policy_folder(tmp_path / "gpt2")
    assert config.resid_pdrop == config.embd_pdrop == config.attn_pdrop == 0
    assert (config.n_positions, config.n_embd, config.n_layer, config.vocab_size) == (80, 32, 3, 150)
    vocab = (tmp_path / "gpt2" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert vocab[143:] == [vocab[143], *(f"[unused{i}]" for i in range(1, 7))] and len(vocab) == 150
    assert vocab[5:144] == sorted(set(vocab[5:144])) and tokenizer.model_max_length == 80
    classifier = json.loads((tmp_path / "sentiment" / "config.json").read_text(encoding="utf-8"))
    assert (classifier["max_position_embeddings"], classifier["hidden_size"]) == (64, 64)
    assert classifier["hidden_dropout_prob"] == classifier["attention_probs_dropout_prob"] == 0
    assert classifier["id2label"] == {"0": "negative (stars 1, 2 and 3)", "1": "positive (stars 4 and 5)"}


def test_making_is_the_same_every_time_and_leaves_the_draws_of_others(tmp_path):
    """On a CPU, whatever was drawn before."""
    states = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(ord(name))
        expected = torch.rand(3, generator=torch.Generator().manual_seed(ord(name)))
        demo_models.make_demo_models(tmp_path / name, steps={"gpt2": 1, "sentiment": 1})
        assert torch.equal(torch.rand(3), expected)
        states.append([torch.load(tmp_path / name / which / "pytorch_model.bin") for which in ("gpt2", "sentiment")])
    for first, second in zip(*states):
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())


# --- what the models have learned


def test_the_classifier_likes_happy_reviews_and_not_unhappy_ones(demo):
    """And mixed ones by how they end."""
    happy = ["刚收到货,感觉质量很不错,推荐大家购买。", "用了几天,客服太差,但是颜色非常漂亮。", "很满意"]
    unhappy = ["刚收到货,感觉质量很失望,要求退货。", "用了几天,颜色漂亮,但是客服非常太差。", "很难用"]
    scores = SentimentReward(demo[1], "cpu")([*happy, *unhappy])
    assert scores[:3].min() > 0.8 and scores[3:].max() < 0.2


def test_the_classifier_judges_reviews_that_it_has_not_seen(demo, reviews):
    scores = SentimentReward(demo[1], "cpu")([text for text, _ in reviews[:300]])
    right = [(score > 0.5) == label for score, (_, label) in zip(scores.tolist(), reviews)]
    assert sum(right) >= 290


def test_the_gpt2_has_learned_the_grammar(demo, reviews):
    """Nats a review, its end included; a model that knows nothing needs log 144 for each of some 20 characters."""
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    model = GPT2LMHeadModel.from_pretrained(demo[0]).eval()
    batch = tokenizer([text for text, _ in reviews[:200]], padding=True, return_tensors="pt")
    with torch.no_grad():
        logps = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.log_softmax(-1)
    targets = batch["input_ids"][:, 1:]
    nats = -logps[:, :-1].gather(-1, targets[..., None])[..., 0]
    nats = (nats * batch["attention_mask"][:, 1:]).sum(-1).mean().item()
    assert nats < 21
    ends = logps[torch.arange(200), batch["attention_mask"].sum(-1) - 2, tokenizer.sep_token_id].exp()
    assert ends.mean() > 0.5


# --- files


def test_the_files_are_laid_out_as_the_article_s(demo):
    gpt2, sentiment = demo
    for folder, architecture in ((gpt2, "GPT2LMHeadModel"), (sentiment, "BertForSequenceClassification")):
        names = {"config.json", "vocab.txt", "pytorch_model.bin", "tokenizer_config.json"}
        assert {path.name for path in folder.iterdir()} == names
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [architecture] and config["vocab_size"] == 144
        assert "dtype" not in config and config["tokenizer_class"] == "BertTokenizer"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.model_max_length == 64
        assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        assert len(tokenizer) == 144 and "[UNK]" not in tokenizer.tokenize("刚收到货,感觉不错。!")
    config = json.loads((gpt2 / "config.json").read_text(encoding="utf-8"))
    assert "bos_token_id" not in config and "eos_token_id" not in config
    sizes = {"n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 4}
    assert {name: config[name] for name in sizes} == sizes
    labels = AutoModelForSequenceClassification.from_pretrained(sentiment).config
    assert labels.id2label == {0: "negative (stars 1, 2 and 3)", 1: "positive (stars 4 and 5)"}
    assert labels.label2id == {"negative (stars 1, 2 and 3)": 0, "positive (stars 4 and 5)": 1}


def test_the_name_demo_is_the_gpt2_or_the_classifier(demo):
    assert (model_folder("demo", "--model_name"), model_folder("demo", "--reward_model_name")) == demo
    assert (demo[0].name, demo[1].name) == ("gpt2", "sentiment")
