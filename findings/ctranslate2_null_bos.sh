#!/usr/bin/env bash
# A Chinese GPT-2 with BERT's vocabulary has [CLS] and [SEP], but no bos_token or eos_token. You expect CTranslate2 to
# reject it, or to convert it into something that it can open.
# The converter of CTranslate2 4.8.5 reports success and writes "bos_token": null into config.json. Generator(folder)
# then raises "[json.exception.type_error.302] type must be string, but is null", which names neither file nor token.
# Workaround: set bos_token and eos_token in tokenizer_config.json before you convert. The log-probabilities are then
# right.
# Source: GPT2Loader.set_config in ctranslate2/converters/transformers.py copies tokenizer.bos_token without a check.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
venv/bin/python - <<'PY'
import json

import ctranslate2
import torch
import transformers
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

print("ctranslate2", ctranslate2.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"刚收到货感觉很好差"]
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32)
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
model.save_pretrained("model")
open("model/vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")


def convert(name, **tokens):
    with open("model/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "BertTokenizer", **tokens}, file)
    ctranslate2.converters.TransformersConverter("model").convert(name)
    config = json.load(open(f"{name}/config.json"))
    print(f"\n{name}: converted, config.json has", {key: config[key] for key in ("bos_token", "eos_token")})
    return name


with_tokens = ctranslate2.Generator(convert("with_tokens", bos_token="[CLS]", eos_token="[SEP]"))
text = ["[CLS]", "很", "好"]
ids = torch.tensor([AutoTokenizer.from_pretrained("model").convert_tokens_to_ids(text)])
expected = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).flatten().tolist()
found = with_tokens.score_batch([text])[0].log_probs
print("expected log-probabilities", expected, "\nfound", found)
assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-4)
folder = convert("without_tokens")
print("expected: it opens like the other one")
try:
    ctranslate2.Generator(folder)
except RuntimeError as error:
    print("found: RuntimeError:", error)
    if "must be string, but is null" not in str(error):
        raise
else:
    raise SystemExit("The behaviour has changed")
PY
