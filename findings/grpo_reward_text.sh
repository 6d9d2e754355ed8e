#!/usr/bin/env bash
# A reward function for TRL's GRPOTrainer looks for a phrase: `"很好" in completion`. The policy is a Chinese GPT-2 with
# BertTokenizer. You expect the function to get what the model wrote after your prompt.
# In TRL 1.16.0 with transformers 5.24.0 the function gets "很 好", with a space between the characters, so every reward
# is 0 and nothing is learned. Also, the prompt's ids end with [SEP], which ends a text, so the model begins a new one.
# Both come from BertTokenizer, and there is no warning. These models' tokenizers have no eos_token; unless you set one,
# generate() fails with "'NoneType' object cannot be interpreted as an integer".
# Source: GRPOTrainer._tokenize_prompts and batch_decode in trl/trainer/grpo_trainer.py; BertTokenizer.__init__ sets
# the [SEP] and a WordPiece decoder, which joins tokens with spaces.
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
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32)
seen = {}


class Policy(GPT2LMHeadModel):
    """Writes 很好很好 whatever the prompt is."""

    def generate(self, input_ids, generation_config=None, **options):
        super().generate(input_ids, generation_config=generation_config, **options)
        seen["ids"] = input_ids[0].tolist()
        tail = torch.tensor([words.index(word) for word in "很好很好"])
        return torch.cat([input_ids, tail.expand(len(input_ids), -1)], 1)


def score(completions, **columns):
    seen["completion"] = completions[0]
    seen["rewards"] = [float("很好" in text) for text in completions]
    return seen["rewards"]


def train(**tokens):
    tokenizer = BertTokenizer("vocab.txt", **tokens)
    model = Policy(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
    settings = dict(per_device_train_batch_size=2, num_generations=2, max_completion_length=4, max_steps=1)
    settings |= dict(report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    config = trl.GRPOConfig(output_dir="out", **settings)
    data = Dataset.from_list([{"prompt": "刚收到货"}] * 2)
    trl.GRPOTrainer(model, score, config, train_dataset=data, processing_class=tokenizer).train()


train(bos_token="[CLS]", eos_token="[SEP]")
print("prompt:     expected", ["[CLS]", *"刚收到货"], "found", [words[i] for i in seen["ids"]])
print("completion: expected '很好很好' found", repr(seen["completion"]))
print("rewards:    expected [1.0, 1.0] found", seen["rewards"])
try:
    train()
    error = None
except TypeError as raised:
    error = str(raised)
print("without eos_token:", error)
if words[seen["ids"][-1]] != "[SEP]" or seen["rewards"] != [0.0, 0.0] or not error:
    raise SystemExit("The behaviour has changed")
PY
