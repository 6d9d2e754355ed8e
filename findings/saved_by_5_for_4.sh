#!/usr/bin/env bash
# You save a tokenizer with transformers 5.24.0 next to a GPT-2 and give the folder to someone with transformers 4.57.6.
# You expect it to open there: the weights do, and the file formats haven't changed.
# save_pretrained of PreTrainedTokenizerFast writes its new class name, TokenizersBackend, which 4.57.6 doesn't know:
# AutoTokenizer and pipelines raise a ValueError. A BertTokenizer keeps its name but is saved without vocab.txt, so
# BertTokenizer of 4.57.6, which doesn't read tokenizer.json, can't open it, and neither can tools that need vocab.txt.
# Workaround: write "PreTrainedTokenizerFast" into tokenizer_config.json, and keep vocab.txt in the folder.
# Source: `PreTrainedTokenizerFast = TokenizersBackend` in tokenization_utils_tokenizers.py of 5.24.0, and
# save_pretrained in tokenization_utils_base.py, which writes the name of the class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv new
new/bin/pip install -q --no-compile transformers==5.24.0
python3 -m venv old
old/bin/pip install -q --no-compile transformers==4.57.6
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
new/bin/python - <<'PY'
import os

import transformers
from transformers import BertTokenizer, PreTrainedTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好差"]
open("vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")
bert = BertTokenizer("vocab.txt")
bert.save_pretrained("bert")
special = {f"{word[1:4].lower()}_token": word for word in words[:4]}
PreTrainedTokenizerFast(tokenizer_object=bert.backend_tokenizer, **special).save_pretrained("fast")
for name in ("bert", "fast"):
    open(f"{name}/config.json", "w").write('{"model_type": "gpt2", "vocab_size": 8}')
    print("saved by", transformers.__version__, name, sorted(os.listdir(name)))
PY
cat > open.py <<'PY'
import transformers
from transformers import AutoTokenizer, BertTokenizer

seen = []
for opener, name in ((AutoTokenizer, "bert"), (AutoTokenizer, "fast"), (BertTokenizer, "bert")):
    try:
        seen.append(opener.from_pretrained(name)("很好").input_ids)
    except Exception as error:
        seen.append(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:120])
    print(f"opened by {transformers.__version__} {opener.__name__} {name}: expected [2, 5, 6, 3], found {seen[-1]}")
opens = [one == [2, 5, 6, 3] for one in seen]
if opens != ([True, True, True] if transformers.__version__ == "5.24.0" else [True, False, False]):
    raise SystemExit("The behaviour has changed")
PY
new/bin/python open.py
old/bin/python open.py
