"""The demo models: what they write and prefer, where they are stored, and their files."""

import contextlib
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from reward import SentimentReward
from support.models import demo_models
from tests.helpers import read_json

HAPPY = demo_models.GOOD + demo_models.GOOD_ENDINGS
UNHAPPY = demo_models.BAD + demo_models.BAD_ENDINGS
ENDS_WELL, ENDS_BADLY = (re.compile(f"({'|'.join(words)})[。!]?$") for words in (HAPPY, UNHAPPY))


@pytest.fixture(scope="module")
def reviews() -> list[tuple[str, int]]:
    draw = random.Random(7)
    return [demo_models.write_review(draw) for _ in range(4000)]


def test_reviews_end_as_labelled_half_are_positive_and_a_fifth_are_mixed(reviews):
    """The shares have standard errors of 0.008 and 0.006. Five standard errors are allowed."""
    for text, label in reviews:
        assert (bool(ENDS_WELL.search(text)), bool(ENDS_BADLY.search(text))) == (label == 1, label == 0), text
    mixed = [text for text, _ in reviews if ",但是" in text]
    assert sum(label for _, label in reviews) / 4000 == pytest.approx(0.5, abs=0.04)
    assert len(mixed) / 4000 == pytest.approx(0.2, abs=0.03)
    assert all(bool(ENDS_WELL.search(text.split(",但是")[0])) == bool(ENDS_BADLY.search(text)) for text in mixed)
    assert all(any(word in text for text, _ in reviews) for word in HAPPY + UNHAPPY)
    assert max(len(text) for text, _ in reviews) <= 62  # [CLS] and [SEP] fill the models' 64 positions


class LockOfAnother(contextlib.nullcontext):
    """A lock that was held by another process, which has made the models in the meantime."""

    def __enter__(self):
        Path(self.enter_result).with_suffix("").mkdir()


def test_the_models_are_made_once_per_source_and_torch_version(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_models, "make_demo_models", made.append)
    gpt2, sentiment = demo_models.demo_models()
    assert str(gpt2.parent) in capsys.readouterr().out and (gpt2.name, sentiment.name) == ("gpt2", "sentiment")
    assert gpt2.parent.is_dir() and gpt2.is_relative_to(tmp_path / "cache" / "ppo-chinese-gpt2")
    assert demo_models.demo_models() == (gpt2, sentiment) and len(made) == 1 and capsys.readouterr().out == ""
    source = tmp_path / "demo_models.py"
    shutil.copy(demo_models.__file__, source)
    monkeypatch.setattr(demo_models, "__file__", str(source))
    assert demo_models.demo_models()[0] == gpt2
    source.write_bytes(source.read_bytes() + b"#")
    other = demo_models.demo_models()[0]
    monkeypatch.setattr(torch, "__version__", "99.0")
    assert len({gpt2, other, demo_models.demo_models()[0]}) == 3 == len(made)
    shutil.rmtree(gpt2.parent.parent)
    monkeypatch.setattr(demo_models, "FileLock", LockOfAnother)
    assert demo_models.demo_models()[0].parent.is_dir() and len(made) == 3


def test_making_the_models_is_deterministic_and_does_not_change_the_random_state(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_models, "STEPS", {"gpt2": 1, "sentiment": 1})
    states = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.manual_seed(ord(name))
        expected = torch.rand(3, generator=torch.Generator().manual_seed(ord(name)))
        demo_models.make_demo_models(tmp_path / name)
        assert torch.equal(torch.rand(3), expected)
        states.append([torch.load(tmp_path / name / which / "pytorch_model.bin") for which in ("gpt2", "sentiment")])
    for first, second in zip(*states):
        assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_classifier_scores_reviews_by_their_ending(demo, reviews):
    judge = SentimentReward(demo[1], "cpu")
    scores = judge(["用了几天,客服太差,但是颜色非常漂亮。", "很满意", "用了几天,颜色漂亮,但是客服非常太差。", "很难用"])
    assert scores[:2].min() > 0.5 > scores[2:].max()
    right = [(score > 0.5) == label for score, (_, label) in zip(judge([t for t, _ in reviews[:300]]), reviews)]
    assert sum(right) >= 270


def test_the_gpt2_has_learned_the_grammar(demo, reviews):
    """A review costs under 25 nats with its [SEP]. An untrained model needs log 144 = 5 for each of about 20 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(demo[0])
    model = GPT2LMHeadModel.from_pretrained(demo[0]).eval()
    batch = tokenizer([text for text, _ in reviews[:200]], padding=True, return_tensors="pt")
    with torch.no_grad():
        logps = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits.log_softmax(-1)
    nats = -logps[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["attention_mask"][:, 1:]
    assert nats.sum(-1).mean() < 25
    ends = logps[torch.arange(200), batch["attention_mask"].sum(-1) - 2, tokenizer.sep_token_id].exp()
    assert ends.mean() > 0.5


def test_the_folders_have_the_layout_of_the_articles_models(demo):
    for folder, architecture in zip(demo, ("GPT2LMHeadModel", "BertForSequenceClassification")):
        assert set(os.listdir(folder)) == {"config.json", "vocab.txt", "pytorch_model.bin", "tokenizer_config.json"}
        assert read_json(folder / "config.json")["architectures"] == [architecture]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert len(tokenizer) == 144 and "[UNK]" not in tokenizer.tokenize("刚收到货,感觉不错。!")
        assert tokenizer.model_max_length == 64 and tokenizer.tokenize("A") == tokenizer.tokenize("a")
