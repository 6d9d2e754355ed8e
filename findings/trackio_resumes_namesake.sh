#!/usr/bin/env bash
# In trackio two runs of a project can have the same name: resume="never" makes a new one each time.
# If you resume the first experiment under its name, you expect it to continue its own curve.
# trackio 0.43.0 takes no id and resumes the newest run with that name, so the first experiment's later steps end up in
# the curve of the second one.
# Workaround: put an id of your own into the name, such as baseline-1f3a9c.
# Source: init in trackio/__init__.py calls _safe_get_latest_run_for_init(project, name).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile trackio==0.43.0
TRACKIO_DIR="$folder/trackio" HF_HUB_OFFLINE=1 venv/bin/python -W ignore - <<'PY'
import contextlib
import io
import json
import sqlite3
from importlib.metadata import version
from pathlib import Path

import trackio

print("trackio", version("trackio"))
for resume, loss in ("never", 1.0), ("never", 2.0), ("allow", 1.1):  # the first experiment, the second, the first again
    with contextlib.redirect_stdout(io.StringIO()):
        trackio.init(project="demo", name="baseline", resume=resume, auto_log_cpu=False)
        trackio.log({"loss": loss})
        trackio.finish()
(database,) = Path("trackio").glob("demo.db")
curves = {}
for run, metrics in sqlite3.connect(database).execute("SELECT run_id, metrics FROM metrics ORDER BY id"):
    curves.setdefault(run, []).append(json.loads(metrics)["loss"])
print("expected: [[1.0, 1.1], [2.0]]")
print("found:   ", list(curves.values()))
if list(curves.values()) != [[1.0], [2.0, 1.1]]:
    raise SystemExit("The behaviour has changed")
PY
