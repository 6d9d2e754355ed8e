#!/usr/bin/env bash
# A folder's config.json has no model_type, because it belongs to a run and not to a model. You expect
# AutoConfig.from_pretrained(folder) to reject it, whatever the folder is called.
# transformers 4.57.6 looks for the name of a known model in the path: runs/my-gpt2 opens as a GPT2Config and
# runs/my-bert as a BertConfig, with default sizes for everything that the file doesn't set. If you mistype a path, you
# get another kind of model, or an untrained one with 124 M parameters, instead of an error. 5.24.0 rejects them all.
# Source: "Fallback: use pattern matching on the string" in AutoConfig.from_pretrained,
# models/auto/configuration_auto.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 4.57.6 5.24.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install -q --no-compile "transformers==$version"
done
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cat > look.py <<'PY'
import json
from pathlib import Path

import transformers
from transformers import AutoConfig

found = []
for name in ("my-gpt2", "my-bert", "mine"):
    folder = Path("runs", name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"lr": 1e-4, "seed": 1}))
    try:
        found.append(type(AutoConfig.from_pretrained(folder)).__name__)
    except ValueError as error:
        found.append(type(error).__name__)
    print(f"transformers {transformers.__version__}, {folder}: expected ValueError, found {found[-1]}")
old = ["GPT2Config", "BertConfig", "ValueError"]
if found != (old if transformers.__version__ == "4.57.6" else ["ValueError"] * 3):
    raise SystemExit("The behaviour has changed")
PY
for version in 4.57.6 5.24.0; do "venv-$version/bin/python" look.py; done
