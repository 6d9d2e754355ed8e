"""The Python API, for your own training loop."""

import copy
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config import PPOConfig
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import make

QUERY, RESPONSE = [2, 5, 6], [7, 8, 3]
SETTINGS = dict(device="cpu", dtype="float32", gen_len=3)


@pytest.fixture
def twins(policy):
    return make(policy), make((copy.deepcopy(policy[0]), policy[1]))


@pytest.fixture
def trainer(gpt2_folder):
    return TextPPOTrainer.from_pretrained(gpt2_folder, PPOConfig(**SETTINGS, frozen_share=0.5))


def step(queries=(QUERY, QUERY), responses=(RESPONSE, RESPONSE), rewards=(0.5, 0.1)):
    return lambda trainer: trainer.step(queries, responses, rewards)


def fit(prompts=("衣服",), reward=lambda texts: [sum(text.encode()) % 99 for text in texts], budget=0.4):
    return lambda trainer: trainer.fit_kl_coef(prompts, reward, budget)


def load(**settings):
    return lambda trainer: TextPPOTrainer.from_pretrained(trainer.config.model_name, PPOConfig(**settings))


REFUSED = [  # (call, part of the message)
    (step(rewards=[0.5, math.nan]), "reward 1 is nan"),
    (step(rewards=[math.inf, 0.5]), "reward 0 is inf"),
    (step(rewards=["good", 0.5]), "reward 0 is 'good'"),
    (step(rewards=[0.5]), "2 rewards"),
    (step([QUERY]), "expected one response per query, got 2 for 1 queries"),
    (step("衣服"), "a list with one query"),
    (step(["衣服", "书"]), "query 0 must be a 1-d tensor or a list of token ids"),
    (step(responses=[RESPONSE, [7.0, 8.5]]), "response 1 must be"),
    (step([QUERY, [2, 43]]), "query 1 has an id outside the vocabulary of 43"),
    (step(responses=[RESPONSE, [7, 0, 3]]), "response 1 contains ['[PAD]'] before its end"),
    (step([QUERY, [5] * 46]), "46 + 3 tokens > 48 positions"),
    (lambda trainer: trainer.generate(torch.tensor(QUERY)), "query 0 must be"),
    (lambda trainer: trainer.generate([QUERY, [2] * 46]), "46 tokens + gen_len 3 > 48 positions"),
    (lambda trainer: trainer.generate([[2, 5, 3]]), "query 0 ends with [SEP]"),
    (lambda trainer: trainer.encode("衣服"), "encode() takes a list of texts, for example encode(['刚收到货'])"),
    (load(lr=-1.0), "lr must be above 0"),
    (load(kl_budget=0.4), "call fit_kl_coef before the first step"),
    (lambda trainer: TextPPOTrainer.from_pretrained("./missing"), "doesn't exist"),
    (fit(prompts=[]), "needs prompts"),
    (fit(budget=0), "a budget > 0"),
    (fit(reward=lambda texts: [0.5] * len(texts)), "must differ from the rest"),
    (lambda trainer: trainer.set_kl_coef(1.0), "first step"),  # only rejected after a step
    (fit(), "first step"),
]


def everything(trainer) -> str:
    """Return everything that a call could have changed."""
    state, rest = trainer.engine.state_dict(), (trainer.n_steps, trainer.n_drawn, trainer.reward_unit)
    tensors = [*state["policy"].values(), *state["average"].values(), *trainer.ref_model.parameters()]
    moments = state["optimizer"]["state"].values()
    return repr(([tensor.tolist() for tensor in tensors], moments, rest, trainer.kl_controller.value, trainer.config))


def test_invalid_input_raises_a_clear_error_and_leaves_the_trainer_unchanged(trainer):
    trainer.config.eval_samples = 16
    for steps in range(2):
        before = everything(trainer)
        for call, said in REFUSED[: None if steps else -2]:
            with pytest.raises(ValueError) as error:
                call(trainer)
            assert said in str(error.value) and "\n" not in str(error.value), said
        assert everything(trainer) == before
        trainer.step([QUERY] * 2, trainer.generate([QUERY] * 2), [0.1, 0.9])


@pytest.mark.parametrize(
    "rewards",
    [
        np.array([0.5, 1.0], dtype=np.float16),
        [np.float32(0.5), np.int64(1)],
        [Decimal("0.5"), True],
        torch.tensor([0.25, 0.5], dtype=torch.float64, requires_grad=True) * 2,
        [torch.tensor(0.5), torch.tensor([1.0], requires_grad=True)],
    ],
    ids=str,
)
def test_rewards_can_be_numbers_of_any_kind(twins, rewards):
    """The second step shows that no gradient flows back into the rewards."""
    trainer, twin = twins
    for _ in range(2):
        stats = trainer.step([QUERY] * 2, [[5, 6], [7]], rewards)
        assert stats == twin.step([QUERY] * 2, [[5, 6], [7]], [0.5, 1.0])


@pytest.mark.parametrize(
    "kind",
    [
        list,
        lambda batch: [np.array(ids, dtype=np.int16) for ids in batch],
        lambda batch: [torch.tensor(ids, dtype=torch.int32) for ids in batch],
        np.array,
    ],
)
def test_token_ids_can_be_lists_arrays_or_tensors(twins, kind):
    (trainer, twin), queries, responses = twins, [QUERY, [2, 9, 8]], [[5, 6], [7, 3]]
    as_tensors = [[torch.tensor(ids) for ids in batch] for batch in (queries, responses)]
    assert all(map(torch.equal, trainer.generate(kind(queries)), twin.generate(as_tensors[0])))
    assert trainer.step(kind(queries), kind(responses), [0.5, 1]) == twin.step(*as_tensors, torch.tensor([0.5, 1]))


def test_step_works_under_no_grad_and_generate_in_inference_mode(twins):
    trainer, twin = twins
    with torch.inference_mode():
        responses = trainer.generate([QUERY] * 4)
    with torch.no_grad():
        stats = trainer.step([QUERY] * 4, responses, [0.1, 0.9, 0.5, 0.3])
    assert stats == twin.step([QUERY] * 4, twin.generate([QUERY] * 4), [0.1, 0.9, 0.5, 0.3])


def test_generating_for_one_query_at_a_time_gives_the_same_samples_as_one_call(twins):
    trainer, twin = twins
    at_once = trainer.generate([QUERY] * 16)
    one_by_one = [twin.generate([QUERY])[0] for _ in range(16)]
    assert all(map(torch.equal, at_once, one_by_one))
    trainer.step([QUERY] * 16, at_once, torch.arange(16) / 16)
    assert not all(map(torch.equal, at_once, trainer.generate([QUERY] * 16)))


def test_evaluation_samples_and_failed_calls_do_not_change_later_samples(twins, monkeypatch):
    trainer, twin = twins
    trainer.generate([QUERY] * 4, trainer.ref_model, seed=9, step=0)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr("support.compute.engine.sample", lambda *args: 1 / 0)
        trainer.generate([QUERY] * 4)
    assert all(map(torch.equal, trainer.generate([QUERY] * 4), twin.generate([QUERY] * 4)))


def test_decode_returns_the_encoded_texts(trainer):
    queries = trainer.encode(("刚收到货,感觉", "衣服"))
    assert [query.tolist()[0] for query in queries] == [2, 2] and 3 not in torch.cat(queries)
    responses = [torch.cat([query[1:], torch.tensor([3])]) for query in trainer.encode(["很不错!", "good"])]
    assert trainer.decode([query.tolist() for query in queries], responses) == ["刚收到货,感觉很不错!", "衣服good"]
    assert trainer.decode(responses) == ["很不错!", "good"] and trainer.decode([]) == []


def test_fit_kl_coef_finds_the_coefficient_and_the_first_step_uses_it(trainer):
    """A reward is b with probability p and a otherwise. For the best policy at a KL of 0.1, it is b with probability
    q, where q log(q/p) + (1 - q) log((1 - q) / (1 - p)) = 0.1, and beta = (b - a) / (logit(q) - logit(p))."""

    def reward(texts):
        return [30.0 * ("!" in text) for text in texts]

    coef = trainer.fit_kl_coef(["衣服"], reward, 0.1)
    queries = trainer.encode(["衣服"] * trainer.config.eval_samples)
    p = float(np.mean(reward(trainer.decode(trainer.generate(queries, trainer.ref_model, 20_170_707, 0))))) / 30
    tilted = p * math.exp(30 / coef) / (p * math.exp(30 / coef) + 1 - p)
    kl = tilted * math.log(tilted / p) + (1 - tilted) * math.log((1 - tilted) / (1 - p))
    assert kl == pytest.approx(0.1, rel=20 / len(queries))  # the estimate has no bias of order 1 / n
    assert trainer.step([QUERY] * 2, [[5, 6], [7]], [0.5, 1.0])["objective/kl_coef"] == coef


def test_a_saved_model_has_the_averaged_weights_and_the_runs_temperature(gpt2_folder, tmp_path):
    """Before the first step, the model is saved as it was loaded. Plain transformers opens both."""
    settings = PPOConfig(**SETTINGS, temperature=0.5, average_power=1.0, lr=1e-2, frozen_share=0.0)
    trainer = TextPPOTrainer.from_pretrained(str(gpt2_folder), settings)
    bias = "transformer.h.0.mlp.c_fc.bias"
    passed = [trainer.model.state_dict()[bias].clone()]
    trainer.save(str(tmp_path / "untrained"))
    for _ in range(2):
        queries = trainer.encode(["衣服"] * 4)
        trainer.step(queries, trainer.generate(queries), [0.1, 0.9, 0.4, 0.2])
        passed.append(trainer.model.state_dict()[bias].clone())
    trainer.save(tmp_path / "trained")
    average = passed[1] + 2 / 3 * (passed[2] - passed[1])  # step t has the weight (1 + 1) / (1 + t)
    assert not torch.allclose(passed[1], passed[2], atol=1e-3)
    for name, expected in (("untrained", passed[0]), ("trained", average)):
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert torch.allclose(saved.state_dict()[bias], expected, rtol=1e-6, atol=1e-7)
        assert saved.generation_config.temperature == 0.5 and saved.generation_config.max_new_tokens == 3
        assert AutoTokenizer.from_pretrained(tmp_path / name).encode("衣服")[0] == 2


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_saving_twice_gives_the_same_files_and_changes_nothing(trainer, tmp_path, scale):
    """The value head is saved in the unit of the scores, so a trainer with another unit predicts the same values."""
    queries = trainer.encode(["衣服", "这本书很", "刚收到货,感觉", "好评"])
    responses, scores = trainer.generate(queries), [scale * score for score in (1.0, 9.0, 4.0, 2.0)]
    for _ in range(3):
        trainer.step(queries, responses, scores)
    before = everything(trainer)
    for name in ("once", "twice"):
        trainer.save(tmp_path / name)
    first, second = ([path.read_bytes() for path in sorted((tmp_path / n).iterdir())] for n in ("once", "twice"))
    assert first == second and everything(trainer) == before

    again = TextPPOTrainer.from_pretrained(tmp_path / "twice", PPOConfig(**SETTINGS))
    believed = again.step(queries, responses, [3.0, 1.0, 2.0, 1.0])["ppo/val/mean"]
    trainer.engine.model.load_state_dict(trainer.policy_for_saving.state_dict())
    assert trainer.step(queries, responses, scores)["ppo/val/mean"] == pytest.approx(believed, rel=1e-4)
    assert abs(believed) > scale / 100
