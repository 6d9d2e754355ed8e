"""The model hub, through its own client, against a hub on loopback."""

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from config import UserError
from support.hub import model_folder
from tests.conftest import ROOT, write_classifier, write_gpt2
from tests.hub_server import Hub
from train_ppo import main

FIND = """
import sys
from pathlib import Path
from config import UserError
from support.hub import model_folder
{prelude}
try:
    print(model_folder("owner/gpt2", "--model_name"{check}))
except UserError as error:
    sys.exit(str(error))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model as the hub has it, with files that nothing here needs."""
    folder = write_gpt2(tmp_path / "original")
    (folder / "tf_model.h5").write_bytes(b"of another library")
    (folder / "README.md").write_text("of the model")
    return folder


@pytest.fixture
def hub(folder):
    with Hub({"owner/gpt2": folder}) as hub:
        yield hub


def environment(hub, cache, **changes) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    times = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache)} | times | changes


def find(hub, cache, prelude="", check="", **changes) -> tuple[Path | None, str]:
    """model_folder in a process of its own: the folder, or None and the message."""
    code = FIND.format(prelude=prelude, check=check)
    env = environment(hub, cache, **changes)
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode == 0:
        return Path(done.stdout.splitlines()[-1]), done.stdout
    assert "Traceback" not in done.stderr
    return None, done.stderr.strip().splitlines()[-1]


def unfinished(cache) -> list[Path]:
    return list(cache.rglob("*.incomplete"))


def test_what_is_fetched_once_is_used_without_the_hub(hub, folder, tmp_path):
    """The first run fetches what loading needs and no more; afterwards not one request is made."""
    found, _ = find(hub, tmp_path / "cache")
    assert sorted(path.name for path in found.iterdir()) == [
        "config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt",
    ]  # fmt: skip
    assert all((found / path.name).read_bytes() == (folder / path.name).read_bytes() for path in found.iterdir())
    hub.requests.clear()
    assert find(hub, tmp_path / "cache")[0] == found and not hub.requests
    hub.fault = ("GET", "", 503)
    assert find(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")[0] == found


def test_a_cache_that_another_program_began_is_completed(hub, tmp_path):
    """from_pretrained of the model alone leaves no vocabulary: that is fetched, and the weights not again."""
    begin = "from huggingface_hub import hf_hub_download\n"
    begin += "for name in ('config.json', 'pytorch_model.bin'): hf_hub_download('owner/gpt2', name)"
    found, _ = find(hub, tmp_path / "cache", prelude=begin)
    assert (found / "vocab.txt").is_file()
    assert sum(request.startswith("GET") and "pytorch_model.bin" in request for request in hub.requests) == 1


def test_a_cache_of_an_earlier_client_is_used(folder, tmp_path, monkeypatch):
    """Its layout, without the listing that clients keep today; only what loading needs is there."""
    from huggingface_hub import constants

    snapshot = tmp_path / "models--owner--gpt2" / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("README.md", "tf_model.h5"))
    (tmp_path / "models--owner--gpt2" / "refs").mkdir()
    (tmp_path / "models--owner--gpt2" / "refs" / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_folder("owner/gpt2", "--model_name") == snapshot


def test_sharded_weights_are_complete_with_their_last_shard(hub, folder, tmp_path):
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00002.bin")
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"more")
    shards = '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
    (folder / "pytorch_model.bin.index.json").write_text(shards)
    found, _ = find(hub, tmp_path / "cache")
    (found / "pytorch_model-00002-of-00002.bin").unlink()
    assert (find(hub, tmp_path / "cache")[0] / "pytorch_model-00002-of-00002.bin").is_file()


FAULTS = [  # (method, part of the path, what happens), headers of the answer, part of the message
    (("GET", "/api/models", "hang"), {}, r"does not answer.* HF_HUB_ETAG_TIMEOUT=60"),
    (("HEAD", "pytorch_model.bin", "hang"), {}, r"does not answer"),
    (("GET", "pytorch_model.bin", "stall"), {}, r"does not answer, or no longer \(Error while downloading"),
    (("GET", "/api/models", 503), {}, r"out of order \(503 Service Unavailable\); try later"),
    (("HEAD", "vocab.txt", 503), {}, r"out of order \(503"),
    (("GET", "pytorch_model.bin", 503), {}, r"out of order \(503"),
    (("GET", "/api/models", 401), {}, r"refuses access \(401\).* HF_TOKEN"),
    (("HEAD", "pytorch_model.bin", 403), {}, r"refuses access \(403\).* HF_TOKEN"),
    (("HEAD", "config.json", 403), {"X-Error-Code": "GatedRepo"}, r"gated.* accept the terms at .*owner/gpt2"),
    (
        ("GET", "/api/models", 404),
        {"X-Error-Code": "RepoNotFound"},
        r"no such public model \(404\).*check the name",
    ),
    (("GET", "/api/models", 429), {}, r"too many requests from here \(429\); wait"),
    (("GET", "pytorch_model.bin", 429), {"Retry-After": "300"}, r"too many requests from here \(429\); wait"),
    (("GET", "/api/models", "page"), {}, r"no model hub, but perhaps the login page"),
    (("HEAD", "config.json", "page"), {}, r"no model hub, but perhaps the login page"),
    (("HEAD", "config.json", "slow"), {}, r"HF_HUB_ETAG_TIMEOUT=60"),
    (("GET", "pytorch_model.bin", "cut"), {}, r"broke; try again"),
]


@pytest.fixture(scope="module")
def tried(tmp_path_factory) -> dict:
    """What each fault leads to, all tried at the same time: message, seconds, unfinished files, and whether the next
    try succeeded."""
    folder = write_gpt2(tmp_path_factory.mktemp("hub") / "original")

    def try_out(fault, headers, said):
        cache = tmp_path_factory.mktemp("cache")
        with Hub({"owner/gpt2": folder}) as hub:
            hub.fault, hub.headers = fault, headers
            started = time.monotonic()
            limit = "5" if fault[2] == "cut" else "1"  # a second for each of the client's tries
            found, message = find(hub, cache, HF_HUB_ETAG_TIMEOUT=limit, HF_HUB_DOWNLOAD_TIMEOUT=limit)
            seconds, left = time.monotonic() - started, unfinished(cache)
            hub.fault = None
            return found, message, seconds, left, find(hub, cache)[0]

    with ThreadPoolExecutor(5) as pool:
        return dict(zip((fault for fault, *_ in FAULTS), pool.map(lambda case: try_out(*case), FAULTS)))


@pytest.mark.parametrize(("fault", "headers", "said"), FAULTS)
def test_what_is_wrong_with_the_hub_is_said_soon(tried, fault, headers, said):
    """One line with the cause and the way out, within the time limits; nothing unfinished stays in the cache, and the
    next try succeeds."""
    found, message, seconds, left, again = tried[fault]
    assert found is None and seconds < 15
    assert re.search(said, message), message
    assert message.startswith("--model_name owner/gpt2 cannot be fetched: ") and not left
    assert (again / "pytorch_model.bin").is_file()


def test_no_connection(tmp_path, hub):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    assert "no connection to http://127.0.0.1:9; set HF_ENDPOINT" in find(hub, tmp_path / "cache", **nobody)[1]


def test_a_connection_that_breaks_is_taken_up_again(hub, folder, tmp_path):
    """The client goes on where a file broke off."""
    hub.fault = ("GET", "pytorch_model.bin", "cut once")
    patient = {"HF_HUB_ETAG_TIMEOUT": "10", "HF_HUB_DOWNLOAD_TIMEOUT": "10"}
    found, _ = find(hub, tmp_path / "cache", **patient)
    assert (found / "pytorch_model.bin").read_bytes() == (folder / "pytorch_model.bin").read_bytes()


def test_a_slow_hub_works_once_the_limit_is_raised(hub, tmp_path):
    hub.fault = ("HEAD", "config.json", "slow")
    assert find(hub, tmp_path / "cache", HF_HUB_ETAG_TIMEOUT="5")[0]


def test_xet_is_left_out_behind_a_mirror(hub, tmp_path):
    """A mirror passes on that a file lies in Xet's storage, which is another host and may be blocked."""
    hub.fault = ("HEAD", "pytorch_model.bin", "xet")
    assert find(hub, tmp_path / "cache")[0]


@pytest.mark.parametrize(
    "absent, said",
    [("vocab.txt", "no vocabulary"), ("pytorch_model.bin", "no weights"), ("config.json", "no config.json")],
)
def test_a_model_that_lacks_a_file_is_refused_before_anything_is_fetched(hub, folder, tmp_path, absent, said):
    (folder / absent).unlink()
    found, message = find(hub, tmp_path / "cache")
    assert found is None and said in message and "README.md" in message
    assert not any("resolve" in request for request in hub.requests)


def test_a_model_of_another_kind_is_refused_before_its_weights(hub, tmp_path):
    prelude = "def check(folder):\n    assert (folder / 'vocab.txt').is_file()\n    raise UserError('of another kind')"
    assert find(hub, tmp_path / "cache", prelude, ", check")[1] == "of another kind"
    assert not any(request.startswith("GET") and "pytorch_model.bin" in request for request in hub.requests)


def test_a_cache_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache should be")
    message = find(hub, tmp_path / "cache")[1]
    assert f"{tmp_path / 'cache'} cannot be written (Not a directory); set HF_HOME" in message


def test_a_disk_without_room_is_told_before_the_weights(hub, tmp_path):
    prelude = "import shutil\nshutil.disk_usage = lambda path: shutil._ntuple_diskusage(10, 5, 5)"
    assert "MiB are free; set HF_HOME" in find(hub, tmp_path / "cache", prelude)[1]
    assert not any(request.startswith("GET") and "pytorch_model.bin" in request for request in hub.requests)


def test_offline_without_a_cache(hub, tmp_path):
    assert "HF_HUB_OFFLINE is set" in find(hub, tmp_path / "cache", HF_HUB_OFFLINE="1")[1]
    assert not hub.requests


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing", "a/b/c", "C:\\models"])
def test_what_looks_like_a_folder_is_never_asked_for(name):
    with pytest.raises(UserError, match="there is no such folder"):
        model_folder(name, "--model_name")


def test_a_run_goes_on_when_the_hub_is_gone(tmp_path, monkeypatch):
    """A run with hub ids; then, without the hub, --resume and --eval_only of it."""
    from huggingface_hub import constants

    models = {"owner/gpt2": write_gpt2(tmp_path / "gpt2"), "owner/sentiment": write_classifier(tmp_path / "sentiment")}
    flags = (
        "--model_name owner/gpt2 --reward_model_name owner/sentiment --device cpu --batch_size 4 --minibatch_size 4 "
    )
    flags += "--gen_len 4 --eval_samples 4 --dtype float32 --episodes 4 --run_name one"
    run = tmp_path / "runs" / "one"
    with Hub(models) as hub:
        command = [sys.executable, "train_ppo.py", *flags.split(), "--runs_dir", str(run.parent)]
        env = environment(hub, tmp_path / "cache")
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and f"fetching owner/gpt2 from {hub.url}" in done.stdout, done.stderr
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    assert main(["--resume", str(run), "--episodes", "8"]) == 0
    assert main(["--eval_only", str(run)]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
