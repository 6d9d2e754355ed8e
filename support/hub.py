"""Where a model's files are: a local folder, the demo's, or the model hub's (its cache first)."""

import contextlib
import errno
import http
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from support.errors import UserError
from support.files import damaged, path_errors, read_json

NEEDED = "config.json"
VOCABULARIES = (("vocab.txt",), ("tokenizer.json",), ("vocab.json", "merges.txt"))
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"
VALUE_HEAD = "value_head.safetensors"  # of a model that was trained here
SMALL = (NEEDED, *(file for vocabulary in VOCABULARIES for file in vocabulary), *TOKENIZER, VALUE_HEAD)
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")


@path_errors()
def model_folder(name: str, flag: str, check: Callable[[Path], None] = lambda folder: None) -> Path:
    """The local folder of a model: as given, made on the spot for 'demo', or from the hub (its cache first).

    A model that is in the cache makes no request at all; what a cache lacks is fetched, the weights last. check(folder)
    looks at a model's small files before its weights are fetched. UserError where the model cannot be had, at most a
    minute after the hub went silent (HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT, 10 seconds each, make that more).
    """
    if name == "demo":
        from support.demo_models import demo_models

        return demo_models()[0 if flag == "--model_name" else 1]
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    if not re.fullmatch(HUB_ID, name):
        raise UserError(f"{flag} {name}: there is no such folder, and it is no hub id (owner/model)")
    cached = cached_folder(name)
    return cached if cached and is_complete(cached) else fetch(name, flag, cached, check)


# ----------------------------------------------------------------------------------------------
# The cache


def cached_folder(name: str) -> Path | None:
    """The folder of a model's files in the hub's cache, complete or not."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, NEEDED)
    except HFValidationError as error:
        raise UserError(f"{name} is no hub id: {error}")
    return Path(config).parent if isinstance(config, str) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder holds all that loading needs: config, a vocabulary, and every file of the weights."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    weights = wanted_weights(names)
    for index in (name for name in weights if name.endswith(".index.json")):
        with damaged(folder / index, "remove it"):
            shards = read_json(folder / index, "remove it")["weight_map"].values()
        weights = weights if names >= set(shards) else []
    return NEEDED in names and has_vocabulary(names) and bool(weights)


def has_vocabulary(names) -> bool:
    return any(set(vocabulary) <= set(names) for vocabulary in VOCABULARIES)


def wanted_weights(names) -> list[str]:
    """The files of a model's weights: safetensors where there are any, else torch's format."""
    found = [sorted(name for name in names if re.fullmatch(pattern, name)) for pattern in WEIGHTS]
    return found[0] or found[1]


# ----------------------------------------------------------------------------------------------
# The hub


def fetch(name: str, flag: str, cached: Path | None, check: Callable[[Path], None]) -> Path:
    """Bring what loading needs of a model into the hub's cache; the folder there. UserError where that fails.

    A cache that was begun is completed with files of the same revision.
    """
    from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    if constants.ENDPOINT != "https://huggingface.co":
        # Xet's storage is another host, which a mirror does not stand for. The client reads its variable at import only
        constants.HF_HUB_DISABLE_XET = True
    timeout = constants.HF_HUB_ETAG_TIMEOUT
    store = Path(constants.HF_HUB_CACHE, "--".join(["models", *name.split("/")]))
    watched = Watch(store / "blobs", 2.5 * timeout, 5.5 * constants.HF_HUB_DOWNLOAD_TIMEOUT)
    revision = cached.name if cached else None
    try:
        info = watched(lambda: HfApi().model_info(name, revision=revision, timeout=timeout))
        names = [file.rfilename for file in info.siblings]
        weights = wanted_weights(names)
        for what, there in ((NEEDED, NEEDED in names), ("weights", weights), ("vocabulary", has_vocabulary(names))):
            if not there:
                raise UserError(f"{flag} {name}: the model on the hub has no {what}; its files are {', '.join(names)}")
        print(f"fetching {name} from {constants.ENDPOINT}", flush=True)
        n_bytes = 0
        for file in (NEEDED, *weights):
            url = hf_hub_url(name, file, revision=info.sha)
            n_bytes += watched(lambda url=url: get_hf_file_metadata(url, timeout=timeout)).size or 0

        def bring(file: str, revision: str | None) -> Path:
            bar = watched.progress_bar()
            return Path(watched(lambda: hf_hub_download(name, file, revision=revision, tqdm_class=bar))).parent

        folder = bring(NEEDED, revision)
        for file in (file for file in SMALL[1:] if file in names):
            bring(file, folder.name)  # the same commit, even if the model changes meanwhile
        check(folder)
        check_room(store, n_bytes)
        for file in weights:
            bring(file, folder.name)
        return folder
    except UserError:
        raise
    except Exception as error:
        reason = explain(error, name, flag, store)
        raise UserError(f"{flag} {name} cannot be fetched: {reason}; and no folder here has that name")


class Silence(Exception):
    """Nothing came from the hub for a while. Its message is what the client said last."""


class Watch:
    """Calls a function that talks to the hub, and gives up where nothing comes in for too long.

    The client tries again for minutes where a hub hangs. Here a function may take `for_answer` seconds until the first
    byte of a file, and after it `for_bytes` seconds without another. blobs: the cache folder that files grow in, also
    where another process fetches the same model and this one waits for it. Silence where the time is over.
    """

    def __init__(self, blobs: Path, for_answer: float, for_bytes: float):
        self.blobs, self.for_answer, self.for_bytes = blobs, for_answer, for_bytes
        self.n_updates = 0
        self.last_words = ""
        handler = logging.Handler(logging.WARNING)
        handler.emit = self.listen
        logging.getLogger("huggingface_hub").addHandler(handler)

    def __call__(self, function: Callable):
        outcome = []

        def call():
            try:
                outcome[:] = [function(), None]
            except BaseException as error:
                outcome[:] = [None, error]

        unfinished = set(self.unfinished_files())
        received, since, patience = self.received(), time.monotonic(), self.for_answer
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(0.1)
                if self.received() != received:
                    received, since, patience = self.received(), time.monotonic(), self.for_bytes
                if time.monotonic() - since > patience:
                    raise Silence(self.last_words)
        except BaseException:
            for path in set(self.unfinished_files()) - unfinished:
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        result, error = outcome
        if error is not None:
            raise error
        return result

    def received(self) -> tuple[int, int]:
        """What changes whenever something comes in."""
        sizes = 0
        for path in self.unfinished_files():
            with contextlib.suppress(OSError):
                sizes += path.stat().st_size
        return self.n_updates, sizes

    def unfinished_files(self):
        return self.blobs.glob("*.incomplete")

    def progress_bar(self):
        """A tqdm class that tells this watch of what comes in."""
        from huggingface_hub.utils import tqdm

        class Bar(tqdm):
            def update(bar, n=1):
                self.n_updates += 1
                return super().update(n)

        return Bar

    def listen(self, record: logging.LogRecord) -> None:
        if "rror" in (words := record.getMessage().splitlines()[0]):
            self.last_words = re.sub(r"( from)? https?://\S+?(?=:? |$)", "", words)


# ----------------------------------------------------------------------------------------------
# What went wrong


def check_room(store: Path, needed: int) -> None:
    """UserError where the disk has no room for files of `needed` bytes."""
    free = shutil.disk_usage(next(path for path in store.parents if path.exists())).free
    if free < needed:
        room = f"{needed / 2**20:.0f} MiB are needed, {free / 2**20:.0f} MiB are free"
        raise UserError(f"no room in {store.parent}: {room}; set HF_HOME to a folder on a larger disk")


def explain(error: Exception, name: str, flag: str, store: Path) -> str:
    """Why the hub's client failed, and the way out that fits, in one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # of which the client only says that the cache does not help
    kinds = {kind.__name__ for kind in type(error).__mro__}  # httpx's errors have other modules in other versions
    words = str(error) if isinstance(error, Silence) else ""
    retried = re.search(r"HTTP Error (\d+)", words)
    status = int(retried[1]) if retried else getattr(getattr(error, "response", None), "status_code", None)
    hub = constants.ENDPOINT
    elsewhere = f"set HF_ENDPOINT to a mirror of the hub, {flag} PATH to a local folder, or take --preset demo"
    if "OfflineModeIsEnabled" in kinds:
        return f"HF_HUB_OFFLINE is set, and the cache {store} lacks files; unset it, or {flag} PATH to a local folder"
    if "GatedRepoError" in kinds:
        return f"access is gated ({status}); accept the terms at {hub}/{name} and set HF_TOKEN to your token"
    if "RevisionNotFoundError" in kinds:
        return f"{hub} no longer has the version that the cache began with; remove {store} and try again"
    if "RepositoryNotFoundError" in kinds or status == 404:
        return f"{hub} knows no such public model ({status}); check the name, and for a private model set HF_TOKEN"
    if status in (401, 403):
        return f"{hub} refuses access ({status}); check the name, and set HF_TOKEN to a token that may read it"
    if status == 429:
        return f"{hub} has had too many requests from here (429); wait some minutes, or set HF_TOKEN to your token"
    if status:
        return f"{hub} is out of order ({status} {http.HTTPStatus(status).phrase}); try later, or {elsewhere}"
    if "Silence" in kinds or "TimeoutException" in kinds:
        xet = "" if constants.HF_HUB_DISABLE_XET else "HF_HUB_DISABLE_XET=1 where Xet's storage is blocked, "
        longer = "HF_HUB_ETAG_TIMEOUT=60 and HF_HUB_DOWNLOAD_TIMEOUT=60 where it is only slow, "
        return f"{hub} does not answer, or no longer{f' ({words})' if words else ''}. Set {longer}{xet}or {elsewhere}"
    if getattr(error, "errno", None) == errno.ENOSPC:
        return f"the disk of {store.parent} is full; free some room, or set HF_HOME to a folder on a larger disk"
    if getattr(error, "errno", None):
        return f"the cache {store.parent} cannot be written ({error.strerror}); set HF_HOME to a folder that can"
    if kinds & {"JSONDecodeError", "FileMetadataError", "TypeError", "AttributeError", "KeyError"}:
        return (
            f"what answers at {hub} is no model hub, but perhaps the login page of this network; open it in a browser, "
            f"or {elsewhere}"
        )
    if "ConnectError" in kinds:
        return f"no connection to {hub}; {elsewhere}"
    if "TransportError" in kinds or "Consistency check failed" in str(error):
        return f"the connection to {hub} broke; try again, or {elsewhere}"
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    xet = "" if constants.HF_HUB_DISABLE_XET else "; HF_HUB_DISABLE_XET=1 avoids Xet's storage"
    return f"{reason}{xet}; {elsewhere}"
