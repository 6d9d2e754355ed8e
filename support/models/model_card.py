"""Write the model card: README.md in a saved model's folder, which the Hub shows as the model's page."""

import json
import os
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from config import PPOConfig
from support.common.files import write_whole
from support.models.hub import HUB_ID

RESULTS = "<!-- results: each evaluation replaces the text below this line -->"
TEXT = """---
{metadata}
---

# GPT-2, trained with PPO

```python
from transformers import pipeline

generator = pipeline("text-generation", model=".")  # this folder, or its name on the Hub
for _ in range(5):
    print(generator({prompt})[0]["generated_text"])
```

{base}, fine-tuned with proximal policy optimization to increase a reward, with a penalty on the KL divergence from the
original model.
It continues a prompt by up to {gen_len} tokens, sampled at temperature {temperature:g} (see `generation_config.json`).

In your own code, open the tokenizer with `AutoTokenizer`. `BertTokenizer` would append `[SEP]`, the end of a text,
to every prompt. Pipelines in transformers before 4.43 omit the token that starts a text; in these versions, call
`model.generate(**tokenizer(prompt, return_tensors="pt"))` instead.

The license isn't filled in: see the license of the base model, then add `license: ...` at the top of this file.
Only further training needs `value_head.safetensors`.

{results}
"""


def write_card(folder: Path, config: PPOConfig, prompt: str) -> None:
    """Write the card of a model, with `prompt` as the example and no results yet. Keeps a README.md of your own."""
    own = read_card(folder)
    if own and RESULTS not in own:
        return
    original = config.reference or config.model_name
    name = original if is_hub_id(original) else None
    language = "zh" if re.search("[\u4e00-\u9fff]", prompt) else None
    head = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "ppo", "rlhf"]}
    text = TEXT.format(
        metadata=ModelCardData(base_model=name, language=language, **head).to_yaml(),
        prompt=json.dumps(prompt, ensure_ascii=False),
        base=f"[{name}](https://huggingface.co/{name})" if name else "A GPT-2",
        gen_len=config.gen_len,
        temperature=config.temperature,
        results=RESULTS,
    )
    write_whole(folder / "README.md", text)


def write_results(folder: Path, config: PPOConfig, prompts: list[str], evaluation: str) -> None:
    """Write into a model's card how it was trained and evaluated. The text above the results isn't changed."""
    above, found, _ = read_card(folder).partition(RESULTS)
    if not found:
        return
    examples = ", ".join(f"`{prompt}`" for prompt in prompts[:5]) + (", ..." if len(prompts) > 5 else "")
    classifier = config.reward_model_name
    classifier = f"the classifier `{classifier}`" if is_hub_id(classifier) else "a classifier"
    rewards = config.reward or ["classifier"]
    names = [classifier if name == "classifier" else f"`{name}`" for name in rewards]
    weights = zip(names, config.reward_weights or [1.0] * len(rewards))
    reward = " + ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in weights if weight)
    trained = f"Trained on {config.episodes:,} completions of {examples}, with {reward} as the reward."
    write_whole(folder / "README.md", f"{above}{RESULTS}\n\n## Results\n\n{trained}\n\n{evaluation}\n")


def read_card(folder: Path) -> str:
    path = folder / "README.md"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def is_hub_id(name: str) -> bool:
    """Return whether a model's name is a Hub id, and not a local folder or the demo."""
    return name != "demo" and not os.path.isdir(os.path.expanduser(name)) and re.fullmatch(HUB_ID, name) is not None
