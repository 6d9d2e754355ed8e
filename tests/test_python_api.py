"""A loop of one's own, in Python: what the README shows works as pasted."""

import copy
import json
import math
import random
import re
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import pipeline

from config import PPOConfig
from support.text_trainer import TextPPOTrainer
from tests.helpers import code_blocks, make


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
IDS = "a 1-d tensor or a list of token ids"


def step(queries=(QUERY, QUERY), responses=(RESPONSE, RESPONSE), rewards=(0.5, 0.1)):
    return lambda trainer: trainer.step(queries, responses, rewards)


def inside(context, call):
    def called(trainer):
        with context():
            call(trainer)

    return called


REFUSED = [  # (call, what is said)
    (step(rewards=[0.5, math.nan]), "reward 1 is nan: rewards must be finite numbers, one for each response"),
    (step(rewards=[math.inf, 0.5]), "reward 0 is inf"),
    (step(rewards=[0.5, 1e39]), "reward 1 is 1e+39"),
    (step(rewards=[0.5, 10**5000]), "reward 1 is inf"),
    (step(rewards=["good", 0.5]), "reward 0 is 'good'"),
    (step(rewards=[0.5, None]), "reward 1 is None"),
    (step(rewards=torch.zeros(2, 1)), "reward 0 is [0.0]"),
    (step(rewards=[torch.zeros(2)] * 2), "reward 0 is tensor([0., 0.])"),
    (step(rewards=[0.5]), "2 queries, 2 responses and 1 rewards"),
    (step([QUERY]), "1 queries, 2 responses and 2 rewards"),
    (step([], [], []), "0 queries, 0 responses and 0 rewards"),
    (step(rewards=0.5), "one reward for each completion is needed, in a list or a tensor, not 0.5"),
    (step(rewards=None), "one reward for each completion is needed, in a list or a tensor, not None"),
    (step(rewards=torch.tensor(0.5)), "one reward for each completion is needed"),
    (step(rewards={0: 0.5, 1: 0.1}), "one reward for each completion is needed"),
    (step(None), "one query for each completion is needed, in a list or a tensor, not None"),
    (step("衣服"), "one query for each completion is needed, in a list or a tensor, not '衣服'"),
    (step(responses={"input_ids": [RESPONSE] * 2}), "one response for each completion is needed"),
    (step(["衣服", "书"]), f"query 0 must be {IDS}, not '衣服'; a single query goes into a list, too"),
    (step([QUERY, None]), f"query 1 must be {IDS}, not None"),
    (step(QUERY[:2]), f"query 0 must be {IDS}, not 2; a single query goes into a list, too"),
    (step(responses=[RESPONSE, [7.0, 8.5]]), f"response 1 must be {IDS}, not [7.0, 8.5]"),
    (step(responses=[RESPONSE, torch.tensor([7.0, 3.0], requires_grad=True)]), f"response 1 must be {IDS}"),
    (step(responses=torch.tensor([RESPONSE, RESPONSE]) == 3), f"response 0 must be {IDS}, not [False, False, True]"),
    (step([[QUERY], [QUERY]]), f"query 0 must be {IDS}, not [[2, 5, 6]]"),
    (step([torch.tensor([QUERY])] * 2), f"query 0 must be {IDS}, not tensor([[2, 5, 6]])"),
    (step([[2, [5]], QUERY]), f"query 0 must be {IDS}, not [2, [5]]"),
    (step([QUERY, []]), "query 1 is empty; it needs at least one token"),
    (step([QUERY, [2, 999]]), "query 1 holds an id outside the vocabulary of 43"),
    (step(responses=[[-1], RESPONSE]), "response 0 holds an id outside"),
    (step(responses=[[2**70], RESPONSE]), f"response 0 must be {IDS}, not [1180591620717411303424]"),
    (step(responses=[RESPONSE, [7, 0, 3]]), "response 1 holds [PAD] before its end, a token that is never sampled"),
    (step([QUERY, [5] * 46]), "query 1 and its response have 46 and 3 tokens, and the model 48 positions"),
    (inside(torch.inference_mode, step()), "nothing can be trained in torch.inference_mode(); leave it before step()"),
    (lambda trainer: trainer.step([QUERY], [RESPONSE]), "missing a required argument: 'rewards'"),
    (lambda trainer: trainer.generate(torch.tensor(QUERY)), f"query 0 must be {IDS}, not 2; a single query goes into"),
    (lambda trainer: trainer.generate(["衣服"]), f"query 0 must be {IDS}, not '衣服'"),
    (lambda trainer: trainer.generate(None), "one query for each completion is needed"),
    (lambda trainer: trainer.generate([QUERY, [2] * 46]), "query 1 has 46 tokens, with gen_len 3 more than"),
    (lambda trainer: trainer.generate([QUERY, []]), "query 1 is empty"),
    (lambda trainer: trainer.generate([[2, 5, 3]]), "query 0 ends with [SEP], after which nothing is to follow"),
    (
        lambda trainer: trainer.generate([QUERY], max_new_tokens=8, top_k=0.0),
        "generate() takes query_tensors, model, seed, step: got an unexpected keyword argument 'max_new_tokens'; "
        "all else is set in the config, such as gen_len and temperature",
    ),
    (lambda trainer: trainer.encode("衣服"), "encode() takes a list of texts, as in encode(['刚收到货']), not '衣服'"),
    (lambda trainer: trainer.encode(["衣服", None]), "encode() takes a list of texts"),
    (lambda trainer: trainer.encode([["衣服"]]), "encode() takes a list of texts"),
    (lambda trainer: trainer.encode(None), "encode() takes a list of texts"),
    (
        lambda trainer: trainer.decode(torch.tensor(RESPONSE)),
        f"sequence 0 must be {IDS}, not 7; a single",
    ),
    (lambda trainer: trainer.decode(["很好"]), f"sequence 0 must be {IDS}, not '很好'"),
    (
        lambda trainer: trainer.decode([QUERY] * 2, [RESPONSE]),
        "needs one response for each query, not 2 and 1",
    ),
    (lambda trainer: trainer.decode([[999]]), "sequence 0 holds an id outside the vocabulary of 43"),
]


def everything(trainer) -> list:
    """All that a call could have moved, as it is now."""
    state = copy.deepcopy(trainer.engine.state_dict())
    weights = [*state["policy"].values(), *state["average"].values(), *trainer.ref_model.parameters()]
    moments = [tensor for of_weight in state["optimizer"]["state"].values() for tensor in of_weight.values()]
    counters = trainer.n_steps, trainer.n_drawn, trainer.kl_controller.value, state["skipped_in_a_row"]
    generators = repr(random.getstate()), repr(np.random.get_state()), *torch.get_rng_state().tolist()
    return [*(tensor.tolist() for tensor in weights + moments), counters, generators]


def test_what_is_refused_is_said_and_leaves_the_trainer_as_it_was(gpt2_folder):
    """And what it draws next."""
    config = PPOConfig(device="cpu", dtype="float32", gen_len=3, frozen_share=0.5)
    trainer, twin = (TextPPOTrainer.from_pretrained(gpt2_folder, config) for _ in range(2))
    for one in (trainer, twin):
        one.step([QUERY] * 2, one.generate([QUERY] * 2), [0.1, 0.9])
        one.generate([QUERY])
    before = everything(trainer)
    for call, said in REFUSED:
        with pytest.raises((ValueError, TypeError)) as error:
            call(trainer)
        assert said in str(error.value) and "\n" not in str(error.value), said
    assert everything(trainer) == before
    assert trainer.generate([QUERY] * 9)[-1].tolist() == twin.generate([QUERY] * 9)[-1].tolist()


def test_a_call_that_fails_draws_nothing(policy, monkeypatch):
    trainer, twin = make(policy), make(policy)
    with monkeypatch.context() as patched:
        patched.setattr("support.engine.sample", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer.generate([QUERY] * 4)
    assert all(map(torch.equal, trainer.generate([QUERY] * 4), twin.generate([QUERY] * 4)))


@pytest.mark.parametrize(
    "rewards",
    [
        (0.5, 1),
        np.array([0.5, 1.0]),
        np.array([0.5, 1.0], dtype=np.float16),
        [np.float32(0.5), np.int64(1)],
        [Decimal("0.5"), Fraction(1)],
        [0.5, True],
        torch.tensor([0.5, 1.0], dtype=torch.bfloat16),
        torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True),
        torch.tensor([0.25, 0.5], requires_grad=True) * 2,
        [torch.tensor(0.5), torch.tensor([1.0], requires_grad=True)],
        (reward for reward in (0.5, 1.0)),
    ],
    ids=str,
)
def test_rewards_are_numbers_of_any_kind(policy, rewards):
    """Twice: what has a graph of its own is not gone back through."""
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    rewards = list(rewards) if hasattr(rewards, "send") else rewards
    for _ in range(2):
        stats = trainer.step([QUERY] * 2, [[5, 6], [7]], rewards)
        assert stats == twin.step([QUERY] * 2, [[5, 6], [7]], [0.5, 1.0])


@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda batch: [np.array(ids, dtype=np.int16) for ids in batch],
        lambda batch: [torch.tensor(ids, dtype=torch.int32) for ids in batch],
        lambda batch: [list(torch.tensor(ids)) for ids in batch],
        lambda batch: (ids for ids in batch),
        torch.tensor,
        np.array,
        lambda batch: inference(batch),
    ],
)
def test_token_ids_come_in_any_form(policy, kind):
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    queries, responses = [QUERY, [2, 9, 8]], [[5, 6], [7, 3]]
    assert all(map(torch.equal, trainer.generate(kind(queries)), twin.generate(queries)))
    stats = trainer.step(kind(queries), kind(responses), [0.5, 1.0])
    assert stats == twin.step(
        [torch.tensor(ids) for ids in queries], [torch.tensor(ids) for ids in responses], [0.5, 1]
    )


def inference(batch):
    with torch.inference_mode():
        return [torch.tensor(ids) for ids in batch]


def test_a_loop_may_be_written_below_no_grad(policy):
    """What generate gives in inference mode can be trained on outside."""
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    with torch.inference_mode():
        responses = trainer.generate([QUERY] * 4)
    with torch.no_grad():
        stats = trainer.step([QUERY] * 4, responses, [0.1, 0.9, 0.5, 0.3])
    assert stats == twin.step([QUERY] * 4, twin.generate([QUERY] * 4), [0.1, 0.9, 0.5, 0.3])


def test_a_model_made_in_inference_mode_is_refused_at_once(gpt2_folder):
    with torch.inference_mode(), pytest.raises(ValueError, match="made in torch.inference_mode.. cannot be trained"):
        TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu"))


@pytest.mark.parametrize("call", [step(), lambda trainer: trainer.generate([QUERY])])
def test_one_thread_at_a_time(policy, call):
    """The second is refused while the first is at work, and the first ends as if it had been alone; so may the next."""
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    refusals = []

    def second_thread(*args):
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            refusals.append(pool.submit(call, trainer).exception())

    hook = trainer.model.transformer.h[1].register_forward_hook(second_thread)
    stats = trainer.step([QUERY] * 2, [[5, 6], [7, 3]], [0.5, 0.1])
    (error,) = refusals
    assert type(error) is ValueError
    assert str(error) == "another thread is in step() or generate() of this trainer: one at a time"
    assert stats == twin.step([QUERY] * 2, [[5, 6], [7, 3]], [0.5, 0.1])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(call, trainer).exception() is None


def test_a_trainer_can_be_copied(policy):
    trainer = make(policy)
    twin = copy.deepcopy(trainer)
    stats = trainer.step([QUERY] * 2, [[5, 6], [7, 3]], [0.5, 0.1])
    assert twin.step([QUERY] * 2, [[5, 6], [7, 3]], [0.5, 0.1]) == stats


def test_lists_of_ids_are_taken(policy):
    trainer, twin = make(policy), make((copy.deepcopy(policy[0]), policy[1]))
    responses = trainer.generate([QUERY] * 4)
    stats = trainer.step([QUERY] * 4, [response.tolist() for response in responses], [0.1, 0.9, 0.5, 0.3])
    assert twin.step([torch.tensor(QUERY)] * 4, responses, torch.tensor([0.1, 0.9, 0.5, 0.3])) == stats


# --- texts


def test_the_readme_s_loop_as_pasted(tmp_path, monkeypatch, capsys):
    """Its rewards rise, and what it saves opens here and in plain transformers."""
    (snippet,) = [code for code in code_blocks("README.md", "python") if code.startswith("from config import")]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(snippet.replace("range(20)", "range(5)"), "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"\d\.\d of \d\.\d million parameters train", out) and "刚收到货,感觉" in out
    means = [float(mean) for mean in re.findall(r"^(\d\.\d\d)  KL", out, re.MULTILINE)]
    assert len(means) == 5 and np.mean(means[-2:]) > means[0]
    again = TextPPOTrainer.from_pretrained("my_model", PPOConfig(preset="demo"))
    assert torch.equal(again.model.lm_head.weight, names["trainer"].policy_for_saving.lm_head.weight)
    text = pipeline("text-generation", model="my_model")("刚收到货,感觉")
    assert len(text[0]["generated_text"]) > 12


def test_texts_come_back_as_they_went_in(gpt2_folder):
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(device="cpu"))
    queries = trainer.encode(["刚收到货,感觉", "衣服"])
    responses = [torch.cat([query[1:], torch.tensor([3])]) for query in trainer.encode(["很不错!", "good"])]
    texts = ["刚收到货,感觉很不错!", "衣服good"]
    assert trainer.decode(queries, responses) == texts
    assert trainer.decode([query.tolist() for query in queries], responses) == texts
    assert trainer.decode(queries, [response.tolist() for response in responses]) == texts
    assert trainer.decode([]) == trainer.decode([], []) == []


def test_what_trains_is_counted(demo, capsys):
    """Blocks of 12 * 96^2 + 13 * 96, 144 + 64 embeddings of 96, twice 96 in the last norm, 97 in the value head: all
    243,937, or a block, norm and head, 112,129."""
    for frozen_share, said in ((0.0, "0.2 of 0.2"), (0.5, "0.1 of 0.2")):
        TextPPOTrainer.from_pretrained("demo", PPOConfig(frozen_share=frozen_share, device="cpu"))
        assert capsys.readouterr().out.splitlines()[-1] == f"{said} million parameters train"


def test_without_a_config_the_settings_are_the_default_ones(gpt2_folder):
    assert TextPPOTrainer.from_pretrained(gpt2_folder).config == PPOConfig(model_name=str(gpt2_folder))


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


def test_the_values_of_a_saved_model_are_in_the_unit_of_the_scores(gpt2_folder, tmp_path):
    """And a trainer that goes on from it, with other scores and another unit, values texts the same."""
    settings = PPOConfig(device="cpu", value_lr=0.1, average_power=1e9, gen_len=3)
    trainer = TextPPOTrainer.from_pretrained(gpt2_folder, settings)
    queries = trainer.encode(["衣服"] * 4)
    responses = trainer.generate(queries)
    trainer.step(queries, responses, [100.0, 900.0, 400.0, 200.0])
    believed = trainer.step(queries, responses, [100.0, 900.0, 400.0, 200.0])["ppo/val/mean"]
    trainer.step(queries, responses, [100.0, 900.0, 400.0, 200.0])
    trainer.save(tmp_path / "saved")
    wanted = trainer.step(queries, responses, [0.1, 0.1, 0.1, 0.1])["ppo/val/mean"]
    again = TextPPOTrainer.from_pretrained(tmp_path / "saved", settings)
    assert again.step(queries, responses, [3.0, 1.0, 2.0, 1.0])["ppo/val/mean"] == pytest.approx(wanted, rel=1e-4)
    assert abs(wanted) > 10 and wanted != pytest.approx(believed, rel=0.01)


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
