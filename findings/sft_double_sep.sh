#!/usr/bin/env bash
# You fine-tune a Chinese GPT-2 with TRL's SFTTrainer. You set eos_token to [SEP], because SFTTrainer raises a
# TypeError without one. You expect training texts of the form [CLS] text [SEP].
# TRL 1.16.0 appends the eos token to the text and then lets the tokenizer encode it, and BertTokenizer appends its
# own [SEP]. All texts end with [SEP][SEP], and the loss counts both. The model learns that another [SEP] follows the
# end. As a reward or perplexity model it then sees texts that never occurred in training. TRL checks whether the text
# ends with the eos token before encoding, but not after.
# Source: add_eos and tokenize_fn in SFTTrainer._prepare_dataset, trl/trainer/sft_trainer.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0 trl==1.16.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
venv/bin/python -W ignore - <<'PY'
import torch
import transformers
import trl
from datasets import Dataset
from transformers import BertTokenizer, GPT2Config, GPT2LMHeadModel

print("trl", trl.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"刚收到货感觉很好差"]
open("vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")
tokenizer = BertTokenizer("vocab.txt", eos_token="[SEP]")
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32)
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
config = trl.SFTConfig(output_dir="out", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
for row in ({"text": "感觉很好"}, {"prompt": "感觉", "completion": "很好"}):
    data = Dataset.from_list([row])
    trainer = trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    found = [words[i] for i in batch["input_ids"][0]]
    counted = [words[i] for i in batch["labels"][0] if i != -100]
    print("\nrow      ", row)
    print("expected ", ["[CLS]", *"感觉很好", "[SEP]"])
    print("found    ", found)
    print("in the loss", counted)
    if found[-2:] != ["[SEP]", "[SEP]"] or counted[-2:] != ["[SEP]", "[SEP]"]:
        raise SystemExit("The behaviour has changed")
PY
