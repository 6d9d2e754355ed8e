#!/usr/bin/env bash
# A model folder has a config.json and BERT's vocab.txt, but no tokenizer_config.json. Many Chinese ALBERT and RoBERTa
# checkpoints look like this. You expect AutoTokenizer to read vocab.txt, or to raise an error.
# transformers 5.24.0 picks the tokenizer class from model_type. That class looks for spiece.model or vocab.json, finds
# neither, and builds a vocabulary from its special tokens: 5 tokens for ALBERT and RoBERTa, 1 for GPT-2.
# Texts of the same shape then have the same ids, so a sentiment classifier used as a reward gives 很好 and 很差 the same
# score. No message says that vocab.txt wasn't read. transformers 4.57.6 raises an error for these folders.
# Source: TOKENIZER_MAPPING_NAMES in models/auto/tokenization_auto.py and `if vocab is None` (ALBERT: `vocab is not
# None`) in AlbertTokenizer.__init__, RobertaTokenizer.__init__ and GPT2Tokenizer.__init__.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile transformers==5.24.0
export HF_HUB_OFFLINE=1
venv/bin/python - <<'PY'
import json
from pathlib import Path

import transformers
from transformers import AutoTokenizer, BertTokenizer

print("transformers", transformers.__version__)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"刚收到货感觉很好差质量不错"]
changed = []
for model_type in ("albert", "roberta", "gpt2"):
    folder = Path(model_type)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": len(words)}))
    right = BertTokenizer.from_pretrained(folder)
    print(f"\n{model_type}: vocab.txt has {len(words)} tokens")
    print("  expected      ", len(right), right("很好").input_ids, right("很差").input_ids)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    good, bad = tokenizer("很好").input_ids, tokenizer("很差").input_ids
    print("  AutoTokenizer ", len(tokenizer), good, bad, type(tokenizer).__name__)
    if len(tokenizer) == len(words) or good != bad:
        changed.append(model_type)
if changed:
    raise SystemExit(f"The behaviour has changed for {changed}")
PY
