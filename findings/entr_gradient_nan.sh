#!/usr/bin/env bash
# A policy may sample only some tokens; the logits of the others are -inf. torch.special.entr gives 0 at probability 0,
# so you expect to be able to train with an entropy bonus built on it.
# In torch 2.13.0 the value is right, but the gradient is NaN for all logits, including the allowed ones: the derivative
# of entr at 0 is infinite, and softmax's backward multiplies it by 0. There is no warning. The same happens without any
# -inf if a logit is about 104 below the best one, because its probability rounds to 0 in float32.
# torch.where around p * log p doesn't help, because NaN * 0 is NaN again, and xlogy(p, p) fails like entr.
# Workaround: replace log p with 0 at these tokens before the product, or use torch.distributions.Categorical.
# Source: `special_entr` in torch's tools/autograd/derivatives.yaml and `softmax_backward`.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 numpy==2.4.6
venv/bin/python - <<'PY'
import torch

print("torch", torch.__version__)


def entr(logits):
    return torch.special.entr(logits.softmax(-1)).sum()


def where_after(logits):
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    return -torch.where(p > 0, p * log_p, 0.0).sum()


def where_before(logits):
    p, log_p = logits.softmax(-1), logits.log_softmax(-1)
    return -(p * torch.where(p > 0, log_p, 0.0)).sum()


def categorical(logits):
    return torch.distributions.Categorical(logits=logits).entropy()


allowed = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
categorical(allowed).backward()
expected = [round(x, 4) for x in allowed.grad.tolist()]
print("expected gradient of the allowed tokens:", expected)
for banned in (float("-inf"), -200.0):
    right = {}
    for entropy in (entr, where_after, where_before, categorical):
        logits = torch.tensor([1.0, 2.0, 0.5, banned], requires_grad=True)
        value = entropy(logits)
        value.backward()
        gradient = [round(x, 4) for x in logits.grad.tolist()]
        print(f"banned logit {banned}: {entropy.__name__:13} {value.item():.4f} gradient {gradient}")
        right[entropy.__name__] = gradient == [*expected, 0.0]
    nan_with_where = banned == float("-inf")
    if right != {"entr": False, "where_after": not nan_with_where, "where_before": True, "categorical": True}:
        raise SystemExit("The behaviour has changed")
PY
