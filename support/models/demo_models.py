"""Builds the demo's two tiny models without downloading anything.

A small grammar writes happy, unhappy and mixed shop reviews. A Chinese GPT-2 learns to write them and a BERT
classifier learns to tell happy from unhappy, in under a minute on two CPU cores. They are kept in the user's cache.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, GPT2Config, GPT2LMHeadModel

from support.common.files import whole

NEGATIVE, POSITIVE = "negative (stars 1, 2 and 3)", "positive (stars 4 and 5)"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # the first lines of vocab.txt

# ----------------------------------------------------------------------------------------------
# The grammar

OPENINGS = ["刚收到货,感觉", "昨天收到的,", "用了几天,", "第二次买了,"]
OPENINGS += ["给妈妈买的,", "打开包装看了看,", "双十一买的,", "朋友推荐的,"]
THINGS = ["质量", "颜色", "味道", "做工", "包装", "手感", "物流", "客服", "款式", "价格", "屏幕", "尺寸"]
DEGREES = ["很", "非常", "真的", "还是", "挺", "有点", "比较", "特别", "实在", "相当"]
GOOD = ["不错", "满意", "漂亮", "好用", "舒服", "喜欢", "划算", "精致", "给力", "贴心", "合适", "靠谱"]
BAD = ["失望", "粗糙", "难看", "难用", "一般", "太差", "后悔", "糟糕", "敷衍", "廉价", "不值", "气人"]
GOOD_ENDINGS = ["下次还会再来", "推荐大家购买", "值得拥有", "全五分好评", "家人都说好", "会一直支持"]
BAD_ENDINGS = ["再也不会买了", "要求退货", "大家别上当", "只能给差评", "打算扔掉", "客服也不理人"]


def write_review(draw: random.Random) -> tuple[str, int]:
    """Return a review and its label, 1 happy or 0 unhappy. A fifth are mixed; their label says how they end."""
    happy = draw.random() < 0.5
    first = happy if draw.random() < 0.8 else not happy

    def clause(good):
        return draw.choice(THINGS) + draw.choice(DEGREES) + draw.choice(GOOD if good else BAD)

    text = draw.choice(OPENINGS)
    text += draw.choice(["", draw.choice(THINGS)]) + draw.choice(DEGREES) + draw.choice(GOOD if first else BAD)
    if draw.random() < 0.7 or first != happy:
        text += ("," if first == happy else ",但是") + clause(happy)
    if draw.random() < 0.5:
        text += "," + draw.choice(GOOD_ENDINGS if happy else BAD_ENDINGS)
    return text + draw.choice(["。", "!", ""]), int(happy)


# ----------------------------------------------------------------------------------------------
# Training

REVIEWS, STEPS, BATCH, LR = 8_000, {"gpt2": 400, "sentiment": 120}, 64, 2e-3
GPT2_SIZES = {"n_positions": 64, "n_embd": 96, "n_layer": 2, "n_head": 4}
CLASSIFIER_SIZES = {"max_position_embeddings": 64, "hidden_size": 64, "num_hidden_layers": 2}
CLASSIFIER_SIZES |= {"num_attention_heads": 4, "intermediate_size": 256}


def demo_models() -> tuple[Path, Path]:
    """Return the folders of the demo GPT-2 and the demo classifier; the first call makes them, which takes a minute."""
    source = Path(__file__).read_bytes() + f"torch {torch.__version__}".encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "ppo-chinese-gpt2")
    folder = cache / f"demo-{hashlib.sha256(source).hexdigest()[:16]}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):  # another process may be making them
            if not folder.exists():
                print(f"making the demo models in {folder} (once, under a minute)", flush=True)
                with whole(folder) as partial:
                    partial.mkdir()
                    make_demo_models(partial)
    return folder / "gpt2", folder / "sentiment"


def make_demo_models(out: Path) -> None:
    """Train both models on the CPU and write them below `out`; the weights are the same every time."""
    draw = random.Random(1)
    reviews = [write_review(draw) for _ in range(REVIEWS)]
    vocab = write_vocab(out / "vocab.txt", reviews)
    tokenizer = BertTokenizer(str(out / "vocab.txt"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gpt2 = new_gpt2(len(vocab), GPT2_SIZES)
        fit(gpt2, tokenizer, reviews, STEPS["gpt2"], draw)
        classifier = new_classifier(len(vocab), CLASSIFIER_SIZES)
        fit(classifier, tokenizer, reviews, STEPS["sentiment"], draw)
    write_model(out / "gpt2", gpt2, out / "vocab.txt")
    write_model(out / "sentiment", classifier, out / "vocab.txt")


def write_vocab(path: Path, reviews: list[tuple[str, int]]) -> list[str]:
    """Write and return a vocabulary: the special tokens and the reviews' characters."""
    vocab = [*SPECIAL_TOKENS, *sorted({c for text, _ in reviews for c in text})]
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return vocab


def new_gpt2(vocab_size: int, sizes: dict) -> GPT2LMHeadModel:
    """Return an untrained GPT-2 without dropout; sizes are fields of GPT2Config."""
    config = GPT2Config(
        vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def new_classifier(vocab_size: int, sizes: dict) -> BertForSequenceClassification:
    """Return an untrained classifier without dropout; sizes are fields of BertConfig."""
    config = BertConfig(
        vocab_size=vocab_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: NEGATIVE, 1: POSITIVE}, label2id={NEGATIVE: 0, POSITIVE: 1}, **sizes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def write_model(folder: Path, model, vocab: Path) -> None:
    """Write a model on the CPU and its tokenizer in the file layout of the article's models."""
    folder.mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copy(vocab, folder / "vocab.txt")
    positions = model.config.max_position_embeddings
    tokenizer = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def fit(model, tokenizer, reviews: list[tuple[str, int]], steps: int, draw: random.Random) -> None:
    """Train a GPT-2 on the reviews, or a classifier on reviews and labels; a review is encoded as [CLS] ... [SEP]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), type(model).__name__, unit="step", disable=None):
        texts, labels = zip(*draw.sample(reviews, BATCH))
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        loss = forward(model, batch["input_ids"], batch["attention_mask"], torch.tensor(labels)).loss
        descend(model, loss, optimizer, schedule)
    model.eval()


def forward(model, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor):
    """Return a model's output with its loss: next tokens for a GPT-2, labels for a classifier.

    ids, mask (batch, time), labels (batch,), all int64, on any device.
    """
    ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
    if isinstance(model, GPT2LMHeadModel):
        labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels)


def descend(model, loss: torch.Tensor, optimizer, schedule) -> None:
    """Take one optimiser step down the loss; the gradient is clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
