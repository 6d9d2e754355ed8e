"""Tests that need a GPU: python -m pytest -m gpu. The random model has the article's sizes, but a tiny vocabulary."""

import pytest
import torch

from config import PPOConfig
from ppo import logprobs_from_logits
from reward import SentimentReward
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import small_run, weights, write_gpt2
from train_ppo import main

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PROMPTS = ["刚收到货,感觉", "质量", "这本书很好", "衣服很不错,好评"] * 8
SCORES = [i % 5 / 4 for i in range(32)]


@pytest.fixture(scope="module")
def large_gpt2(tmp_path_factory):
    shape = dict(n_embd=768, n_layer=12, n_head=12, initializer_range=0.02)
    return write_gpt2(tmp_path_factory.mktemp("models") / "gpt2", **shape)


@pytest.fixture(scope="module")
def trainers(large_gpt2):
    """A function that creates a trainer, and responses sampled by a float32 trainer."""

    def make(dtype="float32", device=GPU, **changes):
        config = PPOConfig(dtype=dtype, device=device, batch_size=32, minibatch_size=32, **changes)
        return TextPPOTrainer.from_pretrained(large_gpt2, config)

    trainer = make()
    return make, trainer.generate(trainer.encode(PROMPTS))


def logprobs(trainer, responses):
    """Return the policy's log-probabilities of all response tokens as one float64 vector on the CPU."""
    completions = trainer.collate(trainer.encode(PROMPTS), responses)
    found, _ = trainer.forward_pass(trainer.engine.share_trunk(completions), trainer.model, logprobs_from_logits)
    return found[completions.mask].cpu().double()


def step(trainer, responses):
    """Return a step's statistics, and how much it changes the weights, as one float64 vector on the CPU."""
    before = [weight.detach().cpu().double() for weight in trainer.engine.weights]
    stats = trainer.step(trainer.encode(PROMPTS), responses, SCORES)
    moved = [weight.detach().cpu().double() - start for weight, start in zip(trainer.engine.weights, before)]
    return stats, torch.cat([each.flatten() for each in moved])


@pytest.mark.parametrize("other", [{"device": "cpu"}, {"micro_batch_size": 5}], ids=str)
def test_float32_on_the_gpu_matches_the_cpu_and_other_micro_batch_sizes(trainers, other):
    make, responses = trainers
    one, two = make(), make(**other)
    difference = (logprobs(one, responses) - logprobs(two, responses)).abs().max()
    assert difference < 1e-4  # nats: 1,000 times float32's precision, over twelve blocks
    (stats, moved), (expected, expected_moved) = step(one, responses), step(two, responses)
    assert stats == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert (moved - expected_moved).norm() < 1e-2 * expected_moved.norm()


def test_a_bfloat16_step_is_close_to_a_float32_step(trainers):
    """Rounding must not cause ratios above 1.2, which PPO clips. Average errors are a tenth as large."""
    make, responses = trainers
    one, two = make("bfloat16"), make()
    differences = logprobs(one, responses) - logprobs(two, responses)
    assert differences.square().mean().sqrt() < 0.02 and differences.abs().max() < 0.2
    (stats, moved), (_, expected) = step(one, responses), step(two, responses)
    assert stats["ppo/skipped"] == 0 and (moved - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_repeating_a_step_gives_bitwise_identical_weights(trainers, dtype):
    make, responses = trainers
    (stats, moved), (expected, expected_moved) = step(make(dtype), responses), step(make(dtype), responses)
    assert stats == expected and moved.equal(expected_moved)


def test_the_reward_on_the_gpu_matches_the_cpu(classifier_folder):
    on_gpu, on_cpu = (SentimentReward(classifier_folder, device)(PROMPTS) for device in (torch.device(GPU), "cpu"))
    assert on_gpu.device.type == "cpu" and on_gpu.tolist() == pytest.approx(on_cpu.tolist(), abs=1e-5)


def test_two_runs_and_a_resumed_run_give_bitwise_identical_weights(tmp_path, demo, without_pictures):
    for name in ("one", "two"):
        assert small_run(tmp_path, "--device", GPU, name=name)[0] == 0
    assert small_run(tmp_path, "--device", GPU, "--episodes", "32", name="short")[0] == 0
    assert main(["--resume", str(tmp_path / "short"), "--episodes", "48"]) == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "two") == weights(tmp_path / "short")
