#!/usr/bin/env bash
# tokenizer.json describes a whole tokenizer: normalizer, vocabulary, special tokens around a text, decoder. You
# expect AutoTokenizer and BertTokenizer to do what the file says, as they do in transformers 4.57.6.
# In transformers 5.24.0 a class with its own __init__, such as BertTokenizer, takes the vocabulary from the file and
# rebuilds the rest from BERT's defaults. If a classifier's tokenizer.json keeps case and maps ， to , then the
# classifier gets different tokens than in training and gives different scores. If a Chinese GPT-2's tokenizer.json
# adds only [CLS] and decodes without spaces, the prompt gets a [SEP] at its end, and texts get spaces between
# characters. Nothing is printed.
# Workaround: put "tokenizer_class": "PreTrainedTokenizerFast" into tokenizer_config.json and use AutoTokenizer.
# Source: TokenizersBackend.convert_to_native_format in tokenization_utils_tokenizers.py (it reads the post-processor,
# but not normalizer and decoder) and BertTokenizer.__init__ (it replaces the post-processor at its end).
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
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertTokenizerFast

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好,，", "Good", "good"]
backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.BertNormalizer(lowercase=False)])
backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
backend.decoder = decoders.Fuse()
backend.add_special_tokens(words[:5])
text = "Good，很好"
ids = backend.encode(text).ids
expected = (ids, backend.decode(ids))
special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
print("\ntransformers", transformers.__version__)
print("tokenizer.json says                ", expected)
seen = []
for opener, name in ((AutoTokenizer, "BertTokenizer"), (BertTokenizerFast, "PreTrainedTokenizerFast")):
    folder = Path(f"{transformers.__version__}-{name}")
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **special}))
    tokenizer = opener.from_pretrained(folder)
    ids = tokenizer(text).input_ids
    seen.append((ids, tokenizer.decode(ids, skip_special_tokens=True)))
    print(f"{opener.__name__:17} opens it as      ", seen[-1])
cured = AutoTokenizer.from_pretrained(folder)
ids = cured(text).input_ids
assert (ids, cured.decode(ids, skip_special_tokens=True)) == expected
follows = [one == expected for one in seen]
if follows != ([True, True] if sys.argv[1] == "4.57.6" else [False, False]):
    raise SystemExit("The behaviour has changed")
PY
for version in 4.57.6 5.24.0; do "venv-$version/bin/python" look.py "$version"; done
