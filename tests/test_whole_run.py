"""The output of a whole run, recomputed by a second implementation with plain `transformers` and NumPy."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from config import PPOConfig
from support.models.pretrained import load_gpt2_config, load_policy
from tests.helpers import Reference, leave_pictures_empty, read_json, rows
from train_ppo import main

PROMPTS = ["好", "刚收到货,感觉", "给妈妈买的,"]  # one, seven and six tokens long
BATCH, GEN_LEN, TEMPERATURE, SEED, BETA = 10, 10, 0.8, 3, 1.0
SETTINGS = dict(
    preset="demo", device="cpu", prompts=PROMPTS, temperature=TEMPERATURE, gen_len=GEN_LEN, seed=SEED,
    batch_size=BATCH, minibatch_size=4, micro_batch_size=3, ppo_epochs=2, lam=0.9, gamma=0.97, frozen_share=0.5,
    vf_coef=0.4, init_kl_coef=BETA, kl_controller="adaptive", target=0.05, horizon=50, lr=3e-4, adam_epsilon=1e-3,
    average_power=2.0, max_grad_norm=0.7, save_every=1, keep_checkpoints=9, log_samples_every=2, run_name="run",
    eval_samples=30,
)  # fmt: skip
EPISODES = {"float32": 27, "bfloat16": 20}
PAD, UNK, CLS, SEP, MASK = range(5)
EVALUATION_SEED = 20_170_707


def how_far_apart(dtype: str, spread: float) -> float:
    """Return the largest difference between two correct computations of a logit.

    The logits of a token have a standard deviation of `spread`. A forward pass rounds a number about 25 times: 11 times
    in each of two blocks, then in the embedding, the norm and the projection. One rounding changes it by up to `unit`
    times its size, with a mean square of a third of unit^2. In bfloat16, products are summed in float32. In float32, a
    sum of up to 384 terms is rounded 384 times. Two computations have twice as many errors, and the largest of a few
    thousand independent errors is within 4 standard deviations.
    """
    unit, roundings = {"float32": (2**-24, 25 * 384), "bfloat16": (2**-8, 25)}[dtype]
    return 4 * math.sqrt(2 * roundings / 3) * unit * spread


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tmp_path_factory, demo):
    """A run, and the models that it used, loaded in plain `transformers`."""
    runs_dir = tmp_path_factory.mktemp("runs")
    settings, flags = SETTINGS | {"episodes": EPISODES[request.param], "dtype": request.param}, []
    for name, value in {**settings, "runs_dir": runs_dir}.items():
        flags += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    with pytest.MonkeyPatch.context() as patched:
        leave_pictures_empty(patched)  # the picture has its own tests
        assert main(flags) == 0
    folder = runs_dir / "run"
    metrics = [{name: float(value) for name, value in row.items()} for row in rows(folder)]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    checkpoints = sorted((folder / "checkpoints").iterdir())
    start = GPT2LMHeadModel.from_pretrained(demo[0], dtype=torch.float32)
    policies = [start, *(with_weights(demo[0], path / "policy.safetensors") for path in checkpoints)]
    dtype = getattr(torch, request.param)
    found = SimpleNamespace(
        folder=folder, metrics=metrics, samples=samples, checkpoints=checkpoints,
        evaluation=read_json(folder / "evaluation.json"), demo=demo, settings=settings,
        vocab=(demo[0] / "vocab.txt").read_text(encoding="utf-8").split("\n"), steps=len(metrics),
        policies=[policy.to(dtype).eval() for policy in policies], dtype=dtype,
        saved=AutoModelForCausalLM.from_pretrained(folder / "model").to(dtype).eval(),
    )  # fmt: skip
    logits = start(torch.tensor([[CLS, *map(found.vocab.index, PROMPTS[1])]])).logits.float() / TEMPERATURE
    found.close = how_far_apart(request.param, logits.std(-1).max().item())
    return found


def with_weights(folder, file) -> GPT2LMHeadModel:
    gpt2 = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    weights = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("v_head")}
    missing, unknown = gpt2.load_state_dict(weights, strict=False)
    assert not unknown and set(missing) < {"lm_head.weight", "transformer.wte.weight"}  # tied weights
    return gpt2


def of_step(run, step) -> list[tuple[str, str]]:
    return [(sample["prompt"], sample["completion"]) for sample in run.samples if sample["step"] == step]


def tokens_of(run, completion) -> list[int]:
    """Return the tokens of a completion: one per character, and [SEP] if it is shorter than gen_len."""
    return [run.vocab.index(character) for character in completion] + [SEP] * (len(completion) < GEN_LEN)


def logprobs_of(run, gpt2, texts) -> list[torch.Tensor]:
    """Return, for each text, the log-probabilities (T, V) from which its tokens were sampled."""
    prompts = [[CLS, *map(run.vocab.index, prompt)] for prompt, _ in texts]
    completions = [tokens_of(run, completion) for _, completion in texts]
    whole = [torch.tensor(prompt + completion) for prompt, completion in zip(prompts, completions)]
    with torch.no_grad():
        logits = gpt2(torch.nn.utils.rnn.pad_sequence(whole, batch_first=True)).logits.float() / TEMPERATURE
    logits[..., [PAD, UNK, CLS, MASK]] = -1e30
    logprobs = logits.log_softmax(-1)
    return [row[len(a) - 1 : len(a) + len(b) - 1] for row, a, b in zip(logprobs, prompts, completions)]


def draws_missed_by(run, gpt2, texts, seed, step) -> float:
    """Return the largest distance of a random number from its token's interval of cumulative probabilities."""
    farthest = 0.0
    for i, ((_, completion), logprobs) in enumerate(zip(texts, logprobs_of(run, gpt2, texts))):
        philox = np.random.Philox(key=[seed, step], counter=[0, 0, 0, i])
        draws = np.random.Generator(philox).random(GEN_LEN, np.float32)
        cumulative = logprobs.double().exp().cumsum(-1)
        for t, token in enumerate(tokens_of(run, completion)):
            low, high = cumulative[t, token - 1], cumulative[t, token]
            farthest = max(farthest, float(low - draws[t]), float(draws[t] - high))
    return farthest


def test_prompts_take_turns_in_a_new_random_order_each_round(run):
    turns = [np.random.default_rng([SEED, turn]).permutation(3) for turn in range(14)]
    n = run.steps * BATCH
    assert run.steps == len(run.checkpoints) == math.ceil(run.settings["episodes"] / BATCH)
    assert [sample["prompt"] for sample in run.samples] == [PROMPTS[i] for turn in turns for i in turn][:n]
    assert [sample["step"] for sample in run.samples] == [1 + i // BATCH for i in range(n)]


def test_each_token_is_the_one_that_its_random_number_selects(run):
    """The policy that samples in a step is in the checkpoint of the previous step.

    If all logits change by at most d, a cumulative probability changes by at most tanh(d) / 2, which is below d / 2.
    """
    for step, policy in zip(range(1, run.steps + 1), run.policies):
        assert draws_missed_by(run, policy, of_step(run, step), SEED, step) < run.close / 2
    average = load_file(run.checkpoints[-1] / "average.safetensors")
    assert all(weight.equal(average[name].to(run.dtype)) for name, weight in run.saved.named_parameters())
    for when, evaluated in (("before", run.policies[0]), ("after", run.saved)):
        texts = [(prompt, text) for prompt, text, _ in run.evaluation[when]["samples"]]
        assert draws_missed_by(run, evaluated, texts, EVALUATION_SEED, 0) < run.close / 2


def test_kl_and_entropy_match_the_samples(run):
    """Errors of single tokens cancel in a mean over about 100 tokens. In the KL of a text, those of ten add up."""
    for step, (row, policy) in enumerate(zip(run.metrics, run.policies), 1):
        texts = of_step(run, step)
        tokens = [tokens_of(run, completion) for _, completion in texts]
        old, ref = (logprobs_of(run, gpt2, texts) for gpt2 in (policy, run.policies[0]))
        kl = sum((a - b)[range(len(ids)), ids].sum().item() for a, b, ids in zip(old, ref, tokens)) / BATCH
        logprobs = torch.cat(old)
        entropy = -(logprobs.exp() * logprobs).sum(-1).mean().item()
        assert [row["objective/kl"], row["objective/entropy"]] == pytest.approx([kl, entropy], abs=run.close)
    assert all(row["objective/kl"] for row in run.metrics[1:])


@pytest.mark.parametrize("run", ["float32"], indirect=True)
def test_a_second_implementation_learns_the_same_from_the_samples(run):
    """Checks the statistics of PPO in metrics.csv and the weights in the checkpoint for the first two steps.

    The tolerances are larger than in test_step_reference.py, because errors add up over the steps.
    """
    start = load_policy(run.demo[0], load_gpt2_config(run.demo[0]))
    reference = Reference(PPOConfig(**run.settings), start, start)
    for step in (1, 2):
        scores = [sample["score"] for sample in run.samples if sample["step"] == step]
        queries = [torch.tensor([CLS, *map(run.vocab.index, prompt)]) for prompt, _ in of_step(run, step)]
        responses = [torch.tensor(tokens_of(run, text)) for _, text in of_step(run, step)]
        expected = reference.step(queries, responses, scores)
        row = run.metrics[step - 1]
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-3, abs=1e-4)
    for name, expected in (("policy", reference.weights()), ("average", reference.average())):
        got = load_file(run.checkpoints[1] / f"{name}.safetensors")
        for weight, first in start.state_dict().items():
            moved, should = got.get(weight, got["transformer.wte.weight"]) - first, expected[weight] - first
            assert (moved - should).norm() <= 5e-3 * should.norm() + 1e-6, weight
