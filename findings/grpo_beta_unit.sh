#!/usr/bin/env bash
# You move a job with a KL coefficient of 0.2 from PPO to GRPO and set beta=0.2. In PPO the coefficient is a price in
# units of the reward, so if you multiply the rewards by 100, you expect the same beta to matter 100 times less.
# In TRL 1.16.0 nothing changes: GRPOTrainer divides each group's rewards by their standard deviation before the loss
# adds beta times the KL. So beta is a price in standard deviations of the reward. For rewards with a standard deviation
# of 0.34, a KL coefficient of 0.2 is beta=0.2/0.34=0.6. With scale_rewards="none" beta is in units of the reward.
# Source: scale_rewards in _generate_and_score_completions and per_token_kl in _compute_loss, both in
# trl/trainer/grpo_trainer.py.
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
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=1, n_head=2, n_positions=32)
torch.manual_seed(0)
GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3)).save_pretrained("model")
settings = dict(per_device_train_batch_size=8, num_generations=8, max_completion_length=8, max_steps=20, beta=5.0)
settings |= dict(learning_rate=0.01, disable_dropout=True, report_to="none", use_cpu=True, bf16=False, seed=1)
settings |= dict(disable_tqdm=True, gradient_checkpointing=False, logging_strategy="no", save_strategy="no")
start = GPT2LMHeadModel.from_pretrained("model").state_dict()


def trained(factor: float, scale_rewards: str) -> torch.Tensor:
    def score(completions, **columns):
        return [factor * text.count("好") for text in completions]

    config = trl.GRPOConfig(output_dir="out", scale_rewards=scale_rewards, **settings)
    data = Dataset.from_list([{"prompt": "刚收到货"}] * 8)
    trainer = trl.GRPOTrainer("model", score, config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    return torch.cat([(weights - start[name]).flatten() for name, weights in trainer.model.state_dict().items()])


seen = {}
for scale_rewards in ("group", "none"):
    once, hundredfold = trained(1, scale_rewards), trained(100, scale_rewards)
    seen[scale_rewards] = ((hundredfold - once).norm() / once.norm()).item()
    print(f"scale_rewards={scale_rewards!r}: rewards times 100 change the update by {seen[scale_rewards]:.1%}")
print("expected: a large change for both, since beta stays the same")
if seen["group"] > 0.02 or seen["none"] < 0.2:
    raise SystemExit("The behaviour has changed")
PY
