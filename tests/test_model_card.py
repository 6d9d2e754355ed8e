"""The model card, as the model hub's own library reads it, and what its snippet does."""

import json
import re
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from config import PPOConfig
from support.evaluation import before_after_table, results_table
from support.model_card import write_card, write_results
from support.models import encode_prompt, load_tokenizer
from support.text_trainer import TextPPOTrainer
from tests.helpers import VOCAB, code_blocks, write_bpe_gpt2
from train_ppo import main

pytestmark = pytest.mark.usefixtures("without_pictures")
HEAD = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "ppo", "rlhf"]}


def metadata(folder) -> dict:
    return ModelCard.load(folder / "README.md").data.to_dict()


def snippet(folder) -> str:
    (code,) = re.findall("```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return code


def test_the_card_of_a_run_tells_what_it_is_and_what_it_reached(finished):
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    results = json.loads((finished / "evaluation.json").read_text(encoding="utf-8"))
    assert metadata(finished / "model") == {"language": "zh", **HEAD}
    assert "Trained on 48 completions of `刚收到货,感觉`, with a classifier of texts as the reward." in card
    assert f"**{results['verdict']}**\n\n{results_table(results)}\n\nThe same draws" in card
    assert before_after_table(results) in card
    assert not re.search(r"(?<![\w.:/<-])/\w", card)  # no path of this machine


@pytest.mark.parametrize("of", ["card", "README"])
def test_a_snippet_completes_its_prompt(finished, monkeypatch, capsys, of):
    monkeypatch.chdir(finished / "model")
    if of == "card":
        code = snippet(finished / "model")
    else:
        (code,) = [code for code in code_blocks("README.md", "python") if code.startswith("from transformers")]
        assert code.count("runs/NAME/model") == 1
    exec(compile(code.replace("runs/NAME/model", "."), of, "exec"), {})
    texts = capsys.readouterr().out.splitlines()
    assert len(texts) == 5 and len(set(texts)) > 1
    assert all(re.fullmatch(r"刚收到货,感觉[^\s\[\]]+", text) for text in texts)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("uer/gpt2-chinese-cluecorpussmall", "uer/gpt2-chinese-cluecorpussmall"),
        ("gpt2", "gpt2"),
        ("./gpt2", None),
        ("/data/gpt2", None),
        ("a folder", None),
        ("here/gpt2", None),
        ("demo", None),
    ],
)
def test_the_base_model_is_named_where_the_hub_has_it(policy, tmp_path, monkeypatch, name, base):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "gpt2").mkdir(parents=True)
    write_card(tmp_path, PPOConfig(model_name=name), policy[1], "刚收到货")
    assert metadata(tmp_path) == {**({"base_model": base} if base else {}), "language": "zh", **HEAD}
    assert (f"[{name}](https://huggingface.co/" in (tmp_path / "README.md").read_text(encoding="utf-8")) == bool(base)


def test_a_loop_of_one_s_own_saves_a_card_of_its_own_model_and_prompt(gpt2_folder, tmp_path):
    """PPOConfig's model_name and prompts are not those of the loop."""
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu", gen_len=5, temperature=0.7))
    trainer.encode(["good", "衣服"])
    trainer.save(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text(encoding="utf-8")
    assert metadata(tmp_path / "saved") == HEAD
    assert 'generator("good")' in card and "up to 5 tokens, drawn at temperature 0.7" in card
    assert "Results" not in card and str(gpt2_folder) not in card


def test_what_a_person_wrote_stays(finished, tmp_path):
    """A licence filled in, where a run is judged again; a README.md of one's own, where a model is saved beside it."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    path = run_dir / "model" / "README.md"
    first = path.read_text(encoding="utf-8")
    mine = re.sub("# license: .*", "license: apache-2.0", first).replace("# GPT-2,", "# My GPT-2,") + "Thanks to all.\n"
    path.write_text(mine, encoding="utf-8")
    assert main(["--eval_only", str(run_dir), "--eval_samples", "32"]) == 0
    again = path.read_text(encoding="utf-8")
    parts = re.compile("(?s)(?<=<!-- results -->).*(?=<!-- end of results -->)")
    assert parts.sub("", again) == parts.sub("", mine) and parts.findall(again) != parts.findall(mine)
    assert metadata(run_dir / "model")["license"] == "apache-2.0"

    trainer = TextPPOTrainer.from_pretrained(run_dir / "model", PPOConfig(preset="demo", device="cpu"))
    trainer.save(run_dir / "model")
    assert path.read_text(encoding="utf-8").count("Results") == 0
    for content in ("# My project\n".encode(), "# 我的项目\n".encode("gbk")):
        path.write_bytes(content)
        trainer.save(run_dir / "model")
        write_results(run_dir / "model", trainer.config, ["衣服"], "good")
        assert path.read_bytes() == content


def test_a_card_that_is_gone_is_not_missed(finished, tmp_path):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (run_dir / "model" / "README.md").unlink()
    assert main(["--eval_only", str(run_dir)]) == 0 and not (run_dir / "model" / "README.md").exists()


def test_an_own_reward_is_named(tmp_path, policy):
    config = PPOConfig(reward="my_reward:score", episodes=12_800)
    write_card(tmp_path, config, policy[1], "衣服")
    write_results(tmp_path, config, [f"衣服{i}" for i in range(9)], "good: 80%")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    shown = "`衣服0`, `衣服1`, `衣服2`, `衣服3`, `衣服4`, ..."
    assert f"Trained on 12,800 completions of {shown}, with the function `my_reward:score` as the reward." in card
    write_results(tmp_path, PPOConfig(), ["衣服"], "good: 80%")
    assert "with the classifier `uer/roberta-base-finetuned-jd-binary-chinese` as" in (
        tmp_path / "README.md"
    ).read_text(encoding="utf-8")


def bpe(folder):
    return load_tokenizer(write_bpe_gpt2(folder)), "<|endoftext|>", "this film was"


def slow_bert(folder):
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return BertTokenizerLegacy(str(folder / "vocab.txt")), "[CLS]", "刚收到货"


@pytest.mark.parametrize("kind", [bpe, slow_bert])
def test_a_tokenizer_that_encodes_otherwise_by_itself_is_told_at_the_top(kind, tmp_path):
    """And the snippet encodes a prompt as training did."""
    tokenizer, start, prompt = kind(tmp_path / "gpt2")
    write_card(tmp_path, PPOConfig(), tokenizer, prompt)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.split("\n\n")[2].startswith(f"**A prompt begins with `{start}`, and nothing comes after it:**")
    seen = []

    def generator(text, add_special_tokens, return_full_text):
        seen.append(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return [{"generated_text": " good"}]

    texts = []
    code = snippet(tmp_path).split("\n", 3)[3]
    exec(code, {"generator": generator, "print": texts.append})
    assert texts == [f"{prompt} good"] * 5 and seen == [encode_prompt(tokenizer, prompt).tolist()] * 5
    assert seen[0] != tokenizer.encode(prompt)


def test_a_tokenizer_that_was_saved_once_needs_no_such_word(policy, tmp_path):
    trainer = TextPPOTrainer(PPOConfig(device="cpu", gen_len=4), policy[0], policy[0], policy[1])
    trainer.save(tmp_path / "once")
    TextPPOTrainer.from_pretrained(tmp_path / "once", PPOConfig(device="cpu", gen_len=4)).save(tmp_path / "twice")
    assert snippet(tmp_path / "once") == snippet(tmp_path / "twice")
    assert "nothing comes after" not in (tmp_path / "twice" / "README.md").read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(tmp_path / "twice").encode("刚收到货") == [2, 5, 6, 7, 8]
