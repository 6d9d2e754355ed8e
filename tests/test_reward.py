"""The sentiment reward, and your own reward functions."""

import functools
import importlib
import json
import math
import os
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer

from reward import RewardError, SentimentReward, find_positive_label, import_function, score_texts
from support.common.errors import UserError
from support.compute.batches import to_ids
from support.models.demo_models import NEGATIVE, POSITIVE
from tests.helpers import VOCAB, change_json, write_classifier, write_gpt2, write_model


@functools.lru_cache(maxsize=1)
def plain_classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def probabilities(folder, text: str) -> list[float]:
    """Return the softmax of the classifier's logits for [CLS], one text's characters and [SEP], without padding."""
    ids = torch.tensor([[2, *(VOCAB.index(character) for character in text), 3]])
    with torch.no_grad():
        logits = plain_classifier(folder)(ids).logits[0].tolist()
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]


TEXTS = ["刚收到货,感觉很不错", "很差", "质量一般,物流不错。" * 2, "失望", "[CLS]很 差[SEP][PAD]", "书", "很差"]
CLEAN = [*TEXTS[:4], "很差", *TEXTS[5:]]  # special tokens and spaces are ignored


@pytest.mark.parametrize(
    ("labels", "named", "positive"),
    [((NEGATIVE, POSITIVE), None, 1), ((POSITIVE, NEGATIVE), NEGATIVE, 1), (("差评", "中评", "好评"), None, 2)],
)
def test_scores_are_probabilities_of_the_positive_label_in_the_order_of_the_texts(tmp_path, labels, named, positive):
    folder = write_classifier(tmp_path / "s", labels)
    # Because of this field, the pipeline would choose a sigmoid
    change_json(folder / "config.json", problem_type="multi_label_classification", function_to_apply="none")
    expected = [probabilities(folder, text)[positive] for text in CLEAN]
    scores = SentimentReward(folder, "cpu", batch_size=2, positive_label=named)(TEXTS)
    assert scores.dtype == torch.float32 and scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize(("limit", "kept"), [(None, 46), (20, 18)])
def test_long_texts_are_truncated_to_the_limit_of_the_model_or_tokenizer(tmp_path, limit, kept):
    """The model has 48 positions, two of them for [CLS] and [SEP]. A tokenizer without a limit has 1e30."""
    folder = write_classifier(tmp_path / "s")
    change_json(folder / "tokenizer_config.json", model_max_length=limit or int(1e30))
    text = ("很好差书" * 100)[: kept + 1]
    scores = SentimentReward(folder, "cpu")([text * 4, text[:kept], text[: kept - 1]])
    expected = [probabilities(folder, text[:kept])[1]] * 2 + [probabilities(folder, text[: kept - 1])[1]]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[2]) > 1e-3


def test_the_positive_label_is_recognised_by_its_beginning():
    for labels in ([NEGATIVE, POSITIVE], ["Negative", "Neutral", "Positive"], ["不好", "好"], ["消极", "正面"]):
        assert find_positive_label(labels, None) == find_positive_label(labels[::-1], None) == labels[-1]


UNCLEAR = [["LABEL_0", "LABEL_1"], ["negative", "not positive"]]
UNCLEAR += [["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"]]


@pytest.mark.parametrize(
    ("labels", "wanted"), [*((labels, None) for labels in UNCLEAR), (UNCLEAR[0], "label_0"), (["LABEL_0"], "happy")]
)
def test_an_ambiguous_positive_label_gives_an_error_that_lists_all_labels(labels, wanted):
    with pytest.raises(UserError) as error:
        find_positive_label(labels, wanted)
    assert all(repr(label) in str(error.value) for label in labels)


def test_folders_without_a_trained_classifier_are_rejected(tmp_path):
    folder = write_classifier(tmp_path / "s", ("a", "b"))
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({k: v for k, v in weights.items() if not k.startswith("classifier")}, folder / "pytorch_model.bin")
    for path, label in ((folder, "b"), (write_gpt2(tmp_path / "g"), "LABEL_1")):
        with pytest.raises(UserError, match=f"{path} isn't a trained model"):
            SentimentReward(path, "cpu", positive_label=label)


def test_the_classifier_is_moved_to_its_device_before_the_pipeline_gets_it(classifier_folder, monkeypatch):
    """If there is a process group, the pipeline leaves a model on the CPU."""
    seen = []
    monkeypatch.setattr("reward.pipeline", lambda *args, model, **options: seen.append((model.device, model.dtype)))
    SentimentReward(classifier_folder, torch.device("meta"), torch.bfloat16)
    assert seen == [(torch.device("meta"), torch.bfloat16)]


SIZES = dict(vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SIZES |= dict(max_position_embeddings=48, initializer_range=0.3, embedding_size=8)
DECODER = dict(n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None, initializer_range=0.5)


def write_other(folder, kind, tokenizer=None, tokenizer_json=False, **changes):
    """Write a random classifier of another family, with BERT's vocabulary. Returns the classifier and its folder."""
    torch.manual_seed(0)
    labels = dict(id2label={0: "NEGATIVE", 1: "POSITIVE"}, label2id={"NEGATIVE": 0, "POSITIVE": 1})
    config = AutoConfig.for_model(kind, **SIZES | ({} if "num_labels" in changes else labels) | changes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    write_model(folder, config.to_dict(), model.state_dict())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    if tokenizer_json:
        BertTokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.txt").unlink()
    return model, folder


def scores_one_by_one(model, texts) -> list[float]:
    ids = [[2, *(VOCAB.index(character) for character in text), 3] for text in texts]
    return [model(torch.tensor([row])).logits.softmax(-1)[0, 1].item() for row in ids]


@pytest.mark.parametrize("tokenizer_json", [False, True], ids=["vocab.txt", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["distilbert", "albert", "roberta", "xlm-roberta", "deberta-v2"])
def test_classifiers_of_other_families_can_score_texts(tmp_path, kind, tokenizer_json):
    """Published folders don't name a tokenizer class, because transformers would then read another vocabulary."""
    model, folder = write_other(tmp_path / "s", kind, tokenizer_json=tokenizer_json)
    expected = scores_one_by_one(model, ["刚收", "很好"])
    assert SentimentReward(folder, "cpu")(["刚收", "很好"]).tolist() == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-4


@pytest.mark.parametrize(("kind", "pad", "kept"), [("roberta", 1, 44), ("roberta", 0, 45), ("mpnet", 1, 44)])
def test_long_texts_are_truncated_to_the_positions_that_the_roberta_family_uses(tmp_path, kind, pad, kept):
    """There are 48 positions. The first token comes after the padding position, and two are for [CLS] and [SEP]."""
    model, folder = write_other(tmp_path / "s", kind, pad_token_id=pad)
    text = ("很好差书" * 20)[: kept + 1]
    expected = scores_one_by_one(model, [text[:kept]])
    assert SentimentReward(folder, "cpu")([text]).tolist() == pytest.approx(expected, abs=1e-6)


LEFT = {"padding_side": "left"}
DECODERS = [("gpt2", DECODER, {}), ("gpt2", DECODER, LEFT), ("gpt2", DECODER | {"pad_token_id": 3}, {})]
DECODERS += [("qwen2", {"num_key_value_heads": 1}, LEFT)]


@pytest.mark.parametrize(("kind", "changes", "tokenizer"), DECODERS, ids=["right", "left", "other padding", "qwen2"])
def test_a_decoder_scores_a_text_in_a_batch_like_a_single_text(tmp_path, kind, changes, tokenizer):
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    model, folder = write_other(tmp_path / "s", kind, tokenizer | names, **changes)
    texts = ["很好", "刚收到货,感觉很好", "差", "很差"]
    model.config.pad_token_id = None
    expected = scores_one_by_one(model, texts)
    assert SentimentReward(folder, "cpu")(texts).tolist() == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01


@pytest.mark.parametrize(("kind", "changes"), [("bert", {}), ("gpt2", DECODER)])
def test_a_reward_model_with_one_label_returns_its_raw_output(tmp_path, kind, changes):
    names = {"model_input_names": ["input_ids", "attention_mask"]}
    model, folder = write_other(tmp_path / "s", kind, names, num_labels=1, **changes)
    model.config.pad_token_id = None
    texts = ["很好", "刚收到货,感觉很好", "差"]
    ids = [[2, *(VOCAB.index(character) for character in text), 3] for text in texts]
    expected = [model(torch.tensor([row])).logits.item() for row in ids]
    scores = SentimentReward(folder, "cpu")(texts).tolist()
    assert scores == pytest.approx(expected, abs=1e-6) and not all(0 <= score <= 1 for score in scores)


def test_labels_that_are_numbers_are_compared_as_text(tmp_path):
    folder = write_classifier(tmp_path / "s")
    expected = SentimentReward(folder, "cpu")(["很好", "差"])
    for labels, wanted in (([0, 1], "1"), ([1, 2], "2"), ([None, True], "True"), ([-1.0, 1.0], "1.0")):
        change_json(folder / "config.json", id2label=dict(enumerate(labels)))
        assert torch.equal(SentimentReward(folder, "cpu", positive_label=wanted)(["很好", "差"]), expected)
    with pytest.raises(UserError, match="labels: '-1.0', '1.0'"):
        SentimentReward(folder, "cpu", positive_label="2")


NUMBERS = [
    (number for number in (0.5, True)),
    torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True),
    [torch.tensor([0.5]), np.array([[1.0]])],
    [Decimal("0.5"), Fraction(2, 2)],
    [np.float32(0.5), np.int64(1)],
    type("Series", (), {"tolist": lambda self: [0.5, 1.0]})(),  # like pandas
]
REFUSED = [
    ([0.5, math.nan], "nan, not a finite number, for '差评'"),
    ([0.5, "1"], "'1', not a finite number, for '差评'"),
    ([np.zeros((9, 9)), 0.5], "array([[0., 0."),
    ([0.5] * 3, "3 numbers for 2 texts; the first text was '好评'"),
    ({0: 0.5, 1: 1.0}, "a dict, not a list of numbers, for '好评'"),
    ({0.5, 1.0}, "a set, not a list of numbers, for '好评'"),
    (torch.tensor(0.5), "a Tensor, not a list of numbers, for '好评'"),
]


@pytest.mark.parametrize("result", NUMBERS)
def test_scores_can_be_numbers_in_any_common_form(result):
    scores = score_texts(lambda texts: result, ["a", "b"])
    assert torch.equal(scores, torch.tensor([0.5, 1.0])) and scores.dtype == torch.float32


@pytest.mark.parametrize(("result", "said"), REFUSED)
def test_invalid_scores_give_an_error_that_shows_the_text(result, said):
    with pytest.raises(RewardError) as error:
        score_texts(lambda texts: result, ["好评", "差评"])
    assert str(error.value).startswith(f"the reward function returned {said}") and "\n" not in str(error.value)
    assert len(str(error.value)) < 150 and error.value.traceback == ""


def test_an_exception_in_a_reward_is_reported_with_its_line_traceback_and_texts():
    calls = []

    def reward(texts):
        calls.append(texts)
        return [1 / (text != "差评") for text in texts]

    with pytest.raises(RewardError) as error:
        score_texts(reward, ["好评", "差评"])
    where = f"({__file__}, line {reward.__code__.co_firstlineno + 2})"
    assert str(error.value) == f"the reward function raised ZeroDivisionError: division by zero {where}"
    whole, texts = error.value.traceback.split("\nIt was called with these texts:\n")
    assert whole.startswith("Traceback") and json.loads(texts) == ["好评", "差评"]
    assert len(calls) == 1  # a call may take minutes, or cost money


@pytest.mark.parametrize("raised", [SystemExit(), ValueError("enough\nof it")], ids=repr)
def test_any_exception_in_a_reward_becomes_a_one_line_error(raised):
    def raises_while_it_is_read(texts):
        yield 0.5
        raise raised

    with pytest.raises(RewardError, match="^the reward function raised [^\n]+$"):
        score_texts(raises_while_it_is_read, ["好评"])


def test_out_of_memory_in_a_reward_does_not_blame_a_text():
    with pytest.raises(RewardError, match="^out of memory in the reward function [^好]*; lower [^好]*$"):
        score_texts(lambda texts: torch.empty(1 << 60), ["好评"])


def test_a_reward_may_modify_its_list_and_is_not_called_without_texts():
    texts = ["好评", "差评"]
    assert score_texts(lambda own: [own.pop() == "好评" for _ in range(2)], texts).tolist() == [0, 1]
    assert texts == ["好评", "差评"] and score_texts(lambda texts: 1 / 0, []).shape == (0,)


def test_importing_a_reward_does_not_change_gradient_mode_or_default_dtype(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    sets_modes = "import torch\ntorch.set_grad_enabled(False)\ntorch.set_default_dtype(torch.float64)\nscore = print\n"
    (tmp_path / "sets_modes.py").write_text(sets_modes)
    assert import_function("sets_modes:score") is print
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """A function that writes source files, all with the same timestamp. Their modules are unloaded afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    monkeypatch.setattr("support.common.imports.EXECUTED", {})
    monkeypatch.setattr("sys.dont_write_bytecode", False)

    def write(**sources):
        for name, text in sources.items():
            path = tmp_path / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            os.utime(path, (1, 1))  # Python only compares whole seconds and the file size

    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


SCORE, HELPED = "def score(texts):\n    return [{}]\n", "{}\ndef score(texts):\n    return [WORTH]\n"
IN_CALL = "def score(texts):\n    from own_words import WORTH\n    return [WORTH]\n"


@pytest.mark.parametrize(
    ("spec", "sources", "edited"),
    [
        ("own_reward:score", {"own_reward": SCORE.format(1)}, {"own_reward": SCORE.format(2)}),
        (
            "own_reward:score",
            {"own_reward": HELPED.format("from own_words import WORTH"), "own_words": "WORTH = 1"},
            {"own_words": "WORTH = 2"},
        ),
        ("own_reward:score", {"own_reward": IN_CALL, "own_words": "WORTH = 1"}, {"own_words": "WORTH = 2"}),
        (
            "own.reward:score",
            {"own__in__reward": HELPED.format("from .words import WORTH"), "own__in__words": "WORTH = 1"},
            {"own__in__words": "WORTH = 2"},
        ),
        (
            "own_reward:score",
            {"own_reward": HELPED.format("from own.words import WORTH"), "own__in__words": "WORTH = 1"},
            {"own__in__words": "WORTH = 2"},
        ),
    ],
)
def test_an_edited_reward_is_executed_again(rewards, spec, sources, edited):
    """The edited file is the reward or a module that it imports. This also works after an edit that fails."""
    rewards(**sources)
    assert import_function(spec)(["a"]) == [1]
    rewards(**edited)
    assert import_function(spec)(["a"]) == [2]
    (name, text), *_ = sources.items()
    rewards(**{name: f"{text}\nmistake\n"})
    with pytest.raises(UserError, match="NameError"):
        import_function(spec)
    rewards(**sources)
    assert import_function(spec)(["a"]) == [1]


def test_an_unchanged_reward_keeps_its_state(rewards):
    rewards(own_reward="import own_words\nWORTH = 1\ndef score(texts):\n    return [WORTH]\n", own_words="")
    function = import_function("own_reward:score")
    sys.modules["own_reward"].WORTH = 3
    assert import_function("own_reward:score") is function and function(["a"]) == [3]


def test_a_reward_that_was_edited_after_a_manual_import_is_executed_again(rewards):
    rewards(own_reward=SCORE.format(1))
    assert importlib.import_module("own_reward").score(["a"]) == [1]
    rewards(own_reward=SCORE.format(2))
    assert import_function("own_reward:score")(["a"]) == [2]


def test_booleans_are_not_token_ids():
    assert to_ids([True, False]) is None and to_ids(np.array([3, 5], dtype=np.uint8)).tolist() == [3, 5]


def test_an_error_message_is_one_line_without_control_characters():
    assert str(UserError("a\nb\r\tc\0 \x1b[31m \u202e 感觉é👍🏽")) == "a\\nb\\r\\tc\\x00 \\x1b[31m \\u202e 感觉é👍🏽"
