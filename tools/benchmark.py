"""Measure how long a training step takes, and how close that is to what the machine can do.

    python -m tools.benchmark --model_name DIR --reward_model_name DIR [--batch_size N --gen_len N --dtype ... any flag]

Runs the step of train_ppo.py once to warm up, then a few times, and prints medians. It counts the arithmetic that a
step needs, not what it does: one prefill per distinct prompt, the vocabulary projection only at completion positions,
no padding, no recomputation. A backward pass counts as two forward passes through the trained weights, and as one
through the projection if that is frozen. Frozen blocks count once for sampling and once after it. The ceiling is the
fastest matrix product of this machine in the same dtype, measured in the same run. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections import defaultdict

import torch

from config import PPOConfig
from ppo import PPOTrainer
from support.models.pretrained import decode
from support.run.load import load
from support.run.settings import check, parse_args
from tools import exits_on_user_error
from train_ppo import draw_prompts

STEPS = 3


def main(argv: list[str]) -> None:
    config, _ = parse_args(argv, "python -m tools.benchmark", __doc__)
    check(config)
    result = measure(config)
    step = result["seconds_per_step"]
    for phase in ("sampling", "scoring", "logprobs", "update"):
        print(f"{phase:10} {result[phase]:8.3f} s  {result[phase] / step:5.1%}")
    print(f"{'step':10} {step:8.3f} s")
    print(f"{result['completions_per_second']:.1f} completions/s, {result['tokens_per_second']:.0f} tokens/s")
    print(
        f"{result['multiply_adds'] / 1e9:.0f} G multiply-adds needed per step: {result['rate_tflops']:.3f} TFLOP/s of "
        f"{result['ceiling_tflops']:.3f}, {result['ceiling_share']:.0%} of the ceiling"
    )
    print(f"peak memory {result['peak_memory_gb']:.2f} GiB on {result['device']} in {result['dtype']}")
    print(json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in result.items()}))


def measure(config: PPOConfig) -> dict:
    """Return medians of a few steps: seconds of a step and of its phases, completions and tokens per second, the
    arithmetic needed, its share of the ceiling, and the peak memory in GiB (on a CPU that of the process so far)."""
    policy, tokenizer, reward, prompts, queries, reference = load(config)
    trainer = PPOTrainer(config, policy, reference, tokenizer)
    device = trainer.engine.device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, float] = defaultdict(float)

    def timed(phase, function):
        def call(*args):
            synchronize()
            started = time.perf_counter()
            result = function(*args)
            synchronize()
            seconds[phase] += time.perf_counter() - started
            return result

        return call

    trainer.generate, trainer.step = timed("sampling", trainer.generate), timed("update", trainer.step)
    trainer.forward_pass = timed("logprobs", trainer.forward_pass)
    trainer.engine.share_trunk = timed("logprobs", trainer.engine.share_trunk)
    reward.score = timed("scoring", reward.score)
    steps = []
    for step in range(1, STEPS + 2):
        seconds.clear()
        synchronize()
        started = time.perf_counter()
        drawn = draw_prompts(len(prompts), config.seed, step, config.batch_size)
        completions = trainer.generate([queries[i] for i in drawn])
        responses = completions.token_lists()
        texts = [prompts[i] + text for i, text in zip(drawn, decode(tokenizer, responses))]
        trainer.step(completions, reward.score(texts, drawn) @ reward.weights)
        synchronize()
        seconds["update"] -= seconds["logprobs"]  # both belong to PPOTrainer.step
        steps.append({**seconds, "step": time.perf_counter() - started})
    median = {name: statistics.median(step[name] for step in steps[1:]) for name in steps[0]}
    step = median.pop("step")

    bert = getattr(getattr(reward.functions.get("classifier"), "pipeline", None), "model", None)
    n_prompt, n_response = [len(query) for query in queries], [len(response) for response in responses]
    needed = multiply_adds(trainer.model, bert, config, n_prompt, n_response, [len(text) + 2 for text in texts])
    rate, ceiling = 2 * needed / step / 1e12, best_matrix_product(device, trainer.engine.dtype) / 1e12
    return {
        "seconds_per_step": step,
        "completions_per_second": config.batch_size / step,
        "tokens_per_second": sum(n_response) / step,
        "multiply_adds": needed,
        "rate_tflops": rate,
        "ceiling_tflops": ceiling,
        "ceiling_share": rate / ceiling,
        "peak_memory_gb": peak_memory(device) / 2**30,
        "dtype": str(trainer.engine.dtype)[6:],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        **median,
    }


def peak_memory(device: torch.device) -> float:
    """Return the peak memory in bytes, or NaN on Windows, where Python can't measure it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return float("nan")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def multiply_adds(policy, bert, config: PPOConfig, n_prompt: list[int], n_response: list[int], n_text: list[int]):
    """Return the multiply-adds that one step needs. bert: the classifier, or None. n_prompt, n_response, n_text:
    the tokens of each prompt, of each response (including [SEP]) and of each text that the classifier scores."""

    def blocks(layers: int, width: int, inner: int, tokens: int, context: float) -> float:
        """Count four width x width matrices, two width x inner matrices, and attention."""
        return layers * tokens * (4 * width**2 + 2 * width * inner + 2 * width * context)

    gpt2 = policy.config
    sizes = gpt2.n_layer, gpt2.n_embd, gpt2.n_inner or 4 * gpt2.n_embd
    new = sum(n - 1 for n in n_response)  # nothing is predicted after the last token
    context = sum(n_prompt) / len(n_prompt) + new / len(n_response) / 2
    prefill = sum(blocks(*sizes, n, n / 2) for n in n_prompt)
    completions = blocks(*sizes, new, context)
    projection = sum(n_response) * gpt2.n_embd * gpt2.vocab_size
    frozen = policy.n_frozen / gpt2.n_layer
    minibatches = -(-config.batch_size // config.minibatch_size)
    total = prefill + completions + projection  # sampling
    total += frozen * (prefill + completions)  # the frozen blocks, once for all the passes below
    total += 2 * ((1 - frozen) * (prefill + completions) + projection)  # old and reference log-probabilities
    forward = (1 - frozen) * (minibatches * prefill + completions)
    total += config.ppo_epochs * (3 * forward + (2 if frozen else 3) * projection)
    if bert is not None:
        sizes = bert.config.num_hidden_layers, bert.config.hidden_size, bert.config.intermediate_size
        total += sum(blocks(*sizes, n, n) for n in n_text)
    return total


def best_matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of the fastest of a few matrix products, two per multiply-add."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = 0.0
    for n in (8192, 4096) if device.type == "cuda" else (2048, 1024):
        a, b = torch.randn(2, n, n, device=device, dtype=dtype)
        for _ in range(10):
            synchronize()
            started = time.perf_counter()
            a @ b
            synchronize()
            best = max(best, 2 * n**3 / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    with exits_on_user_error("benchmark"):
        main(sys.argv[1:])
