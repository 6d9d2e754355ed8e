"""Fixtures, such as small models that the tests build without a network connection, a GPU or downloaded files."""

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

from support.models.demo_models import demo_models
from tests.helpers import (
    TRACKER,
    draw_no_pixels,
    leave_pictures_empty,
    load_gpt2,
    small_run,
    write_classifier,
    write_gpt2,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are faster on one thread than on several."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))


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
    """A finished run of three steps on the demo models, with all its checkpoints. Tests only change copies of it."""
    code, run_dir = small_run(tmp_path_factory.mktemp("runs"), "--save_every", "1", "--keep_checkpoints", "5")
    assert code == 0
    return run_dir


@pytest.fixture
def without_pictures(monkeypatch):
    """Make runs write an empty rewards.png, because drawing takes longer than a small run."""
    leave_pictures_empty(monkeypatch)


@pytest.fixture
def figures(monkeypatch) -> list:
    """The list of drawn figures, each with its `savefig` options. The files on disk stay empty."""
    return draw_no_pixels(monkeypatch)


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """Run the test in its own temporary folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def signals_restored():
    """Install Python's default signal handlers for the test, and restore the old ones afterwards."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    defaults[signal.SIGHUP] = signal.SIG_DFL
    handlers = {number: signal.signal(number, default) for number, default in defaults.items()}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def policy(gpt2_folder):
    """A fresh policy and its tokenizer."""
    return load_gpt2(gpt2_folder)


@pytest.fixture
def trackers(tmp_path, monkeypatch) -> Path:
    """A folder on sys.path with fake wandb, swanlab and trackio packages, which log their calls to NAME.calls."""
    folder = tmp_path / "trackers"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("wandb", "swanlab", "trackio"):
        (folder / f"{name}.py").write_text(TRACKER, encoding="utf-8")
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("wandb", "swanlab", "trackio"):
        sys.modules.pop(name, None)
