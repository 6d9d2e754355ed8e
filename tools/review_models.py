"""A Chinese GPT-2 and a sentiment classifier, trained from scratch on reviews that people wrote.

    python -m tools.review_models online_shopping_10_cats.zip review_models

writes review_models/gpt2 (6 blocks, 256 wide) and review_models/sentiment (4 blocks, 256 wide) for --model_name and
--reward_model_name, in the article models' file layout. The reviews are a UTF-8 CSV file, or the only one in a zip; its
column `review` is a text, and its column `label` is 1 where the writer is happy and 0 where not. Two CPU cores take
26 minutes for 63,000 reviews; on a CPU, they and the same number of threads give the same weights every time.
"""

import argparse
import csv
import io
import random
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tqdm import tqdm
from transformers import BertTokenizer, GPT2LMHeadModel

from support.demo_models import SPECIAL_TOKENS, descend, forward, new_classifier, new_gpt2, write_model
from support.devices import keep_freed_memory, pick_device, pick_dtype
from support.errors import UserError, exits_on_user_error
from support.files import path_errors, read_text, whole
from support.models import quiet_transformers

LENGTH = 48  # tokens; of a longer review the beginning is read
GPT2_SIZES = {"n_positions": LENGTH, "n_embd": 256, "n_layer": 6, "n_head": 4}
CLASSIFIER_SIZES = {
    "max_position_embeddings": LENGTH,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
}
EPOCHS, LR = {"sentiment": 2, "gpt2": 3}, {"sentiment": 5e-4, "gpt2": 1.5e-3}
BATCH, WARMUP, SEED = 64, 100, 1
FEWEST, HELD_BACK = 100, 30  # reviews; one in so many is not trained on, but judges the models


@path_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reviews", type=Path, help="a CSV file with columns label and review, or a zip with one inside")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} is there already; name another folder, or remove it")
    reviews = read_reviews(args.reviews)
    with quiet_transformers(), whole(args.out) as partial:
        partial.mkdir(parents=True)
        make_review_models(partial, reviews)
    print(f"python train_ppo.py --model_name {args.out / 'gpt2'} --reward_model_name {args.out / 'sentiment'}")


# ----------------------------------------------------------------------------------------------
# The reviews


def read_reviews(path: Path) -> list[tuple[str, int]]:
    """Texts that differ, and their labels: 1 happy, 0 unhappy. UserError where the file cannot be used."""
    rows = csv.DictReader(io.StringIO(unpack(path), newline=""))
    reviews = {}
    try:
        for name in ("label", "review"):
            if name not in (rows.fieldnames or []):
                raise UserError(f"{path} has no column {name}; its first line must name the columns label and review")
        for row in rows:
            if row["label"] not in ("0", "1") or row["review"] is None:
                raise UserError(
                    f"{path} is damaged in line {rows.line_num}: a review, and 0 or 1 as its label, belong there"
                )
            if row["review"].strip():
                reviews[row["review"]] = int(row["label"])
    except csv.Error as error:
        raise UserError(f"{path} is damaged in line {rows.reader.line_num}: {error}")
    if len(reviews) < FEWEST or len(set(reviews.values())) < 2:
        raise UserError(f"{path} has {len(reviews)} different reviews; {FEWEST} are needed, happy and unhappy ones")
    return list(reviews.items())


def unpack(path: Path) -> str:
    """The text of a file, or of the only .csv file in a zip."""
    remedy = "save it as UTF-8"
    if not zipfile.is_zipfile(path):
        return read_text(path, remedy)
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            if len(names) != 1:
                raise UserError(f"{path} holds {len(names)} .csv files; unpack it, and name one")
            return read_text(zipfile.Path(archive, names[0]), remedy)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise UserError(f"{path} cannot be unpacked: {error}; download it again")


def write_vocab(path: Path, texts: list[str]) -> None:
    """Write BERT's special tokens and the texts' characters, one a line; ## stands before those that go on a word."""
    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    pieces = {word[0] for word in words} | {f"##{character}" for word in words for character in word[1:]}
    vocab = [*SPECIAL_TOKENS, *sorted(pieces)]
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")


# ----------------------------------------------------------------------------------------------
# Training


def make_review_models(out: Path, reviews: list[tuple[str, int]]) -> None:
    """Train both models and write them below `out`."""
    keep_freed_memory()
    texts, labels = zip(*reviews)
    write_vocab(out / "vocab.txt", texts)
    tokenizer = BertTokenizer(str(out / "vocab.txt"))
    examples = list(zip(tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"], labels))
    random.Random(SEED).shuffle(examples)
    judged, training = examples[: len(examples) // HELD_BACK], examples[len(examples) // HELD_BACK :]
    for name, new, sizes in (("sentiment", new_classifier, CLASSIFIER_SIZES), ("gpt2", new_gpt2, GPT2_SIZES)):
        torch.manual_seed(SEED)
        model = new(len(tokenizer), sizes).to(pick_device("auto"))
        model.set_attn_implementation("eager")  # the quickest on a CPU: texts are short
        fit(model, training, judged, EPOCHS[name], LR[name], random.Random(SEED))
        write_model(out / name, model.cpu(), out / "vocab.txt")
    (out / "vocab.txt").unlink()


def fit(model, training: list, judged: list, epochs: int, lr: float, draw: random.Random) -> None:
    """Train a GPT-2 on token ids, or a classifier on ids and labels, and judge it after each epoch."""
    dtype = pick_dtype("auto", model.device)
    steps = epochs * -(-len(training) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / WARMUP) * (1 - k / steps))
    for epoch in range(1, epochs + 1):
        model.train()
        what = f"{type(model).__name__}, epoch {epoch} of {epochs}"
        for ids, mask, labels in tqdm(batches(training, draw), what, unit="step", disable=None):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss = forward(model, ids, mask, labels).loss
            descend(model, loss, optimizer, schedule)
        model.eval()
        print(f"{len(judged)} reviews that it has not seen: {judge(model, judged, draw)}", flush=True)


def batches(examples: list, draw: random.Random) -> list[tuple[torch.Tensor, ...]]:
    """All examples, those of a length together, in random order: ids and mask (batch, time), labels (batch,), int64."""
    ordered = sorted(examples, key=lambda example: len(example[0]) + draw.random())
    found = []
    for start in range(0, len(ordered), BATCH):
        rows, labels = zip(*ordered[start : start + BATCH])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # with [PAD]
        found.append((ids, (ids != 0).long(), torch.tensor(labels)))
    return draw.sample(found, len(found))


@torch.no_grad()
def judge(model, examples: list, draw: random.Random) -> str:
    """A GPT-2's loss a token, or how often a classifier is right."""
    of_gpt2, found = isinstance(model, GPT2LMHeadModel), []
    for ids, mask, labels in batches(examples, draw):
        output = forward(model, ids, mask, labels)
        if of_gpt2:
            found.append((output.loss.item(), mask[:, 1:].sum().item()))
        else:
            found.append(((output.logits.argmax(-1).cpu() == labels).float().mean().item(), len(labels)))
    values, weights = zip(*found)
    mean = np.average(values, weights=weights)
    return f"{mean:.3f} nats a token" if of_gpt2 else f"{mean:.1%} told right"


if __name__ == "__main__":
    with exits_on_user_error("review_models"):
        main()
