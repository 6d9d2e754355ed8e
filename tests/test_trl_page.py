"""docs/trl.md and docs/differences.md: the loop runs as printed, and every name on the pages is there."""

import ast
import re

import numpy as np
import pytest
import torch
from transformers import pipeline

from config import PPOConfig
from support.text_trainer import TextPPOTrainer
from tests.helpers import code_blocks, read

TRL_SETTINGS = """
    exp_name seed log_with task_name model_name query_dataset reward_model remove_unused_columns tracker_kwargs
    accelerator_kwargs project_kwargs tracker_project_name push_to_hub_if_best_kwargs steps learning_rate adap_kl_ctrl
    init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value vf_coef batch_size forward_batch_size
    mini_batch_size gradient_accumulation_steps world_size ppo_epochs max_grad_norm optimize_cuda_cache
    optimize_device_cache early_stopping target_kl compare_steps ratio_threshold use_score_scaling use_score_norm
    score_clip whiten_rewards gradient_checkpointing is_encoder_decoder is_peft_model backward_batch_size
    global_backward_batch_size global_batch_size dataset_num_proc
""".split()  # the fields of PPOConfig in TRL 0.11.4
TRL_STATISTICS = """
    objective/entropy objective/kl objective/kl_coef objective/kl_dist objective/logprobs objective/ref_logprobs
    ppo/learning_rate ppo/loss/policy ppo/loss/total ppo/loss/value ppo/mean_non_score_reward ppo/mean_scores
    ppo/policy/advantages ppo/policy/advantages_mean ppo/policy/approxkl ppo/policy/clipfrac ppo/policy/entropy
    ppo/policy/policykl ppo/policy/ratio ppo/returns/mean ppo/returns/var ppo/std_scores ppo/val/clipfrac ppo/val/error
    ppo/val/mean ppo/val/var ppo/val/var_explained ppo/val/vpred time/ppo/calc_stats time/ppo/compute_advantages
    time/ppo/compute_rewards time/ppo/forward_pass time/ppo/optimize_step time/ppo/total tokens/queries_dist
    tokens/queries_len_mean tokens/queries_len_std tokens/responses_dist tokens/responses_len_mean
    tokens/responses_len_std
""".split()  # what its step returns


def tables(name: str) -> list[list[list[str]]]:
    """The page's tables, as rows of cells, without their heads."""
    found = re.findall(r"(?:^\|.*\|\n)+", read(f"docs/{name}"), re.MULTILINE)
    return [[row.strip("|").split("|") for row in table.splitlines()[2:]] for table in found]


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def only_here(number: int) -> set[str]:
    return set(code(re.findall(r"^Only here: (.*)", read("docs/trl.md"), re.MULTILINE)[number]))


def test_the_loop_runs_as_printed(demo, tmp_path, monkeypatch, capsys):
    """With the demo's models and settings; the reward rises, and plain transformers opens the result."""
    _, after, _ = code_blocks("docs/trl.md")
    monkeypatch.chdir(tmp_path)
    for printed, here in (
        ("uer/gpt2-chinese-cluecorpussmall", "demo"),
        ("uer/roberta-base-finetuned-jd-binary-chinese", demo[1].as_posix()),
        ("gen_len=16", 'preset="demo"'),
        ("* 128", "* 64"),
        ("range(157)", "range(5)"),
    ):
        assert after.count(printed) == 1
        after = after.replace(printed, here)
    names = {}
    exec(compile(after, "trl.md", "exec"), names)
    out = capsys.readouterr().out
    means = [float(mean) for mean in re.findall(r"^(\d\.\d\d)  KL -?\d\.\d\d  刚收到货,感觉", out, re.MULTILINE)]
    assert len(means) == 5 and np.mean(means[-2:]) > means[0]
    assert names["trainer"].tokenizer.sep_token_id not in torch.cat(names["queries"])
    assert not any("SEP" in text or " " in text for text in names["texts"])
    assert len(pipeline("text-generation", model="my_model")("刚收到货,感觉")[0]["generated_text"]) > 8


@pytest.mark.parametrize("name", ["trl", "differences"])
def test_both_languages_show_the_same_code_and_name_the_same_things(name):
    """And the same numbers; the last of more than two columns is prose."""
    assert code_blocks(f"docs/{name}.md") == code_blocks(f"docs/{name}.zh.md")
    english, chinese = tables(f"{name}.md"), tables(f"{name}.zh.md")
    assert [len(table) for table in english] == [len(table) for table in chinese]
    for row, in_chinese in zip(sum(english, []), sum(chinese, [])):
        named, named_in_chinese = [
            set(re.findall(r"`[^`]+`|\d[\d.e-]*", " ".join(cells[: max(2, len(cells) - 1)])))
            for cells in (row, in_chinese)
        ]
        assert named == named_in_chinese, row


def test_what_the_old_loop_calls_and_sets_is_in_the_tables():
    """What comes from trl, the methods of its trainer, and each setting of PPOConfig and of generate."""
    before = code_blocks("docs/trl.md")[0]
    calls = [node for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Call)]
    (imported,) = re.findall(r"from trl import (.*)", before)
    methods = re.findall(r"(?:trainer|tokenizer)\.(\w+)\(", before)
    keywords = {name: [word.arg for call in calls if ast.unparse(call.func) == name for word in call.keywords]
                for name in ("PPOConfig", "dict", "trainer.generate")}  # fmt: skip
    assert [len(words) for words in keywords.values()] == [6, 5, 4] and len(methods) == 6
    of_calls, of_settings = ("\n".join(row[0] for row in table) for table in tables("trl.md")[1:3])
    for name in (*imported.split(", "), *methods, *keywords["dict"], *filter(None, keywords["trainer.generate"])):
        assert re.search(rf"\b{name}\b", of_calls), name
    assert set(keywords["PPOConfig"]) < set(code(of_settings))


def test_the_calls_named_here_are_there():
    for row in tables("trl.md")[1]:
        for name in re.findall(r"trainer\.(\w+)", row[1]):
            assert hasattr(TextPPOTrainer, name) or name in ("ref_model", "tokenizer", "kl_controller"), name


def test_every_setting_of_trl_is_answered_with_a_setting_and_its_default():
    rows = tables("trl.md")[2]
    named = [word for row in rows for word in code(re.sub(r"\(.*?\)", "", row[0]))]
    assert sorted(named) == sorted(TRL_SETTINGS)
    ours = vars(PPOConfig())
    answers = [answer for row in rows for answer in re.findall(r"`(\w+)`(?: \(`?(.*?)`?\))?", row[1])]
    for name, default in answers:
        assert name in ours or name == "step", name
        assert default in ("", str(ours.get(name))) or float(default) == ours[name], name
    assert sum(default != "" for _, default in answers) > 15
    assert only_here(0) < set(ours)


def test_every_statistic_of_trl_is_answered_with_one_of_step(gpt2_folder):
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu", gen_len=3))
    queries = trainer.encode(["衣服"] * 2)
    stats = trainer.step(queries, trainer.generate(queries), [0.1, 0.9])
    rows = tables("trl.md")[3]
    assert sorted(word for row in rows for word in code(row[0])) == sorted(TRL_STATISTICS)
    answers = {word for row in rows for word in code(row[1])}
    assert answers | only_here(1) == set(stats) and not answers & only_here(1)


def test_the_settings_that_differ_are_settings_of_this_one():
    """And the presets default and article have the values that the table gives for here and the article's code."""
    rows = tables("differences.md")[0]
    settings = [word for row in rows for word in re.findall(r"`([a-z_]+)`", row[3])]
    assert len(settings) > 8 and set(settings) <= set(vars(PPOConfig()))
    by_setting = {word: row for row in rows for word in re.findall(r"`([a-z_]+)`", row[3])}
    for name in ("minibatch_size", "lr", "lam", "adam_epsilon"):
        values = [float(re.search(r"\d[\d.e-]*", re.sub("`.*?`", "", cell))[0]) for cell in by_setting[name][1:4:2]]
        assert values == [getattr(PPOConfig(preset=preset), name) for preset in ("article", "default")], name
