"""Every command and every snippet of the README, and those of docs/hub.md, run as pasted, on small models.

`.ci/run` types those that make an environment, tests/test_python_api.py runs the loop of one's own.
"""

import random
import re
import shutil
import zipfile

import pytest

from support.demo_models import write_review
from tests.helpers import code_blocks, write_bpe_gpt2, write_classifier, write_gpt2
from tests.hub_server import Hub
from tests.shell import Shell

BY_CI = "python3 -m venv"


@pytest.fixture(scope="module")
def shell(tmp_path_factory, finished):
    """In a folder with the files that the pages speak of; a hub on loopback serves the article's models."""
    folder = tmp_path_factory.mktemp("typed")
    published = folder / "published"
    gpt2, sentiment = write_gpt2(published / "gpt2"), write_classifier(published / "sentiment")
    vocab = gpt2 / "vocab.txt"  # with the characters of the pages' prompts
    vocab.write_text(vocab.read_text(encoding="utf-8").replace("苹", "部"), encoding="utf-8")
    models = {"uer/gpt2-chinese-cluecorpussmall": gpt2, "uer/roberta-base-finetuned-jd-binary-chinese": sentiment}
    models |= {"lvwerra/gpt2-imdb": write_bpe_gpt2(published / "bpe"), "lvwerra/distilbert-imdb": sentiment}
    for name in ("gpt2", "sentiment"):
        shutil.copytree(published / name, folder / name)
    shutil.copytree(finished, folder / "runs" / "NAME")
    (folder / "prompts.txt").write_text("刚收到货,感觉\n这本书\n", encoding="utf-8")
    (reward,) = [code for code in code_blocks("README.md", "python") if "# my_reward" in code]
    (folder / "my_reward.py").write_text(reward)
    draw = random.Random(1)
    rows = "\n".join(f'书籍,{label},"{text}"' for text, label in (write_review(draw) for _ in range(300)))
    with zipfile.ZipFile(published / "online_shopping_10_cats.zip", "w") as archive:
        archive.writestr("online_shopping_10_cats.csv", f"cat,label,review\n{rows}\n")
    with (
        Hub(models) as hub,
        Shell(folder, HF_ENDPOINT=hub.url, HF_HOME=str(folder / "home"), HF_TOKEN="hf_loopback") as shell,
    ):
        shell.hub = hub
        yield shell


LEAVES = {  # a word that one block alone has: files that its commands leave, as patterns, and how many
    "HF_ENDPOINT": {"runs/2*/report.md": 3, "runs/2*/model/model.safetensors": 3},
    "review_models": {"review_models/gpt2/vocab.txt": 1, "review_models/sentiment/config.json": 1},
    "--prompts_file": {"runs/films/report.md": 1},
    "plot_rewards.py": {"runs/lr-*/report.md": 9, "compare.png": 1, "compare.md": 1, "reward.pdf": 1},
    "--kl_budget": {"runs/*/inputs/my_reward-*.py": 1},
    "hf upload": {},
}


@pytest.mark.parametrize("word", LEAVES)
def test_a_command_of_the_readme_as_pasted(shell, word):
    (block,) = [block for block in code_blocks("README.md", "bash") if word in block]
    published = f"file://{shell.folder / 'published'}/"
    block = re.sub(r"https://github\.com/.*/", published, block).replace("https://your-mirror", shell.hub.url)
    if not shutil.which("curl"):
        block = re.sub("^curl .*", f"cp '{shell.folder}'/published/*.zip .", block)
    printed = shell.type(block.replace("hf auth login\n", ""))
    for pattern, number in LEAVES[word].items():
        assert len(list(shell.folder.glob(pattern))) == number
    if word == "HF_ENDPOINT":
        assert shell.hub.fetched().count("config.json") == 2  # the mirror is not asked again for what is in the cache
    if word == "--prompts_file":
        assert "--lr" in printed and "step 3/3" in printed
    if word == "hf upload":
        assert printed.count("| 刚收到货,感觉 |") == printed.count("| 刚收到货,质量 |") == 5
        folder = shell.folder / "runs" / "NAME" / "model"
        uploaded = shell.hub.uploaded["YOUR_NAME/happy-reviews"]
        assert {path: (folder / path).read_bytes() for path in uploaded} == uploaded
        assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= uploaded.keys()


def test_every_command_of_the_readme_is_typed():
    for block in code_blocks("README.md", "bash"):
        assert block.startswith(BY_CI) or sum(word in block for word in LEAVES) == 1


def test_models_are_fetched_by_the_hub_s_own_program_for_a_machine_without_a_network(shell):
    """docs/hub.md"""
    for name in ("gpt2", "sentiment"):
        shutil.rmtree(shell.folder / name)
    (block,) = [block for block in code_blocks("docs/hub.md", "bash") if "hf download" in block]
    fetching, training = block.split("python", 1)
    shell.type(fetching)
    shell.type(f"python{training}", HF_ENDPOINT="http://127.0.0.1:9")
    for name in ("gpt2", "sentiment"):
        for file in (shell.folder / "published" / name).iterdir():
            assert (shell.folder / name / file.name).read_bytes() == file.read_bytes()


def test_a_gpt2_of_another_language(shell):
    """docs/hub.md"""
    (block,) = [block for block in code_blocks("docs/hub.md", "bash") if "lvwerra" in block]
    assert "| This film was | " in shell.type(block)
