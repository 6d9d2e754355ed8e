#!/usr/bin/env bash
# torchrun --max-restarts starts all processes again after one has died. A training script calls init_process_group and
# continues from its checkpoint. You expect each start to have its own store: rendezvous.py of torch says "We
# create a new TCPStore for every retry so no need to add prefix for each attempt".
# In torch 2.13.0 the agent's store outlives the processes: everything they wrote before the restart is still there,
# under the same names. Gloo keeps the addresses of all processes in it, so after a restart a process may read the
# address of a dead one. Whether it does is a race.
# Workaround: add a prefix with the number of the restart,
# dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store).
# Source: `_create_c10d_store` in torch/distributed/rendezvous.py, which in earlier versions added "/worker/attempt_N".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
cat > script.py <<'PY'
import os
import sys

import torch
import torch.distributed as dist

restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, _ = next(dist.rendezvous("env://"))
own = dist.PrefixStore(str(restart), store)
print(f"torch {torch.__version__}, start {restart}: mark in the store {store.check(['mark'])}, "
      f"under a prefix of its own {own.check(['mark'])}", flush=True)
if restart == 0:
    store.set("mark", "of the first start")
    own.set("mark", "of the first start")
    sys.exit(1)
PY
venv/bin/torchrun --standalone --nproc-per-node 1 --max-restarts 1 script.py 2> /dev/null | tee seen
grep -q "start 0: mark in the store False, under a prefix of its own False" seen
grep -q "start 1: mark in the store True, under a prefix of its own False" seen
