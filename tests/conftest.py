"""Models that the tests make themselves: no network, no GPU, nothing from outside the repository."""

import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from support.demo_models import NEGATIVE, POSITIVE, demo_models

VOCAB = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *"刚收到货,感觉很不错好评差质量快递物流一般满意失望衣服苹果这本书电影!。",
    "good",
    "##s",
]
SPECIAL = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}


def write_model(folder: Path, config: dict, weights: dict, vocab=VOCAB) -> Path:
    """A model folder laid out as the published ones: weights as pytorch_model.bin, vocab.txt, no special-token ids."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    tokenizer = {"do_lower_case": True, "tokenizer_class": "BertTokenizer", "model_max_length": 48, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def write_gpt2(folder: Path, **changes) -> Path:
    """A random GPT-2, two layers 32 wide, with the old attn.bias buffers of published checkpoints."""
    torch.manual_seed(0)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 48, "vocab_size": len(VOCAB)}
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "tokenizer_class": "BertTokenizer",
        **shape,
        **changes,
    }
    config |= {
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "initializer_range": 0.2,
    }
    model = GPT2LMHeadModel(
        GPT2Config(**{k: v for k, v in config.items() if k != "model_type"}, bos_token_id=None, eos_token_id=None)
    )
    weights = dict(model.state_dict())
    for i in range(config["n_layer"]):
        weights[f"transformer.h.{i}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
    return write_model(folder, config, weights)


def write_classifier(folder: Path, labels=(NEGATIVE, POSITIVE)) -> Path:
    """A random BERT classifier, one layer 16 wide."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(VOCAB), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=48, initializer_range=0.5, id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)}, architectures=["BertForSequenceClassification"],
    )  # fmt: skip
    return write_model(
        folder,
        config.to_dict() | {"tokenizer_class": "BertTokenizer"},
        BertForSequenceClassification(config).state_dict(),
    )


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count()))))


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory) -> Path:
    return write_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("models") / "sentiment")


@pytest.fixture(scope="session")
def demo() -> tuple[Path, Path]:
    return demo_models()


@pytest.fixture(scope="session")
def finished(tmp_path_factory, demo) -> Path:
    """The folder of a finished small run, three steps with all their checkpoints; tests change copies of it only."""
    from tests.test_train import small_run

    code, run_dir = small_run(tmp_path_factory.mktemp("runs"), "--save_every", "1", "--keep_checkpoints", "5")
    assert code == 0
    return run_dir


@pytest.fixture
def without_pictures(monkeypatch):
    """Runs leave an empty rewards.png: to draw one takes longer than a small run."""
    monkeypatch.setattr("support.run_folder.draw", lambda runs, out: out.touch())


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, which are neither laid out nor rendered but leave an empty file; and the options of
    `savefig`."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = []

    def savefig(self, out, **options):
        out.touch()
        drawn.append((self, options))

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
    return drawn


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Files of the current folder are the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def signals_restored():
    """Signals mean what they mean to a new process, and afterwards what they meant before."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    defaults[signal.SIGHUP] = signal.SIG_DFL
    handlers = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def policy(gpt2_folder):
    """A fresh policy and its tokenizer."""
    from support.models import load_gpt2_config, load_policy, load_tokenizer

    return load_policy(gpt2_folder, load_gpt2_config(gpt2_folder)), load_tokenizer(gpt2_folder)


TRACKER = """
import json
import sys
from pathlib import Path


def note(*call):
    with Path(__file__).with_suffix(".calls").open("a", encoding="utf-8") as file:
        file.write(json.dumps(call, default=vars) + "\\n")


class Table:
    def __init__(self, columns=None, data=None):
        self.columns, self.data = columns, data

    def add(self, headers, rows):
        self.columns, self.data = headers, rows


class echarts:
    Table = Table


def init(**options):
    note("init", options | {name: str(options[name]) for name in ("dir",) if name in options})
    return sys.modules[__name__]


def log(data, step=None):
    note("log", data, step)


def finish():
    note("finish")
"""


@pytest.fixture
def trackers(tmp_path, monkeypatch) -> Path:
    """A folder on Python's path with stand-ins for wandb, swanlab and trackio, which note in NAME.calls how they are
    called."""
    folder = tmp_path / "trackers"
    folder.mkdir()
    for name in ("wandb", "swanlab", "trackio"):
        (folder / f"{name}.py").write_text(TRACKER, encoding="utf-8")
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
    monkeypatch.syspath_prepend(folder)
    return folder
