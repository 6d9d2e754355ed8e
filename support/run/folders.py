"""Find the folder of a new or an earlier run, and check whether a run is finished. Doesn't need torch."""

import shlex
from datetime import datetime
from itertools import chain, count
from pathlib import Path

from config import PPOConfig
from support.common.errors import UserError
from support.common.files import read_json
from support.run.settings import own_rewards, total_steps

FINAL = ("model", "rewards.png", "report.md")  # written at the end of a run, in this order


def new_run_folder(config: PPOConfig) -> Path:
    """Return a folder for a new run without creating it: --run_name, which mustn't exist, or the current time."""
    runs = Path(config.runs_dir)
    if config.run_name is None:
        name = datetime.now().strftime("%Y%m%d-%H%M%S")
        names = chain([name], (f"{name}-{i}" for i in count(2)))
        return next(runs / free for free in names if not (runs / free).exists())
    if (run_dir := runs / config.run_name).exists():
        raise UserError(f"{run_dir} already exists; choose another --run_name, or {flags_to_continue(run_dir, config)}")
    return run_dir


def is_finished(run_dir: Path, config: PPOConfig) -> bool:
    """Return whether a run has done all steps of its config and written everything that the end of a run writes."""
    evaluation = read_json(run_dir / "evaluation.json", "remove it; --resume will create it again", missing={})
    steps = evaluation.get("steps") or 0
    return steps >= total_steps(config) and all((run_dir / name).exists() for name in FINAL)


def find_run_folder(config: PPOConfig, name: str) -> Path:
    """Return the folder of an earlier run; 'latest' is the newest in --runs_dir. Raises UserError if there is none."""
    if name == "latest":
        runs = sorted(Path(config.runs_dir).glob("*/config.json"), key=lambda path: path.stat().st_mtime)
        if not runs:
            raise UserError(f"there is no run in {config.runs_dir}; check --runs_dir")
        name = runs[-1].parent
    path = Path(name)
    if not is_run_folder(path):
        near = "".join(f"; did you mean {parent}?" for parent in path.parents if is_run_folder(parent))
        raise UserError(f"{path} is not a run folder: it has no config.json with a run's settings{near}")
    return path


def is_run_folder(path: Path) -> bool:
    """Return whether a folder has the config.json of a run, and not of a model (such as the run's own)."""
    file = path / "config.json"
    return file.is_file() and "model_type" not in read_json(file, "a run can't continue without its settings")


def flags_to_continue(run_dir: Path, config: PPOConfig) -> str:
    """Return the flags that continue a run. The user's own reward must be named again, see `read_command_line`."""
    return shlex.join(["--resume", run_dir.as_posix(), *(["--reward", *config.reward] if own_rewards(config) else [])])
