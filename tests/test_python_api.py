"""A loop of one's own, in Python: what the README shows works as pasted."""

import copy
import json
import re

import numpy as np
import pytest
import safetensors.torch
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
    assert np.mean(names["means"][-2:]) > names["means"][0]
    assert torch.equal(names["again"].model.lm_head.weight, names["trainer"].policy_for_saving.lm_head.weight)
    text = pipeline("text-generation", model="my_model")("[CLS]刚收到货,感觉", add_special_tokens=False)
    assert len(text[0]["generated_text"]) > 12


def test_texts_come_back_as_they_went_in(gpt2_folder):
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu"))
    queries = trainer.encode(["刚收到货,感觉", "衣服"])
    responses = [torch.cat([query[1:], torch.tensor([3])]) for query in trainer.encode(["很不错!", "good"])]
    texts = ["刚收到货,感觉很不错!", "衣服good"]
    assert trainer.decode(queries, responses) == texts
    assert trainer.decode([query.tolist() for query in queries], responses) == texts
    assert trainer.decode(queries, [response.tolist() for response in responses]) == texts
    with pytest.raises(ValueError):
        trainer.decode(queries, responses[:1])


def test_what_trains_is_counted(demo, capsys):
    """Blocks of 12 * 96^2 + 13 * 96, 144 + 64 embeddings of 96, twice 96 in the last norm, 97 in the value head: all
    243,937, or a block, norm and head, 112,129."""
    for frozen_share, said in ((0.0, "0.2 of 0.2"), (0.5, "0.1 of 0.2")):
        TextPPOTrainer.from_pretrained("demo", PPOConfig(frozen_share=frozen_share, device="cpu"))
        assert capsys.readouterr().out.splitlines()[-1] == f"{said} million parameters train"


def test_without_a_config_the_settings_are_the_default_ones(gpt2_folder):
    assert TextPPOTrainer.from_pretrained(gpt2_folder).config == PPOConfig()


def test_a_saved_model_is_the_average_at_the_temperature_of_the_run(gpt2_folder, tmp_path):
    """Before any step it is the model that was loaded."""
    settings = PPOConfig(device="cpu", temperature=0.5, average_power=1.0, lr=1e-2, frozen_share=0.0, gen_len=3)
    trainer = TextPPOTrainer.from_pretrained(str(gpt2_folder), settings)
    bias = "transformer.h.0.mlp.c_fc.bias"
    passed = [trainer.model.state_dict()[bias].clone()]
    trainer.save(str(tmp_path / "untrained"))
    for _ in range(2):
        queries = trainer.encode(["衣服"] * 4)
        trainer.step(queries, trainer.generate(queries), [0.1, 0.9, 0.4, 0.2])
        passed.append(trainer.model.state_dict()[bias].clone())
    trainer.save(tmp_path / "trained")
    average = passed[1] + 2 / 3 * (passed[2] - passed[1])  # step t weighs about t: (1 + 1) / (1 + t)
    for name, expected in (("untrained", passed[0]), ("trained", average)):
        weights = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert torch.allclose(weights[bias], expected, atol=1e-7)
        assert json.loads((tmp_path / name / "generation_config.json").read_text())["temperature"] == 0.5
    assert not torch.allclose(passed[1], passed[2], atol=1e-4)


def test_the_reference_is_what_was_loaded_in_the_dtype_of_the_run(gpt2_folder):
    settings = dict(device="cpu", frozen_share=0.0, gen_len=3, lr=1e-2)
    for dtype in ("float32", "bfloat16"):
        trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(dtype=dtype, **settings))
        before = copy.deepcopy(trainer.model.state_dict())
        queries = trainer.encode(["衣服"] * 4)
        trainer.step(queries, trainer.generate(queries), [0.1, 0.9, 0.4, 0.2])
        assert trainer.model.dtype == torch.float32 and trainer.ref_model.dtype == getattr(torch, dtype)
        for name, weight in trainer.ref_model.state_dict().items():
            assert torch.equal(weight, before[name].to(weight.dtype)), name
        assert not torch.equal(trainer.model.lm_head.weight, before["lm_head.weight"])


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
