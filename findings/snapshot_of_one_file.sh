#!/usr/bin/env bash
# The cache of the Hub contains only a model's config.json, perhaps because AutoConfig.from_pretrained read it or
# hf_hub_download fetched it. You expect snapshot_download(name, local_files_only=True) to say whether the model is
# there, as its error LocalEntryNotFoundError and its new IncompleteSnapshotError promise.
# huggingface_hub 2.4.0 returns the folder, even with allow_patterns="*.safetensors", which matches nothing there. It
# has a list of files to compare with only if a recent snapshot_download filled the cache. A script that copies this
# folder to a machine without a network copies a model without weights and vocabulary.
# Workaround: look into the folder, or ask try_to_load_from_cache for each file that you need.
# Source: _raise_if_incomplete_snapshot in huggingface_hub/_snapshot_download.py: without a list "we cannot tell".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile huggingface_hub==2.4.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import os
from pathlib import Path

import huggingface_hub
from huggingface_hub import hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

print("huggingface_hub", huggingface_hub.__version__)
name, commit = "someone/gpt2-chinese", "a" * 40
repository = Path(os.environ["HF_HOME"], "hub", "models--someone--gpt2-chinese")  # as hf_hub_download leaves it
for part in ("refs", "blobs", f"snapshots/{commit}"):
    (repository / part).mkdir(parents=True)
(repository / "refs" / "main").write_text(commit)
(repository / "blobs" / "b").write_text('{"model_type": "gpt2"}')
(repository / "snapshots" / commit / "config.json").symlink_to("../../blobs/b")
print("config.json is there:", Path(hf_hub_download(name, "config.json", local_files_only=True)).name)
for file in ("model.safetensors", "vocab.txt"):
    print(f"{file} is there:", try_to_load_from_cache(name, file) is not None)
print("expected: an error from snapshot_download")
for patterns in (None, "*.safetensors"):
    try:
        found = snapshot_download(name, local_files_only=True, allow_patterns=patterns)
    except LocalEntryNotFoundError as error:
        raise SystemExit(f"The behaviour has changed: {error}")
    print(f"found:    allow_patterns={patterns}: success, a folder with", os.listdir(found))
    if os.listdir(found) != ["config.json"]:
        raise SystemExit("The behaviour has changed")
PY
