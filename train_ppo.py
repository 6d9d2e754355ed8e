"""Train a Chinese GPT-2 with PPO towards texts that a reward likes.

    python train_ppo.py                                  the article's job, on a GPU
    python train_ppo.py --preset demo                    tiny models made on the spot, two minutes on a laptop
    python train_ppo.py --model_name DIR --reward_model_name DIR --lr 2e-5 --prompts "衣服" "这本书"
    python train_ppo.py --reward my_reward:score         your own function of texts
    python train_ppo.py --resume runs/NAME               go on after a stop
    python train_ppo.py --eval_only runs/NAME            judge a saved model again
    torchrun --nproc-per-node 8 train_ppo.py             on eight GPUs; --batch_size stays that of all together
    python train_ppo.py --help                           every hyperparameter; config.py explains them

A run writes its own folder runs/NAME; `python plot_rewards.py` draws it.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

from config import PPOConfig, UserError, import_function, parse_args, pick_device, pick_dtype
from support import processes
from support.hub import model_folder
from support.run_folder import (
    FINAL,
    FOR_JUDGING,
    HARMLESS,
    RunLog,
    find_run_folder,
    lock_folder,
    new_run_folder,
    saved_config,
)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    try:
        processes.init_process_group()
        config, run_dir, mode = processes.broadcast_from_rank_0(
            lambda: read_command_line(sys.argv[1:] if argv is None else argv)
        )
        return run(config, run_dir, mode)
    except UserError as error:
        if processes.rank() == 0:
            print(f"train_ppo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except Exception as error:
        if processes.lost_another_process(error):
            return 1
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which may not be imported yet
            print(
                "train_ppo.py: error: the device is out of memory; lower --micro_batch_size (or --gen_len)",
                file=sys.stderr,
            )
            return 2
        raise


def read_command_line(argv: list[str]) -> tuple[PPOConfig, Path, str]:
    """What to do: the config, the run folder, and 'train', 'resume', 'eval_only' or 'nothing'. UserError for bad input."""
    config, given = parse_args(argv)
    if config.eval_only is not None:
        run_dir = find_run_folder(config, config.eval_only)
        return saved_config(run_dir, config, given - {"eval_only"}, FOR_JUDGING), run_dir, "eval_only"
    if config.resume is not None:
        run_dir, mode = find_run_folder(config, config.resume), "resume"
    else:
        config.check()
        run_dir = new_run_folder(config)
        mode = "resume" if (run_dir / "config.json").exists() else "train"  # a restart goes on, see new_run_folder
    if mode == "resume":
        config = saved_config(run_dir, config, given - {"resume"}, HARMLESS)
        if all((run_dir / name).exists() for name in FINAL) and (given <= {"resume"} or processes.restart_count()):
            print(f"{run_dir} is finished already, nothing is missing")
            mode = "nothing"
    for name in ("batch_size", "minibatch_size"):
        if getattr(config, name) % processes.world_size():
            share = f"the {processes.world_size()} processes, each of which takes an equal share"
            raise UserError(f"--{name} {getattr(config, name)} does not divide by {share}")
    return config, run_dir, mode


# ----------------------------------------------------------------------------------------------
# The run


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one leaves at once."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        if processes.world_size() > 1:  # torchrun passes on what the terminal has sent already
            self.received = number
            return
        if self.received:
            os._exit(128 + number)
        self.received = number
        os.write(2, b"\nstopping after this step; once more leaves at once\n")

    def release(self) -> None:
        """Let signals end the process again, where nothing can be lost by it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def draw_prompts(n_prompts: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Which prompt each completion of a step continues: all in turn, each pass over them in a new order."""
    import numpy as np

    positions = range((step - 1) * batch_size, step * batch_size)
    orders = {
        turn: np.random.default_rng([seed, turn]).permutation(n_prompts) for turn in {p // n_prompts for p in positions}
    }
    return [int(orders[p // n_prompts][p % n_prompts]) for p in positions]


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks. It hands them back otherwise, and each tensor of logits would come in anew, page
    fault by page fault: a sixth of a step on a CPU (docs/speed.md)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink


def load(config: PPOConfig):
    """Everything that a run needs: trainer, tokenizer, reward, prompts, and the prompts as tokens."""
    policy_folder = processes.local_rank_0_first(lambda: model_folder(config.model_name, "--model_name"))
    reward_folder = None
    if not config.reward:
        reward_folder = processes.local_rank_0_first(
            lambda: model_folder(config.reward_model_name, "--reward_model_name")
        )

    import copy

    from ppo import PPOTrainer

    keep_freed_memory()
    loaded = processes.on_all_ranks(lambda: load_models(config, policy_folder, reward_folder))
    policy, dtype, tokenizer, reward, prompts, queries = loaded
    reference = copy.deepcopy(policy).to(dtype)
    return PPOTrainer(config, policy, reference, tokenizer), tokenizer, reward, prompts, queries


def load_models(config: PPOConfig, policy_folder: Path, reward_folder: Path | None):
    """Policy, dtype, tokenizer, reward, prompts, and the prompts as tokens.

    What can be wrong is found in the order of what it costs to look: configs, then the prompts' lengths, and the weights
    last.
    """
    from reward import SentimentReward
    from support.models import encode_prompt, load_gpt2_config, load_policy, load_tokenizer

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    gpt2_config = load_gpt2_config(policy_folder)
    tokenizer = load_tokenizer(policy_folder)
    if len(tokenizer) != gpt2_config.vocab_size:
        sizes = f"{len(tokenizer)} tokens, the model {gpt2_config.vocab_size}"
        raise UserError(f"the tokenizer in {policy_folder} has {sizes}: they do not belong together")
    prompts = config.read_prompts()
    queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest, positions = max(map(len, queries)), gpt2_config.n_positions
    if longest + config.gen_len > positions:
        room = f"the longest prompt has {longest} tokens and the model {positions} positions, which leaves {max(0, positions - longest)}"
        raise UserError(f"--gen_len {config.gen_len}: {room}")
    if config.reward:
        reward = import_function(config.reward)
    else:
        reward = SentimentReward(reward_folder, device, dtype, config.positive_label)
    policy = load_policy(policy_folder, gpt2_config, device)
    return policy, dtype, tokenizer, reward, prompts, queries


def run(config: PPOConfig, run_dir: Path, mode: str) -> int:
    """Train (mode 'train' or 'resume'), only judge ('eval_only') or do 'nothing'; the exit code.

    On several processes all of them run this; rank 0 alone writes and prints.
    """
    if mode == "nothing":
        return 0
    rank_0 = processes.rank() == 0
    # 1. Models, prompts and reward
    trainer, tokenizer, reward, prompts, queries = load(config)

    from tqdm import tqdm

    from plot_rewards import draw
    from reward import RewardError, clean_text, score_texts
    from support import evaluation
    from support.checkpoint import disk_errors, load_checkpoint, save_checkpoint, write_whole
    from support.models import load_gpt2_config, load_policy, save_policy

    def judge(model) -> dict:
        try:
            return evaluation.evaluate(trainer, model, tokenizer, reward, prompts, queries)
        except RewardError as error:
            raise reward_failure(error, "evaluation", run_dir)

    if mode == "eval_only":
        saved = load_policy(run_dir / "model", load_gpt2_config(run_dir / "model"), trainer.device)
        results = {"before": judge(trainer.ref_model), "after": judge(saved)}
        if rank_0:
            finish_evaluation(results, prompts, config, run_dir)
        return 0

    # 2. The run folder
    if rank_0:
        with disk_errors(run_dir):
            run_dir.mkdir(parents=True, exist_ok=mode == "resume" or processes.restart_count())
            lock = lock_folder(run_dir)  # noqa: F841 (held for as long as this name lives)
    if mode == "resume":
        load_checkpoint(trainer, run_dir / "checkpoints")
    if rank_0:
        with disk_errors(run_dir / "config.json"):
            config.save(run_dir / "config.json")
        log = RunLog(run_dir, trainer.n_steps)
    print(f"run folder {run_dir}, {config.n_steps()} steps of {config.batch_size} completions")
    several = f"{processes.world_size()} processes, each " if processes.world_size() > 1 else ""
    print(f"{several}on {trainer.device} in {str(trainer.dtype)[6:]}")

    # 3. How good the policy is before training; measured once
    evaluation_file = run_dir / "evaluation.json"
    results = processes.broadcast_from_rank_0(
        lambda: json.loads(evaluation_file.read_text(encoding="utf-8")) if evaluation_file.exists() else None
    )
    if results is None:
        results = {"before": judge(trainer.ref_model)}
        if rank_0:
            evaluation.write_json(evaluation_file, results)

    # 4. The loop
    stop = StopSignal()
    bar = tqdm(
        range(trainer.n_steps + 1, config.n_steps() + 1),
        initial=trainer.n_steps,
        total=config.n_steps(),
        unit="step",
        disable=not rank_0,
    )
    for step in bar:
        started = time.perf_counter()
        drawn = draw_prompts(len(prompts), config.seed, step, config.batch_size)
        batch = [queries[i] for i in drawn]
        responses = trainer.generate(batch)
        completions = [clean_text(text) for text in tokenizer.batch_decode(responses)]
        sampled = time.perf_counter()
        try:
            scores = score_texts(reward, [prompts[i] + text for i, text in zip(drawn, completions)])
        except RewardError as error:
            if rank_0:
                save_checkpoint(trainer, run_dir / "checkpoints", config.keep_checkpoints)
            raise reward_failure(error, f"step {step}", run_dir)
        scored = time.perf_counter()
        try:
            stats = trainer.step(batch, responses, scores)
        except FloatingPointError as error:
            raise UserError(
                f"step {step}: {error}; try a lower --lr, or --dtype float32. The last good checkpoint is kept"
            )
        finished = time.perf_counter()

        row = {"step": step, "episodes": step * config.batch_size, "env/reward_mean": scores.mean().item()}
        row |= {"env/reward_std": scores.std(correction=0).item(), **stats}
        row |= {
            "time/sample": sampled - started,
            "time/score": scored - sampled,
            "time/ppo": finished - scored,
            "time/step": finished - started,
        }
        samples = [
            {"step": step, "prompt": prompts[i], "completion": text, "score": score}
            for i, text, score in zip(drawn, completions, scores.tolist())
        ]
        if rank_0:
            with disk_errors(run_dir / "metrics.csv"):
                log.write(row, samples)
        bar.set_postfix(reward=f"{row['env/reward_mean']:.3f}", kl=f"{stats['objective/kl']:.2f}")
        if config.log_samples_every and step % config.log_samples_every == 0:
            shown = "\n".join(
                f"  {s['score']:.2f}  {s['prompt']}{s['completion']}" for s in samples[: evaluation.SHOWN]
            )
            tqdm.write(f"step {step}, mean reward {row['env/reward_mean']:.3f}\n{shown}")

        last, stopped = step == config.n_steps(), processes.all_reduce_max(stop.received)
        due = last or stopped or (config.save_every and step % config.save_every == 0)
        if due and rank_0:
            save_checkpoint(trainer, run_dir / "checkpoints", config.keep_checkpoints)
        if stopped and not last:
            bar.close()
            print(f"stopped after step {step}; go on with: python train_ppo.py --resume {run_dir}")
            return 128 + stopped

    stop.release()

    # 5. The trained model, how good it is now, and the pictures; --resume makes what is missing of them
    partial = run_dir / ".partial-model"
    if rank_0:
        with disk_errors(run_dir / "model", 4 * trainer.model.num_parameters()):
            shutil.rmtree(partial, ignore_errors=True)
            save_policy(trainer.policy_for_saving, tokenizer, partial, config.temperature)
            shutil.rmtree(run_dir / "model", ignore_errors=True)
            partial.rename(run_dir / "model")
    results["after"] = judge(trainer.policy_for_saving)
    if rank_0:
        finish_evaluation(results, prompts, config, run_dir)
        draw([run_dir], run_dir / "rewards.png")
        table = evaluation.before_after_table(results)
        write_whole(run_dir / "before_after.md", table + "\n")
        print(f"\n{table}\n\nmodel, metrics and pictures are in {run_dir}")
    return 0


def reward_failure(error, where: str, run_dir: Path) -> UserError:
    """What to tell of a RewardError; its traceback, where the reward function raised, goes to error.log."""
    if not error.traceback:
        return UserError(f"{where}: {error}")
    if processes.rank() == 0:
        (run_dir / "error.log").write_text(error.traceback, encoding="utf-8")
    return UserError(f"{where}: {error}; the traceback is in {run_dir / 'error.log'}")


def finish_evaluation(results: dict, prompts: list[str], config: PPOConfig, run_dir: Path) -> None:
    """Work out the gain, print the table, write evaluation.json."""
    from support import evaluation

    results["gain"] = evaluation.gain(results["before"], results["after"], prompts, config.init_kl_coef)
    results["frontier"] = evaluation.frontier(results["before"], prompts)
    evaluation.write_json(run_dir / "evaluation.json", results)
    print(f"\n{evaluation.commonest(results)}\n\n{evaluation.summary(results)}")


if __name__ == "__main__":
    processes.exit_process(main())
