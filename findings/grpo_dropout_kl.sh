#!/usr/bin/env bash
# GRPO with beta > 0 penalises the KL to the reference. At learning rate 0 the policy stays equal to the reference, so
# you expect the logged kl to be 0.
# In TRL 1.16.0 a GPT-2 with its usual dropout of 0.1 computes its log-probabilities with dropout (the model is in
# training mode), but the reference computes them without. So kl is far from 0 although nothing has changed, and the
# penalty pushes against noise. With num_iterations > 1, the ratio of new and old policy contains the same noise.
# Current large models have no dropout, so recipes made for them don't mention it.
# Workaround: `disable_dropout=True` gives exactly 0; its default is False.
# Source: `disable_dropout` in trl/trainer/grpo_config.py and _get_per_token_logps_and_entropies in grpo_trainer.py.
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
tokenizer = BertTokenizer("vocab.txt", bos_token="[CLS]", eos_token="[SEP]")
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained("model")
settings = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=8, max_steps=2, beta=0.1)
settings |= dict(learning_rate=0.0, logging_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)


def score(completions, **columns):
    return [float(text.count("好")) for text in completions]


seen = {}
for disable in (False, True):
    config = trl.GRPOConfig(output_dir="out", disable_dropout=disable, **settings)
    data = Dataset.from_list([{"prompt": "刚收到货"}] * 8)
    trainer = trl.GRPOTrainer("model", score, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    seen[disable] = [float(row["kl"]) for row in trainer.state.log_history if "kl" in row]
for disable, kl in seen.items():
    print(f"disable_dropout={disable}: learning rate 0, expected kl [0.0, 0.0], found", kl)
if min(seen[False]) < 0.01 or max(map(abs, seen[True])) > 1e-6:
    raise SystemExit("The behaviour has changed")
PY
