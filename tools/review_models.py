"""Train a Chinese GPT-2 and a sentiment classifier from scratch on reviews that people wrote.

    python -m tools.review_models online_shopping_10_cats.zip review_models

writes review_models/gpt2 (6 blocks, 256 wide) and review_models/sentiment (4 blocks, 256 wide) for --model_name and
--reward_model_name, in the file layout of the article's models. The reviews are a UTF-8 CSV file, or the only one in a
zip, with a text in the column `review` and 1 (happy) or 0 (unhappy) in the column `label`. 63,000 reviews take 26
minutes on two CPU cores. The same CPU, versions and number of threads give the same weights every time.
"""

import argparse
import csv
import io
import random
import zipfile
from pathlib import Path

import torch
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tqdm import tqdm
from transformers import BertTokenizer, GPT2LMHeadModel

from support.common.errors import UserError
from support.common.files import path_errors, read_text, whole
from support.compute.devices import keep_freed_memory, pick_device, pick_dtype
from support.models.demo_models import SPECIAL_TOKENS, descend, forward, new_classifier, new_gpt2, write_model
from support.models.pretrained import quiet_transformers
from tools import exits_on_user_error

LENGTH = 48  # tokens; longer reviews are cut
GPT2_SIZES = {"n_positions": LENGTH, "n_embd": 256, "n_layer": 6, "n_head": 4}
CLASSIFIER_SIZES = {"max_position_embeddings": LENGTH, "hidden_size": 256, "num_hidden_layers": 4}
CLASSIFIER_SIZES |= {"num_attention_heads": 4, "intermediate_size": 1024}
EPOCHS, LR = {"sentiment": 2, "gpt2": 3}, {"sentiment": 5e-4, "gpt2": 1.5e-3}
BATCH, WARMUP, SEED = 64, 100, 1
FEWEST, HELD_OUT = 100, 30  # the fewest reviews that are enough; one review in HELD_OUT is held out


@path_errors()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("reviews", type=Path, help="a CSV file with columns label and review, or a zip that has one")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} already exists; choose another folder, or remove it")
    reviews = read_reviews(args.reviews)
    with quiet_transformers(), whole(args.out) as partial:
        partial.mkdir(parents=True)
        make_review_models(partial, reviews)
    print(f"python train_ppo.py --model_name {args.out / 'gpt2'} --reward_model_name {args.out / 'sentiment'}")


def read_reviews(path: Path) -> list[tuple[str, int]]:
    """Return the distinct texts of a file and their labels, 1 or 0. Raises UserError if it can't be used."""
    rows = csv.DictReader(io.StringIO(unpack(path), newline=""))
    reviews = {}
    for row in rows:
        if row.get("label") not in ("0", "1") or row.get("review") is None:
            expected = "expected columns label (0 or 1) and review (a text), named in the first line"
            raise UserError(f"{path}, line {rows.line_num}: {expected}")
        if row["review"].strip():
            reviews[row["review"]] = int(row["label"])
    if len(reviews) < FEWEST or len(set(reviews.values())) < 2:
        raise UserError(f"{path} has {len(reviews)} different reviews; at least {FEWEST} with both labels are needed")
    return list(reviews.items())


def unpack(path: Path) -> str:
    """Return the text of a file, or of the only .csv file in a zip."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith(".csv")]
            if len(names) != 1:
                raise UserError(f"{path} contains {len(names)} .csv files; unpack it, and give one of them")
            return read_text(zipfile.Path(archive, names[0]), "save it as UTF-8")
    return read_text(path, "save it as UTF-8")


def write_vocab(path: Path, texts: list[str]) -> None:
    """Write BERT's special tokens and the texts' characters, one per line; ## marks those that continue a word."""
    normalize, split = BertNormalizer(lowercase=True).normalize_str, BertPreTokenizer().pre_tokenize_str
    words = {word for text in texts for word, _ in split(normalize(text))}
    pieces = {word[0] for word in words} | {f"##{character}" for word in words for character in word[1:]}
    vocab = [*SPECIAL_TOKENS, *sorted(pieces)]
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")


def make_review_models(out: Path, reviews: list[tuple[str, int]]) -> None:
    """Train both models and write them below `out`."""
    keep_freed_memory()
    texts, labels = zip(*reviews)
    write_vocab(out / "vocab.txt", texts)
    tokenizer = BertTokenizer(str(out / "vocab.txt"))
    examples = list(zip(tokenizer(list(texts), truncation=True, max_length=LENGTH)["input_ids"], labels))
    random.Random(SEED).shuffle(examples)
    held_out, training = examples[: len(examples) // HELD_OUT], examples[len(examples) // HELD_OUT :]
    for name, new, sizes in (("sentiment", new_classifier, CLASSIFIER_SIZES), ("gpt2", new_gpt2, GPT2_SIZES)):
        torch.manual_seed(SEED)
        model = new(len(tokenizer), sizes).to(pick_device("auto"))
        model.set_attn_implementation("eager")  # the fastest on a CPU for short texts
        fit(model, training, held_out, EPOCHS[name], LR[name], random.Random(SEED))
        write_model(out / name, model.cpu(), out / "vocab.txt")
    (out / "vocab.txt").unlink()


def fit(model, training: list, held_out: list, epochs: int, lr: float, draw: random.Random) -> None:
    """Train a GPT-2 on token ids, or a classifier on ids and labels, and evaluate it after each epoch."""
    dtype = pick_dtype("auto", model.device)
    steps = epochs * -(-len(training) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / WARMUP) * (1 - k / steps))
    for epoch in range(1, epochs + 1):
        model.train()
        title = f"{type(model).__name__}, epoch {epoch} of {epochs}"
        for ids, mask, labels in tqdm(batches(training, draw), title, unit="step", disable=None):
            with torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32):
                loss = forward(model, ids, mask, labels).loss
            descend(model, loss, optimizer, schedule)
        model.eval()
        print(f"on {len(held_out)} held-out reviews: {evaluate(model, held_out, draw)}", flush=True)


def batches(examples: list, draw: random.Random) -> list[tuple[torch.Tensor, ...]]:
    """Split all examples into batches of similar lengths: ids and mask (batch, time), labels (batch,), all int64."""
    ordered = sorted(examples, key=lambda example: len(example[0]) + draw.random())
    found = []
    for start in range(0, len(ordered), BATCH):
        rows, labels = zip(*ordered[start : start + BATCH])
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # 0 is [PAD]
        found.append((ids, (ids != 0).long(), torch.tensor(labels)))
    return draw.sample(found, len(found))


@torch.no_grad()
def evaluate(model, examples: list, draw: random.Random) -> str:
    """Return a GPT-2's loss per token, or a classifier's accuracy."""
    total, count, is_gpt2 = 0.0, 0, isinstance(model, GPT2LMHeadModel)
    for ids, mask, labels in batches(examples, draw):
        output = forward(model, ids, mask, labels)
        if is_gpt2:
            n = mask[:, 1:].sum().item()
            total, count = total + n * output.loss.item(), count + n
        else:
            total, count = total + (output.logits.argmax(-1).cpu() == labels).sum().item(), count + len(labels)
    return f"{total / count:.3f} nats per token" if is_gpt2 else f"accuracy {total / count:.1%}"


if __name__ == "__main__":
    with exits_on_user_error("review_models"):
        main()
