"""Find the files of a model: in a local folder, among the demo models, in the Hugging Face cache, or on the Hub."""

import os
import re
from collections.abc import Callable
from pathlib import Path

from support.common.errors import UserError, first_line
from support.common.files import path_errors, read_json
from support.models.demo_models import demo_models

VALUE_HEAD = "value_head.safetensors"  # only models trained here have one
VOCABULARIES = ({"vocab.txt"}, {"tokenizer.json"}, {"vocab.json", "merges.txt"})
SMALL = rf"[\w.-]+\.(json|txt)|{VALUE_HEAD}"
WEIGHTS = (r"model(-\d+-of-\d+)?\.safetensors", r"pytorch_model(-\d+-of-\d+)?\.bin")
STAND_INS = {  # first bytes of files that a failed download leaves instead of the real one
    b"version https://git-lfs": "a git-lfs pointer, not the file itself: run `git lfs pull` in that folder, or use",
    b"<!doctype html": "a web page, not the file itself: use",
}
HUB_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"


@path_errors()
def model_folder(name: str, flag: str, check: Callable[[Path], object] = lambda folder: None) -> Path:
    """Return the local folder of a model: the folder given, a demo model, or a download from the Hub.

    `check(folder)` may reject a model's small files before its weights are downloaded. Raises UserError if the model
    can't be found or downloaded.
    """
    if name == "demo":
        return demo_models()[0 if flag in ("--model_name", "--reference", "--base") else 1]
    if os.path.isdir(folder := os.path.expanduser(name)):
        return Path(folder)
    if not re.fullmatch(HUB_ID, name):
        raise UserError(f"{flag} {name}: this folder doesn't exist, and it isn't a Hub id (owner/model) either")
    from huggingface_hub.errors import HTTPError

    try:
        return from_cache_or_hub(name, flag, check)
    except UserError:
        raise
    except (OSError, ValueError, HTTPError) as error:
        reason = explain(error, name, flag)
        raise UserError(f"{flag} {name}: there is no such folder, and it can't be downloaded: {reason}")


def from_cache_or_hub(name: str, flag: str, check: Callable[[Path], object]) -> Path:
    """Do what `model_folder` does for a Hub id. If the cache has the whole model, nothing is requested."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    def fetch(file: str, revision: str | None = None) -> Path:
        # If the Hub hangs, this request gives up after one attempt; hf_hub_download would try for over six minutes
        hub.get_hf_file_metadata(hub.hf_hub_url(name, file, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return Path(hub.hf_hub_download(name, file, revision=revision)).parent

    cached = hub.try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and is_complete(Path(cached).parent):
        return Path(cached).parent
    constants.HF_HUB_DISABLE_XET = True  # Xet uses hosts that mirrors lack, and other time-outs
    info = hub.HfApi().model_info(name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    names = {file.rfilename for file in info.siblings}
    if "config.json" not in names or not has_vocabulary(names) or not wanted_weights(names):
        needed = "config.json, a vocabulary, and safetensors or .bin weights"
        raise UserError(f"{flag} {name} needs {needed}, but the files on the Hub are {', '.join(sorted(names))}")
    print(f"fetching {name} from {constants.ENDPOINT}", flush=True)
    folder = fetch("config.json")
    for file in sorted(names):
        if re.fullmatch(SMALL, file):
            fetch(file, revision=folder.name)  # the same commit, even if the model is updated meanwhile
    check(folder)
    for file in wanted_weights(names):
        fetch(file, revision=folder.name)
    return folder


def is_complete(folder: Path) -> bool:
    """Return whether a folder has all files that loading needs: config, vocabulary, and every shard of the weights."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    weights = wanted_weights(names)
    shard = re.search(r"-of-(\d+)", weights[0]) if weights else None
    return "config.json" in names and has_vocabulary(names) and len(weights) == (int(shard[1]) if shard else 1)


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder contains an adapter, no model at all, or a pointer or web page instead of a file."""
    names = {path.name for path in folder.glob("*")}
    if "adapter_config.json" in names:
        adapter = read_json(folder / "adapter_config.json", "download it again")
        kind, base = adapter.get("peft_type", "peft"), adapter.get("base_model_name_or_path")
        alone = "; or remove adapter_config.json to use the model without it" if "config.json" in names else ""
        remedy = "merge it with peft's merge_and_unload(), save model and tokenizer in a new folder, and use that"
        raise UserError(f"{folder} contains a {kind} adapter for {base}, which isn't a whole model: {remedy}{alone}")
    below = [path.parent for kind in ("*", "snapshots/*") for path in folder.glob(f"{kind}/config.json")]
    if "config.json" not in names or folder / "model" in below:  # a run's folder contains both
        newest = max(below, key=lambda path: [int(digits) for digits in re.findall(r"\d+", path.name)], default=None)
        problem = "its config.json has a run's settings" if "config.json" in names else "it has no config.json"
        raise UserError(f"no model in {folder}: {problem}" + (f"; did you mean {newest}?" if newest else ""))
    for name in sorted({"config.json", VALUE_HEAD, *set().union(*VOCABULARIES), *wanted_weights(names)} & names):
        with (folder / name).open("rb") as file:
            start = file.read(64).lower()
        for beginning, what in STAND_INS.items():
            if start.startswith(beginning):
                raise UserError(f"{folder / name} is {what} `hf download`{second_weights(folder)}")


def second_weights(folder: Path) -> str:
    """Return a hint if torch's .bin weights are in the folder too, but safetensors come first; otherwise ""."""
    wanted = wanted_weights({path.name for path in folder.iterdir()})
    # A smaller file is a git-lfs pointer
    other = wanted_weights({path.name for path in folder.glob("*.bin") if path.stat().st_size > 1000})
    return f"; or remove {', '.join(wanted)} to load {other[0]} instead" if other and wanted != other else ""


def has_vocabulary(names: set[str]) -> bool:
    return any(vocabulary <= names for vocabulary in VOCABULARIES)


def wanted_weights(names: set[str]) -> list[str]:
    """Return the weight files among `names`: safetensors if there are any, otherwise torch's .bin."""
    safetensors, torch_bin = (sorted(name for name in names if re.fullmatch(kind, name)) for kind in WEIGHTS)
    return safetensors or torch_bin


def explain(error: Exception, name: str, flag: str) -> str:
    """Say what caused an error of the Hub's client, and how to fix it."""
    from huggingface_hub import constants

    hub, cache, text = constants.ENDPOINT, constants.HF_HUB_CACHE, first_line(error)
    elsewhere = f"set HF_ENDPOINT to a mirror of the Hub, or {flag} to the path of a local folder"
    slow = "if it is only slow, set HF_HUB_ETAG_TIMEOUT=60 and HF_HUB_DOWNLOAD_TIMEOUT=60"
    advice = {  # by exception or HTTP status; the first match is used
        "GatedRepoError 403": f"{hub} refuses access; accept the terms at {hub}/{name} and set HF_TOKEN to your token",
        "RepositoryNotFoundError 401 404": f"{hub} has no such model; check the name; if it is private, set HF_TOKEN",
        "TimeoutException": f"{hub} doesn't answer; {elsewhere}; {slow}",
        "HTTPError": f"{hub} has a problem or can't be reached ({text}); try later, or {elsewhere}",
        "JSONDecodeError FileMetadataError": f"{hub} isn't a model hub, or a login page answered instead; {elsewhere}",
        "Exception": f"{text}; if {cache} is full or not writable, set HF_HOME; otherwise {elsewhere}",
    }
    kinds = {kind.__name__ for kind in type(error).__mro__}  # the module of httpx's errors depends on its version
    kinds.add(str(getattr(getattr(error, "response", None), "status_code", None)))
    return next(line for fitting, line in advice.items() if kinds & set(fitting.split()))
