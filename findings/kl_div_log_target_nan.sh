#!/usr/bin/env bash
# F.kl_div takes its target as probabilities or, with log_target=True, as log-probabilities. You expect the same KL from
# both. Here the policy never samples [PAD], so its log-probability is -inf; the reference may sample it.
# In torch 2.13.0 probabilities give the right KL, because 0 log 0 counts as 0. Log-probabilities give NaN: exp(-inf) is
# 0, and 0 * (-inf - x) is NaN. A KL penalty or a distillation loss over a restricted vocabulary is then NaN from the
# first step. If the token is banned on both sides, both forms give NaN.
# Workaround: torch.distributions.kl_divergence gives the right result.
# Source: the formula `target.exp() * (target - input)` in the documentation of torch.nn.KLDivLoss, and
# _kl_categorical_categorical in torch/distributions/kl.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import math

import torch
from torch.distributions import Categorical, kl_divergence
from torch.nn.functional import kl_div

print("torch", torch.__version__)
banned = float("-inf")
policy = torch.tensor([1.0, 2.0, 0.5, banned]).log_softmax(-1)
seen = []
for last in (-1.0, banned):
    reference = torch.tensor([1.5, 1.0, 0.0, last]).log_softmax(-1)
    allowed = policy > banned
    expected = (policy.exp() * (policy - reference))[allowed].sum().item()
    kls = {
        "probabilities": kl_div(reference, policy.exp(), reduction="sum"),
        "log_target=True": kl_div(reference, policy, reduction="sum", log_target=True),
        "kl_divergence": kl_divergence(Categorical(logits=policy), Categorical(logits=reference)),
    }
    print(f"the reference's logit of [PAD] is {last}: expected {expected:.4f}")
    for name, kl in kls.items():
        print(f"    {name:16} {kl.item():.4f}")
    seen.append([math.isclose(kl.item(), expected, rel_tol=1e-5) for kl in kls.values()])
if seen != [[True, False, True], [False, False, True]]:
    raise SystemExit("The behaviour has changed")
PY
