#!/usr/bin/env bash
# A RoBERTa classifier has max_position_embeddings 514. You truncate long texts to that many tokens, with
# truncation=True and max_length=config.max_position_embeddings, which is right for BERT, and expect it to score
# every text.
# In transformers 5.24.0 a RoBERTa numbers its positions from pad_token_id + 1 = 2, so only 512 tokens fit. Longer
# texts raise "IndexError: index out of range in self". A reward built like this works until the first long text,
# perhaps hours into a run. With only truncation=True, and no model_max_length in tokenizer_config.json, nothing is
# truncated.
# Source: `padding_idx + 1` in RobertaEmbeddings.create_position_ids_from_input_ids,
# models/roberta/modeling_roberta.py.
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
from transformers import AutoConfig, AutoModelForSequenceClassification, BertTokenizer, pipeline

print("transformers", transformers.__version__, "torch", torch.__version__)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好差"]
open("vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")
sizes = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
seen = {}
for kind, positions in (("bert", 512), ("roberta", 514)):
    config = AutoConfig.for_model(kind, **sizes, max_position_embeddings=positions)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    classify = pipeline("sentiment-analysis", model=model, tokenizer=BertTokenizer("vocab.txt"))
    for max_length in (512, positions, None):
        try:
            classify("很好" * 400, truncation=True, max_length=max_length)
            found = "a score"
        except (IndexError, RuntimeError) as error:
            found = f"{type(error).__name__}: {error}"
        seen[kind, max_length] = found == "a score"
        print(f"{kind}, max_position_embeddings {positions}, max_length {max_length}: expected a score, found {found}")
expected = {("bert", 512): True, ("bert", None): False, ("roberta", 512): True, ("roberta", 514): False}
if seen != expected | {("roberta", None): False}:
    raise SystemExit("The behaviour has changed")
PY
