#!/usr/bin/env bash
# A model's generation_config.json asks for samples at temperature 1, up to 9 tokens. You expect the text-generation
# pipeline to follow it, as generate() does, because the pipeline's own values are only defaults.
# The pipeline of transformers 4.57.6 and 5.0.0 samples at its own 0.7, up to 256 tokens, whatever the file says. A
# policy that PPO trained and evaluated at temperature 1 seems better and more monotonous in the pipeline than its
# figures suggest. 5.24.0 follows the file.
# Workaround: set temperature=1.0 and max_new_tokens=9 in the call, or in config.json's task_specific_params.
# Source: Pipeline.__init__ in pipelines/base.py passes _default_generation_config to _prepare_generation_config in
# generation/utils.py, which takes a value from the model only if the pipeline's config leaves it at the default.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0
for version in 4.57.6 5.0.0; do venv/bin/pip install -q --no-compile --target "v$version" "transformers==$version"; done
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cat > look.py <<'PY'
import sys

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, pipeline
from transformers.generation.logits_process import TemperatureLogitsWarper

words = ["[PAD]", "[UNK]", *"刚收到货感觉很好差"]
backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=300)
transformers.utils.logging.disable_progress_bar()
used = []
original = TemperatureLogitsWarper.__init__


def note(self, temperature):
    used.append(temperature)
    original(self, temperature)


TemperatureLogitsWarper.__init__ = note
seen = {}
for temperature in (1.0, 0.9):
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    options = dict(do_sample=True, temperature=temperature, top_k=0, max_new_tokens=9, pad_token_id=0)
    model.generation_config = GenerationConfig(**options)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    for part in (model, tokenizer):
        part.save_pretrained(f"model-{temperature}")
    used.clear()
    ids = pipeline("text-generation", model=f"model-{temperature}")("很好", return_tensors=True)
    seen[temperature] = (used[-1] if used else 1.0, len(ids[0]["generated_token_ids"]) - 2)
    print(f"transformers {transformers.__version__}: expected {(temperature, 9)}, found {seen[temperature]}")
follows = [seen[temperature] == (temperature, 9) for temperature in seen]
if follows != [sys.argv[1] == "5.24.0"] * 2:
    raise SystemExit("The behaviour has changed")
PY
for version in 4.57.6 5.0.0 5.24.0; do PYTHONPATH="v$version" venv/bin/python -W ignore look.py "$version"; done
