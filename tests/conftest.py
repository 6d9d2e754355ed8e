"""Models that the tests make themselves: no network, no GPU, nothing from outside the repository."""

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
    """The folder of a finished small run, three steps with all their checkpoints; tests change copies of it only."""
    code, run_dir = small_run(tmp_path_factory.mktemp("runs"), "--save_every", "1", "--keep_checkpoints", "5")
    assert code == 0
    return run_dir


@pytest.fixture
def without_pictures(monkeypatch):
    """Runs leave an empty rewards.png: to draw one takes longer than a small run."""
    leave_pictures_empty(monkeypatch)


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are drawn, each with the options of `savefig`. They leave an empty file."""
    return draw_no_pixels(monkeypatch)


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
    return load_gpt2(gpt2_folder)


@pytest.fixture
def trackers(tmp_path, monkeypatch) -> Path:
    """A folder on Python's path with stand-ins for wandb, swanlab and trackio, which note their calls in NAME.calls."""
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
