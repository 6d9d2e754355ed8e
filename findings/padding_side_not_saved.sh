#!/usr/bin/env bash
# To complete prompts in batches, a GPT-2's tokenizer has to pad on the left. You set tokenizer.padding_side = "left"
# and save the tokenizer with the model. You expect it to pad on the left when the folder is opened again, because
# bos_token, set in the same way, is saved.
# transformers 5.24.0 and 4.57.6 don't write padding_side unless it was passed to from_pretrained or __init__. Anyone
# who opens the folder and calls generate() pads on the right again. GPT-2 then continues from [PAD], and the short
# prompts of a batch get garbage.
# Workaround: write "padding_side": "left" into tokenizer_config.json.
# Source: save_pretrained in tokenization_utils_base.py saves init_kwargs, which an assignment doesn't change.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
for version in 4.57.6 5.24.0; do
    python3 -m venv "venv-$version"
    "venv-$version/bin/pip" install -q --no-compile "transformers==$version"
done
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cat > look.py <<'PY'
import transformers
from transformers import AutoTokenizer, BertTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好衣服"]
open("vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")
open("config.json", "w").write('{"model_type": "gpt2"}')
open("tokenizer_config.json", "w").write('{"tokenizer_class": "BertTokenizer"}')


def saved(name, **options):
    tokenizer = AutoTokenizer.from_pretrained(".", **options)
    tokenizer.padding_side, tokenizer.bos_token = "left", "[CLS]"
    tokenizer.save_pretrained(name)
    again = BertTokenizerFast.from_pretrained(name)
    return again.padding_side, again.bos_token


seen = [saved("assigned"), saved("given", padding_side="left")]
print("transformers", transformers.__version__)
print("  assigned: expected ('left', '[CLS]'), found", seen[0], "\n  given:    expected ('left', '[CLS]'), found", seen[1])
if seen != [("right", "[CLS]"), ("left", "[CLS]")]:
    raise SystemExit("The behaviour has changed")
PY
for version in 4.57.6 5.24.0; do "venv-$version/bin/python" look.py; done
