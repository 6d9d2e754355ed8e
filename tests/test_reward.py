"""The sentiment reward and rewards of one's own."""

import math
import subprocess
import sys

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from config import UserError
from reward import RewardError, SentimentReward, find_positive_label, score_texts
from support.demo_models import NEGATIVE, POSITIVE
from support.models import clean_text
from tests.conftest import ROOT, VOCAB, write_classifier, write_gpt2, write_model


@pytest.mark.parametrize(
    ("decoded", "text"),
    [
        ("很 不 错 , 好 评 [SEP] [PAD] [PAD]", "很不错,好评"),
        ("[CLS] 刚 收 到", "刚收到"),
        ("good phone 很 好 用 5 星", "good phone很好用5星"),
        ("质 量 iphone 6 plus", "质量iphone 6 plus"),
        ("##韩 国", "韩国"),
        ("", ""),
    ],
)
def test_clean_text(decoded, text):
    assert clean_text(decoded) == text
    assert clean_text(text) == text


@pytest.mark.parametrize("labels", [(NEGATIVE, POSITIVE), (POSITIVE, NEGATIVE), ("差评", "中评", "好评")])
def test_scores_are_the_positive_labels_probability(tmp_path, labels):
    """Against the model itself, one text at a time without pipeline, batching or padding."""
    folder = write_classifier(tmp_path / "s", labels)
    texts = ["刚收到货,感觉很不错", "很差", "质量一般,物流不错。" * 2, "失望", "书"]
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    positive = labels.index("好评" if "好评" in labels else POSITIVE)
    with torch.no_grad():
        expected = [
            model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0, positive].item() for text in texts
        ]
    scores = SentimentReward(folder, "cpu", batch_size=2)(texts)
    assert scores.dtype == torch.float32 and scores.shape == (5,)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_long_texts_are_cut_at_the_models_limit(classifier_folder):
    reward = SentimentReward(classifier_folder, "cpu")
    scores = reward(["很好" * 200, "很好" * 23])
    assert scores[0].item() == pytest.approx(scores[1].item(), abs=1e-6)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1"], ["positive", "pos again"]])
def test_ambiguous_labels_are_listed(labels):
    with pytest.raises(UserError, match="--positive_label") as error:
        find_positive_label(labels, None)
    assert all(label in str(error.value) for label in labels)


def test_the_happy_label_can_be_named():
    assert find_positive_label(["LABEL_0", "LABEL_1"], "LABEL_1") == "LABEL_1"
    with pytest.raises(UserError, match="'LABEL_0', 'LABEL_1'"):
        find_positive_label(["LABEL_0", "LABEL_1"], "happy")


def test_a_classifier_without_head_is_refused(tmp_path):
    folder = write_classifier(tmp_path / "s")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({k: v for k, v in weights.items() if not k.startswith("classifier")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="classifier"):
        SentimentReward(folder, "cpu")


def test_a_gpt2_is_no_classifier(tmp_path):
    with pytest.raises(UserError):
        SentimentReward(write_gpt2(tmp_path / "g"), "cpu", positive_label="LABEL_1")


# --- any callable


@pytest.mark.parametrize("kind", [list, torch.tensor, tuple, lambda x: torch.tensor(x).double().numpy()])
def test_any_list_of_numbers_will_do(kind):
    scores = score_texts(lambda texts: kind([0.5, 1.0]), ["a", "b"])
    assert torch.equal(scores, torch.tensor([0.5, 1.0])) and scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([0.5, math.nan], "nan.*'差评'"),
        ([0.5, math.inf], "inf.*'差评'"),
        ([0.5, "good"], "'good'.*'差评'"),
        ([0.5, None], "None.*'差评'"),
        ([True, 0.5], "True.*'好评'"),
        ([0.5], "1 numbers for 2 texts.*'好评'"),
        (0.5, "float.*'好评'"),
        (None, "NoneType.*'好评'"),
        (torch.zeros(2, 2), r"\[0.0, 0.0\].*'好评'"),
    ],
)
def test_rubbish_is_refused_and_the_text_shown(result, said):
    with pytest.raises(RewardError, match=said):
        score_texts(lambda texts: result, ["好评", "差评"])


def test_a_raising_function_is_named_with_file_line_and_text():
    def reward(texts):
        return [1 / (text != "差评") for text in texts]

    with pytest.raises(RewardError, match=r"ZeroDivisionError.*test_reward.py, line \d+.*'差评'") as error:
        score_texts(reward, ["好评", "差评"])
    assert "Traceback" in error.value.traceback and "\n" not in str(error.value)


def test_a_regression_is_no_classifier():
    for wanted in (None, "LABEL_0"):
        with pytest.raises(UserError, match="one label, 'LABEL_0': a regression"):
            find_positive_label(["LABEL_0"], wanted)


def test_the_classifier_is_on_its_device_before_the_pipeline_has_it(classifier_folder, monkeypatch):
    """With a process group the pipeline leaves a model where it is; one left on the CPU would be slow in silence."""
    seen = []
    monkeypatch.setattr("reward.pipeline", lambda *args, model, **options: seen.append((model.device, model.dtype)))
    SentimentReward(classifier_folder, torch.device("meta"), torch.bfloat16)
    assert seen == [(torch.device("meta"), torch.bfloat16)]


def test_files_beside_a_reward_of_ones_own_do_not_hide_the_programs(tmp_path):
    for name in ("reward", "ppo", "plot_rewards"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')\n", encoding="utf-8")
    (tmp_path / "my_reward.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n", encoding="utf-8")
    script = (
        f"import sys; sys.path[0] = {str(ROOT)!r}\n"
        "from config import import_function; import_function('my_reward:score'); import reward, ppo, plot_rewards"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_classifier_of_another_family_has_its_own_tokenizer(tmp_path):
    """DistilBERT takes no token types, and its published folders do not name a tokenizer's class."""
    torch.manual_seed(0)
    sizes = dict(dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_position_embeddings=48, vocab_size=len(VOCAB))
    config = DistilBertConfig(**sizes, id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    model = DistilBertForSequenceClassification(config).eval()
    folder = write_model(tmp_path / "distilbert", config.to_dict(), model.state_dict())
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 48}')
    ids = torch.tensor([[2, 5, 6, 3]])
    expected = model(ids).logits.softmax(-1)[0, 1].item()
    assert SentimentReward(folder, "cpu")(["刚收"])[0].item() == pytest.approx(expected, abs=1e-6)
