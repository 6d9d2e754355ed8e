"""How long a training step takes, and how close that is to what the machine can do.

    python -m tools.benchmark --model_name DIR --reward_model_name DIR [--batch_size N --gen_len N --dtype ... any flag]

Runs the step of train_ppo.py once to warm up, then a few times, and prints medians. The arithmetic counted is what the
step needs, not what it does: one prefill per distinct prompt, the vocabulary projection at completion positions only,
no padding, backward as twice forward in what is trained (the projection as once where it is frozen), no recomputation:
frozen blocks count once when sampling and once after.
The ceiling is the best matrix product of this machine in the same dtype, measured in the same run. The last line is
JSON.
"""

import copy
import functools
import json
import math
import statistics
import sys
import time
from collections import defaultdict

import torch

from config import PPOConfig
from reward import score_texts
from support.errors import exits_on_user_error
from support.load import load
from support.settings import check, parse_args
from support.text_trainer import TextPPOTrainer
from train_ppo import draw_prompts

STEPS = 3
PHASES = {  # of a step, by what the engine or the loop does
    "generate": "sampling",
    "score_texts": "scoring",
    "share_trunk": "logprobs",
    "evaluate": "logprobs",
    "optimise": "update",
}


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
        f"{result['multiply_adds'] / 1e9:.0f} G multiply-adds needed a step: {result['rate_tflops']:.3f} TFLOP/s of "
        f"{result['ceiling_tflops']:.3f}, {result['ceiling_share']:.0%} of the ceiling"
    )
    print(f"peak memory {result['peak_memory_gb']:.2f} GiB on {result['device']} in {result['dtype']}")
    print(json.dumps({key: round(value, 5) if isinstance(value, float) else value for key, value in result.items()}))


def measure(config: PPOConfig) -> dict:
    """Medians of a few steps: seconds of a step and of its phases, completions and tokens a second, the arithmetic
    needed, its share of the ceiling, and the peak memory in GiB (on a CPU that of the process so far).
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    policy, tokenizer, reward, prompts = load(config)
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    queries, device = trainer.encode(prompts), trainer.engine.device
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds: dict[str, float] = defaultdict(float)

    def timed(name, call):
        synchronize()
        started = time.perf_counter()
        result = call()
        synchronize()
        seconds[PHASES[name]] += time.perf_counter() - started
        return result

    trainer.engine.observer = timed
    phases, lengths, tokens_scored = [], [], []
    for step in range(1, STEPS + 2):
        seconds.clear()
        synchronize()
        started = time.perf_counter()
        drawn = draw_prompts(len(prompts), config.seed, step, config.batch_size)
        batch = [queries[i] for i in drawn]
        responses = trainer.generate(batch)
        texts = [prompts[i] + text for i, text in zip(drawn, trainer.decode(responses))]
        scores = timed("score_texts", lambda: score_texts(reward, texts))
        trainer.step(batch, responses, scores)
        synchronize()
        phases.append({**seconds, "step": time.perf_counter() - started})
        lengths.append([len(response) for response in responses])
        tokens_scored.append([len(text) + 2 for text in texts])
    median = {name: statistics.median(phase[name] for phase in phases[1:]) for name in phases[0]}

    classifier = getattr(getattr(reward, "pipeline", None), "model", None)
    needed = multiply_adds(
        trainer.model,
        classifier and classifier.config,
        config,
        [len(q) for q in queries],
        lengths[-1],
        tokens_scored[-1],
    )
    rate = 2 * needed / median["step"] / 1e12
    ceiling = best_matrix_product(device, trainer.engine.dtype) / 1e12
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**30
    elif sys.platform == "win32":
        memory = math.nan  # Python's library does not tell
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    step = median.pop("step")
    return {
        "seconds_per_step": step,
        "completions_per_second": config.batch_size / step,
        "tokens_per_second": sum(lengths[-1]) / step,
        "multiply_adds": needed,
        "rate_tflops": rate,
        "ceiling_tflops": ceiling,
        "ceiling_share": rate / ceiling,
        "peak_memory_gb": memory,
        "dtype": str(trainer.engine.dtype)[6:],
        "device": name,
        **median,
    }


def blocks(layers: int, width: int, inner: int, tokens: int, context: float) -> float:
    """Multiply-adds of a transformer's blocks: four width x width matrices, two width x inner, and attention."""
    return layers * tokens * (4 * width**2 + 2 * width * inner + 2 * width * context)


def multiply_adds(
    policy, bert, config, prompt_lengths: list[int], lengths: list[int], tokens_scored: list[int]
) -> float:
    """What one step needs, in multiply-adds. `lengths` are the completions' tokens, [SEP] included."""
    gpt2 = policy.config
    inner = gpt2.n_inner or 4 * gpt2.n_embd
    new = sum(length - 1 for length in lengths)  # nothing is predicted after the last token
    context = sum(prompt_lengths) / len(prompt_lengths) + new / len(lengths) / 2
    prefill = sum(blocks(gpt2.n_layer, gpt2.n_embd, inner, length, length / 2) for length in prompt_lengths)
    completions = blocks(gpt2.n_layer, gpt2.n_embd, inner, new, context)
    projection = sum(lengths) * gpt2.n_embd * gpt2.vocab_size
    minibatches = -(-config.batch_size // config.minibatch_size)
    frozen = policy.n_frozen / gpt2.n_layer
    total = prefill + completions + projection  # sampling
    total += frozen * (prefill + completions)  # what the trained blocks start from, once for all the passes below
    total += 2 * ((1 - frozen) * (prefill + completions) + projection)  # old and reference log-probabilities
    forward = (1 - frozen) * (minibatches * prefill + completions)
    total += config.ppo_epochs * (3 * forward + (2 if frozen else 3) * projection)
    if bert is not None:
        total += sum(
            blocks(bert.num_hidden_layers, bert.hidden_size, bert.intermediate_size, n, n) for n in tokens_scored
        )
    return total


@functools.cache
def best_matrix_product(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the fastest of several matrix products, two operations per multiply-add."""
    best = 0.0
    sizes = (
        [(8192, 8192, 8192), (4096, 4096, 4096)]
        if device.type == "cuda"
        else [(2048, 2048, 2048), (512, 768, 3072), (1024, 1024, 1024)]
    )
    for m, k, n in sizes:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        for _ in range(10):
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            a @ b
            if device.type == "cuda":
                torch.cuda.synchronize()
            best = max(best, 2 * m * k * n / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    with exits_on_user_error("benchmark"):
        main(sys.argv[1:])
