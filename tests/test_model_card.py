"""The model card: its metadata as read by the Hub's library, its text, and its code."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard

from config import PPOConfig
from support.models.model_card import write_card, write_results
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import write_bpe_gpt2
from train_ppo import main

HEAD = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "ppo", "rlhf"]}


def metadata(folder) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def card(folder) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def run_its_code(folder, monkeypatch, capsys) -> list[str]:
    monkeypatch.chdir(folder)
    (code,) = re.findall("```python\n(.*?)```", card(folder), re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    return capsys.readouterr().out.splitlines()


def test_the_card_of_a_run_says_how_it_was_trained_and_its_code_runs(finished, monkeypatch, capsys):
    results = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert metadata(finished / "model") == {"language": "zh", **HEAD}
    text = card(finished / "model")
    assert "Trained on 48 completions of `刚收到货,感觉`, with a classifier as the reward." in text
    assert results["verdict"] in text
    assert "`AutoTokenizer`. `BertTokenizer` would append `[SEP]`" in text and "transformers before 4.43" in text
    assert not re.search(r"(?<![\w.:/<-])/\w", text)  # no local path
    texts = run_its_code(finished / "model", monkeypatch, capsys)
    assert len(texts) == 5 and len(set(texts)) > 1
    assert all(re.fullmatch(r"刚收到货,感觉[^\s\[\]]+", text) for text in texts)


def test_a_byte_level_gpt2_saved_by_your_own_loop_gets_a_matching_card(tmp_path, monkeypatch, capsys):
    """The card has the loop's prompt and settings, not PPOConfig's defaults."""
    config = PPOConfig(device="cpu", gen_len=5, temperature=0.7)
    trainer = TextPPOTrainer.from_pretrained(write_bpe_gpt2(tmp_path / "gpt2"), config)
    trainer.encode(["this film was", "刚收到货"])
    trainer.save(tmp_path / "saved")
    assert metadata(tmp_path / "saved") == HEAD
    text = card(tmp_path / "saved")
    assert "up to 5 tokens, sampled at temperature 0.7" in text and str(tmp_path) not in text
    texts = run_its_code(tmp_path / "saved", monkeypatch, capsys)
    assert len("".join(texts).split("this film was")) == 6


@pytest.mark.parametrize(("name", "base"), [("gpt2", True), ("here/gpt2", False), ("demo", False)])
def test_the_base_model_is_named_if_it_is_on_the_hub(tmp_path, monkeypatch, name, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "gpt2").mkdir(parents=True)
    write_card(tmp_path, PPOConfig(model_name=name), "刚收到货")
    assert metadata(tmp_path).get("base_model") == (name if base else None)
    assert (f"[{name}](https://huggingface.co/{name})" in card(tmp_path)) == base


def test_your_own_changes_to_the_card_are_kept(finished, tmp_path):
    """A license that you added survives another evaluation, and your own README.md survives saving a model."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    path = run_dir / "model" / "README.md"
    mine = card(run_dir / "model").replace("library_name:", "license: apache-2.0\nlibrary_name:")
    path.write_text(mine, encoding="utf-8")
    assert main(["--eval_only", str(run_dir), "--eval_samples", "32"]) == 0
    again = card(run_dir / "model")
    assert metadata(run_dir / "model")["license"] == "apache-2.0" and again != mine
    assert again.split("## Results")[0] == mine.split("## Results")[0] and again.count("## Results") == 1

    path.write_bytes("# 我的项目\n".encode("gbk"))
    write_card(run_dir / "model", PPOConfig(), "刚收到货")
    write_results(run_dir / "model", PPOConfig(), ["衣服"], "good")
    assert path.read_bytes() == "# 我的项目\n".encode("gbk")


@pytest.mark.parametrize(
    ("changes", "reward"),
    [
        ({"reward": ["my_reward:score"]}, "`my_reward:score`"),
        (
            {"reward": ["a:b", "classifier", "c:d"], "reward_weights": [0.5, 1, 0]},
            "0.5 x `a:b` + the classifier `uer/roberta-base-finetuned-jd-binary-chinese`",
        ),
        ({}, "the classifier `uer/roberta-base-finetuned-jd-binary-chinese`"),
        ({"reward_model_name": "./sentiment"}, "a classifier"),
    ],
)
def test_the_card_names_the_reward_and_the_first_prompts(tmp_path, changes, reward):
    config = PPOConfig(episodes=12_800, **changes)
    write_card(tmp_path, config, "衣服")
    write_results(tmp_path, config, [f"衣服{i}" for i in range(9)], "good: 80%")
    shown = "`衣服0`, `衣服1`, `衣服2`, `衣服3`, `衣服4`, ..."
    assert f"Trained on 12,800 completions of {shown}, with {reward} as the reward.\n\ngood: 80%\n" in card(tmp_path)
    write_results(tmp_path, config, [f"衣服{i}" for i in range(5)], "good: 80%")
    assert "`衣服4`, with" in card(tmp_path)
