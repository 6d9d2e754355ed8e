"""Where a model's files are: a local folder, the demo's, or the model hub's (its cache first)."""

import re
from pathlib import Path

from config import UserError

HUB_TIMEOUT = 5  # seconds


def model_folder(name: str, flag: str) -> Path:
    """The local folder of a model: as given, made on the spot for 'demo', or from the hub (its cache first).

    A cached model makes no request at all. Otherwise the hub is asked once what files there are, and those that
    loading needs are fetched. UserError where neither works.
    """
    if name == "demo":
        from support.demo_models import demo_models

        return demo_models()[0 if flag == "--model_name" else 1]
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{flag} {name}: there is no such folder, and it is no hub id (owner/model)")

    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").exists() and [*cached.glob("*.safetensors"), *cached.glob("pytorch_model*.bin")]:
            return cached
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    try:
        files = [file.rfilename for file in HfApi().model_info(name, timeout=HUB_TIMEOUT).siblings]
    except RepositoryNotFoundError:
        raise UserError(f"{flag} {name}: no such folder here, and no such public model on the hub")
    except Exception as error:
        raise UserError(hub_message(name, flag, error))
    weights = [file for file in files if re.fullmatch(r"model.*\.safetensors(\.index\.json)?", file)]
    weights = weights or [file for file in files if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", file)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted + weights, etag_timeout=HUB_TIMEOUT))
    except Exception as error:
        raise UserError(hub_message(name, flag, error))


def hub_message(name: str, flag: str, error: Exception) -> str:
    return (
        f"cannot fetch {name} from the model hub ({type(error).__name__}). Three ways out: set HF_ENDPOINT to a mirror "
        f"of the hub; {flag} PATH with a local folder of the model; or --preset demo, which downloads nothing"
    )
