"""Read from the command line the config, the run folder, and what to do there."""

import shlex
from dataclasses import replace
from pathlib import Path

from config import PPOConfig
from support.common.errors import UserError
from support.common.files import path_errors
from support.compute import processes
from support.run.folders import find_run_folder, flags_to_continue, is_finished, new_run_folder
from support.run.settings import check, load_config, own_rewards, parse_args
from support.run.tracking import check_installed

# Flags that may differ from the run's own settings, because they don't change its result (--episodes only extends it)
ALWAYS = {"runs_dir", "device", "process_timeout", "micro_batch_size"}
SAVING = {"log_samples_every", "save_every", "save_every_minutes", "keep_checkpoints"}
ALLOWED = {
    "resume": ALWAYS | SAVING | {"episodes", "track", "stop_on_alarm"},
    "eval_only": ALWAYS | {"dtype", "eval_samples"},
    "complete": ALWAYS | {"dtype", "prompts", "prompts_file", "n"},
}


@path_errors()
def read_command_line(argv: list[str], description: str = "") -> tuple[PPOConfig, Path, str]:
    """Return the config, the run folder, and 'train', 'resume', 'eval_only', 'complete' or 'nothing'.

    Raises UserError for bad input.
    """
    config, given = parse_args(argv, description=description)
    mode = next((mode for mode in ALLOWED if mode in given), "train")
    if mode == "train":
        check(config)
        if {"kl_budget", "init_kl_coef"} <= given:
            raise UserError("--kl_budget chooses the value of --init_kl_coef; give only one of them")
        run_dir = Path(config.runs_dir, config.run_name or "")
        if config.run_name and (run_dir / "config.json").exists() and processes.restart_count():
            mode = "resume"
        else:
            run_dir = new_run_folder(config)
    else:
        run_dir = find_run_folder(config, getattr(config, mode))
    if mode != "train":
        config = saved_config(run_dir, config, given - {mode}, ALLOWED[mode])
    if mode == "eval_only" and not (run_dir / "model").exists():
        way = f"finish it first: python train_ppo.py {flags_to_continue(run_dir, config)}"
        raise UserError(f"{run_dir} isn't finished, so it has no model to evaluate; {way}")
    if mode == "resume" and is_finished(run_dir, config):
        print(f"{run_dir} is already finished; to train it further, use --resume with more --episodes")
        return config, run_dir, "nothing"
    if own := own_rewards(config):
        if "reward" not in given:
            way = shlex.join(["python", "train_ppo.py", *argv, "--reward", *config.reward])
            raise UserError(f"{run_dir} uses a reward function, whose code runs only if you name it: {way}")
        from reward import import_function  # needs torch, which --help doesn't need

        for name in own:
            import_function(name)  # before anything is downloaded
    if mode in ("train", "resume"):
        if config.track != "none":
            check_installed(config.track)
        for name in ("batch_size", "minibatch_size"):
            if getattr(config, name) % processes.world_size():
                n = processes.world_size()
                raise UserError(f"--{name} {getattr(config, name)} must be divisible by the number of processes, {n}")
    return config, run_dir, mode


def saved_config(run_dir: Path, config: PPOConfig, given: set[str], allowed: set[str]) -> PPOConfig:
    """Return a run's own config with the allowed flags given here. Raises UserError if another flag would change it."""
    saved = load_config(run_dir / "config.json")
    for name in sorted(given):
        old, new = getattr(saved, name), getattr(config, name)
        if name not in allowed and old != new:
            change = f"--{name} {new} would change the result of {run_dir}, which was started with {old}"
            raise UserError(f"{change}; start a new run for that")
        if name == "episodes" and new < old:
            raise UserError(f"--episodes {new} is less than the {old} of {run_dir}; it can only be raised")
    taken = {name: getattr(config, name) for name in given & allowed}
    if "prompts" in given:
        taken["prompts_file"] = config.prompts_file  # instead of the run's own file
    check(config := replace(saved, **taken))
    return config
