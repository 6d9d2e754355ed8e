"""tools/benchmark.py: multiply-adds match a count by hand, and the phases of a step don't overlap."""

import itertools
from types import SimpleNamespace

import pytest

from config import PPOConfig
from tools import benchmark


def gpt2(n_layer, n_frozen):
    return SimpleNamespace(
        config=SimpleNamespace(n_layer=n_layer, n_embd=2, n_inner=None, vocab_size=3), n_frozen=n_frozen
    )


def test_multiply_adds_by_hand():
    """The prompt has 2 tokens and the completion 3, of which the model reads 2. In a block, each token costs 48 for the
    matrices and 4 for every token that it attends to: on average 1 in the prompt and 3 in the completion. That is 104
    for the prompt and 120 for the completion. The projection to the vocabulary costs 18, so a pass costs 242.

    A step takes one pass for sampling, two for log-probabilities, and three for an update with its backward pass.
    """
    config = PPOConfig(batch_size=1, minibatch_size=1, ppo_epochs=1)
    assert benchmark.multiply_adds(gpt2(1, 0), None, config, [2], [3], []) == 242 + 2 * 242 + 3 * 242
    # If the lower block is frozen, sampling uses both blocks, and all later passes share one pass through the lower one
    half = benchmark.multiply_adds(gpt2(2, 1), None, config, [2], [3], [])
    assert half == (2 * 224 + 18) + 224 + 2 * 242 + (3 * 224 + 2 * 18)
    bert = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=1, hidden_size=2, intermediate_size=8))
    assert benchmark.multiply_adds(gpt2(1, 0), bert, config, [2], [3], [5]) == 6 * 242 + 5 * (48 + 4 * 5)


def test_the_phases_of_a_step_do_not_overlap(gpt2_folder, classifier_folder, monkeypatch):
    """The fake clock advances by one second at each reading."""
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    monkeypatch.setattr(benchmark, "STEPS", 1)
    monkeypatch.setattr(benchmark, "best_matrix_product", lambda device, dtype: 1e12)
    names = {"model_name": str(gpt2_folder), "reward_model_name": str(classifier_folder)}
    config = PPOConfig(**names, batch_size=4, minibatch_size=4, ppo_epochs=1, gen_len=4, device="cpu", dtype="float32")
    found = benchmark.measure(config)
    phases = [found[phase] for phase in ("sampling", "scoring", "logprobs", "update")]
    assert sum(phases) + 4 == found["seconds_per_step"] == 4 / found["completions_per_second"]  # 4 between the phases
    assert found["ceiling_share"] == pytest.approx(2 * found["multiply_adds"] / found["seconds_per_step"] / 1e12)
