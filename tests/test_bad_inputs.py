"""Every case of tools/bad_inputs.py: exit code 2, one line on stderr, nothing harmed; and the Chinese page."""

import re
from pathlib import Path

import pytest
import torch

import train_ppo
from support import devices
from support.hub import Silence, explain
from tests.helpers import ROOT
from tests.test_hub import error_of_kind
from tools.bad_inputs import BROKEN, FLAGS, try_out, workplace


@pytest.mark.parametrize(("flags", "said"), FLAGS, ids=[flags for flags, _ in FLAGS])
def test_bad_flags(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, err, _ = try_out(flags)
    assert code == 2 and err.count("\n") == 1
    assert said in err and err.startswith("train_ppo.py: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("what", "change", "command", "said"), BROKEN, ids=[case[0] for case in BROKEN])
def test_broken_files(what, change, command, said, demo, finished):
    with workplace(*demo, finished):
        code, err, unharmed = try_out(command, change)
    lines = err.strip().splitlines()
    assert code == 2 and said in lines[-1] and "error: " in lines[-1]
    assert "Traceback" not in err and unharmed


@pytest.fixture
def elsewhere(monkeypatch, capsys) -> list[str]:
    """Lines that need a network or a GPU at fault, which docs/errors.md does without."""
    begin, end = "--model_name owner/gpt2 cannot be fetched: ", "; and no folder here has that name"
    of_hub = (error_of_kind("ConnectError"), Silence(""))
    said = [begin + explain(error, "owner/gpt2", "--model_name", Path("cache/gpt2")) + end for error in of_hub]

    def no_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(train_ppo, "train", no_memory)
    assert train_ppo.main(["--preset", "demo"]) == 2
    monkeypatch.setattr(devices, "usable_gpus", lambda: 0)
    monkeypatch.setattr(devices, "nvidia_driver", lambda: (1, "12.4"))
    monkeypatch.setattr(torch.version, "cuda", None)
    devices.pick_device("auto")
    printed = capsys.readouterr()
    return said + printed.err.replace("train_ppo.py: error: ", "").splitlines() + printed.out.splitlines()


def test_the_chinese_page_explains_lines_that_are_printed(elsewhere):
    """Each stands in docs/errors.md, or is printed here; '…' in it is what differs from case to case."""
    table = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    said = re.findall(r"(?m)^\| .* \| (.*) \|$", table) + elsewhere
    quoted = re.findall(r"(?m)^\| `(.*?)` \|", (ROOT / "docs/errors.zh.md").read_text(encoding="utf-8"))
    stale = [
        line
        for line in quoted
        if not any(re.fullmatch(".+".join(map(re.escape, line.split("…"))), one) for one in said)
    ]
    assert len(quoted) > 20 and stale == []
