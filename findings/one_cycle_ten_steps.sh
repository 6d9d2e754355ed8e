#!/usr/bin/env bash
# A short training run has ten optimiser steps, and the first tenth is warm-up. You expect
# OneCycleLR(total_steps=10, pct_start=0.1) to warm up for one step and anneal for nine.
# It raises ZeroDivisionError in its constructor, because a warm-up of exactly one step has length 0 there. The same
# happens with 5 steps and 0.2, or 4 and 0.25, but not with 9 or 11 steps and 0.1 (9 skip the warm-up). A program works
# until a dataset happens to have exactly this many batches.
# Workaround: transformers' get_linear_schedule_with_warmup, or LambdaLR.
# Source: OneCycleLR._schedule_phases and get_lr in torch/optim/lr_scheduler.py: the first phase ends at
# pct_start * total_steps - 1, and get_lr divides by that.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy
cat > look.py <<'PY'
import torch
from torch.optim.lr_scheduler import OneCycleLR

print(f"torch {torch.__version__}")


def outcome(total_steps, pct_start):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        schedule = OneCycleLR(optimizer, max_lr=1.0, total_steps=total_steps, pct_start=pct_start)
    except ZeroDivisionError as error:
        return f"ZeroDivisionError: {error}"
    return f"first learning rate {schedule.get_last_lr()[0]:.2f}"


found = {case: outcome(*case) for case in ((9, 0.1), (10, 0.1), (11, 0.1), (5, 0.2), (4, 0.25), (20, 0.1))}
for (steps, share), what in found.items():
    print(f"{steps} steps, pct_start {share}: {what}")
if [case for case, what in found.items() if what.startswith("Zero")] != [(10, 0.1), (5, 0.2), (4, 0.25)]:
    raise SystemExit("The behaviour has changed")
PY
venv/bin/python -W ignore look.py
