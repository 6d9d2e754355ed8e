"""Train a Chinese GPT-2 with PPO towards texts that a reward likes.

    python train_ppo.py                                  the article's job, on a GPU
    python train_ppo.py --preset article                 the same with the article's own settings
    python train_ppo.py --preset demo                    tiny models made on the spot, a minute or two on a laptop
    python train_ppo.py --model_name DIR --reward_model_name DIR --lr 2e-5 --prompts "衣服" "这本书"
    python train_ppo.py --reward my_reward:score         your own function of texts
    python train_ppo.py --resume runs/NAME               go on after a stop
    python train_ppo.py --eval_only runs/NAME            judge a saved model again
    python train_ppo.py --complete runs/NAME --prompts "这家店" "昨天"     its model on any prompts, before and after
    torchrun --nproc-per-node 8 train_ppo.py             on eight GPUs; --batch_size stays that of all together
    python train_ppo.py --help                           every hyperparameter; config.py explains them

A run writes its own folder runs/NAME; `python plot_rewards.py` draws it.
"""

import copy
import shlex
import sys
import time
from pathlib import Path

from config import PPOConfig
from support import import_libraries, processes
from support.command_line import flags_to_go_on, is_finished, read_command_line
from support.errors import UserError, first_line, is_out_of_memory
from support.settings import total_steps
from support.streams import hold_streams


def train(config: PPOConfig, policy, tokenizer, reward, prompts: list[str], folder, resume: bool = False) -> int:
    """Train a policy, judge it before and after, and return the exit code. On several processes all of them run this.

    policy, tokenizer, reward, prompts: what `load` returned. folder: a RunFolder that is not open yet.
    """
    # Imported here, since --help and what is refused at once need no torch
    from reward import score_texts
    from support.evaluation import evaluate, noise, scores_and_prompts
    from support.prospect import kl_coef_for
    from support.signals import StopSignal
    from support.text_trainer import TextPPOTrainer

    # 1. Reference and trainer; the run folder
    reference = copy.deepcopy(policy)
    trainer = TextPPOTrainer(config, policy, reference, tokenizer)
    queries = trainer.encode(prompts)
    folder.open(trainer, resume)

    # 2. How good the policy is before training, measured once; what can be expected, and at which price
    results = folder.read_evaluation(prompts)
    if not results:
        with folder.errors_explained(trainer):
            results["before"] = evaluate(trainer, reference, reward, prompts)
            results["before"]["noise"] = noise(reward, results["before"])
        folder.write_evaluation(results)
    if config.kl_budget and trainer.n_steps == 0:
        trainer.set_kl_coef(kl_coef_for(*scores_and_prompts(results["before"], prompts), config.kl_budget))
    folder.expect(results["before"], prompts)

    # 3. The loop: draw prompts, sample, score, step, log, save
    stop = StopSignal()
    with folder.errors_explained(trainer, training=True):
        for step in range(trainer.n_steps + 1, total_steps(config) + 1):
            started = time.perf_counter()
            drawn = draw_prompts(len(prompts), config.seed, step, config.batch_size)
            batch_prompts, query_tensors = [prompts[i] for i in drawn], [queries[i] for i in drawn]

            response_tensors = trainer.generate(query_tensors)
            completions = trainer.decode(response_tensors)
            sampled = time.perf_counter()

            scores = score_texts(reward, [prompt + text for prompt, text in zip(batch_prompts, completions)])
            scored = time.perf_counter()

            stats = trainer.step(query_tensors, response_tensors, scores)
            stepped = time.perf_counter()

            seconds = {"sample": sampled - started, "score": scored - sampled, "ppo": stepped - scored}
            folder.log(step, seconds, batch_prompts, completions, scores, stats)
            stopped = max(processes.all_gather(stop.received))
            if stopped or folder.checkpoint_due(step):
                folder.save_checkpoint(trainer)
            if stopped:
                break
    if trainer.n_steps < total_steps(config):
        flags = flags_to_go_on(folder.path, config)
        print(f"stopped after step {trainer.n_steps}; go on with: python train_ppo.py {flags}")
        return 128 + stopped  # a shell's code for what ended by this signal
    stop.release()

    # 4. The trained model, how good it is now, and the pictures; --resume makes what is missing of them
    folder.save_model(trainer)
    with folder.errors_explained(trainer):
        results["after"] = evaluate(trainer, trainer.policy_for_saving, reward, prompts)
    results["steps"], results["alarms"] = trainer.n_steps, folder.alarms.found
    folder.report(results, prompts)
    folder.finish(results, prompts)
    return 0


def draw_prompts(n_prompts: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Which prompt each completion of a step continues: all in turn, each pass over them in a new order."""
    import numpy as np

    positions = range((step - 1) * batch_size, step * batch_size)
    orders = {
        turn: np.random.default_rng([seed, turn]).permutation(n_prompts) for turn in {p // n_prompts for p in positions}
    }
    return [int(orders[p // n_prompts][p % n_prompts]) for p in positions]


def judge_again(config: PPOConfig, policy, tokenizer, reward, prompts: list[str], folder) -> int:
    """Judge the saved model of a run without training, and return the exit code. Arguments as for `train`."""
    from support.evaluation import evaluate, noise
    from support.text_trainer import TextPPOTrainer

    processes.broadcast_from_rank_0(folder.hold)
    folder.compare_inputs()
    results = folder.read_evaluation(prompts)
    earlier = (results.get("after") or {"n": 0})["n"]
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    saved = saved_policy(folder.path, policy)
    with folder.errors_explained(trainer):
        for when, model in (("before", trainer.ref_model), ("after", saved)):
            results[when] = evaluate(trainer, model, reward, prompts)
        results["before"]["noise"] = noise(reward, results["before"])
    folder.report(results, prompts)
    if config.eval_samples < earlier:
        print(f"{folder.path} keeps its judgement by {earlier} samples, more than these {config.eval_samples}")
    else:
        folder.note_start(trainer, step=None)
        folder.finish(results, prompts)
    return 0


def saved_policy(run_dir: Path, policy):
    """A copy of the policy with the weights of a run's saved model, which only rank 0 needs to have."""
    from support.models import load_gpt2_config, load_policy

    weights = processes.broadcast_from_rank_0(
        lambda: load_policy(run_dir / "model", load_gpt2_config(run_dir / "model")).state_dict()
    )
    saved = copy.deepcopy(policy)
    saved.load_state_dict(weights)
    return saved


def complete(config: PPOConfig, policy, tokenizer, reward, prompts: list[str], folder) -> int:
    """Print completions by the model of a run before training and now, of the same draws, with their rewards, and
    return the exit code. The run may be at work; nothing in its folder changes. Arguments as for `train`."""
    from support.checkpoint import load_checkpoint
    from support.evaluation import before_after_table, sample_and_score
    from support.text_trainer import TextPPOTrainer

    run_dir = folder.path
    del folder.inputs["the hash of the prompts"]  # which may be any
    folder.compare_inputs()
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    finished, saved = processes.broadcast_from_rank_0(
        lambda: (is_finished(run_dir, config), (run_dir / "model").exists())
    )
    if not finished:
        load_checkpoint(trainer, run_dir / "checkpoints")
    if not trainer.n_steps and not saved:
        raise UserError(f"{run_dir} has no checkpoint yet, and no model; wait for one, see --save_every_minutes")
    now = trainer.policy_for_saving if trainer.n_steps else saved_policy(run_dir, policy)

    table = {}
    for when, model in (("before", trainer.ref_model), ("after", now)):
        index, *_, texts, scores = sample_and_score(trainer, model, reward, prompts, config.eval_samples)
        rows = sorted(zip(index, range(len(texts))))  # prompt by prompt
        table[when] = {"samples": [(prompts[prompt], texts[row], scores[row].item()) for prompt, row in rows]}
    if folder.writes:
        where = f"step {trainer.n_steps} of {total_steps(config)}" if trainer.n_steps else "training"
        print(f"\nbefore training, and after {where}:\n\n{before_after_table(table, config.eval_samples)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code."""
    config = run_dir = mode = folder = None
    argv = sys.argv[1:] if argv is None else argv
    try:
        processes.init_process_group()
        config, run_dir, mode = processes.broadcast_from_rank_0(lambda: read_command_line(argv, __doc__))
        processes.set_timeout(config.process_timeout)
        if mode == "nothing":
            return 0
        import_libraries()
        from support.load import input_hashes, load
        from support.run_folder import RunFolder

        loaded = load(config)
        folder = RunFolder(run_dir, config, argv, input_hashes(config, *loaded))
        if mode == "complete":
            return complete(config, *loaded, folder)
        if mode == "eval_only":
            return judge_again(config, *loaded, folder)
        return train(config, *loaded, folder, resume=mode == "resume")
    except UserError as error:
        processes.say_why(str(error))
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except Exception as error:
        if is_out_of_memory(error):
            lower = "lower --micro_batch_size, also with --resume, or in a new run --gen_len or the models"
            processes.say_why(f"out of memory ({first_line(error)}); {lower}")
            return 2
        if lost := processes.lost_process(error):
            flags = flags_to_go_on(run_dir, config) if mode in ("train", "resume") else shlex.join(argv)
            processes.say_why(f"{lost}; when all machines are back, go on with: python train_ppo.py {flags}")
            return 1
        raise
    finally:
        if folder:
            folder.close()


if __name__ == "__main__":
    hold_streams()
    processes.exit_process(main())
