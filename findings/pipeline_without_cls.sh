#!/usr/bin/env bash
# The tokenizer of a model folder puts [CLS] before a prompt, because the Chinese GPT-2 was trained that way. You
# expect the text-generation pipeline to give the model what tokenizer(prompt) gives, in all versions of transformers.
# Up to 4.42 the pipeline encodes prompts with add_special_tokens=False, so there is no [CLS]. From 4.43 on it leaves
# the decision to the tokenizer. With the same folder, the same call and greedy decoding you get different completions,
# and a model that PPO trained on prompts with [CLS] looks worse than it is.
# Workaround: pass add_special_tokens=True in 4.42. In 4.41 the pipeline passes it on to generate(), which raises an
# error; call the tokenizer and model.generate yourself there.
# Source: TextGenerationPipeline.preprocess in pipelines/text_generation.py: `add_special_tokens=False` in 4.41.2,
# `add_special_tokens=None` in 5.24.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0
venv/bin/pip install -q --no-compile --target old transformers==4.41.2 tokenizers==0.19.1 huggingface_hub==0.36.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cat > look.py <<'PY'
import json
import sys

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"刚收到货感觉很好差质量不错"]
if sys.argv[1] == "4.41.2":  # the older version writes the folder because both can read it then
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained("model")
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(words[:5])
    backend.save("model/tokenizer.json")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    with open("model/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "PreTrainedTokenizerFast", **special}, file)
expected = AutoTokenizer.from_pretrained("model")("很好").input_ids
generate = pipeline("text-generation", model="model")
found = generate.preprocess("很好")["input_ids"][0].tolist()
text = generate("很好", do_sample=False, max_new_tokens=6)[0]["generated_text"]
print(f"transformers {transformers.__version__}: the tokenizer gives {expected}, the pipeline {found}; {text}")
if (found == expected) != (sys.argv[1] == "5.24.0"):
    raise SystemExit("The behaviour has changed")
PY
PYTHONPATH=old venv/bin/python -W ignore look.py 4.41.2
venv/bin/python -W ignore look.py 5.24.0
