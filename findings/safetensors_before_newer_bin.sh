#!/usr/bin/env bash
# You fine-tune a model and write the result into its folder as many training loops for Chinese GPT-2 do:
# torch.save(model.state_dict(), "pytorch_model.bin"). You expect from_pretrained(folder) to open the weights that you
# trained, or to say that the folder contains two sets of weights.
# If the folder already has a model.safetensors, transformers 5.24.0 opens that one, with the old weights, and prints
# no warning: the trained model scores and writes exactly as before. If the safetensors file is damaged and the .bin
# file is fine, it raises an error instead of opening the .bin file.
# Workaround: use save_pretrained, which replaces model.safetensors, or delete that file.
# Source: _get_resolved_checkpoint_files in modeling_utils.py looks for model.safetensors first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0
export HF_HUB_OFFLINE=1
venv/bin/python -W error - 2> messages <<'PY'
import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

transformers.utils.logging.disable_progress_bar()
print("torch", torch.__version__, "transformers", transformers.__version__)
sizes = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
model.save_pretrained("model")
ids = torch.arange(5)[None]
logits = {"old": model(ids).logits.detach()}
for parameter in model.parameters():  # stands for training
    parameter.data.add_(0.1 * torch.randn_like(parameter))
logits["trained"] = model(ids).logits.detach()
torch.save(model.state_dict(), "model/pytorch_model.bin")
found = GPT2LMHeadModel.from_pretrained("model").eval()(ids).logits
opened = [name for name in logits if torch.allclose(found, logits[name], atol=1e-5)]
print("expected: trained\nfound:   ", *opened)
if opened != ["old"]:
    raise SystemExit("The behaviour has changed")
PY
echo "messages: $(cat messages)"
