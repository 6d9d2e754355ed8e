#!/usr/bin/env bash
# GPT2ForSequenceClassification with num_labels=1 is a reward model: it takes the score at a text's last token. The
# pad token is often the eos token, here [SEP]. You expect attention_mask to decide which token is the last.
# transformers 5.24.0 doesn't look at attention_mask for this. It takes the last token whose id isn't pad_token_id, so
# it skips a final [SEP]. A finished text and the same text without its end get the same score, although the mask
# differs, so PPO can't learn a reward for ending. If config.pad_token_id isn't the id that pads the batch, the score
# is that of a padding token, and depends on how long the other texts of the batch are.
# Source: `non_pad_mask = (input_ids != self.config.pad_token_id)` in GPT2ForSequenceClassification.forward.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
venv/bin/python -W ignore - <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2ForSequenceClassification

print("transformers", transformers.__version__, "torch", torch.__version__)
PAD, CLS, SEP = 0, 2, 3
torch.manual_seed(0)
sizes = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=SEP)
model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, initializer_range=0.5)).eval()


def score(pad_token_id, *rows):
    model.config.pad_token_id = pad_token_id
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    with torch.no_grad():
        return round(model(ids, attention_mask=mask).logits[0].item(), 4)


cut, ended, longer = [CLS, 11, 12], [CLS, 11, 12, SEP], [CLS, 5, 6, 7, 8, 9]
right = {"cut off": score(PAD, cut), "ended": score(PAD, ended)}
print("pad_token_id = [PAD], batch padded with [PAD]: expected", right)
same = {"cut off": score(SEP, cut), "ended": score(SEP, ended)}
print("pad_token_id = [SEP], nothing to pad:          found   ", same)
alone, beside = score(SEP, cut), score(SEP, cut, longer)
print("pad_token_id = [SEP], batch padded with [PAD]: found   ", {"cut off, alone": alone, "beside a longer": beside})
assert right["cut off"] != right["ended"] and score(PAD, cut, longer) == right["cut off"]
if same["ended"] != right["cut off"] or alone == beside:
    raise SystemExit("The behaviour has changed")
PY
