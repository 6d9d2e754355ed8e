#!/usr/bin/env bash
# You save weights on a machine that you share. You expect the umask to decide who may read them, as for torch.save and
# any file that Python writes: mode 644 with the usual umask of 022.
# safetensors 0.8.0 writes files with mode 600, whatever the umask is and whatever mode the file had before. So does
# save_pretrained of transformers, which uses it. A colleague, or a web server that runs as another user, can list the
# folder but gets "Permission denied" for the weights. safetensors 0.7.0 follows the umask, and keeps the mode of an
# older file.
# Workaround: chmod after saving.
# Source: serialize_to_file, in Rust, now writes another file and renames it, as the new inode number shows.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile safetensors==0.8.0 numpy==2.4.6
cat > look.py <<'PY'
import os
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

os.umask(0o022)
path = Path("model.safetensors")
path.unlink(missing_ok=True)
modes = []
for before in (None, 0o664):
    if before:
        path.chmod(before)
    save_file({"weight": np.zeros(3)}, path)
    modes.append(path.stat().st_mode & 0o777)
    print(f"safetensors {version('safetensors')}: expected mode 644, found {modes[-1]:o}")
if (modes == [0o600, 0o600]) != (version("safetensors") == "0.8.0"):
    raise SystemExit("The behaviour has changed")
PY
venv/bin/python look.py
venv/bin/pip install -q --no-compile safetensors==0.7.0
venv/bin/python look.py
