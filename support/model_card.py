"""The model card: README.md beside a saved model, which the model hub shows as the model's page."""

import json
import os
import re
from pathlib import Path

from config import PPOConfig
from support.files import write_whole
from support.hub import HUB_ID
from support.models import is_bert

CARD = "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"  # what stands between them is written anew by a judgement

TEXT = """---
{base_model}
# license: the base model's to state; look it up there and fill it in
library_name: transformers
pipeline_tag: text-generation
{language}tags:
- gpt2
- ppo
- rlhf
---

# GPT-2, trained with PPO

{mind}```python
from transformers import pipeline

generator = pipeline("text-generation", model=".")  # this folder, or its name on the hub
for _ in range(5):
    print({snippet})
```

{base}, trained by proximal policy optimisation towards a reward, at a price on the distance from what it was.
It continues a prompt by up to {gen_len} tokens, drawn at temperature {temperature:g}, as `generation_config.json` says.

The licence is not filled in: this model is made from another, whose licence says what is allowed. `license: ...` in
the head of this file states it. `value_head.safetensors` serves further training alone.

{begin}
{end}
"""


def write_card(folder: Path, config: PPOConfig, tokenizer, prompt: str) -> None:
    """Write the card of a model in its folder, with `prompt` as the example and no results yet.

    A README.md that is no such card is the user's own, and stays.
    """
    path = folder / CARD
    if path.exists() and BEGIN not in read_card(folder):
        return
    name, start = config.model_name, tokenizer.cls_token
    base, in_head = "A GPT-2", "# base_model: its name on the hub, if it is there"
    if is_hub_id(name):
        base, in_head = f"[{name}](https://huggingface.co/{name})", f"base_model: {name}"
    mind, snippet = "", f'generator({quoted(prompt)})[0]["generated_text"]'
    in_training = [tokenizer.cls_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    if not is_bert(tokenizer) and tokenizer.encode(prompt) != in_training:
        alone = f"generator({quoted(start + prompt)}, add_special_tokens=False, return_full_text=False)"
        snippet = f'{quoted(prompt)} + {alone}[0]["generated_text"]'
        mind = f"**A prompt begins with `{start}`, and nothing comes after it:** so it was in training. The tokenizer "
        mind += "does otherwise by itself, which makes texts worse or empty; hence what the last line below adds.\n\n"
    text = TEXT.format(
        base_model=in_head,
        language="language: zh\n" if re.search("[\u4e00-\u9fff]", prompt) else "",
        base=base,
        mind=mind,
        snippet=snippet,
        gen_len=config.gen_len,
        temperature=config.temperature,
        begin=BEGIN,
        end=END,
    )
    write_whole(path, text)


def write_results(folder: Path, config: PPOConfig, prompts: list[str], judgement: str) -> None:
    """Put what a run's model was trained on and how it was judged into its card; all else there stays as it is."""
    head, begin, rest = read_card(folder).partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        return
    shown = ", ".join(f"`{prompt}`" for prompt in prompts[:5]) + (", ..." if len(prompts) > 5 else "")
    classifier = config.reward_model_name
    scorer = f"the classifier `{classifier}`" if is_hub_id(classifier) else "a classifier of texts"
    reward = f"the function `{config.reward}`" if config.reward else scorer
    trained = f"Trained on {config.episodes:,} completions of {shown}, with {reward} as the reward."
    write_whole(folder / CARD, f"{head}{begin}\n## Results\n\n{trained}\n\n{judgement}\n{end}{tail}")


def read_card(folder: Path) -> str:
    """The text of a folder's card; nothing where there is none, or none in UTF-8."""
    try:
        return (folder / CARD).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return ""


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one on the hub, and no folder here nor the demo."""
    return name != "demo" and not os.path.isdir(os.path.expanduser(name)) and re.fullmatch(HUB_ID, name) is not None


def quoted(text: str) -> str:
    """A text as Python and JSON both write it."""
    return json.dumps(text, ensure_ascii=False)
