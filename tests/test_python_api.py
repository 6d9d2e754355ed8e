"""A loop of one's own, in Python: what the README shows works as pasted."""

import copy
import re

import numpy as np
import pytest
import torch
from transformers import pipeline

from config import PPOConfig
from support.text_trainer import TextPPOTrainer
from tests.conftest import ROOT
from tests.test_trainer import make


def test_queries_one_at_a_time_draw_what_one_call_draws(policy):
    trainer = make(policy)
    query = torch.tensor([2, 5, 6])
    at_once = trainer.generate([query] * 16)
    trainer.step([query] * 16, at_once, torch.arange(16) / 16)
    second = trainer.generate([query] * 16)

    twin = make((trainer.ref_model, policy[1]))
    one_by_one = [twin.generate([query])[0] for _ in range(16)]
    assert all(map(torch.equal, at_once, one_by_one))
    assert len({tuple(response.tolist()) for response in one_by_one}) > 8
    assert not all(map(torch.equal, at_once, second))
    assert all(map(torch.equal, second, trainer.generate([query] * 16, step=2)))
    halves = make((trainer.ref_model, policy[1]))
    assert all(map(torch.equal, at_once, halves.generate([query] * 8) + halves.generate([query] * 8)))


def test_judging_draws_do_not_count(policy):
    trainer, twin = make(policy), make(policy)
    query = torch.tensor([2, 5, 6])
    trainer.generate([query] * 4, trainer.ref_model, seed=9, step=0)
    assert all(map(torch.equal, trainer.generate([query] * 4), twin.generate([query] * 4)))


QUERY, RESPONSE = [2, 5, 6], [7, 8, 3]


@pytest.mark.parametrize(
    ("queries", "responses", "rewards", "said"),
    [
        ([QUERY] * 2, [RESPONSE] * 2, [0.5, float("nan")], "reward 1 is nan"),
        ([QUERY] * 2, [RESPONSE] * 2, [float("inf"), 0.5], "reward 0 is inf"),
        ([QUERY] * 2, [RESPONSE] * 2, torch.zeros(2, 1), r"shape \(2,\), one number a response, not \(2, 1\)"),
        ([QUERY, []], [RESPONSE] * 2, [0.5, 0.1], "query 1 is empty"),
        ([QUERY, [2, 999]], [RESPONSE] * 2, [0.5, 0.1], "query 1 holds an id outside the vocabulary of 43"),
        ([QUERY] * 2, [[-1], RESPONSE], [0.5, 0.1], "response 0 holds an id outside"),
        ([QUERY, [5] * 46], [RESPONSE] * 2, [0.5, 0.1], "query 1 and its response have 46 and 3 tokens.* 48 positions"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_anything_moves(policy, queries, responses, rewards, said):
    trainer = make(policy)
    with pytest.raises(ValueError, match=said):
        trainer.step(queries, responses, rewards)
    assert trainer.n_steps == 0


def test_lists_of_ids_are_taken(policy):
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    responses = trainer.generate([QUERY] * 4)
    stats = trainer.step([QUERY] * 4, [response.tolist() for response in responses], [0.1, 0.9, 0.5, 0.3])
    assert twin.step([torch.tensor(QUERY)] * 4, responses, torch.tensor([0.1, 0.9, 0.5, 0.3])) == stats


# --- texts


def test_the_readme_s_loop_as_pasted(tmp_path, monkeypatch, capsys):
    """Its rewards rise, and what it saves opens here and in plain transformers."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(from config import .*?)```", readme, re.DOTALL)
    assert snippet in (ROOT / "README.zh.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet.replace("range(20)", "range(5)"), "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"\d\.\d of \d\.\d million parameters train", out) and "刚收到货,感觉" in out
    assert np.mean(names["means"][-2:]) > names["means"][0] + 0.05
    assert torch.equal(names["again"].model.lm_head.weight, names["trainer"].policy_for_saving.lm_head.weight)
    text = pipeline("text-generation", model="my_model")("[CLS]刚收到货,感觉", add_special_tokens=False)
    assert len(text[0]["generated_text"]) > 12


def test_frozen_parameters_are_not_counted(gpt2_folder, capsys):
    """Half of two blocks of width 32: 12 * 32^2 + 13 * 32 in a block, twice 32 in the last norm, 33 in the head."""
    trainer = TextPPOTrainer.from_pretrained(str(gpt2_folder), PPOConfig(frozen_share=0.5, device="cpu"))
    assert sum(weight.numel() for weight in trainer.trained) == 12 * 32**2 + 13 * 32 + 2 * 32 + 33
    assert "0.0 of 0.0 million parameters train" in capsys.readouterr().out


def test_texts_come_back_as_they_went_in(gpt2_folder):
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu"))
    queries = trainer.encode(["刚收到货,感觉", "衣服"])
    responses = [torch.cat([query[1:], torch.tensor([3])]) for query in trainer.encode(["很不错!", "good"])]
    assert trainer.decode(queries, responses) == ["刚收到货,感觉很不错!", "衣服good"]


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("./missing", {}, "no such folder"),
        (None, {"lr": -1.0}, "--lr must be above 0"),
        (None, {"batch_size": 1.5}, "batch_size must be of type int"),
        (None, {"preset": "big"}, "--preset big is unknown; choose one of"),
    ],
)
def test_what_the_command_line_refuses_is_a_value_error(gpt2_folder, name, config, said):
    with pytest.raises(ValueError, match=said):
        TextPPOTrainer.from_pretrained(name or gpt2_folder, PPOConfig(**config))
