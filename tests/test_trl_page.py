"""The loops of docs/trl.md and the README run as printed, and both languages show the same code."""

import re

import numpy as np
import pytest
import torch
from transformers import pipeline

from config import PPOConfig
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import code_blocks


def run_page(page_code: str, changes: dict[str, str], tmp_path, monkeypatch) -> dict:
    """Run a page's code with `changes` in another folder. Returns its global variables."""
    monkeypatch.chdir(tmp_path)
    for printed, here in changes.items():
        assert page_code.count(printed) == 1, printed
        page_code = page_code.replace(printed, here)
    names = {}
    exec(compile(page_code, "page", "exec"), names)
    return names


def test_the_loop_of_the_trl_page_runs_as_printed(demo, tmp_path, monkeypatch, capsys):
    """It uses the demo's models and settings. The reward rises, and plain transformers opens the result."""
    changes = {
        "uer/gpt2-chinese-cluecorpussmall": "demo",
        "uer/roberta-base-finetuned-jd-binary-chinese": demo[1].as_posix(),
        "gen_len=16": 'preset="demo"',
        "* 128": "* 64",
        "range(157)": "range(5)",
    }
    names = run_page(code_blocks("docs/trl.md")[1], changes, tmp_path, monkeypatch)
    means = re.findall(r"^(\d\.\d\d)  KL -?\d\.\d\d  刚收到货,感觉", capsys.readouterr().out, re.MULTILINE)
    assert len(means) == 5 and np.mean(list(map(float, means[-2:]))) > float(means[0])
    assert not any("SEP" in text or " " in text for text in names["texts"])
    assert len(pipeline("text-generation", model="my_model")("刚收到货,感觉")[0]["generated_text"]) > 8


def test_the_loop_of_the_readme_runs_as_printed(demo, tmp_path, monkeypatch, capsys):
    (snippet,) = [code for code in code_blocks("README.md", "python") if code.startswith("from config import")]
    names = run_page(snippet, {"range(20)": "range(4)", "* 128": "* 64"}, tmp_path, monkeypatch)
    again = TextPPOTrainer.from_pretrained("my_model", PPOConfig(preset="demo"))
    assert torch.equal(again.model.lm_head.weight, names["trainer"].policy_for_saving.lm_head.weight)


@pytest.mark.parametrize("name", ["trl", "grpo", "settings"])
def test_both_languages_show_the_same_code(name):
    assert code_blocks(f"docs/{name}.md") == code_blocks(f"docs/{name}.zh.md")
