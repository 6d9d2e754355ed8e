"""The reward: text -> number. It can be the article's sentiment classifier, a reward model, your own function, a
person, or a weighted sum of these."""

import inspect
import json
import os
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoModelForSequenceClassification, pipeline

from support.common.errors import RewardError, UserError, first_line, is_out_of_memory
from support.common.files import FIX_LINE, append_line, damaged, read_lines
from support.common.imports import import_as_it_is_now
from support.compute import processes
from support.compute.batches import listed, to_float32
from support.compute.products import fix_classifier
from support.models.pretrained import (
    clean_text,
    hash_of,
    is_bert,
    load_weights,
    open_tokenizer,
    quiet_transformers,
    read_model_config,
)


class Rewards:
    """The rewards of a run. PPO maximises their weighted sum; a reward of weight 0 is a judge, which is only measured.

    functions: by name, each from a list of texts to as many numbers. weights: (k,) float32, in the same order, by
    default 1 each. columns: lists with one entry per prompt; a function gets those that it has parameters for. Raises
    UserError if a function needs a column that isn't there.
    """

    def __init__(self, functions: dict[str, Callable], weights=None, columns: dict[str, list] | None = None):
        self.functions, self.columns = functions, columns or {"prompt": [""]}
        self.weights = torch.tensor(weights or [1.0] * len(functions), dtype=torch.float32)
        self.wanted = {name: wanted_columns(name, function, self.columns) for name, function in functions.items()}

    def score(self, texts: list[str], prompt_index) -> torch.Tensor:
        """Score texts with each function, (len(texts), k) float32. prompt_index: the index of each text's prompt."""
        parts = []
        for name, function in self.functions.items():
            columns = {column: [self.columns[column][i] for i in prompt_index] for column in self.wanted[name]}
            parts.append(score_texts(function, texts, columns))
        return torch.stack(parts, 1)

    def named(self, parts: torch.Tensor) -> list[dict]:
        """Return {"name", "weight", "scores"} of each reward, [] if there is only one. parts: (n, k), from `score`."""
        each = zip(self.functions, self.weights.tolist(), parts.T.tolist())
        return [dict(zip(("name", "weight", "scores"), one)) for one in each] if len(self.functions) > 1 else []

    def means(self, parts: torch.Tensor) -> dict[str, float]:
        """Return each reward's mean score by its column in metrics.csv, {} if there is only one. parts: see `named`."""
        return {f"reward/{part['name']}": fmean(part["scores"]) for part in self.named(parts)}


class SentimentReward:
    """Texts -> P(positive) in [0, 1], from the `sentiment-analysis` pipeline around a classifier in a local folder. If
    the model has only one label, it is a reward model, whose raw output is the reward.

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
        if hasattr(model, "score"):  # a decoder: its head reads the last token before the padding
            model.config.pad_token_id, tokenizer.padding_side = tokenizer.pad_token_id, "right"
        # Rounded, so that a run can be resumed in another dtype
        self.weights_hash = hash_of({name: weight.bfloat16() for name, weight in model.named_parameters()})
        model = model.to(device=device, dtype=dtype)  # under torchrun the pipeline doesn't move it
        with quiet_transformers():
            self.pipeline = pipeline("sentiment-analysis", model=model, tokenizer=tokenizer, device=device)
        self.options = dict(
            top_k=None,
            function_to_apply="softmax" if config.num_labels > 1 else "none",
            batch_size=batch_size,
            truncation=True,
            max_length=most_tokens(model, tokenizer),
        )
        fix_classifier(model)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Return P(positive), or a reward model's output, (len(texts),) float32. Scores each distinct text once, the
        shortest first to reduce padding."""
        if is_bert(self.pipeline.tokenizer):
            texts = [clean_text(text) for text in texts]
        distinct, scores = sorted(set(texts), key=lambda text: (len(text), text)), {}
        with quiet_transformers():  # on a GPU, it warns if it is called more than ten times
            results = self.pipeline(distinct, **self.options)
        for text, result in zip(distinct, results):
            scores[text] = next(entry["score"] for entry in result if str(entry["label"]) == self.positive_label)
        return torch.tensor([scores[text] for text in texts])


def read_classifier_folder(folder: Path, positive_label: str | None):
    """Return a classifier's config, happy label and tokenizer without loading weights. Raises UserError if the label
    is unclear, or if the tokenizer doesn't fit."""
    config = read_model_config(folder)
    label = find_positive_label([str(label) for label in config.id2label.values()], positive_label)
    return config, label, open_tokenizer(folder, config)


def most_tokens(model, tokenizer) -> int:
    """Return how many tokens of a text a classifier can read: as many as it has positions. Models of the RoBERTa family
    number positions from padding_idx + 1, so they can't use the first two."""
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    padding = getattr(tables[0], "padding_idx", None) if tables else None
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    return min(positions - (0 if padding is None else padding + 1), tokenizer.model_max_length)


def find_positive_label(labels: list[str], wanted: str | None) -> str:
    """Return the label that counts as happy: `wanted`, the only label, or the only one that means "positive".

    Raises UserError, with all labels, if `wanted` isn't one of them, or if it isn't clear which one is positive.
    """
    names = ", ".join(repr(label) for label in labels)
    if wanted is not None:
        if wanted not in labels:
            raise UserError(f"--positive_label {wanted!r} isn't one of the classifier's labels: {names}")
        return wanted
    if len(labels) == 1:
        return labels[0]
    positive = [label for label in labels if re.match(r"(very |非常|很)?(pos|正|好|积极)", label.strip().lower())]
    if len(positive) != 1:
        raise UserError(f"can't tell which label of the classifier is positive; set --positive_label to one of {names}")
    return positive[0]


# ----------------------------------------------------------------------------------------------
# A person


class HumanReward:
    """A person as the reward: shows each text and reads a number. Scores are kept in a file, so that no text is shown
    twice, in this run or in another one from the same folder."""

    def __init__(self, path: Path = Path("human_scores.jsonl")):
        self.path = path
        with damaged(path, FIX_LINE):
            self.scores = {each["text"]: float(each["score"]) for each in read_lines(path)}
        if self.scores:
            print(f"{path} has the scores of {len(self.scores)} texts; remove it to score them again")

    def __call__(self, texts: list[str]) -> list[float]:
        new = [text for text in dict.fromkeys(texts) if text not in self.scores]
        for i, text in enumerate(new, 1):
            self.scores[text] = ask(f"\n{i} of {len(new)}  {text}\nscore, higher is better; Ctrl-D stops > ", self.path)
            append_line(self.path, {"text": text, "score": self.scores[text]})
        return [self.scores[text] for text in texts]


def ask(question: str, path: Path) -> float:
    """Ask a person for a number and return it. Raises RewardError at the end of the input."""
    while True:
        try:
            answer = input(question)
        except EOFError:
            raise RewardError(f"the input has ended; your scores so far are in {path} and won't be asked for again")
        if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", answer):
            return float(answer)
        print("that isn't a number; type one, for example 0.8")


# ----------------------------------------------------------------------------------------------
# Any other reward


def import_function(spec: str) -> Callable:
    """Import the function named by 'module:function' from the working directory or Python's path, using the current
    content of its file and of those next to it.

    Restores gradient mode and default dtype, which some scripts set. Raises UserError if there is no such function.
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


def wanted_columns(name: str, function: Callable, columns: dict[str, list]) -> list[str]:
    """Return the prompt columns that a reward function has parameters for (its first parameter takes the texts).

    Raises UserError if there is no column for a parameter without a default.
    """
    try:
        _, *parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function in C, or one without parameters
        return []
    parameters = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    for each in parameters:
        if each.default is each.empty and each.name not in columns:
            file = f"a --prompts_file of JSON lines, each with 'prompt' and {each.name!r}"
            raise UserError(f"--reward {name} has a parameter {each.name!r}, so it needs {file}")
    return [each.name for each in parameters if each.name in columns]


def score_texts(reward: Callable, texts: list[str], columns: dict[str, list] | None = None) -> torch.Tensor:
    """Return the rewards of some texts, (len(texts),) float32, from any callable that returns a number for each.

    columns: more arguments by name, each with one entry per text. Each process scores its own share. Raises RewardError
    on every rank if scoring fails on any rank.
    """
    scores = torch.zeros(len(texts))
    mine = processes.rows_of_rank(len(texts))
    columns = {name: values[mine] for name, values in (columns or {}).items()}
    scores[mine] = processes.on_all_ranks(lambda: checked_scores(reward, texts[mine], columns))
    return processes.all_reduce_sum(scores)


def checked_scores(reward: Callable, texts: list[str], columns: dict[str, list]) -> torch.Tensor:
    """Return the rewards of some texts, (len(texts),) float32. KeyboardInterrupt isn't caught.

    Raises RewardError if the callable raises (even SystemExit) or doesn't return one finite number for each text.
    """
    if not texts:
        return torch.zeros(0)
    try:
        return read_scores(reward(list(texts), **columns), texts)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise failed_call(texts, error)


def read_scores(returned, texts: list[str]) -> torch.Tensor:
    """Convert what a reward function returned to (len(texts),) float32. Raises RewardError, with the text that caused
    it, if that isn't one finite number per text."""
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
    """Return the RewardError for an exception in a reward function: its type and line, traceback and texts."""
    whole = "".join(traceback.format_exception(error)).encode(errors="backslashreplace").decode()
    whole += f"\nIt was called with these texts:\n{json.dumps(texts, ensure_ascii=False, indent=1)}\n"
    if is_out_of_memory(error):
        lower = "--gen_len, or the number of texts that it processes at once"
        return RewardError(f"out of memory in the reward function ({first_line(error)}); lower {lower}", whole)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RewardError(f"the reward function raised {first_line(error)} ({frame.filename}, line {frame.lineno})", whole)
