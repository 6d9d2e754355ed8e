"""What the command line asks for: the config, the folder of the run, and what to do there."""

import argparse
import dataclasses
import os
import re
import shlex
import socket
from datetime import datetime
from pathlib import Path

from config import PPOConfig
from support import collectives, meeting
from support.errors import UserError
from support.files import path_errors, read_evaluation
from support.settings import check, import_function, load_config, parse_args, read_prompts, total_steps
from support.tracking import check_installed

# Settings that may differ when a run goes on, since none of them changes what it computes (but for how long); and
# when a saved run is judged again.
HARMLESS = {"runs_dir", "device", "log_samples_every", "save_every", "save_every_minutes", "keep_checkpoints"}
HARMLESS |= {"process_timeout", "micro_batch_size", "episodes", "track"}
FOR_JUDGING = {"runs_dir", "device", "dtype", "process_timeout", "micro_batch_size", "eval_samples"}
FOR_COMPLETING = FOR_JUDGING - {"eval_samples"} | {"prompts", "prompts_file"}
FINAL = ("model", "rewards.png", "report.md")  # what the end of a run writes, the last of them last

JOB_FILE = ".torchrun-id"  # below torchrun the job that a run folder belongs to


@path_errors()
def read_command_line(argv: list[str]) -> tuple[PPOConfig, Path, str]:
    """The config, the run folder, and 'train', 'resume', 'eval_only', 'complete' or 'nothing'. UserError for bad input.

    For 'complete' the config's eval_samples are the completions of all prompts together.
    """
    flags = CompleteFlags()
    complete, n, others = parse_complete(flags, argv)
    config, given = parse_args(others, parents=[flags])
    if complete is not None:
        run_dir, mode = find_run_folder(config, complete), "complete"
        given |= {"prompts_file"} if "prompts" in given else set()  # of which the run may have one
        config = saved_config(run_dir, config, given, FOR_COMPLETING)
        config.eval_samples = n * len(read_prompts(config))
    elif config.eval_only is not None:
        run_dir, mode = find_run_folder(config, config.eval_only), "eval_only"
        config = saved_config(run_dir, config, given - {"eval_only"}, FOR_JUDGING)
    elif config.resume is not None:
        run_dir, mode = find_run_folder(config, config.resume), "resume"
    else:
        check(config)
        if {"kl_budget", "init_kl_coef"} <= given:
            raise UserError("--kl_budget finds the value of --init_kl_coef: give one of them")
        run_dir = new_run_folder(config)
        mode = "resume" if (run_dir / "config.json").exists() else "train"  # a restart goes on, see new_run_folder
        if mode == "train" and meeting.restart_count():
            here = f"{run_dir} is not on this machine, {socket.gethostname()}"
            print(f"THIS JOB HAS BEEN STARTED BEFORE, BUT ITS RUN FOLDER IS NOT HERE: IT BEGINS AT STEP 1 ({here})")
    if mode == "resume":
        config = saved_config(run_dir, config, given - {"resume"}, HARMLESS)
        if is_finished(run_dir, config):
            more = "; more --episodes would go on, and --eval_only judges it again" if given - {"resume"} else ""
            print(f"{run_dir} is finished already, nothing is missing{more}")
            mode = "nothing"
    if config.reward is not None and mode != "nothing":
        if "reward" not in given:
            own = f"{run_dir} has a reward of its own, {config.reward}, and code runs only where you name it"
            raise UserError(f"{own}: {shlex.join(['python', 'train_ppo.py', *argv, '--reward', config.reward])}")
        import_function(config.reward)  # before anything is fetched
    if config.track != "none" and mode in ("train", "resume"):
        check_installed(config.track)
    for name in ("batch_size", "minibatch_size"):
        if mode not in ("eval_only", "complete") and getattr(config, name) % collectives.world_size():
            share = f"the {collectives.world_size()} processes, each of which takes an equal share"
            raise UserError(f"--{name} {getattr(config, name)} does not divide by {share}")
    return config, run_dir, mode


class CompleteFlags(argparse.ArgumentParser):
    """--complete and --n, which are no settings of a run; --help lists them with these."""

    def __init__(self):
        super().__init__(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.add_argument(
            "--complete",
            metavar="RUN",
            help="Complete --prompts with the model of this run folder, before training and now, and train nothing.",
        )
        self.add_argument("--n", type=int, help="Completions of each prompt that --complete shows. (default: 5)")

    def error(self, message):
        raise UserError(f"{message}; write --complete runs/NAME --n 5")


def parse_complete(flags: CompleteFlags, argv: list[str]) -> tuple[str | None, int, list[str]]:
    """The run of --complete, --n, and all other arguments. UserError where they are wrong."""
    asked, others = flags.parse_known_args(argv, argparse.Namespace(complete=None, n=None))
    if asked.n is not None and asked.complete is None:
        raise UserError("--n is how many completions of each prompt --complete shows; give it a run folder")
    if asked.n is not None and not 1 <= asked.n <= 10_000:
        raise UserError(f"--n must be at least 1 and at most 10000, not {asked.n}")
    return asked.complete, asked.n or 5, others


def new_run_folder(config: PPOConfig) -> Path:
    """Where a new run will live; nothing is written yet. UserError where a name that was given is taken.

    Without --run_name a run is called after the time. Below torchrun its processes may be restarted and must find the
    folder again, so there it is called after torchrun's --rdzv-id, or, where torchrun knows none, after torchrun's
    process number. A later run of the same name is NAME-2; one that goes on takes the last that is there.
    """
    runs, name = Path(config.runs_dir), config.run_name
    if name is None:
        name = os.environ.get("TORCHELASTIC_RUN_ID", datetime.now().strftime("%Y%m%d-%H%M%S"))
        name = f"torchrun-{os.getppid()}" if name == "none" else re.sub(r"[^\w.\-]", "-", name)
        names = [name]
        while (runs / names[-1]).exists():
            names.append(f"{name}-{len(names) + 1}")
        name = names[-2] if len(names) > 1 and goes_on(runs / names[-2], config) else names[-1]
    run_dir = runs / name
    if run_dir.exists() and not goes_on(run_dir, config):
        raise UserError(
            f"--run_name {name}: {run_dir} exists already; choose another name, or " + flags_to_go_on(run_dir, config)
        )
    return run_dir


def goes_on(run_dir: Path, config: PPOConfig) -> bool:
    """Whether this start goes on with a run folder that is there: torchrun has restarted the processes, or the run is
    not finished and has torchrun's job written in it, as where a machine joins or comes back."""
    if meeting.restart_count():
        return True
    owner = run_dir / JOB_FILE
    return owner.exists() and owner.read_text(encoding="utf-8") == meeting.job() and not is_finished(run_dir, config)


def is_finished(run_dir: Path, config: PPOConfig) -> bool:
    """Whether a run has done the steps of its config, and all that its end writes is there."""
    judged_after = read_evaluation(run_dir).get("steps") or 0
    return judged_after >= total_steps(config) and all((run_dir / name).exists() for name in FINAL)


def find_run_folder(config: PPOConfig, name: str) -> Path:
    """The folder of an earlier run; 'latest' is the newest below --runs_dir."""
    if name == "latest":
        runs = sorted(Path(config.runs_dir).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"no run to resume in {config.runs_dir}")
        return runs[-1].parent
    if Path(name).name == "model" and (Path(name).parent / "metrics.csv").exists():
        raise UserError(f"{name} is the model of a run; give the run, {Path(name).parent}")
    if not (Path(name) / "config.json").is_file():
        raise UserError(f"{name} is no run folder: it has no config.json")
    return Path(name)


def saved_config(run_dir: Path, config: PPOConfig, given: set[str], allowed: set[str]) -> PPOConfig:
    """A run's own config with the allowed flags given here. UserError for flags that would change the result."""
    saved = load_config(run_dir / "config.json")
    for name in sorted(given):
        old, new = getattr(saved, name), getattr(config, name)
        if name not in allowed and old != new:
            change = f"--{name} {new} would change the result of {run_dir}, which was started with {old}"
            raise UserError(f"{change}; start a new run for that")
        if name == "episodes" and new < old:
            raise UserError(f"--episodes {new} is fewer than the {old} of {run_dir}; they can only be raised")
        if name == "episodes" and new > old:
            print(f"{new - old:,} completions more: {old:,} -> {new:,}")
    config = dataclasses.replace(saved, **{name: getattr(config, name) for name in given & allowed})
    check(config)
    return config


def flags_to_go_on(run_dir: Path, config: PPOConfig) -> str:
    """What to type behind `python train_ppo.py` for a run that is there: a reward of one's own is named again."""
    return shlex.join(["--resume", run_dir.as_posix(), *(["--reward", config.reward] if config.reward else [])])


def how_to_go_on(run_dir: Path | None, config: PPOConfig) -> str:
    """What to do after another process or machine is gone, and the newest checkpoint where this machine has any."""
    if run_dir is None:
        return "start the run again"
    from support.checkpoint import checkpoints  # whose torch --help does without

    found = checkpoints(run_dir / "checkpoints")
    if not run_dir.exists():
        newest = f"the first machine has the checkpoints of {run_dir}"
    else:
        newest = f"the newest checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    flags = f"{flags_to_go_on(run_dir, config)} in place of the other flags"
    return f"{newest}; when all machines are there again, go on with {flags}"
