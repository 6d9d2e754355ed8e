"""The README's commands run as pasted on small models, and the links and flags of every page exist."""

import glob
import importlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import constants

import plot_rewards
import train_ppo
from config import PPOConfig
from support.models.demo_models import write_review
from tests.helpers import ROOT, code_blocks, draw_no_pixels, read, write_bpe_gpt2, write_classifier, write_gpt2
from tests.hub_server import Hub
from tools import rank, review_models, train_reward_model

PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
IN_BOTH_LANGUAGES = [page for page in PAGES if page.replace(".md", ".zh.md") in PAGES and page != "README.md"]
READMES = ["README.md", "README.zh.md"]
PLOT_FLAGS = {"--against", "--by", "--lang", "--only", "--out"}
TRAIN_FLAGS = {f"--{name}" for name in PPOConfig.__dataclass_fields__} | {"--complete", "--n", "--help"}


# ----------------------------------------------------------------------------------------------
# Links and flags


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", line)).lower().replace(" ", "-") for line in headings
    }


def links(page: Path) -> list[tuple[str, str]]:
    """Return (file, anchor) for each link within the repository. "" means this page, or no anchor."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [tuple((link + "#").split("#")[:2]) for link in found if "://" not in link]


@pytest.mark.parametrize("page", PAGES)
def test_links_point_to_existing_files_and_headings(page):
    for file, anchor in links(ROOT / page):
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.is_file(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_use_flags_that_exist(page):
    for line in re.findall(r"(?:train_ppo|plot_rewards)\.py [^`\n]*", read(page)):
        known = TRAIN_FLAGS if line.startswith("train_ppo") else PLOT_FLAGS
        assert set(re.findall(r"--[a-z][\w-]*", line)) <= known, line


@pytest.mark.parametrize("page", IN_BOTH_LANGUAGES)
def test_both_languages_have_the_same_commands(page):
    english, chinese = (
        [re.sub(r"(?m) *# .*", "", block) for block in code_blocks(name)]
        for name in (page, page.replace(".md", ".zh.md"))
    )
    assert english == chinese


# ----------------------------------------------------------------------------------------------
# The README's commands


SMALL = "--device cpu --episodes 32 --batch_size 16 --minibatch_size 16 --eval_samples 64".split()
RECORD = "import json, os, sys; print(json.dumps([os.environ.get('HF_ENDPOINT'), sys.argv[1:]]))"


def command_lines(block: str) -> set[str]:
    """Return the lines of a block without comments. A line that ends in a backslash is joined with the next one."""
    return {line.strip() for line in re.sub(r" *# .*", "", re.sub(r" *\\\n *", " ", block)).split("\n")}


def commands(block: str) -> list[tuple[str | None, list[str]]]:
    """Return the commands that a shell runs for a block, with loops unrolled, as (HF_ENDPOINT, words)."""
    functions = "".join(
        f'{name}() {{ {shlex.quote(sys.executable)} -ISc {shlex.quote(RECORD)} {name} "$@"; }}\n'
        for name in ("python", "hf", "curl", "pip", "modelscope")
    )
    printed = subprocess.run(["bash", "-euf", "-c", functions + block], capture_output=True, text=True, check=True)
    return [tuple(json.loads(line)) for line in printed.stdout.splitlines()]


def small(flags: list[str]) -> list[str]:
    """Return flags that make a run of train_ppo.py small, if the command starts one."""
    if {"--help", "--complete"} & set(flags):
        return []
    return ["--episodes", "48"] if "--resume" in flags else [*SMALL, "--episodes", "16"]


@pytest.fixture(scope="module")
def typed(tmp_path_factory, finished):
    """A function that runs a block of shell commands in a folder with the files that the README mentions.

    A hub on localhost serves the article's models. Every program except `hf` runs in this process.
    """
    folder = tmp_path_factory.mktemp("typed")
    published = tmp_path_factory.mktemp("published")
    gpt2, sentiment = write_gpt2(published / "gpt2"), write_classifier(published / "sentiment")
    vocab = gpt2 / "vocab.txt"  # must have the characters of the README's prompts
    vocab.write_text(vocab.read_text(encoding="utf-8").replace("苹", "部"), encoding="utf-8")
    models = {"uer/gpt2-chinese-cluecorpussmall": gpt2, "uer/roberta-base-finetuned-jd-binary-chinese": sentiment}
    models |= {"hfl/chinese-roberta-wwm-ext": sentiment}
    models |= {"lvwerra/gpt2-imdb": write_bpe_gpt2(published / "bpe"), "lvwerra/distilbert-imdb": sentiment}
    for name in ("gpt2", "sentiment"):
        shutil.copytree(published / name, folder / name)
    shutil.copytree(finished, folder / "runs" / "NAME")
    (folder / "prompts.txt").write_text("刚收到货,感觉\n这本书\n", encoding="utf-8")
    (reward,) = [code for code in code_blocks("README.md", "python") if "# my_reward" in code]
    (folder / "my_reward.py").write_text(reward)
    draw = random.Random(1)
    rows = "\n".join(f'书籍,{label},"{text}"' for text, label in (write_review(draw) for _ in range(300)))
    with zipfile.ZipFile(folder / "online_shopping_10_cats.zip", "w") as archive:
        archive.writestr("online_shopping_10_cats.csv", f"cat,label,review\n{rows}\n")

    with Hub(models) as hub, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_no_pixels(patch)
        answers = iter(["4 3 2 1"] * 12 + ["q"])
        patch.setattr("builtins.input", lambda question: next(answers))
        patch.setitem(review_models.GPT2_SIZES, "n_embd", 32)
        patch.setitem(review_models.GPT2_SIZES, "n_head", 2)
        patch.setitem(review_models.CLASSIFIER_SIZES, "hidden_size", 32)
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        patch.setenv("HF_HOME", str(folder / "home"))
        patch.setenv("HF_TOKEN", "hf_loopback")

        def run(block: str) -> None:
            for endpoint, (program, *words) in commands(block.replace("https://your-mirror", hub.url)):
                patch.setenv("HF_ENDPOINT", endpoint or hub.url)
                importlib.reload(constants)
                words = [name for word in words for name in sorted(glob.glob(word)) or [word]]
                assert call(program, words) in (0, None), words

        yield hub, run
    importlib.reload(constants)


def call(program: str, words: list[str]) -> int | None:
    if program in ("curl", "pip", "modelscope"):  # their files exist already
        return 0
    if program == "hf":
        return subprocess.run([sys.executable, "-m", "huggingface_hub.cli.hf", *words], check=True).returncode
    script, *flags = words
    try:
        if script == "train_ppo.py":
            return train_ppo.main(flags + small(flags))
        if script == "plot_rewards.py":
            return plot_rewards.main(flags)
        tools = {f"tools.{tool.__name__[6:]}": tool for tool in (rank, review_models, train_reward_model)}
        return tools[words[1]].main(words[2:])
    except SystemExit as end:
        return end.code


MAKES = {  # (page, a word that only one of its blocks has): {files that its commands create: how many}
    ("README.md", "HF_ENDPOINT"): {"runs/2*/report.md": 3, "runs/2*/model/model.safetensors": 3},
    ("README.zh.md", "modelscope"): {"runs/2*/report.md": 1},
    ("README.md", "for lr in"): {"runs/lr-*/report.md": 2, "compare.png": 1, "compare.md": 1},
    ("README.zh.md", "for epochs in"): {
        "runs/epochs-*/report.md": 2,
        "epochs.png": 1,
        "compare.md": 1,
        "plane.pdf": 1,
    },
    ("README.md", "--prompts_file"): {"runs/films/report.md": 1},
    ("README.md", "my_reward"): {"runs/*/inputs/my_reward-*.py": 1},
    ("README.md", "tools.rank"): {"rankings.jsonl": 1, "reward_model/README.md": 1, "reward_model/loss.png": 1},
    ("README.md", "--complete"): {},
    ("docs/settings.md", "curl"): {
        "review_models/gpt2/vocab.txt": 1,
        "review_models/sentiment/config.json": 1,
    },
}


@pytest.mark.parametrize(("page", "word"), MAKES)
def test_a_block_runs_as_pasted(typed, page, word, capfd):
    hub, run = typed
    for path in [Path(path) for pattern in ("runs/2*", *MAKES[page, word]) for path in glob.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (block,) = [block for block in code_blocks(page, "bash") if word in block]
    block = re.sub(".*--against.*\n", "", block)  # 64 samples are too few to estimate a gain
    for loop, shorter in ((" 3e-5 1e-4 3e-4", " 3e-5 1e-4"), (" 1 4 16", " 1 4"), (" 1 2 3", " 1")):
        block = block.replace("in" + loop, "in" + shorter)
    run(block)
    printed = capfd.readouterr().out
    for pattern, number in MAKES[page, word].items():
        assert len(glob.glob(pattern)) == number, pattern
    if word == "HF_ENDPOINT":
        assert hub.fetched().count("config.json") == 2  # one for each model: later runs download nothing
    if word == "--prompts_file":
        assert "--lr" in printed and "step 1/1" in printed
    if word == "--complete":
        assert printed.count("| 刚收到货,感觉 |") == printed.count("| 刚收到货,质量 |") == 5
        uploaded = hub.uploaded["YOUR_NAME/happy-reviews"]
        assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= uploaded.keys()
        for name, content in uploaded.items():
            with open(f"runs/NAME/model/{name}", "rb") as file:
                assert file.read() == content


@pytest.mark.parametrize("page", READMES)
def test_every_block_of_a_readme_is_run(page):
    """The blocks that create an environment are run by .ci/run. It is enough to run a block from one README if that
    contains all commands of the block in the other language."""
    run = [command_lines(block) for page, word in MAKES for block in code_blocks(page, "bash") if word in block]
    for block in code_blocks(page, "bash"):
        assert block.startswith("python3 -m venv") or sum(word in block for _, word in MAKES) == 1, block
        assert block.startswith("python3 -m venv") or any(command_lines(block) <= lines for lines in run), block


@pytest.mark.parametrize("word", ["hf download", "lvwerra"])
def test_a_block_of_the_hub_page_runs_as_pasted(typed, word, capfd):
    _, run = typed
    (block,) = [block for block in code_blocks("docs/hub.md", "bash") if word in block]
    if word == "hf download":
        shutil.rmtree("gpt2")
        shutil.rmtree("sentiment")
    run(block)
    assert word == "hf download" or "| This film was | " in capfd.readouterr().out
