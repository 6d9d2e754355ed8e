"""The sentiment reward and rewards of one's own."""

import contextlib
import functools
import json
import math
import os
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

from reward import RewardError, SentimentReward, find_positive_label, read_classifier_config, score_texts
from support import user_code
from support.demo_models import NEGATIVE, POSITIVE
from support.errors import UserError
from tests.helpers import VOCAB, write_classifier, write_gpt2, write_model


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@functools.lru_cache(maxsize=1)
def plain_classifier(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


def probabilities(folder, text: str) -> list[float]:
    """softmax of the classifier's logits for [CLS], the text's characters and [SEP], of one text without padding."""
    ids = torch.tensor([[2, *(VOCAB.index(character) for character in text), 3]])
    with torch.no_grad():
        logits = plain_classifier(folder)(ids).logits[0].tolist()
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]


TEXTS = ["刚收到货,感觉很不错", "很差", "质量一般,物流不错。" * 2, "失望", "书", "很差"]


@pytest.mark.parametrize(
    ("labels", "positive"),
    [((NEGATIVE, POSITIVE), 1), ((POSITIVE, NEGATIVE), 0), (("差评", "中评", "好评"), 2), (("不好", "好"), 1)],
)
@pytest.mark.parametrize("batch_size", [1, 2, 128])
def test_scores_are_the_positive_labels_probability(tmp_path, labels, positive, batch_size):
    """In the order of the texts, though these go through the classifier sorted by length."""
    folder = write_classifier(tmp_path / "s", labels)
    expected = [probabilities(folder, text)[positive] for text in TEXTS]
    scores = SentimentReward(folder, "cpu", batch_size=batch_size)(TEXTS)
    assert scores.dtype == torch.float32 and scores.shape == (6,)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.parametrize("problem", ["multi_label_classification", "single_label_classification", None])
def test_scores_are_shares_of_one_whatever_the_classifier_s_config_says(tmp_path, problem):
    """The pipeline's own choice for several labels at once would be a sigmoid."""
    folder = write_classifier(tmp_path / "s", ("差评", "中评", "好评"))
    edit(folder / "config.json", problem_type=problem, function_to_apply="none")
    reward = SentimentReward(folder, "cpu")
    assert reward(["很不错"]).item() == pytest.approx(probabilities(folder, "很不错")[2], abs=1e-6)


@pytest.mark.parametrize(("limit", "kept"), [(48, 46), (None, 46), (512, 46), (20, 18)])
def test_long_texts_are_cut_where_the_model_or_the_tokenizer_ends(tmp_path, limit, kept):
    """The model has 48 positions, two of them for [CLS] and [SEP]; a tokenizer may name no limit."""
    folder = write_classifier(tmp_path / "s")
    values = json.loads((folder / "tokenizer_config.json").read_text())
    del values["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(values | ({"model_max_length": limit} if limit else {})))
    text = ("很好差书" * 100)[: kept + 1]
    scores = SentimentReward(folder, "cpu")([text * 4, text, text[:kept], text[: kept - 1]])
    expected = [probabilities(folder, text[:kept])[1]] * 3 + [probabilities(folder, text[: kept - 1])[1]]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[3]) > 1e-3


def test_texts_of_like_lengths_go_through_the_classifier_together(classifier_folder):
    reward = SentimentReward(classifier_folder, "cpu", batch_size=2)
    shapes = []
    embed = reward.pipeline.model.get_input_embeddings()
    embed.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    reward(["很" * 9, "很", "很" * 10, "很很", "很" * 20])
    assert shapes == [(2, 4), (2, 12), (1, 22)]


def test_special_tokens_in_a_text_do_not_count(classifier_folder):
    reward = SentimentReward(classifier_folder, "cpu")
    clean, marked = reward(["很不错"]), reward(["[CLS]很 不 错[SEP][PAD]"])
    assert clean.tolist() == marked.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_arithmetic_has_the_dtype_of_the_run_and_the_scores_float32(classifier_folder, dtype):
    reward = SentimentReward(classifier_folder, "cpu", dtype)
    assert {weight.dtype for weight in reward.pipeline.model.parameters()} == {dtype}
    scores = reward(TEXTS)
    expected = [probabilities(classifier_folder, text)[1] for text in TEXTS]
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_files_score_in_the_dtype_of_the_run(tmp_path, stored):
    folder = write_classifier(tmp_path / "s")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({name: weight.to(stored) for name, weight in weights.items()}, folder / "pytorch_model.bin")
    edit(folder / "config.json", dtype=str(stored).removeprefix("torch."))
    reward = SentimentReward(folder, "cpu")
    assert {weight.dtype for weight in reward.pipeline.model.parameters()} == {torch.float32}


# --- the happy label


@pytest.mark.parametrize(
    "labels",
    [
        (NEGATIVE, POSITIVE),
        ("negative", "positive"),
        ("NEGATIVE", "POSITIVE"),
        ("NEG", "POS"),
        ("Negative", "Neutral", "Positive"),
        ("不好", "好"),
        ("负面", "正面"),
        ("负向", "中性", "正向"),
        ("差评", "好评"),
        ("差评", "中评", "好评"),
        ("消极", "积极"),
        ("negative", " positive "),
    ],
)
def test_the_happy_label_is_found_by_its_beginning(labels):
    for order in (labels, labels[::-1]):
        assert find_positive_label(list(order), None) == labels[-1]


@pytest.mark.parametrize(
    "labels",
    [
        ["LABEL_0", "LABEL_1"],
        ["positive", "pos again"],
        ["Very Negative", "Negative", "Neutral", "Positive", "Very Positive"],
        ["很差", "差", "好", "很好"],
        ["1 star", "5 stars"],
        ["negative", "not positive"],
        ["悲伤", "愤怒"],
        [True, None],
    ],
)
def test_ambiguous_labels_are_listed(labels):
    with pytest.raises(UserError) as error:
        find_positive_label(labels, None)
    said = "which label of the reward model is the happy one? Its labels are "
    assert str(error.value) == f"{said}{', '.join(map(repr, labels))}; set --positive_label"


def test_the_happy_label_can_be_named():
    assert find_positive_label(["LABEL_0", "LABEL_1"], "LABEL_0") == "LABEL_0"
    assert find_positive_label([NEGATIVE, POSITIVE], NEGATIVE) == NEGATIVE
    for wanted in ("happy", "label_0", ""):
        said = f"--positive_label '{wanted}' is none of the classifier's labels: 'LABEL_0', 'LABEL_1'"
        with pytest.raises(UserError, match=said):
            find_positive_label(["LABEL_0", "LABEL_1"], wanted)


def test_a_named_label_is_the_one_that_scores(classifier_folder):
    reward = SentimentReward(classifier_folder, "cpu", positive_label=NEGATIVE)
    assert reward.positive_label == NEGATIVE
    assert reward(["很不错"]).item() == pytest.approx(probabilities(classifier_folder, "很不错")[0], abs=1e-6)


def test_a_regression_is_no_classifier():
    for wanted in (None, "LABEL_0"):
        with pytest.raises(UserError, match="one label, 'LABEL_0': a regression"):
            find_positive_label(["LABEL_0"], wanted)


def test_labels_are_looked_at_before_there_are_weights(tmp_path):
    folder = write_classifier(tmp_path / "s", ("a", "b"))
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="which label"):
        SentimentReward(folder, "cpu")
    assert read_classifier_config(folder, "b")[1] == "b"
    with pytest.raises(UserError, match="no weights"):
        SentimentReward(folder, "cpu", positive_label="b")


# --- other folders


def test_a_classifier_without_head_is_refused(tmp_path):
    folder = write_classifier(tmp_path / "s")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({k: v for k, v in weights.items() if not k.startswith("classifier")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"the weights in {folder} lack classifier.bias: no classifier"):
        SentimentReward(folder, "cpu")


def test_a_gpt2_is_no_classifier(tmp_path):
    with pytest.raises(UserError, match="no classifier with a trained head"):
        SentimentReward(write_gpt2(tmp_path / "g"), "cpu", positive_label="LABEL_1")


def test_the_classifier_is_on_its_device_before_the_pipeline_has_it(classifier_folder, monkeypatch):
    """With a process group the pipeline leaves a model where it is; one left on the CPU would be slow in silence."""
    seen = []
    monkeypatch.setattr("reward.pipeline", lambda *args, model, **options: seen.append((model.device, model.dtype)))
    SentimentReward(classifier_folder, torch.device("meta"), torch.bfloat16)
    assert seen == [(torch.device("meta"), torch.bfloat16)]


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
    assert AutoTokenizer.from_pretrained(folder).encode("刚收") == ids[0].tolist()


# --- any callable


@pytest.mark.parametrize(
    "result",
    [
        [0.5, 1.0],
        (0.5, 1),
        (number for number in (0.5, 1.0)),
        torch.tensor([0.5, 1.0]),
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16, requires_grad=True),
        np.array([0.5, 1.0]),
        np.array([0.5, 1.0], dtype=np.float16),
        [np.float32(0.5), np.int64(1)],
        [torch.tensor(0.5), torch.tensor(1)],
        [torch.tensor([0.5]), np.array([[1.0]])],
        [Decimal("0.5"), Fraction(2, 2)],
        [0.5, True],
        [np.float64(0.5), np.bool_(True)],
        torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True) * 1,
        np.array([0.5, Decimal(1)], dtype=object),
    ],
    ids=str,
)
def test_any_list_of_numbers_will_do(result):
    scores = score_texts(lambda texts: result, ["a", "b"])
    assert torch.equal(scores, torch.tensor([0.5, 1.0])) and scores.dtype == torch.float32


def test_whole_and_large_numbers_will_do():
    assert score_texts(lambda texts: np.array([-3, 0]), ["a", "b"]).tolist() == [-3, 0]
    assert score_texts(lambda texts: [3e38, -(10**38)], ["a", "b"]).tolist() == pytest.approx([3e38, -1e38])
    with pytest.raises(RewardError, match="returned inf, no finite number, for 'b'"):
        score_texts(lambda texts: [3e38, 10**5000], ["a", "b"])  # of more digits than Python writes


@pytest.mark.parametrize(
    ("result", "said"),
    [
        ([0.5, math.nan], "nan, no finite number, for '差评'"),
        ([0.5, -math.inf], "-inf, no finite number, for '差评'"),
        ([0.5, 1e39], "1e+39, no finite number, for '差评'"),
        (np.array([0.5, 1e300]), "1e+300, no finite number, for '差评'"),
        ([0.5, 10**400], "inf, no finite number, for '差评'"),
        ([0.5, Decimal("-Infinity")], "-inf, no finite number, for '差评'"),
        ([0.5, Decimal("NaN")], "Decimal('NaN'), no finite number, for '差评'"),
        (torch.tensor([math.nan, 0.5]), "nan, no finite number, for '好评'"),
        ([0.5, "good"], "'good', no finite number, for '差评'"),
        ([0.5, "1"], "'1', no finite number, for '差评'"),
        ([0.5, None], "None, no finite number, for '差评'"),
        ([0.5, 1j], "1j, no finite number, for '差评'"),
        ([0.5, [0.5]], "[0.5], no finite number, for '差评'"),
        ([torch.zeros(2), 0.5], "tensor([0., 0.]), no finite number, for '好评'"),
        (torch.zeros(2, 2), "[0.0, 0.0], no finite number, for '好评'"),
        ([0.5], "1 numbers for 2 texts; the first text was '好评'"),
        ([np.zeros((9, 9)), 0.5], "array([[0., 0."),
        ([0.5, "很好" * 100], "'很好很好很好"),
        ([0.5] * 3, "3 numbers for 2 texts; the first text was '好评'"),
        ([], "0 numbers for 2 texts; the first text was '好评'"),
        (0.5, "a float, not a list of numbers, for '好评'"),
        (None, "a NoneType, not a list of numbers, for '好评'"),
        (np.mean([0.5]), "a float64, not a list of numbers, for '好评'"),
        (np.array(0.5), "a ndarray, not a list of numbers, for '好评'"),
        ({0: 0.5, 1: 1.0}, "a dict, not a list of numbers, for '好评'"),
        ({0.5, 1.0}, "a set, not a list of numbers, for '好评'"),
        ("12", "a str, not a list of numbers, for '好评'"),
        (torch.tensor(0.5), "a Tensor, not a list of numbers, for '好评'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rubbish_is_refused_and_the_text_shown(result, said):
    with pytest.raises(RewardError) as error:
        score_texts(lambda texts: result, ["好评", "差评"])
    assert str(error.value).startswith(f"the reward function returned {said}") and "\n" not in str(error.value)
    assert len(str(error.value)) < 150
    assert error.value.traceback == ""


def test_no_texts_need_no_reward():
    assert score_texts(lambda texts: 1 / 0, []).shape == (0,)


def raised_by(reward, texts=("好评", "差评")) -> RewardError:
    with pytest.raises(RewardError) as error:
        score_texts(reward, list(texts))
    assert "\n" not in str(error.value)
    return error.value


def test_a_raising_function_is_named_with_file_and_line_and_its_traceback_and_texts_are_kept():
    calls = []

    def reward(texts):
        calls.append(texts)
        return [1 / (text != "差评") for text in texts]

    error = raised_by(reward)
    line = reward.__code__.co_firstlineno + 2
    assert str(error) == f"the reward function raised ZeroDivisionError: division by zero ({__file__}, line {line})"
    assert error.traceback.startswith("Traceback (most recent call last):\n")
    said, texts = error.traceback.split("\nIt was called with these texts:\n")
    assert said.endswith("ZeroDivisionError: division by zero\n") and json.loads(texts) == ["好评", "差评"]
    assert len(calls) == 1  # a call may take minutes, or cost money


class Stopped(BaseException):
    pass


class Unspeakable(Exception):
    def __str__(self):
        return self.missing


ENDS = [SystemExit(), SystemExit(0), Stopped("enough\nof it"), GeneratorExit(), StopIteration(), Unspeakable()]


@pytest.mark.parametrize("what", ENDS, ids=repr)
def test_whatever_a_reward_raises_is_said(what):
    def reward(texts):
        raise what

    def while_read(texts):
        yield 0.5
        raise what

    class Array:
        def tolist(self):
            raise what

    name = type(what).__name__
    for function in (reward, while_read, lambda texts: Array()):
        said = "RuntimeError: " if function is while_read and name == "StopIteration" else name
        assert str(raised_by(function)).startswith(f"the reward function raised {said}")
    assert "of it" not in str(raised_by(reward))


def test_ctrl_c_in_a_reward_is_ctrl_c():
    def reward(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_texts(reward, ["好评"])


def test_a_reward_may_do_with_its_texts_what_it_likes():
    texts = ["好评", "差评"]
    assert score_texts(lambda own: [own.pop() == "好评" for _ in range(2)], texts).tolist() == [0, 1]
    assert texts == ["好评", "差评"]
    assert "'好评'" in str(raised_by(lambda own: own.clear() or [0.5]))


# --- what it sets


def settings() -> list:
    return [read() for read, _ in user_code.SETTINGS]


KEPT = []  # what ends when nobody holds it any more


def set_everything(folder):
    KEPT.append(torch.inference_mode())
    KEPT[-1].__enter__()
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    os.chdir(folder)


@pytest.fixture
def nothing_set(monkeypatch):
    monkeypatch.setattr(user_code, "its_own", {})
    before = settings()
    yield before
    for value, (read, write) in zip(before, user_code.SETTINGS):
        if read() != value:
            write(value)


@pytest.mark.parametrize("result", [[0.5], SystemExit()], ids=repr)
def test_what_a_reward_sets_holds_for_itself_alone(tmp_path, nothing_set, result):
    """And still holds when it is called again, also where it has failed."""
    seen = []

    def reward(texts):
        seen.append(settings())
        if len(seen) == 1:
            set_everything(tmp_path)
            seen.append(settings())
        if isinstance(result, SystemExit):
            raise result
        return result

    for _ in range(3):
        with pytest.raises(RewardError) if isinstance(result, SystemExit) else contextlib.nullcontext():
            scores = score_texts(reward, ["好评"])
            assert scores.dtype == torch.float32 and scores.tolist() == result
        assert settings() == nothing_set and not torch.is_inference_mode_enabled()
    start, changed, *later = seen
    assert start == nothing_set and all(now != before for now, before in zip(changed, start))
    assert later == [changed] * 2


def test_a_reward_draws_from_the_random_generators_that_checkpoints_keep():
    """So it draws anew at each call, and the same again after a resume."""
    torch.manual_seed(1)
    drawn = [score_texts(lambda texts: torch.rand(2), ["好评", "差评"]).tolist() for _ in range(2)]
    torch.manual_seed(1)
    assert drawn == [torch.rand(2).tolist(), torch.rand(2).tolist()] and drawn[0] != drawn[1]


def test_a_reward_that_runs_out_of_memory_is_not_asked_again_and_no_text_is_blamed():
    asked = []

    def reward(texts):
        asked.append(texts)
        torch.empty(1 << 60)

    with pytest.raises(
        RewardError, match=r"^out of memory in the reward function \(RuntimeError: .*\); lower "
    ) as error:
        score_texts(reward, ["好评", "差评"])
    assert asked == [["好评", "差评"]] and "好评" not in str(error.value)
    assert "\n" not in str(error.value) and "in reward\n" in error.value.traceback


def test_what_a_reward_says_itself_stays():
    def reward(texts):
        raise RewardError("no key for the judge")

    with pytest.raises(RewardError, match="^no key for the judge$"):
        score_texts(reward, ["好评", "差评"])
