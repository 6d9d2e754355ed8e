"""The reward: text -> number. The article's sentiment classifier, or any function of yours."""

import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, pipeline

from support.common.errors import RewardError, UserError, first_line, is_out_of_memory
from support.common.imports import import_as_it_is_now
from support.compute import processes
from support.compute.batches import listed, to_float32
from support.models.pretrained import (
    clean_text,
    is_bert,
    load_weights,
    open_tokenizer,
    quiet_transformers,
    read_model_config,
)


class SentimentReward:
    """Texts -> P(positive) in [0, 1], from the `sentiment-analysis` pipeline around a classifier in a local folder.

    positive_label names the label that counts as happy; with None it is found in the model's id2label. Raises UserError
    if the label is ambiguous, or if the folder doesn't contain a trained classifier.
    """

    def __init__(
        self,
        folder: Path,
        device,
        dtype: torch.dtype = torch.float32,
        positive_label: str | None = None,
        batch_size: int = 128,
    ):
        config, self.positive_label, tokenizer = read_classifier_folder(folder, positive_label)
        model = load_weights(AutoModelForSequenceClassification, folder, config, device)
        positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length) - position_offset(model)
        if hasattr(model, "score"):  # a decoder's head, which reads the last token before this padding
            model.config.pad_token_id, tokenizer.padding_side = tokenizer.pad_token_id, "right"
        model = model.to(device=device, dtype=dtype)  # under torchrun the pipeline doesn't move it
        with quiet_transformers():
            self.pipeline = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer, device=device)
        self.options = dict(
            top_k=None,
            function_to_apply="softmax",
            batch_size=batch_size,
            truncation=True,
            max_length=min(positions, tokenizer.model_max_length),
        )

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """P(positive) of each text, (len(texts),) float32. Texts are sorted by length to reduce padding."""
        if is_bert(self.pipeline.tokenizer):
            texts = [clean_text(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = torch.empty(len(texts))
        with quiet_transformers():  # on a GPU it advises against calling it more than ten times
            results = self.pipeline([texts[i] for i in order], **self.options)
        for i, result in zip(order, results):
            scores[i] = next(entry["score"] for entry in result if str(entry["label"]) == self.positive_label)
        return scores


def read_classifier_folder(folder: Path, positive_label: str | None):
    """A classifier's config, happy label and tokenizer, before any weights. Raises UserError if that label is unclear,
    or if the tokenizer doesn't fit."""
    config = read_model_config(folder)
    label = find_positive_label([str(label) for label in config.id2label.values()], positive_label)
    return config, label, open_tokenizer(folder, config)


def position_offset(model) -> int:
    """How many of a classifier's positions no token has: 2 in the RoBERTa family, which counts on from its padding."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    return 0 if padding is None else padding + 1


def find_positive_label(labels: list[str], wanted: str | None) -> str:
    """The label that counts as happy: `wanted`, or the one that reads like "positive".

    Raises UserError, with all labels, if `wanted` isn't among them, or if not exactly one reads so.
    """
    names = ", ".join(repr(label) for label in labels)
    if len(labels) < 2:
        own = "use it in a function of yours, with --reward module:function"
        raise UserError(f"the reward model has one label, {names}, so it isn't a classifier but a regression; {own}")
    if wanted is not None:
        if wanted not in labels:
            raise UserError(f"--positive_label {wanted!r} isn't one of the classifier's labels: {names}")
        return wanted
    positive = [label for label in labels if re.match(r"(very |非常|很)?(pos|正|好|积极)", label.strip().lower())]
    if len(positive) != 1:
        raise UserError(f"which label of the reward model is the happy one? It has {names}; set --positive_label")
    return positive[0]


# ----------------------------------------------------------------------------------------------
# Any other reward


def import_function(spec: str) -> Callable:
    """Import the function that 'module:function' names, from the working directory or Python's path, as its file and
    those next to it are now.

    Gradient mode and default dtype, which some scripts set, are put back. Raises UserError if there is no function.
    """
    module, _, name = spec.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a reward.py there doesn't hide this program's
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    try:
        function = getattr(import_as_it_is_now(module), name)
    except (Exception, SystemExit) as error:
        raise UserError(f"--reward {spec} cannot be imported ({first_line(error)}); give module:function")
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
    if not callable(function) or isinstance(function, type):
        raise UserError(f"--reward {spec} must be a function, not a {type(function).__name__}")
    return function


def score_texts(reward: Callable[[list[str]], object], texts: list[str]) -> torch.Tensor:
    """The rewards of some texts, (len(texts),) float32, from any callable that returns a number for each.

    Each process scores its own share. Raises RewardError on every rank if that fails on any rank.
    """
    scores = torch.zeros(len(texts))
    mine = processes.rows_of_rank(len(texts))
    scores[mine] = processes.on_all_ranks(lambda: checked_scores(reward, texts[mine]))
    return processes.all_reduce_sum(scores)


def checked_scores(reward: Callable[[list[str]], object], texts: list[str]) -> torch.Tensor:
    """The rewards of some texts, (len(texts),) float32. KeyboardInterrupt passes.

    Raises RewardError if the callable raises, even SystemExit, or doesn't return one finite number for each text.
    """
    if not texts:
        return torch.zeros(0)
    try:
        return read_scores(reward(list(texts)), texts)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise failed_call(texts, error)


def read_scores(returned, texts: list[str]) -> torch.Tensor:
    """What a reward function returned, as (len(texts),) float32. Raises RewardError with the text that is to blame."""
    if (scores := listed(returned)) is None:
        kind = type(returned).__name__
        raise RewardError(f"the reward function returned a {kind}, not a list of numbers, for {texts[0]!r}")
    if len(scores) != len(texts):
        counts = f"{len(scores)} numbers for {len(texts)} texts"
        raise RewardError(f"the reward function returned {counts}; the first text was {texts[0]!r}")
    numbers, wrong = to_float32(scores)
    for i, score in wrong:
        raise RewardError(f"the reward function returned {score}, not a finite number, for {texts[i]!r}")
    return numbers


def failed_call(texts: list[str], error: BaseException) -> RewardError:
    """The error to raise when a reward function raised one: which and where, with its traceback and the texts."""
    whole = "".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode()
    whole += f"\nIt was called with these texts:\n{json.dumps(texts, ensure_ascii=False, indent=1)}\n"
    if is_out_of_memory(error):
        lower = "--gen_len, or how many texts the reward takes at once"
        return RewardError(f"out of memory in the reward function ({first_line(error)}); lower {lower}", whole)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RewardError(f"the reward function raised {first_line(error)} ({frame.filename}, line {frame.lineno})", whole)
