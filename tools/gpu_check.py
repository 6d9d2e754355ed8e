"""One command that tells the owner of a GPU whether all is well there, and how fast it is.

    python -m tools.gpu_check                   on a CUDA GPU, under ten minutes; about 8 GB of temporary disk
    python -m tools.gpu_check --device cpu      the same checks with tiny models, in seconds

Needs no network: the models are made on the spot, of the article's size (12 blocks, 768 wide, 21,128 tokens), with
random weights or taught the demo grammar's reviews. Prints one Markdown table, ready for docs/speed.md, row by row. The
exit code is 0 where all is well, 1 where a check failed, 2 where there is no GPU. A check that raises is a failed row;
the others still run, unless the GPU takes no work any more.
"""

import argparse
import contextlib
import copy
import functools
import gc
import io
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file

import train_ppo
from config import PPOConfig
from gpt2_value_head import completion_uniforms
from ppo import PPOTrainer, logprobs_values_entropy
from support.checkpoint import checkpoints
from support.demo_models import (
    CLASSIFIER_SIZES,
    GPT2_SIZES,
    make_demo_models,
    new_classifier,
    new_gpt2,
    write_model,
    write_review,
    write_vocab,
)
from support.devices import check_device, environment, pick_device, pick_dtype
from support.errors import UserError, first_line
from support.models import (
    encode_prompt,
    load_gpt2_config,
    load_policy,
    load_tokenizer,
    quiet_transformers,
)
from tools import benchmark

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["刚收到货,感觉", "质量", "第二次买了,包装", "用了几天,屏幕很不错,但是"]
# Of a whole short run in bfloat16, rounding soon decides which tokens are drawn
ONE_STEP = "--episodes 128 --batch_size 128 --minibatch_size 128".split()
WAIT = 300  # seconds at most until a run that is to be killed has a checkpoint, or two processes are done

LIMITS = {  # figures "on a CPU" are of models of the article's size
    "float32": 1e-4,  # log-probabilities, nats; on a CPU float32 and float64 differ by 2e-6
    "statistics": 1e-3,  # of one step: absolute below 1, relative above; and the step's weights, of how far they moved
    # Rounding must not decide what PPO clips, ratios beyond 1 plus or minus 0.2: no log-probability may be off by as
    # much, and their root mean square by a tenth of it. On a CPU: 0.02 and 0.006 with random weights, 0.05 and 0.011
    # with taught ones.
    "bfloat16 largest": 0.2,
    "bfloat16 rms": 0.02,
    "bfloat16 update": 0.2,  # of how far a step moves the weights; on a CPU 0.05 with random weights
    "draws": 1e-5,  # probability by which a draw lies outside its token's interval, as one pass over the text has it
    "resumed": 1e-2,  # of how far training moved the weights; on a CPU rounding leaves 2e-6, a lost optimiser state 0.6
    "two in float32": 1e-2,  # as above
    "two in bfloat16": 0.2,  # on a CPU 0.03, with micro-batches of other sizes (6 M parameters)
    "memory": 0.5,  # of the GPU's, of which the micro-batches' logits may take an eighth
    "reward": 0.1,  # that it rises at least
}


@dataclass
class Row:
    """A line of the table. ok is None where a check was left out."""

    check: str
    figure: str
    limit: str
    ok: bool | None

    def __str__(self) -> str:
        ok = {True: "yes", False: "**no**", None: "left out"}[self.ok]
        return f"| {' | '.join(cell.replace('|', '/') for cell in (self.check, self.figure, self.limit))} | {ok} |"


def at_most(check: str, value: float, limit: str, what: str = "") -> Row:
    """A row whose figure must not exceed LIMITS[limit]; NaN does."""
    return Row(check, f"{value:.1e}{what}", f"{LIMITS[limit]:g}", value <= LIMITS[limit])


@dataclass
class Sizes:
    """How large models and batches are."""

    gpt2: dict
    classifier: dict
    vocab_size: int
    taught: dict  # arguments of make_demo_models
    batch: int  # completions of a comparison
    benchmarks: tuple[int, int]  # batches that are timed
    long_batch: int  # completions of 256 tokens
    short_run: list[str]  # flags of the runs that are killed and resumed
    real_run: list[str]  # flags of the run whose reward must rise, beside the default preset's values


ARTICLE = Sizes(
    gpt2={"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024},
    classifier={
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 512,
    },
    vocab_size=21_128,
    taught={"lr": 3e-4},
    batch=32,
    benchmarks=(128, 1024),
    long_batch=128,
    short_run="--episodes 128 --batch_size 16 --minibatch_size 16 --eval_samples 16 --save_every 2".split(),
    real_run=[],
)
TINY = Sizes(
    gpt2={"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 272},
    classifier=CLASSIFIER_SIZES,
    vocab_size=300,
    taught={"lr": 4e-3, "steps": {"gpt2": 60, "sentiment": 60}},
    batch=16,
    benchmarks=(16, 32),
    long_batch=4,
    short_run="--episodes 96 --batch_size 4 --minibatch_size 4 --eval_samples 2 --save_every 4".split(),
    real_run="--episodes 640 --batch_size 64 --minibatch_size 64 --frozen_share 0 --lr 2e-3 --eval_samples 128".split(),
)


class Machine:
    """The device under test, the folder for all that is made, and models and runs that several checks share."""

    def __init__(self, device: torch.device, folder: Path):
        self.device = device
        self.folder = folder
        self.dtype = str(pick_dtype("auto", device))[6:]  # of a default run
        self.sizes = TINY if device.type == "cpu" else ARTICLE
        self.name = torch.cuda.get_device_name() if device.type == "cuda" else device.type.upper()

    @functools.cached_property
    def random(self) -> tuple[Path, Path]:
        """Folders of a GPT-2 and a classifier with random weights. No text of theirs ends early."""
        folder = self.folder / "random"
        folder.mkdir()
        draw = random.Random(1)
        reviews = [write_review(draw) for _ in range(1000)]  # that all characters occur
        vocab_size = len(write_vocab(folder / "vocab.txt", reviews, self.sizes.vocab_size))
        torch.manual_seed(1)
        for name, model in (
            ("gpt2", new_gpt2(vocab_size, self.sizes.gpt2)),
            ("sentiment", new_classifier(vocab_size, self.sizes.classifier)),
        ):
            write_model(folder / name, model, folder / "vocab.txt")
        return folder / "gpt2", folder / "sentiment"

    @functools.cached_property
    def taught(self) -> tuple[Path, Path]:
        """Folders of a GPT-2 that writes the demo grammar's reviews, and of a small classifier that judges them."""
        folder = self.folder / "taught"
        folder.mkdir(exist_ok=True)
        gpt2_sizes = GPT2_SIZES | self.sizes.gpt2
        make_demo_models(folder, gpt2_sizes, self.sizes.vocab_size, device=self.device, **self.sizes.taught)
        return folder / "gpt2", folder / "sentiment"

    @functools.cached_property
    def uninterrupted(self) -> str:
        """The name of a finished short run in float32."""
        train(*self.short_run("uninterrupted", self.device))
        return "uninterrupted"

    @functools.cached_property
    def killed(self) -> tuple[Path, int]:
        """The folder of a short run that was killed with SIGKILL, and the step of its checkpoint."""
        return self.folder / "killed", start_and_kill(self.short_run("killed", self.device), self.folder / "killed")

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """The weights that a finished run has saved."""
        return load_file(self.folder / name / "model" / "model.safetensors")

    def short_run(self, name: str, device, dtype: str = "float32") -> list[str]:
        """Flags of a run of a few steps on the taught models."""
        models = ["--model_name", self.taught[0], "--reward_model_name", self.taught[1]]
        run = ["--runs_dir", self.folder, "--run_name", name, "--device", device, "--dtype", dtype]
        quiet = ["--log_samples_every", "0", "--keep_checkpoints", "1"]
        return [str(flag) for flag in (*models, *run, *quiet, *self.sizes.short_run)]

    def trainer(self, dtype: str, device=None, **changes) -> tuple[PPOTrainer, list[torch.Tensor]]:
        """A trainer of the random GPT-2, and the tokens of PROMPTS."""
        folder = self.random[0]
        tokenizer = load_tokenizer(folder)
        model = load_policy(folder, load_gpt2_config(folder), device or self.device)
        size = dict(batch_size=self.sizes.batch, minibatch_size=self.sizes.batch)
        config = PPOConfig(dtype=dtype, **size | changes)
        trainer = PPOTrainer(config, model, copy.deepcopy(model), tokenizer)
        return trainer, [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]


# ----------------------------------------------------------------------------------------------
# What the checks share


def train(*flags) -> None:
    """A run of train_ppo.py in this process, without its output and its pictures, which take longer than a small run.

    RuntimeError with its last words where it fails.
    """
    errors = io.StringIO()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(errors),
        mock.patch("support.run_folder.draw"),
    ):
        code = train_ppo.main([str(flag) for flag in flags])
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code:
        raise RuntimeError(errors.getvalue().strip().splitlines()[-1])


def start_and_kill(flags: list[str], run_dir: Path) -> int:
    """Start train_ppo.py, SIGKILL it once it has a checkpoint: the step of that. RuntimeError where it ended before."""
    log = run_dir.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, ROOT / "train_ppo.py", *flags], stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + WAIT
        while not checkpoints(run_dir / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    found = checkpoints(run_dir / "checkpoints")
    if not found or (run_dir / "model").exists():
        last_words = log.read_text(errors="replace").strip().splitlines()[-1:]
        raise RuntimeError(f"the run could not be killed after a checkpoint: {' '.join(last_words)}")
    return int(found[-1].name.removeprefix("step-"))


def unlike(machine: Machine, name: str, other: str) -> float:
    """How far a finished run's weights are from another's, over how far training moved these."""
    folder = machine.taught[0]
    start = load_policy(folder, load_gpt2_config(folder)).state_dict()
    weights, expected = machine.weights(name), machine.weights(other)
    differs = sum((weights[key] - expected[key]).double().square().sum() for key in expected)
    moved = sum((expected[key] - start[key]).double().square().sum() for key in expected)
    return math.sqrt(differs / moved)


def step(trainer: PPOTrainer, queries: list[torch.Tensor], responses: list[torch.Tensor]):
    """One step: its statistics, and how it moved the weights, all in one row, float64 on the CPU."""
    scores = torch.rand(len(queries), generator=torch.Generator().manual_seed(1))
    before = [weight.detach().cpu().double() for weight in trainer.engine.weights]
    stats = trainer.step(queries, responses, scores)
    moved = [weight.detach().cpu().double() - start for weight, start in zip(trainer.engine.weights, before)]
    return stats, torch.cat([each.flatten() for each in moved])


def drawn_outside(trainer: PPOTrainer, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> float:
    """How far the draws of the first step lie outside their tokens' intervals of probability, at worst.

    `sample` chose each token from the key/value cache; the intervals are those of one pass over each whole text.
    """
    completions = trainer.engine.collator.completions(queries, responses)
    worst = 0.0
    for i in range(len(completions)):
        one = completions.select(torch.tensor([i]))
        (logits,) = trainer.engine.evaluate(lambda ids, policy: (policy[0],), one, trainer.model)
        n = len(responses[i])
        cumulative = logits[0, :n].float().softmax(-1).cpu().double().cumsum(-1)
        draws = completion_uniforms(trainer.config.seed, 1, [i], n)[0].double() * cumulative[:, -1]
        chosen = responses[i][:, None]
        above = cumulative.gather(1, chosen).squeeze(1)
        below = cumulative.gather(1, chosen - 1).squeeze(1)  # no token is 0, which is [PAD]
        worst = max(worst, (draws - above).max().item(), (below - draws).max().item())
    return worst


def logprobs(trainer: PPOTrainer, queries: list[torch.Tensor], responses: list[torch.Tensor]) -> torch.Tensor:
    """What the policy thinks of the responses' tokens, all in one row, float64 on the CPU."""
    completions = trainer.engine.share_trunk(trainer.engine.collator.completions(queries, responses))
    found, *_ = trainer.engine.evaluate(logprobs_values_entropy, completions, trainer.model)
    return found[completions.mask].cpu().double()


def largest(differences: torch.Tensor) -> float:
    return differences.abs().max().item()


# ----------------------------------------------------------------------------------------------
# The checks. Each takes the machine and yields rows; its docstring names it where it raises.


def float32(machine: Machine) -> Iterator[Row]:
    """float32 against another device"""
    trainer, queries = machine.trainer("float32")
    if machine.device.type == "cpu":
        other, _ = machine.trainer("float64", micro_batch_size=5)
        against = "float64 on the same CPU, in other micro-batches"
    else:
        other, _ = machine.trainer("float32", "cpu")
        against = "the CPU"
    queries = [queries[0]] * machine.sizes.batch
    responses = trainer.generate(queries)
    difference = largest(logprobs(trainer, queries, responses) - logprobs(other, queries, responses))
    yield at_most(f"float32 against {against}: log-probabilities, largest difference", difference, "float32")

    (mine, moved), (theirs, expected) = (step(each, queries, responses) for each in (trainer, other))
    worst = max(theirs, key=lambda name: abs(mine[name] - theirs[name]) / max(1, abs(theirs[name])))
    difference = abs(mine[worst] - theirs[worst]) / max(1, abs(theirs[worst]))
    yield at_most("... one step's statistics, largest difference", difference, "statistics", f" ({worst})")
    difference = ((moved - expected).norm() / expected.norm()).item()
    yield at_most("... the weights after it, of how far they moved", difference, "statistics")


def bfloat16(machine: Machine) -> Iterator[Row]:
    """bfloat16 against float32"""
    if machine.dtype != "bfloat16":
        yield Row("bfloat16 against float32", "this device does not compute in bfloat16", "", None)
        return
    trainer, queries = machine.trainer("float32")
    other, _ = machine.trainer("bfloat16")
    queries = [queries[0]] * machine.sizes.batch
    responses = trainer.generate(queries)
    differences = logprobs(other, queries, responses) - logprobs(trainer, queries, responses)
    rms = differences.square().mean().sqrt().item()
    yield at_most("bfloat16 against float32: log-probabilities, root mean square", rms, "bfloat16 rms")
    yield at_most("... largest difference", largest(differences), "bfloat16 largest")
    moved, expected = (step(each, queries, responses)[1] for each in (other, trainer))
    difference = ((moved - expected).norm() / expected.norm()).item()
    yield at_most("... the weights after one step, of how far they moved", difference, "bfloat16 update")


def lengths(machine: Machine) -> Iterator[Row]:
    """prompts of different lengths"""
    trainer, queries = machine.trainer("float32")
    batch = [queries[i % len(queries)] for i in range(machine.sizes.batch)]
    responses = trainer.generate(batch)
    worst = 0.0
    together = logprobs(trainer, batch, responses).split([len(response) for response in responses])
    for i in range(len(queries)):
        alone = logprobs(trainer, batch[i :: len(queries)], responses[i :: len(queries)])
        worst = max(worst, largest(torch.cat(together[i :: len(queries)]) - alone))
    yield at_most("prompts of different lengths: log-probabilities, together against alone", worst, "float32")
    yield at_most("... draws outside their tokens' intervals", drawn_outside(trainer, batch, responses), "draws")

    trainer, _ = machine.trainer("auto")
    stats = trainer.step(batch, responses, [i % 5 / 4 for i in range(len(batch))])
    finite = all(math.isfinite(value) for value in stats.values())
    figure = f"{stats['ppo/skipped']:.0f} skipped" if finite else "a statistic is not finite"
    dtype = str(trainer.engine.dtype)[6:]
    yield Row(f"... optimiser steps of one step in {dtype}", figure, "0", finite and stats["ppo/skipped"] == 0)


def kill(machine: Machine) -> Iterator[Row]:
    """killed with SIGKILL and resumed"""
    folder, step = machine.killed
    shutil.copytree(folder, machine.folder / "resumed")
    train("--resume", machine.folder / "resumed")
    check = f"killed with SIGKILL, resumed from step {step}: the weights at the end, of how far they moved"
    yield at_most(check, unlike(machine, "resumed", machine.uninterrupted), "resumed")


def devices(machine: Machine) -> Iterator[Row]:
    """resumed on another device"""
    folder, step = machine.killed
    shutil.copytree(folder, machine.folder / "to-cpu")
    train("--resume", machine.folder / "to-cpu", "--device", "cpu")
    check = f"started on the {machine.name}, resumed with --device cpu from step {step}: the same"
    yield at_most(check, unlike(machine, "to-cpu", machine.uninterrupted), "resumed")
    if machine.device.type == "cpu":
        yield Row("the other way round", "there is no other device", "", None)
        return
    step = start_and_kill(machine.short_run("from-cpu", "cpu"), machine.folder / "from-cpu")
    train("--resume", machine.folder / "from-cpu", "--device", machine.device)
    check = f"started on the CPU, resumed with --device {machine.device} from step {step}: the same"
    yield at_most(check, unlike(machine, "from-cpu", machine.uninterrupted), "resumed")


def twice(machine: Machine) -> Iterator[Row]:
    """the same run twice"""
    for name in ("once", "again"):
        train(*machine.short_run(name, machine.device, machine.dtype))
    first, second = map(machine.weights, ("once", "again"))
    same = all(second[key].equal(first[key]) for key in first)
    figure = "the same bits" if same else f"{unlike(machine, 'again', 'once'):.1e} of how far they moved"
    yield Row(f"the same run twice in {machine.dtype}: the weights at the end", figure, "the same bits", same)


def two_processes(machine: Machine) -> Iterator[Row]:
    """two processes below torchrun"""
    n = torch.cuda.device_count() if machine.device.type == "cuda" else 0
    if n < 2:
        yield Row("two processes below torchrun", f"needs two GPUs, {n} here", "", None)
        return
    for dtype in dict.fromkeys(("float32", machine.dtype)):
        one_step = [] if dtype == "float32" else ONE_STEP
        one, two = (f"{number}-{dtype}" for number in ("one", "two"))
        train(*machine.short_run(one, machine.device, dtype), *one_step)
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, ROOT / "train_ppo.py", *machine.short_run(two, machine.device.type, dtype), *one_step]
        process = subprocess.Popen(command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            errors = process.communicate(timeout=WAIT)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun kills those that do not end by that
            process.communicate()
            raise RuntimeError(f"no end after {WAIT} seconds")
        if process.returncode:
            words = [line for line in errors.splitlines() if "rror" in line] or ["torchrun failed"]
            raise RuntimeError(words[0])
        check = f"two processes on two GPUs against one, in {dtype}: the weights at the end, of how far they moved"
        yield at_most(check, unlike(machine, two, one), f"two in {dtype}")


def speed(machine: Machine) -> Iterator[Row]:
    """the benchmark"""
    policy, classifier = map(str, machine.random)
    peaks = []
    for batch in machine.sizes.benchmarks:
        models = dict(model_name=policy, reward_model_name=classifier, device=str(machine.device))
        result = benchmark.measure(PPOConfig(batch_size=batch, minibatch_size=batch, **models))
        figures = [f"{result['seconds_per_step']:.3f} s", f"{result['completions_per_second']:.0f} completions/s"]
        figures += [f"{result['ceiling_share']:.0%} of the matrix ceiling ({result['ceiling_tflops']:.3g} TFLOP/s)"]
        figures += [f"{result['peak_memory_gb']:.2f} GiB"]
        yield Row(f"a step at batch {batch:,} in {result['dtype']}", ", ".join(figures), "", True)
        peaks.append(result["peak_memory_gb"])
        release_memory()
    if machine.device.type == "cuda":  # elsewhere it is the peak of the process, all checks before included
        total = torch.cuda.get_device_properties(machine.device).total_memory / 2**30
        yield at_most("... peak memory, of the GPU's", max(peaks) / total, "memory")


def long_texts(machine: Machine) -> Iterator[Row]:
    """sampling to 256 tokens"""
    trainer, queries = machine.trainer("float32", gen_len=256)
    responses = trainer.generate(queries)
    yield at_most(
        "256 tokens: draws outside their tokens' intervals", drawn_outside(trainer, queries, responses), "draws"
    )
    trainer, queries = machine.trainer("auto", gen_len=256)
    n = machine.sizes.long_batch
    started = time.perf_counter()
    responses = trainer.generate([queries[0]] * n)  # the tokens come to the CPU: nothing is left to wait for
    seconds = time.perf_counter() - started
    tokens = sum(map(len, responses))
    figure = f"{seconds:.2f} s, {tokens / seconds:.0f} tokens/s"
    yield Row(f"... {n} completions in {str(trainer.engine.dtype)[6:]}", figure, "", True)


def real_run(machine: Machine) -> Iterator[Row]:
    """a run whose reward rises"""
    models = ["--model_name", machine.taught[0], "--reward_model_name", machine.taught[1]]
    flags = ["--runs_dir", machine.folder, "--run_name", "real", "--device", machine.device, *machine.sizes.real_run]
    started = time.perf_counter()
    train(*models, *flags)
    seconds = time.perf_counter() - started
    results = json.loads((machine.folder / "real" / "evaluation.json").read_text(encoding="utf-8"))
    before, after, gain = results["before"]["reward"], results["after"]["reward"], results["gain"]["gain"]
    share = "unknown" if gain is None else f"{gain:.2f}"
    figure = f"{before:.3f} -> {after:.3f}, gain {share}, {seconds:.0f} s"
    check = f"reward of a whole run with the defaults {' '.join(machine.sizes.real_run)}".strip()
    yield Row(check, figure, f"+{LIMITS['reward']:g}", after - before >= LIMITS["reward"])


CHECKS = [float32, bfloat16, lengths, kill, devices, twice, two_processes, speed, long_texts, real_run]

# ----------------------------------------------------------------------------------------------
# The program


def release_memory() -> None:
    """Give back what finished checks have left on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def takes_work(device: torch.device) -> bool:
    """Whether the device still computes: after some errors a CUDA GPU does nothing more for this process."""
    try:
        release_memory()
        return torch.ones(1, device=device).item() == 1
    except RuntimeError:
        return False


def rows_of(check, machine: Machine) -> Iterator[Row]:
    """A check's rows as they come, the last a failed one where it raises."""
    rows = check(machine)
    while True:
        try:
            with contextlib.redirect_stdout(io.StringIO()), quiet_transformers():
                row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            yield Row(check.__doc__, first_line(error), "", False)
            return
        yield row


def say(text: str) -> None:
    """What is being done, on a terminal, until the next row takes its place."""
    if sys.stderr.isatty():
        print(f"\r{text:79}\r", end="", file=sys.stderr, flush=True)


def run_checks(machine: Machine) -> bool:
    """Print the rows of one check after the other; whether none failed."""
    well = working = True
    for number, check in enumerate(CHECKS, 1):
        say(progress := f"{number} of {len(CHECKS)}: {check.__doc__}")
        for row in rows_of(check, machine) if working else [Row(check.__doc__, "not run", "", None)]:
            say("")
            print(row, flush=True)
            say(progress)
            well &= row.ok is not False
        working = working and takes_work(machine.device)
    say("")
    return well


def main(argv: list[str]) -> int:
    """Run the program; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu (the same checks, small)")
    args = parser.parse_args(argv)
    try:
        check_device(args.device)
        device = pick_device(args.device)
    except UserError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return 2
    if args.device == "auto" and device.type == "cpu":
        print("gpu_check: error: torch sees no GPU here; --device cpu runs the same checks small", file=sys.stderr)
        return 2
    # On Windows files that are mapped, as weights are, cannot be removed
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as folder:
        machine = Machine(device, Path(folder))
        print(*(f"{name}: {value}" for name, value in environment(device).items()), "", sep="\n")
        print("| check | figure | limit | ok |\n| --- | --- | --- | --- |", flush=True)
        try:
            return int(not run_checks(machine))
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
