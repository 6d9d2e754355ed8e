#!/usr/bin/env bash
# Someone saved a LoRA adapter into the folder of its base model. You expect GPT2LMHeadModel.from_pretrained(folder) to
# open the weights in model.safetensors, ready to train.
# If peft is installed, transformers 5.24.0 finds adapter_config.json, adds the adapter, and sets requires_grad to False
# for every parameter: an optimiser over the trainable ones gets an empty list, and the parameter names have changed. If
# peft isn't installed, the same line opens the base model: same folder, same code, different texts. Neither warns you.
# A policy that starts from such a folder doesn't learn, or isn't the model that you tested on another machine.
# Source: maybe_load_adapters in integrations/peft.py (returns nothing if peft is missing), called by
# PreTrainedModel.from_pretrained; PeftAdapterMixin.load_adapter has is_trainable=False.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0 peft==0.21.2
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
venv/bin/python -W ignore - <<'PY'
import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sizes = dict(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
torch.manual_seed(0)
base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
base.save_pretrained("model")
lora = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
adapted = peft.get_peft_model(GPT2LMHeadModel.from_pretrained("model"), lora).eval()
adapted.save_pretrained("model")
torch.save({"base": base(torch.arange(5)[None]).logits, "adapted": adapted(torch.arange(5)[None]).logits}, "logits.pt")
PY
cat > look.py <<'PY'
import importlib.util
import sys

import torch
import transformers
from transformers import GPT2LMHeadModel

print("torch", torch.__version__, "transformers", transformers.__version__, "with peft:", sys.argv[1])
assert bool(importlib.util.find_spec("peft")) == (sys.argv[1] == "yes")
model = GPT2LMHeadModel.from_pretrained("model").eval()
logits, found = torch.load("logits.pt"), model(torch.arange(5)[None]).logits
opened = [name for name in logits if torch.allclose(found, logits[name], atol=1e-5)]
parameters = list(model.parameters())
trainable = sum(p.requires_grad for p in parameters)
print("  expected: base, all parameters trainable")
print(f"  opened:   {' '.join(opened)}, {trainable} of {len(parameters)} parameters trainable")
if (opened, trainable) != ((["adapted"], 0) if sys.argv[1] == "yes" else (["base"], len(parameters))):
    raise SystemExit("The behaviour has changed")
PY
venv/bin/python -W ignore look.py yes
venv/bin/pip uninstall -q -y peft
venv/bin/python -W ignore look.py no
