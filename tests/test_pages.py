"""What the pages tell a reader to type: the same in both languages, and nothing that no program knows."""

import argparse
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from config import PPOConfig
from tests.helpers import ROOT, code_blocks, read

PAGES = "README docs/hub docs/several_gpus docs/result docs/trl docs/differences docs/learning".split()
BOTH = [f"{page}{ending}" for page in PAGES for ending in (".md", ".zh.md")]
VARIABLE = r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+"
ELSEWHERE = {"WANDB_MODE", "SWANLAB_MODE"}  # in packages that need not be there
ELSEWHERE |= {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT"}  # and in torch newer than the oldest, as its pages say


def blocks(page: str) -> list[str]:
    """The code blocks of a page without their comments, which are in the page's language."""
    return [re.sub(r"(?m)(^| +)# .*", "", block) for block in code_blocks(page)]


def spans(page: str) -> list[str]:
    """What stands between backticks in the text of a page, and its indented lines."""
    text = re.sub(r"(?s)```.*?```", "", read(page))
    return re.findall(r"`([^`\n]+)`", text) + re.findall(r"(?m)^    (.+)", text)


def figures(page: str) -> list[str]:
    """The numbers with a decimal point in the tables of a page."""
    return sorted(re.findall(r"\d+\.\d+", "\n".join(re.findall(r"(?m)^\|.*", read(page)))))


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


OURS = {f"--{name}" for name in PPOConfig.__dataclass_fields__} | {"--complete", "--n", "--help"}
TORCHRUNS = flags_of(get_args_parser())
FIGURES = {"--by", "--only", "--out"}


def commands(page: str) -> list[tuple[list[str], set[str]]]:
    """The words of each command on a page that starts one of the two programs or torchrun, and the flags it knows."""
    found = []
    for line in [line for block in blocks(page) for line in block.splitlines()] + spans(page):
        words = shlex.split(line) if re.search(r"train_ppo\.py|plot_rewards\.py|torchrun ", line) else []
        for program, flags in (("train_ppo.py", OURS), ("plot_rewards.py", FIGURES)):
            if program in words:
                found.append((words[words.index(program) :], flags))
        if "torchrun" in words:
            end = words.index("train_ppo.py") if "train_ppo.py" in words else None
            found.append((words[words.index("torchrun") : end], TORCHRUNS))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_commands(page):
    assert blocks(f"{page}.md") == blocks(f"{page}.zh.md")
    english, chinese = (
        sorted(span for span in spans(f"{page}{ending}") if re.match(r"(\w+=\w+ )?python ", span))
        for ending in (".md", ".zh.md")
    )
    assert english == chinese


@pytest.mark.parametrize("page", PAGES)
def test_both_languages_have_the_same_figures_in_their_tables(page):
    assert figures(f"{page}.md") == figures(f"{page}.zh.md")


@pytest.mark.parametrize("page", BOTH)
def test_every_flag_of_a_command_is_one_of_its_program(page):
    for words, flags in commands(page):
        assert {word for word in words if word.startswith("--")} <= flags, words


@pytest.mark.parametrize("page", BOTH)
def test_every_flag_that_is_named_is_one_of_a_program(page):
    named = {span.split()[0] for span in spans(page) if span.startswith("--")}
    assert named <= OURS | TORCHRUNS | FIGURES


@functools.cache
def known_variables() -> set[str]:
    """The environment variables in the code of this program, of torch's processes and of the hub's client."""
    folders = [ROOT / "support"]
    folders += [
        Path(importlib.import_module(name).__file__).parent for name in ("torch.distributed", "huggingface_hub")
    ]
    sources = (path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    return {name for source in sources for name in re.findall(VARIABLE, source)}


@pytest.mark.parametrize("page", BOTH)
def test_every_environment_variable_is_known(page):
    code = blocks(page) + spans(page)
    named = {name for text in code for name in re.findall(rf"\b({VARIABLE}) ?=", text)}
    named |= {span for span in spans(page) if re.fullmatch(VARIABLE, span)}
    assert named <= known_variables() | ELSEWHERE
