#!/usr/bin/env bash
# You turn a Chinese GPT-2 into a reward model: a classification head and BERT's tokenizer. A GPT-2 has no token types,
# so you expect the text-classification pipeline to score only the text's tokens.
# The tokenizer returns token_type_ids, and GPT-2's forward looks them up among the word embeddings: the pipeline adds
# the embedding of token 0, [PAD], to every token. A head that was trained on input_ids and attention_mask gives
# different scores there, without a warning. Ours ordered 79% of pairs correctly instead of 91%.
# Workaround: save the tokenizer with model_input_names ["input_ids", "attention_mask"]. It isn't enough to set the
# attribute: save_pretrained leaves it out, and the loaded tokenizer returns token_type_ids again. Set it in
# tokenizer.init_kwargs, too.
# Source: GPT2Model.forward in models/gpt2/modeling_gpt2.py (token_type_embeds = self.wte(token_type_ids));
# save_pretrained in tokenization_utils_base.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q --no-compile torch==2.13.0 transformers==5.24.0
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
cat > look.py <<'PY'
import torch
import transformers
from transformers import AutoTokenizer, BertTokenizer, GPT2Config, GPT2ForSequenceClassification, pipeline

transformers.utils.logging.disable_progress_bar()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"刚收到货感觉很好差"]
tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)})
torch.manual_seed(0)
sizes = dict(vocab_size=len(words), n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
model = GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=1, pad_token_id=0)).eval()
expected = model(**tokenizer("感觉很好", return_tensors="pt", return_token_type_ids=False)).logits.item()
with_types = model(**tokenizer("感觉很好", return_tensors="pt")).logits.item()


def in_pipeline(folder):
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    scorer = pipeline("text-classification", folder, function_to_apply="none")
    return scorer("感觉很好")[0]["score"], AutoTokenizer.from_pretrained(folder).model_input_names


found = {"as it is": in_pipeline("plain")}
tokenizer.model_input_names = ["input_ids", "attention_mask"]
found["attribute set"] = in_pipeline("attribute")
tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
found["init_kwargs set, too"] = in_pipeline("kwargs")
print(f"score of input_ids and attention_mask: {expected:.4f}; with token_type_ids: {with_types:.4f}")
for how, (score, names) in found.items():
    print(f"pipeline, {how}: {score:.4f}, {names}")
wrong = [abs(score - expected) > 1e-3 for score, _ in found.values()]
assert abs(with_types - found["as it is"][0]) < 1e-4
if wrong != [True, True, False]:
    raise SystemExit("The behaviour has changed")
PY
venv/bin/python -W ignore look.py
