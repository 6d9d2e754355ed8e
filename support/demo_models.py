"""Two tiny models made on the spot, for machines without the model hub.

A small grammar writes happy, unhappy and mixed shop reviews. A Chinese GPT-2 learns to write them, a BERT classifier
to tell happy from unhappy, in under a minute on two CPU cores. They are saved in the article models' file layout
(config.json, vocab.txt, pytorch_model.bin, ...) in the user's cache folder, so that the same code loads them, and
made only once.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, GPT2Config, GPT2LMHeadModel

from support.errors import UserError
from support.files import disk_errors, whole

NEGATIVE, POSITIVE = "negative (stars 1, 2 and 3)", "positive (stars 4 and 5)"
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # the first of a vocabulary

# ----------------------------------------------------------------------------------------------
# The grammar

OPENINGS = [
    "刚收到货,感觉",
    "昨天收到的,",
    "用了几天,",
    "第二次买了,",
    "给妈妈买的,",
    "打开包装看了看,",
    "双十一买的,",
    "朋友推荐的,",
]
THINGS = ["质量", "颜色", "味道", "做工", "包装", "手感", "物流", "客服", "款式", "价格", "屏幕", "尺寸"]
DEGREES = ["很", "非常", "真的", "还是", "挺", "有点", "比较", "特别", "实在", "相当"]
GOOD = ["不错", "满意", "漂亮", "好用", "舒服", "喜欢", "划算", "精致", "给力", "贴心", "合适", "靠谱"]
BAD = ["失望", "粗糙", "难看", "难用", "一般", "太差", "后悔", "糟糕", "敷衍", "廉价", "不值", "气人"]
GOOD_ENDINGS = ["下次还会再来", "推荐大家购买", "值得拥有", "全五分好评", "家人都说好", "会一直支持"]
BAD_ENDINGS = ["再也不会买了", "要求退货", "大家别上当", "只能给差评", "打算扔掉", "客服也不理人"]


def write_review(draw: random.Random) -> tuple[str, int]:
    """One review and its label: 1 happy, 0 unhappy. A fifth are mixed, judged by how they end."""
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
CLASSIFIER_SIZES = {
    "max_position_embeddings": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
}


def demo_models() -> tuple[Path, Path]:
    """The folders of the demo GPT-2 and the demo classifier, made at the first call and cached for the next."""
    source = Path(__file__).read_bytes() + f"torch {torch.__version__}".encode()
    cache = cache_folder()
    folder = cache / f"demo-{hashlib.sha256(source).hexdigest()[:16]}"
    if not folder.exists():
        print(f"making the demo models in {folder} (once, under a minute)", flush=True)
        with disk_errors(folder), tempfile.TemporaryDirectory() as made:
            make_demo_models(Path(made))
            with FileLock(cache.with_name(f"{cache.name}.lock")):  # another process may be as far
                for left in cache.glob(".partial-*"):  # by a start that was killed
                    shutil.rmtree(left)
                if not folder.exists():
                    with whole(folder) as partial:
                        shutil.copytree(made, partial)
    return folder / "gpt2", folder / "sentiment"


def cache_folder() -> Path:
    """The user's cache folder or, where that cannot be written, one beside temporary files."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # begins with ~ where there is no home
    for parent in (home, tempfile.gettempdir()):
        folder = Path(parent) / "ppo-chinese-gpt2"
        with contextlib.suppress(OSError):
            if folder.is_absolute():
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
                return folder
    raise UserError(f"neither {home} nor {tempfile.gettempdir()} can be written; set XDG_CACHE_HOME to another folder")


def make_demo_models(
    out: Path,
    gpt2_sizes: dict = GPT2_SIZES,
    vocab_size: int = 0,
    lr: float = LR,
    steps: dict[str, int] | None = None,
    device="cpu",
) -> None:
    """Train both models and write them below `out`, on a CPU the same weights every time.

    gpt2_sizes are fields of GPT2Config; the classifier's sizes are always the demo's. vocab_size: as in `write_vocab`.
    lr is the highest learning rate of the GPT-2, steps how many each takes (STEPS unless given).
    """
    steps = steps or STEPS
    draw = random.Random(1)
    reviews = [write_review(draw) for _ in range(REVIEWS)]
    vocab = write_vocab(out / "vocab.txt", reviews, vocab_size)
    tokenizer = BertTokenizer(str(out / "vocab.txt"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        gpt2 = new_gpt2(len(vocab), gpt2_sizes).to(device)
        fit(gpt2, tokenizer, reviews, steps["gpt2"], draw, lr)
        classifier = new_classifier(len(vocab), CLASSIFIER_SIZES).to(device)
        fit(classifier, tokenizer, reviews, steps["sentiment"], draw, LR)
    for name, model in (("gpt2", gpt2), ("sentiment", classifier)):
        write_model(out / name, model.cpu(), out / "vocab.txt")


def write_vocab(path: Path, reviews: list[tuple[str, int]], size: int = 0) -> list[str]:
    """Write the tokens of a vocabulary, one a line: the special ones and the reviews' characters.

    [unused1], [unused2], ... fill it up to `size` tokens, as in published vocabularies.
    """
    vocab = [*SPECIAL_TOKENS, *sorted({c for text, _ in reviews for c in text})]
    vocab += [f"[unused{i}]" for i in range(1, size - len(vocab) + 1)]
    path.write_text("\n".join(vocab) + "\n", encoding="utf-8")
    return vocab


def new_gpt2(vocab_size: int, sizes: dict) -> GPT2LMHeadModel:
    """A random GPT-2 without dropout; sizes are fields of GPT2Config."""
    config = GPT2Config(
        vocab_size=vocab_size, bos_token_id=None, eos_token_id=None, activation_function="gelu_pytorch_tanh",
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **sizes,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def new_classifier(vocab_size: int, sizes: dict) -> BertForSequenceClassification:
    """A random classifier without dropout; sizes are fields of BertConfig."""
    config = BertConfig(
        vocab_size=vocab_size, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label={0: NEGATIVE, 1: POSITIVE}, label2id={NEGATIVE: 0, POSITIVE: 1}, **sizes,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def write_model(folder: Path, model, vocab: Path) -> None:
    """A model on the CPU and its tokenizer in the article models' file layout."""
    folder.mkdir()
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "tokenizer_class": "BertTokenizer"}
    for key in ("bos_token_id", "eos_token_id", "dtype") if model.config.model_type == "gpt2" else ("dtype",):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    shutil.copy(vocab, folder / "vocab.txt")
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
    positions = model.config.max_position_embeddings
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": positions, **special}
        ),
        encoding="utf-8",
    )
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def fit(model, tokenizer, reviews: list[tuple[str, int]], steps: int, draw: random.Random, lr: float) -> None:
    """Train a GPT-2 on the texts, or a classifier on texts and labels; reviews are encoded as [CLS] ... [SEP]."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), type(model).__name__, unit="step", disable=None):
        texts, labels = zip(*draw.sample(reviews, BATCH))
        batch = tokenizer(list(texts), padding=True, return_tensors="pt")
        loss = forward(model, batch["input_ids"], batch["attention_mask"], torch.tensor(labels)).loss
        descend(model, loss, optimizer, schedule)
    model.eval()


def forward(model, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor):
    """What a model makes of texts, with its loss: a GPT-2's of their tokens, a classifier's of the labels.

    ids, mask (batch, time), labels (batch,), all int64, on any device.
    """
    ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels))
    if isinstance(model, GPT2LMHeadModel):
        labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels)


def descend(model, loss: torch.Tensor, optimizer, schedule) -> None:
    """An optimiser step down a loss, the norm of its gradient at most 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
