"""Downloads from the Hub with the real client, which talks to a small hub on localhost."""

import errno
import importlib
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import constants

from support.common.errors import UserError
from support.models.hub import model_folder
from tests.hub_server import Hub

SHARDS = ["{}-00001-of-00002.{}", "{}-00002-of-00002.{}", "{}.{}.index.json"]


@pytest.fixture
def published(tmp_path, gpt2_folder) -> Path:
    """A model as published on the Hub, including files that this program doesn't need."""
    folder = shutil.copytree(gpt2_folder, tmp_path / "published")
    for name in ("tf_model.h5", "README.md"):
        (folder / name).touch()
    return folder


@pytest.fixture
def hub(published):
    with Hub({"owner/gpt2": published}) as hub:
        yield hub


@pytest.fixture
def find(hub, tmp_path, monkeypatch):
    """A function that finds a model as a new process with these variables would. find.waited lists the sleeps."""

    def find(name="owner/gpt2", check=lambda folder: None, **variables) -> Path:
        for variable in [variable for variable in os.environ if variable.startswith("HF_")]:
            monkeypatch.delenv(variable)
        defaults = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        for variable, value in {**defaults, **variables}.items():
            monkeypatch.setenv(variable, value)
        importlib.reload(constants)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        return model_folder(name, "--model_name", check)

    find.waited = []
    monkeypatch.setattr("time.sleep", find.waited.append)
    yield find
    monkeypatch.undo()
    importlib.reload(constants)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["pytorch_model.bin"], ["pytorch_model.bin"]),
        (["pytorch_model.bin", "model.safetensors"], ["model.safetensors"]),
        ([shard.format("model", "safetensors") for shard in SHARDS], None),
        ([shard.format("pytorch_model", "bin") for shard in SHARDS], None),
    ],
    ids=["bin", "both formats", "safetensors in shards", "bin in shards"],
)
def test_only_the_files_that_loading_needs_are_downloaded_and_only_once(hub, published, find, there, wanted):
    (published / "pytorch_model.bin").unlink()
    for name in there:
        (published / name).write_text(f"content of {name}")
    small = {"config.json", "vocab.txt", "tokenizer_config.json"}
    folder = find()
    assert names(folder) == small | set(wanted or there)
    assert all(request.endswith("/config.json") for request in hub.requests if "/main/" in request)  # others by commit
    assert all((folder / name).read_bytes() == (published / name).read_bytes() for name in names(folder))
    hub.requests.clear()
    assert find() == folder == find(HF_HUB_OFFLINE="1") and hub.requests == []
    for name in {"config.json", "vocab.txt", *(wanted or there[:2])}:  # as after an interrupted download
        (folder / name).resolve().unlink()
        assert find() == folder and (folder / name).read_bytes() == (published / name).read_bytes()


def test_weights_are_only_downloaded_after_the_small_files_have_passed_the_check(hub, published, find):
    for name in ("tokenizer.json", "merges.txt", "vocab.json", "value_head.safetensors"):
        (published / name).touch()
    seen = []

    def check(folder):
        seen.append(names(folder))
        raise UserError("of another kind")

    with pytest.raises(UserError, match="^of another kind$"):
        find(check=check)
    assert seen == [names(published) - {"tf_model.h5", "README.md", "pytorch_model.bin"}]
    assert "pytorch_model.bin" not in hub.fetched()
    assert "pytorch_model.bin" in names(find(check=lambda folder: seen.append(folder)))


@pytest.mark.parametrize("missing", ["vocab.txt", "pytorch_model.bin"])
def test_a_model_without_a_needed_file_is_rejected_before_any_download(hub, published, find, missing):
    (published / missing).unlink()
    (published / "vocab.json").touch()  # is only a vocabulary together with merges.txt
    with pytest.raises(UserError, match="^--model_name owner/gpt2 needs config.json, .* on the Hub are README.md"):
        find()
    assert not hub.fetched()


def test_a_local_folder_is_preferred_to_a_hub_id_and_may_start_with_a_tilde(hub, find, tmp_path, monkeypatch):
    (tmp_path / "owner" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find() == Path("owner/gpt2") and find("~/owner/gpt2") == tmp_path / "owner" / "gpt2"
    assert not hub.requests


FAULTS = [  # (method, part of the path, what the hub does), part of the error
    (("HEAD", "pytorch_model.bin", "hang"), "doesn't answer.* HF_HUB_ETAG_TIMEOUT=60"),
    (("GET", "pytorch_model.bin", "stall"), "doesn't answer"),
    (("GET", "/api/models", 503), "has a problem .*503.* try later, or set HF_ENDPOINT .* --model_name to the path"),
    (("HEAD", "config.json", 403), "refuses access; .* at .*/owner/gpt2 and set HF_TOKEN"),
    (("GET", "/api/models", 404), "has no such model; check the name"),
    (("GET", "/api/models", "page"), "isn't a model hub, or a login page answered instead"),
    (("GET", "pytorch_model.bin", "cut"), "can't be reached.* try later"),
]


@pytest.mark.parametrize(("fault", "line"), FAULTS, ids=[" ".join(map(str, fault[0])) for fault in FAULTS])
def test_a_hub_failure_gives_a_one_line_error_within_two_minutes(hub, find, fault, line):
    """This assumes the client's default timeout of 10 seconds per request. The next attempt succeeds."""
    faults = []
    hub.fault, hub.on_fault = fault, lambda: faults.append(fault)
    with pytest.raises(UserError, match=line) as error:
        find()
    assert str(error.value).startswith("--model_name owner/gpt2: ") and "\n" not in str(error.value)
    assert 10 * len(faults) + sum(find.waited) <= 120
    hub.fault = None
    hub.released.set()
    assert "pytorch_model.bin" in names(find())


def test_xet_storage_is_not_used(hub, published, find):
    hub.fault = ("HEAD", "pytorch_model.bin", "xet")
    assert (find() / "pytorch_model.bin").read_bytes() == (published / "pytorch_model.bin").read_bytes()


def test_an_invalid_name_offline_mode_and_a_full_disk_give_one_line_errors(hub, find, monkeypatch):
    with pytest.raises(UserError, match="this folder doesn't exist, and it isn't a Hub id"):
        find("./missing")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        find(HF_HUB_OFFLINE="1")
    assert not hub.requests
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", Mock(side_effect=full))
    with pytest.raises(UserError, match="No space left on device; .* set HF_HOME"):
        find()
