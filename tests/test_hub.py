"""The model hub, through its own client, against a hub on loopback. No clock runs but the one that a test moves."""

import contextlib
import importlib
import io
import os
import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, hf_hub_download
from tqdm import TMonitor

from support import hub as program
from support.errors import UserError
from support.hub import Silence, Watch, explain, is_complete, model_folder
from tests.helpers import write_classifier, write_gpt2
from tests.hub_server import OLDER, Hub
from train_ppo import main


class Clock:
    """Stands still but where a test moves it, and where the client sleeps before it tries again."""

    def __init__(self):
        self.now = 0.0

    def move(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@contextlib.contextmanager
def client(hub, cache, **variables):
    """The hub's client as it is in a process with these environment variables; the clock of the waits."""
    clock = Clock()

    def sleep(seconds):
        clock.move(seconds)
        hub.released.wait(0.3)  # for the watch to see it

    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        places = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(cache), "HF_HOME": f"{cache}-home"}
        for name, value in {**places, **variables}.items():
            patch.setenv(name, value)
        patch.setattr("time.sleep", sleep)
        patch.setattr(program, "time", clock)
        importlib.reload(constants)
        yield clock
    importlib.reload(constants)


def find(hub, cache, name="owner/gpt2", flag="--model_name", **variables) -> tuple[Path | None, str]:
    """The folder of a model and what was printed, or None and the message."""
    with client(hub, cache, **variables), contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            return model_folder(name, flag), printed.getvalue()
        except UserError as error:
            return None, str(error)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model as the hub has it, with files that nothing here needs."""
    folder = write_gpt2(tmp_path / "original")
    (folder / "tf_model.h5").write_bytes(b"of another library")
    (folder / "README.md").write_text("of the model")
    return folder


@pytest.fixture
def hub(folder):
    there = set(threading.enumerate())
    with Hub({"owner/gpt2": folder}) as hub:
        yield hub
    for thread in set(threading.enumerate()) - there - hub.threads:
        if not isinstance(thread, TMonitor):
            thread.join(60)  # a client that was given up would go on talking


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


def add(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(f"content of {name}")


# ----------------------------------------------------------------------------------------------
# What is fetched


def test_what_is_fetched_once_is_used_without_the_hub(hub, folder, cache):
    """The first run fetches what loading needs and no more; afterwards not one request is made."""
    found, printed = find(hub, cache)
    assert printed == f"fetching owner/gpt2 from {hub.url}\n"
    needed = ["config.json", "pytorch_model.bin", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in found.iterdir()) == needed
    assert all((found / path.name).read_bytes() == (folder / path.name).read_bytes() for path in found.iterdir())
    hub.requests.clear()
    assert find(hub, cache) == (found, "") == find(hub, cache, HF_HUB_OFFLINE="1") and not hub.requests


def test_small_files_come_first_and_weights_last_of_which_safetensors_are_preferred(hub, folder, cache):
    small = ["tokenizer.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    small += ["value_head.safetensors"]
    add(folder, *small, "model.safetensors", "generation_config.json")
    find(hub, cache)
    assert hub.fetched()[0] == "config.json" and hub.fetched()[-1] == "model.safetensors"
    assert sorted(hub.fetched()[1:-1]) == sorted([*small, "vocab.txt", "tokenizer_config.json"])


@pytest.mark.parametrize("kind", ["pytorch_model-{}.bin", "model-{}.safetensors"])
def test_sharded_weights_are_complete_with_their_last_shard(hub, folder, cache, kind):
    (folder / "pytorch_model.bin").unlink()
    shards = [kind.format(part) for part in ("00001-of-00002", "00002-of-00002")]
    index = kind.replace("-{}", "") + ".index.json"
    add(folder, *shards)
    (folder / index).write_text(f'{{"weight_map": {{"a": "{shards[0]}", "b": "{shards[1]}"}}}}')
    found, _ = find(hub, cache)
    assert sorted(hub.fetched()[-3:]) == sorted([*shards, index])
    (found / shards[1]).resolve().unlink()
    hub.requests.clear()
    assert find(hub, cache)[0] == found and hub.fetched() == [shards[1]]


def test_a_cache_that_another_program_began_is_completed_from_its_own_revision(hub, folder, tmp_path, cache):
    """from_pretrained of the model alone leaves no vocabulary: that is fetched, and the weights not again."""
    older = shutil.copytree(folder, tmp_path / "older")
    (older / "vocab.txt").write_text("of then")
    hub.commits[OLDER], hub.main = {"owner/gpt2": older}, OLDER
    with client(hub, cache):
        for name in ("config.json", "pytorch_model.bin"):
            hf_hub_download("owner/gpt2", name)
    hub.main = next(commit for commit in hub.commits if commit != OLDER)
    hub.requests.clear()
    found, _ = find(hub, cache)
    assert found.name == OLDER and (found / "vocab.txt").read_text() == "of then"
    assert hub.fetched() == ["vocab.txt", "tokenizer_config.json"]


def test_a_revision_that_the_hub_no_longer_has_is_said(hub, cache):
    hub.commits[OLDER], hub.main = hub.commits[hub.main], OLDER
    with client(hub, cache):
        hf_hub_download("owner/gpt2", "config.json")
    del hub.commits[OLDER]
    hub.main = next(iter(hub.commits))
    store = cache / "models--owner--gpt2"
    assert f"no longer has the version that the cache began with; remove {store} and" in find(hub, cache)[1]


@pytest.mark.parametrize("when", ["config.json", "vocab.txt"])
def test_a_model_that_changes_meanwhile_is_fetched_as_it_was(hub, folder, tmp_path, cache, when):
    newer = shutil.copytree(folder, tmp_path / "newer")
    add(newer, "vocab.txt", "pytorch_model.bin")

    def publish():
        hub.commits[OLDER], hub.main = {"owner/gpt2": newer}, OLDER

    hub.fault, hub.on_fault = ("GET", when, "late"), publish
    found, _ = find(hub, cache)
    assert all((found / path.name).read_bytes() == (folder / path.name).read_bytes() for path in found.iterdir())
    assert hub.main == OLDER


def test_a_cache_of_an_earlier_client_is_used(hub, folder, cache):
    """Its layout, without the listing that clients keep today; only what loading needs is there."""
    snapshot = cache / "models--owner--gpt2" / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("README.md", "tf_model.h5"))
    (cache / "models--owner--gpt2" / "refs").mkdir()
    (cache / "models--owner--gpt2" / "refs" / "main").write_text("abc123")
    assert find(hub, cache)[0] == snapshot and not hub.requests


@pytest.mark.parametrize(
    ("names", "complete"),
    [
        ("config.json vocab.txt model.safetensors", True),
        ("config.json tokenizer.json pytorch_model.bin", True),
        ("config.json vocab.json merges.txt model.safetensors", True),
        ("config.json vocab.json model.safetensors", False),
        ("config.json merges.txt model.safetensors", False),
        ("vocab.txt model.safetensors", False),
        ("config.json vocab.txt", False),
        ("config.json vocab.txt tf_model.h5", False),
        ("config.json vocab.txt model.safetensors.index.json model-00001-of-00002.safetensors", False),
        (
            "config.json vocab.txt model.safetensors.index.json model-00001-of-00002.safetensors "
            "model-00002-of-00002.safetensors",
            True,
        ),
    ],
)
def test_a_folder_is_complete_with_config_vocabulary_and_all_weights(tmp_path, names, complete):
    add(tmp_path, *names.split())
    if "index" in names:
        shards = '{"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}'
        (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {shards}}}')
    assert is_complete(tmp_path) == complete


def test_a_link_that_leads_nowhere_is_no_file(tmp_path):
    add(tmp_path, "config.json", "vocab.txt")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    assert not is_complete(tmp_path)


def test_a_token_opens_a_private_model(hub, cache):
    hub.token = "secret"
    found, message = find(hub, cache)
    assert found is None and "knows no such public model (401)" in message and "set HF_TOKEN" in message
    assert find(hub, cache, HF_TOKEN="secret")[0]


def test_xet_is_left_out_behind_a_mirror(hub, cache):
    """A mirror passes on that a file lies in Xet's storage, which is another host and may be blocked."""
    hub.fault = ("HEAD", "pytorch_model.bin", "xet")
    assert find(hub, cache)[0]


def test_a_connection_that_breaks_is_taken_up_again(hub, folder, cache):
    """The client goes on where a file broke off."""
    hub.fault = ("GET", "pytorch_model.bin", "cut once")
    found, _ = find(hub, cache)
    assert (found / "pytorch_model.bin").read_bytes() == (folder / "pytorch_model.bin").read_bytes()


# ----------------------------------------------------------------------------------------------
# What is refused before the weights


@pytest.mark.parametrize(
    "absent, said",
    [("vocab.txt", "no vocabulary"), ("pytorch_model.bin", "no weights"), ("config.json", "no config.json")],
)
def test_a_model_that_lacks_a_file_is_refused_before_anything_is_fetched(hub, folder, cache, absent, said):
    (folder / absent).unlink()
    found, message = find(hub, cache, flag="--reward_model_name")
    assert found is None and not any("resolve" in request for request in hub.requests)
    assert message.startswith(
        f"--reward_model_name owner/gpt2: the model on the hub has {said}; its files are README.md,"
    )


def test_a_model_of_another_kind_is_refused_before_its_weights(hub, cache):
    seen = []

    def check(folder):
        seen.extend(path.name for path in folder.iterdir())
        raise UserError("of another kind")

    with client(hub, cache), pytest.raises(UserError, match="^of another kind$"):
        model_folder("owner/gpt2", "--model_name", check)
    assert sorted(seen) == sorted(hub.fetched()) == ["config.json", "tokenizer_config.json", "vocab.txt"]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_disk_without_room_is_told_before_the_weights(hub, folder, cache, monkeypatch, missing):
    """Room is needed for config and weights; what fits exactly fits."""
    (folder / "pytorch_model.bin").write_bytes(bytes(5 * 2**20 - (folder / "config.json").stat().st_size))
    usage = SimpleNamespace(total=2**30, used=2**30, free=5 * 2**20 - missing)
    looked_at = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: looked_at.append(path) or usage)
    found, message = find(hub, cache)
    assert bool(found) == (not missing) and cache in looked_at
    if missing:
        said = f"no room in {cache}: 5 MiB are needed, 5 MiB are free; set HF_HOME to a folder on a larger disk"
        assert message == said and "pytorch_model.bin" not in hub.fetched()


@pytest.mark.parametrize("name", ["./missing", "../missing", "~/missing", "a/b/c", "C:\\models", "/gpt2", "-/.hidden"])
def test_what_looks_like_a_folder_is_never_asked_for(name):
    with pytest.raises(UserError) as refused:
        model_folder(name, "--reward_model_name")
    assert (
        str(refused.value) == f"--reward_model_name {name}: there is no such folder, and it is no hub id (owner/model)"
    )


@pytest.mark.parametrize("name", ["owner/gpt2.git", "owner--x/gpt2"])
def test_a_name_that_the_client_refuses_is_no_hub_id(hub, cache, name):
    assert find(hub, cache, name)[1].startswith(f"{name} is no hub id: ") and not hub.requests


def test_a_folder_wins_over_a_hub_id_of_the_same_name(hub, tmp_path, cache, monkeypatch):
    (tmp_path / "owner" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find(hub, cache)[0] == Path("owner/gpt2") and not hub.requests


def test_a_folder_may_begin_at_home(tmp_path, monkeypatch):
    (tmp_path / "gpt2").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert model_folder("~/gpt2", "--model_name") == tmp_path / "gpt2"


def test_demo_is_the_demos_models(demo):
    assert (model_folder("demo", "--model_name"), model_folder("demo", "--reward_model_name")) == demo


def test_a_hub_id_may_lack_its_owner(hub, folder, cache):
    hub.commits[hub.main]["gpt2"] = folder
    found, _ = find(hub, cache, "gpt2")
    assert found.is_relative_to(cache / "models--gpt2")


# ----------------------------------------------------------------------------------------------
# A hub at fault

SILENT = ("hang", "stall")
FAULTS = [  # (method, part of the path, what happens), headers of the answer, part of the message
    (("GET", "/api/models", "hang"), {}, r"does not answer, or no longer\. Set HF_HUB_ETAG_TIMEOUT=60"),
    (("HEAD", "pytorch_model.bin", "hang"), {}, r"does not answer"),
    (("HEAD", "config.json", "hang"), {}, r"HF_HUB_DOWNLOAD_TIMEOUT=60 where it is only slow, or set HF_ENDPOINT"),
    (("GET", "pytorch_model.bin", "stall"), {}, r"does not answer, or no longer"),
    (("GET", "/api/models", 503), {}, r"out of order \(503 Service Unavailable\); try later, or set HF_ENDPOINT"),
    (("HEAD", "vocab.txt", 503), {}, r"out of order \(503"),
    (("GET", "pytorch_model.bin", 503), {}, r"out of order \(503"),
    (("GET", "/api/models", 401), {}, r"refuses access \(401\).* HF_TOKEN"),
    (("HEAD", "pytorch_model.bin", 403), {}, r"refuses access \(403\).* HF_TOKEN"),
    (
        ("HEAD", "config.json", 403),
        {"X-Error-Code": "GatedRepo"},
        r"gated \(403\); accept the terms at .*/owner/gpt2 and",
    ),
    (("GET", "/api/models", 404), {"X-Error-Code": "RepoNotFound"}, r"no such public model \(404\).*check the name"),
    (("GET", "/api/models", 404), {}, r"no such public model \(404\).*check the name"),
    (("GET", "/api/models", 429), {}, r"too many requests from here \(429\); wait"),
    (("GET", "pytorch_model.bin", 429), {"Retry-After": "300"}, r"too many requests from here \(429\); wait"),
    (("GET", "/api/models", "page"), {}, r"no model hub, but perhaps the login page"),
    (("HEAD", "config.json", "page"), {}, r"no model hub, but perhaps the login page"),
    (("GET", "pytorch_model.bin", "cut"), {}, r"broke; try again, or set HF_ENDPOINT"),
]


@pytest.mark.parametrize(("fault", "headers", "said"), FAULTS)
def test_what_is_wrong_with_the_hub_is_one_line(hub, cache, fault, headers, said):
    """With the cause and the way out; nothing unfinished stays in the cache, and the next try succeeds."""
    hub.fault, hub.headers = fault, headers
    with client(hub, cache) as clock:
        if fault[2] in SILENT:
            hub.on_fault = lambda: clock.move(26)
        with pytest.raises(UserError, match=said) as refused:
            model_folder("owner/gpt2", "--model_name")
    message = str(refused.value)
    assert message.startswith("--model_name owner/gpt2 cannot be fetched: ") and "\n" not in message
    assert not list(cache.rglob("*.incomplete"))
    hub.fault = None
    hub.released.set()
    assert (find(hub, cache)[0] / "pytorch_model.bin").is_file()


@pytest.mark.parametrize(("variable", "seconds"), [({}, 25), ({"HF_HUB_ETAG_TIMEOUT": "60"}, 150)])
def test_a_silent_hub_is_given_up_after_its_time(hub, cache, variable, seconds):
    hub.fault = ("HEAD", "config.json", "hang")
    assert given_up(hub, cache, seconds, lambda: None, variable)


@pytest.mark.parametrize(("variable", "seconds"), [({}, 55), ({"HF_HUB_DOWNLOAD_TIMEOUT": "60"}, 330)])
def test_a_download_that_stalls_is_given_up_after_its_time(hub, cache, variable, seconds):
    """Counted from what came in last, which may also come to another process that fetches the same model."""
    hub.fault = ("GET", "pytorch_model.bin", "hang")
    other = cache / "models--owner--gpt2" / "blobs" / "other.incomplete"
    other.parent.mkdir(parents=True)
    other.touch()
    assert given_up(hub, cache, seconds, lambda: other.write_bytes(b"bytes"), variable, after=5)


def test_a_file_that_grows_is_something_that_comes_in(tmp_path):
    watch, file = Watch(tmp_path, 1, 1), tmp_path / "of another process.incomplete"
    states = [watch.received()]
    for content in (b"two", b"longer"):
        file.write_bytes(content)
        states.append(watch.received())
    assert len(set(states)) == 3


def given_up(hub, cache, seconds: int, at_fault, variables: dict, after=0) -> bool:
    """Whether the program waits 0.1 s less than `seconds` from `after` the fault on, and no longer than 0.1 s more."""
    came = threading.Event()
    hub.on_fault = came.set
    with client(hub, cache, **variables) as clock:
        times = [after] * 4 + [after + seconds - 0.1] * 2 + [after + seconds + 0.1]

        def monotonic():
            if came.is_set():
                if len(times) == 7:
                    at_fault()
                clock.now = times.pop(0) if times else 10_000
            return clock.now

        clock.monotonic = monotonic
        with pytest.raises(UserError, match="does not answer"):
            model_folder("owner/gpt2", "--model_name")
    return clock.now == after + seconds + 0.1


def test_what_the_client_said_last_is_said(hub, cache):
    """Without the address, which is long and no help."""
    hub.fault = ("GET", "pytorch_model.bin", "stall")
    with client(hub, cache, HF_HUB_DOWNLOAD_TIMEOUT="1") as clock:  # after it the client tries again
        hub.on_fault = lambda: clock.move(24.5)
        with pytest.raises(UserError, match=r"or no longer \(Error while downloading: [^/\n]*\)\. Set HF_HUB_ETAG"):
            model_folder("owner/gpt2", "--model_name")


def test_a_slow_hub_works_once_the_limit_is_raised(hub, cache):
    """Thirty seconds for an answer."""
    hub.fault = ("HEAD", "config.json", "late")
    with client(hub, cache, HF_HUB_ETAG_TIMEOUT="60") as clock:
        hub.on_fault = lambda: clock.move(30)
        assert model_folder("owner/gpt2", "--model_name").is_dir() and clock.now >= 30


def test_no_connection(hub, cache, capsys):
    """One line, exit code 2, and no traceback."""
    with client(hub, cache, HF_ENDPOINT="http://127.0.0.1:9"):
        assert main(["--model_name", "owner/gpt2", "--device", "cpu"]) == 2
    said = "--model_name owner/gpt2 cannot be fetched: no connection to http://127.0.0.1:9; set HF_ENDPOINT to a mirror"
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"train_ppo.py: error: {said}") and "Traceback" not in err


def test_a_cache_that_cannot_be_written(hub, cache):
    cache.write_text("a file where the cache should be")
    assert f"{cache} cannot be written (Not a directory); set HF_HOME" in find(hub, cache)[1]


def test_offline_without_a_cache(hub, cache):
    message = find(hub, cache, flag="--reward_model_name", HF_HUB_OFFLINE="1")[1]
    store = cache / "models--owner--gpt2"
    assert f"HF_HUB_OFFLINE is set, and the cache {store} lacks files; unset it, or --reward_model_name PATH" in message
    assert not hub.requests


def error_of_kind(name: str, base=Exception, text="it broke", **attributes) -> Exception:
    """As the HTTP client raises it, in whichever module it has it."""
    error = type(name, (base,), {})(text)
    error.__dict__.update(attributes)
    return error


MIRROR = "set HF_ENDPOINT to a mirror of the hub, --model_name PATH to a local folder, or take --preset demo"
ANSWER = SimpleNamespace(status_code=500)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left"), r"the disk of /cache is full; free some room, or set HF_HOME to a folder on a"),
        (
            PermissionError(13, "Permission denied"),
            r"the cache /cache cannot be written \(Permission denied\); set HF_HOME",
        ),
        (
            error_of_kind("HfHubHTTPError", response=ANSWER),
            rf"out of order \(500 Internal Server Error\).*, or {MIRROR}$",
        ),
        (
            error_of_kind("ReadTimeout", type("TimeoutException", (Exception,), {})),
            rf"does not answer, or.*or {MIRROR}$",
        ),
        (error_of_kind("FileMetadataError"), rf"is no model hub, but .*; open it in a browser, or {MIRROR}$"),
        (KeyError("sha"), "is no model hub, but perhaps the login page"),
        (error_of_kind("ConnectError", type("TransportError", (Exception,), {})), rf"no connection to .*; {MIRROR}$"),
        (error_of_kind("ReadError", type("TransportError", (Exception,), {})), rf"broke; try again, or {MIRROR}$"),
        (OSError("Consistency check failed: file should be"), rf"broke; try again, or {MIRROR}$"),
        (RuntimeError("Data processing error\nof Xet"), rf"^RuntimeError: Data processing error; {MIRROR}$"),
        (Silence("HTTP Error 429 thrown while requesting"), r"too many requests from here \(429\); wait"),
        (
            Silence("Error while downloading: timed out"),
            r"no longer \(Error while downloading: timed out\)\. Set HF_HUB",
        ),
    ],
)
def test_every_failure_has_its_way_out(error, said, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert re.search(said, explain(error, "owner/gpt2", "--model_name", Path("/cache/models--owner--gpt2")))


@pytest.mark.parametrize("error", [Silence(""), RuntimeError("Data processing error")])
def test_xet_is_named_where_it_may_be_the_cause(error, monkeypatch):
    for disabled in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", disabled)
        said = explain(error, "owner/gpt2", "--model_name", Path("/cache/models--owner--gpt2"))
        assert ("HF_HUB_DISABLE_XET=1" in said) == (not disabled)


def test_the_cause_of_a_failure_that_the_cache_does_not_help_is_said():
    from huggingface_hub.errors import LocalEntryNotFoundError

    error = LocalEntryNotFoundError("not in the cache either")
    error.__cause__ = error_of_kind("ConnectError")
    assert "no connection to" in explain(error, "owner/gpt2", "--model_name", Path("/cache/models--owner--gpt2"))


# ----------------------------------------------------------------------------------------------
# The watch


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """A watch for 10 s and 20 s on an empty folder, and its clock."""
    clock = Clock()
    monkeypatch.setattr(program, "time", clock)
    return Watch(tmp_path, 10, 20), clock


def test_a_watched_call_gives_its_result_or_its_error(watch):
    watched, _ = watch
    assert watched(lambda: 5) == 5
    with pytest.raises(KeyError, match="no such word"):
        watched(lambda: {}["no such word"])


@pytest.mark.parametrize("came", [False, True])
def test_a_silence_is_longer_once_something_came_in(watch, came):
    """Ten seconds for the answer, and after it twenty from the last byte on; each call begins anew."""
    watched, clock = watch
    gone, times = threading.Event(), []

    def tells_the_time():
        times.append(clock.now)
        clock.now += 3
        return clock.now

    bar = watched.progress_bar()(total=100, disable=True)
    clock.now = 1000.0
    assert watched(lambda: 5) == 5
    clock.monotonic = tells_the_time
    with pytest.raises(Silence):
        watched(lambda: (came and bar.update(10), gone.wait()))
    gone.set()
    waited = clock.now - times[0]
    assert 20 < waited <= 32 if came else 10 < waited <= 18


def test_what_a_broken_call_left_unfinished_is_removed(watch, tmp_path):
    """And what was there before stays: the client goes on with it."""
    watched, clock = watch
    (tmp_path / "before.incomplete").write_text("half")
    gone = threading.Event()

    def stalls():
        (tmp_path / "mine.incomplete").write_text("half")
        (tmp_path / "whole").write_text("whole")
        clock.move(25)
        gone.wait()

    with pytest.raises(Silence):
        clock.monotonic = lambda: clock.now if clock.now < 25 else clock.move(25) or clock.now
        watched(stalls)
    gone.set()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before.incomplete", "whole"]


# ----------------------------------------------------------------------------------------------
# A run


def test_a_run_goes_on_when_the_hub_is_gone(hub, tmp_path, cache, capsys):
    """A run with hub ids; then, without the hub, --resume and --eval_only of it."""
    models = hub.commits[hub.main]
    models |= {"owner/gpt2": write_gpt2(tmp_path / "gpt2"), "owner/sentiment": write_classifier(tmp_path / "sentiment")}
    flags = "--model_name owner/gpt2 --reward_model_name owner/sentiment --device cpu --batch_size 4 --minibatch_size 4"
    flags += " --gen_len 4 --eval_samples 4 --dtype float32 --episodes 4 --run_name one"
    run = tmp_path / "runs" / "one"
    with client(hub, cache):
        assert main([*flags.split(), "--runs_dir", str(run.parent)]) == 0
    assert f"fetching owner/gpt2 from {hub.url}\nfetching owner/sentiment from {hub.url}\n" in capsys.readouterr().out
    hub.fault = ("GET", "", 503)
    hub.requests.clear()
    with client(hub, cache):
        assert main(["--resume", str(run), "--episodes", "8"]) == 0
        assert main(["--eval_only", str(run)]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 3 and not hub.requests
