#!/usr/bin/env bash
# A reward model with num_labels=1 gives one number, such as 2.3 or 30. You put it into the sentiment-analysis
# pipeline and expect that number as the score.
# transformers 5.24.0 applies a sigmoid: 2.3 becomes 0.909, and scores of 20 and 30 both become exactly 1.0 in
# float32, so PPO sees no difference between two good texts. This depends on the saved config: save_pretrained after
# training with plain torch leaves problem_type unset, but Trainer's loss sets it to "regression", which gives the
# number itself. So the same weights can give rewards in two different units.
# Workaround: pass function_to_apply="none".
# Source: TextClassificationPipeline.postprocess in pipelines/text_classification.py, and
# ForSequenceClassificationLoss with `self.config.problem_type = "regression"` in
# BertForSequenceClassification.forward.
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
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer, pipeline

print("transformers", transformers.__version__, "torch", torch.__version__)
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"很好差"]
open("vocab.txt", "w", encoding="utf-8").write("\n".join(words) + "\n")
tokenizer = BertTokenizer("vocab.txt")
sizes = dict(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=32, num_labels=1)).eval()
torch.nn.init.zeros_(model.classifier.weight)
text, seen = "很好", []
for trained_in, reward in (("torch", 2.3), ("torch", 20.0), ("torch", 30.0), ("Trainer", 2.3)):
    torch.nn.init.constant_(model.classifier.bias, reward)
    if trained_in == "Trainer":  # its loss is the model's own
        model(**tokenizer(text, return_tensors="pt"), labels=torch.tensor([1.0]))
    model.save_pretrained("reward_model")
    tokenizer.save_pretrained("reward_model")
    classify = pipeline("sentiment-analysis", model="reward_model")
    seen.append(round(classify(text)[0]["score"], 4))
    raw = round(classify(text, function_to_apply="none")[0]["score"], 4)
    kind = f"loss computed in {trained_in}, problem_type {classify.model.config.problem_type}"
    print(f"{kind}: expected {reward}, found {seen[-1]}; with function_to_apply='none' {raw}")
    assert raw == reward
if seen != [0.9089, 1.0, 1.0, 2.3]:
    raise SystemExit("The behaviour has changed")
PY
