"""Train a Chinese GPT-2 with PPO towards texts that a reward likes.

    python train_ppo.py                                  the article's task, on a GPU
    python train_ppo.py --preset article                 the same with the article's own settings
    python train_ppo.py --preset demo                    tiny models, a minute or two on a laptop
    python train_ppo.py --model_name DIR --reward_model_name DIR --lr 2e-5 --prompts "衣服" "这本书"
    python train_ppo.py --reward my_reward:score         your own function of texts
    python train_ppo.py --reward my_reward:score classifier --reward_weights 1 0     with the classifier as a judge
    python train_ppo.py --resume runs/NAME               continue a stopped run
    python train_ppo.py --eval_only runs/NAME            evaluate a saved model again
    python train_ppo.py --complete runs/NAME --prompts "这家店" "昨天"     complete prompts, before and after
    torchrun --nproc-per-node 8 train_ppo.py             on eight GPUs; --batch_size is still the total
    python train_ppo.py --help                           every hyperparameter; config.py explains them

Each run writes to its own folder, runs/NAME; `python plot_rewards.py` plots its curves.
"""

import copy
import shlex
import sys
import time
from pathlib import Path

from config import PPOConfig
from support import import_libraries
from support.common.errors import UserError, first_line, is_out_of_memory
from support.compute import processes
from support.run.command_line import read_command_line
from support.run.folders import flags_to_continue, is_finished
from support.run.settings import total_steps
from support.run.streams import hold_streams


def train(trainer, reward, prompts: list[str], queries: list, folder) -> int:
    """Train a policy, evaluate it before and after, and return the exit code. Every process runs this.

    trainer: a PPOTrainer. reward: Rewards. queries: the encoded prompts. folder: a RunFolder.
    """
    # Imported here because --help and early errors don't need torch
    from support.common.figures import decimals
    from support.models.pretrained import decode
    from support.run.evaluation import Results, change_since, check_reward, evaluate
    from support.run.limit import gibbs_policy, kl_coef_for
    from support.run.log import progress, step_row
    from support.run.results import SHOWN
    from support.run.run_folder import failures_explained
    from support.run.signals import StopSignal
    from support.run.tracking import Tracker, numbers
    from support.run.warnings import Alarms, prospect

    # 1. Evaluate the policy before training, once per run
    config, tokenizer, last_step = trainer.config, trainer.tokenizer, folder.last_step
    results = folder.read_results()
    if results is None:
        with failures_explained(folder.path, lambda: "evaluation"):
            results = Results(evaluate(trainer, trainer.ref_model, reward, prompts, queries))
            check_reward(reward, results.before)
        folder.write_results(results)

    # 2. Say what is possible at this KL coefficient
    if results.before.unsteady:
        print(f"warning: {results.before.unsteady}")
    if config.kl_budget and trainer.n_steps == 0:
        trainer.set_kl_coef(kl_coef_for(*results.before.rewards(), config.kl_budget))
        folder.save_settings()
    print("\n".join(prospect(results.before, prompts, config.init_kl_coef)))
    kl_limit = gibbs_policy(*results.before.rewards(), config.init_kl_coef)["kl"] if config.init_kl_coef else None
    alarms = Alarms(config, kl_limit)
    for row in folder.logged:
        alarms.look(row)

    # 3. The loop: draw prompts, sample, score, step, log, save
    with StopSignal() as stop, Tracker(folder.path, vars(config)) as tracker:
        with folder.errors_explained():
            for step in range(trainer.n_steps + 1, last_step + 1):
                if alarms.stop:
                    break
                started = time.perf_counter()
                drawn = draw_prompts(len(prompts), config.seed, step, config.batch_size)
                batch_prompts = [prompts[i] for i in drawn]

                completions = trainer.generate([queries[i] for i in drawn])
                texts = decode(tokenizer, completions.token_lists())
                sampled = time.perf_counter()

                parts = reward.score([prompt + text for prompt, text in zip(batch_prompts, texts)], drawn)
                scores = parts @ reward.weights
                scored = time.perf_counter()

                stats = trainer.step(completions, scores)
                stepped = time.perf_counter()

                seconds = {"sample": sampled - started, "score": scored - sampled, "ppo": stepped - scored}
                row = step_row(step, seconds, batch_prompts, texts, scores, stats) | reward.means(parts)
                samples = list(zip(batch_prompts, texts, scores.tolist()))
                folder.write_log(row, samples)
                print(progress(row, last_step))
                for alarm in alarms.look(row):
                    print(f"warning: step {step}: {alarm['says']}")
                show = config.log_samples_every > 0 and step % config.log_samples_every == 0
                for prompt, text, score in samples[:SHOWN] if show else []:
                    print(f"  {score:.{decimals(row['env/reward_std'])}f}  {prompt}{text}")
                if tracker.module:
                    tracker.log(row, samples if show else [], step)

                stopped = max(processes.all_gather(stop.received))
                if stopped or alarms.stop or folder.checkpoint_due():
                    folder.save_checkpoint()
                if stopped:
                    break
        flags = flags_to_continue(folder.path, config)
        if alarms.stop:
            print(f"stopped because of that warning; continue with: python train_ppo.py {flags} --stop_on_alarm False")
        elif trainer.n_steps < last_step:
            print(f"stopped after step {trainer.n_steps}; continue with: python train_ppo.py {flags}")
            return 128 + stopped  # the exit code of a process that this signal ended
        stop.release()

        # 4. Save and evaluate the trained model, and draw the pictures; --resume does whatever is missing
        folder.save_model(prompts[0])
        with failures_explained(folder.path, lambda: "evaluation"):
            results.after = evaluate(trainer, trainer.policy_for_saving, reward, prompts, queries)
            results.after.unsteady = change_since(reward, results.before)
        results.steps, results.alarms = trainer.n_steps, alarms.found
        finish(folder.path, config, results, prompts)
        tracker.finish(numbers(results, "evaluation"))
    return 0


def finish(run_dir: Path, config: PPOConfig, results, prompts: list[str], keep: bool = True) -> None:
    """Compute the gain of a run, print the results and, if `keep`, write them to the run's folder."""
    from plot_rewards import draw
    from support.run.results import before_after_table, results_table, verdict
    from support.run.run_folder import write_ending

    if processes.rank() == 0:
        results.measure(config.init_kl_coef)
        results.verdict = verdict(results, config)
        texts = before_after_table(results.before.samples, results.after.samples)
        print("", texts, results_table(results), results.verdict, sep="\n\n")
        if keep:
            write_ending(run_dir, config, results, prompts, lambda out: draw([run_dir], out))
            print(f"\nmodel, metrics and report.md are in {run_dir}")


def draw_prompts(n_prompts: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Return the index of each completion's prompt in a step. Prompts take turns, in a new order for each pass."""
    import numpy as np

    positions = range((step - 1) * batch_size, step * batch_size)
    orders = {
        turn: np.random.default_rng([seed, turn]).permutation(n_prompts) for turn in {p // n_prompts for p in positions}
    }
    return [int(orders[p // n_prompts][p % n_prompts]) for p in positions]


def evaluate_again(
    trainer, reward, prompts: list[str], queries: list, run_dir: Path, inputs: dict[str, str], argv: list[str]
) -> int:
    """Evaluate the saved model of a run without training, and return the exit code. trainer, reward: as for `train`."""
    from support.run.evaluation import Results, change_since, check_reward, evaluate
    from support.run.run_folder import (
        compare_inputs,
        failures_explained,
        note_start,
        on_rank_0,
        read_results,
    )

    compare_inputs(run_dir, inputs)
    config, earlier = trainer.config, read_results(run_dir)
    saved = saved_policy(run_dir, trainer.model)
    with failures_explained(run_dir, lambda: "evaluation"):
        before = evaluate(trainer, trainer.ref_model, reward, prompts, queries)
        check_reward(reward, before)
        after = evaluate(trainer, saved, reward, prompts, queries)
        after.unsteady = change_since(reward, before)
    results = earlier or Results(before)
    n_earlier = results.after.n if results.after else 0
    results.before, results.after = before, after
    if keep := config.eval_samples >= n_earlier:
        on_rank_0(lambda: note_start(run_dir, trainer, argv, step=None))
    finish(run_dir, config, results, prompts, keep)
    if not keep:
        print(f"{run_dir} keeps its evaluation with {n_earlier} samples, more than these {config.eval_samples}")
    return 0


def saved_policy(run_dir: Path, policy):
    """Return a copy of the policy with the weights of a run's saved model, which only rank 0 needs to have."""
    from support.models.pretrained import load_gpt2_config, load_policy

    weights = processes.broadcast_from_rank_0(
        lambda: load_policy(run_dir / "model", load_gpt2_config(run_dir / "model")).state_dict()
    )
    saved = copy.deepcopy(policy)
    saved.load_state_dict(weights)
    return saved


def complete(trainer, reward, prompts: list[str], queries: list, run_dir: Path, inputs: dict[str, str]) -> int:
    """Print completions by a run's model before training and now, with the same random numbers, and their rewards.
    Returns the exit code. The run may still be training; its folder isn't changed. trainer, reward: as for `train`."""
    from support.run.checkpoint import load_checkpoint
    from support.run.evaluation import sample_and_score
    from support.run.results import before_after_table
    from support.run.run_folder import compare_inputs

    del inputs["the hash of the prompts"]  # any prompts are allowed
    compare_inputs(run_dir, inputs)
    config = trainer.config
    config.eval_samples = config.n * len(prompts)
    finished, saved = processes.broadcast_from_rank_0(
        lambda: (is_finished(run_dir, config), (run_dir / "model").exists())
    )
    if not finished:
        load_checkpoint(trainer, run_dir / "checkpoints")
    if not trainer.n_steps and not saved:
        raise UserError(f"{run_dir} has neither a checkpoint nor a model yet; wait for one (see --save_every_minutes)")
    now = trainer.policy_for_saving if trainer.n_steps else saved_policy(run_dir, trainer.model)

    tables = []
    for model in (trainer.ref_model, now):
        index, _, texts, parts = sample_and_score(trainer, model, reward, prompts, queries)
        scores = parts @ reward.weights
        samples = [(prompts[i], text, score) for i, text, score in zip(index, texts, scores.tolist())]
        tables.append([samples[row] for row in index.argsort(stable=True)])  # prompt by prompt
    where = f"step {trainer.n_steps} of {total_steps(config)}" if trainer.n_steps else "training"
    print(f"\ncompletions before training and after {where}:\n\n{before_after_table(*tables, config.eval_samples)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program and return the exit code."""
    config = run_dir = mode = None
    argv = sys.argv[1:] if argv is None else argv
    try:
        processes.init_process_group()
        config, run_dir, mode = processes.broadcast_from_rank_0(lambda: read_command_line(argv, __doc__))
        processes.set_timeout(config.process_timeout)
        if mode == "nothing":
            return 0
        import_libraries()
        from ppo import PPOTrainer
        from support.run.load import input_hashes, load
        from support.run.run_folder import RunFolder, locked

        policy, tokenizer, reward, prompts, queries, reference = loaded = load(config)
        inputs = input_hashes(config, *loaded)
        trainer = PPOTrainer(config, policy, reference, tokenizer)
        if mode == "complete":
            return complete(trainer, reward, prompts, queries, run_dir, inputs)
        if mode == "eval_only":
            with locked(run_dir):
                return evaluate_again(trainer, reward, prompts, queries, run_dir, inputs, argv)
        open_folder = RunFolder.resume if mode == "resume" else RunFolder.create
        with open_folder(run_dir, trainer, inputs, argv) as folder:
            return train(trainer, reward, prompts, queries, folder)
    except UserError as error:
        processes.say_why(str(error))
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except Exception as error:
        if is_out_of_memory(error):
            lower = "use a small --micro_batch_size (also with --resume) or, in a new run, a smaller --gen_len or model"
            processes.say_why(f"out of memory ({first_line(error)}); {lower}")
            return 2
        if lost := processes.lost_process(error):
            flags = flags_to_continue(run_dir, config) if mode in ("train", "resume") else shlex.join(argv)
            processes.say_why(f"{lost}; when all machines are back, continue with: python train_ppo.py {flags}")
            return 1
        raise


if __name__ == "__main__":
    hold_streams()
    processes.exit_process(main())
