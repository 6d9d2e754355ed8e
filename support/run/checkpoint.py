"""Checkpoints: everything that a run needs to continue as if it had never stopped.

runs/<name>/checkpoints/step-000050/
    policy.safetensors     policy and value head
    average.safetensors    their running average
    optimizer.pt           Adam and the global random generators (torch format, weights_only)
    state.json             step, KL coefficient, unit of the rewards, and a SHA-256 of every file above
"""

import contextlib
import hashlib
import json
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support.common.errors import UserError
from support.common.files import damaged, disk_errors, remove, whole
from support.compute import processes

FILES = ("policy.safetensors", "average.safetensors", "optimizer.pt")
REMEDY = "an older one is used if there is one"


def save_checkpoint(trainer, folder: Path, keep: int) -> Path:
    """Write `folder`/step-NNNNNN for the trainer's current step, then remove older ones so that `keep` remain.

    If a valid checkpoint of this step already exists, keep it. Raises UserError if the disk is full or the folder
    cannot be written; earlier checkpoints are then unchanged.
    """
    final = folder / f"step-{trainer.n_steps:06d}"
    with contextlib.suppress(UserError):
        read_checkpoint(final)
        return final
    with whole(final) as partial:
        folder.mkdir(exist_ok=True)
        partial.mkdir()
        engine = trainer.engine.state_dict()
        save_file(engine["policy"], partial / FILES[0], {"format": "pt"})
        save_file(engine["average"], partial / FILES[1], {"format": "pt"})
        torch.save({"optimizer": engine["optimizer"], "random": random_state()}, partial / FILES[2])
        for name in FILES[:2]:  # safetensors lets only the owner read them
            shutil.copymode(partial / FILES[2], partial / name)
        state = {
            "step": trainer.n_steps,
            "kl_coef": trainer.kl_controller.value,
            "reward_mean": trainer.reward_mean,
            "reward_unit": trainer.reward_unit,
            "skipped_in_a_row": engine["skipped_in_a_row"],
            "sha256": {name: sha256(partial / name) for name in FILES},
        }
        (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")
    older = [path for path in checkpoints(folder) if step_of(path) < trainer.n_steps]
    with disk_errors(folder):
        for path in older[: max(0, len(older) + 1 - keep)]:
            remove(path)
    return final


def load_checkpoint(trainer, folder: Path) -> None:
    """Load the newest usable checkpoint in `folder` into the trainer. If there is none at all, do nothing.

    A damaged checkpoint is skipped with a warning. Raises UserError if all are damaged. Only rank 0 reads the folder.
    """
    found = processes.broadcast_from_rank_0(lambda: checkpoints(folder))
    for path in reversed(found):
        try:
            state, policy, average, saved = processes.broadcast_from_rank_0(lambda: read_checkpoint(path))
            with damaged(path, REMEDY):
                engine = {"policy": policy, "average": average, "optimizer": saved["optimizer"]}
                trainer.engine.load_state_dict({**engine, "skipped_in_a_row": state["skipped_in_a_row"]})
                set_random_state(saved["random"])
                trainer.kl_controller.value = state["kl_coef"]
                trainer.reward_mean, trainer.reward_unit = state.get("reward_mean", 0.0), state["reward_unit"]
                trainer.n_steps = state["step"]
            return
        except UserError as error:
            print(f"warning: skipping a checkpoint: {error}")
    if found:
        raise UserError(f"no usable checkpoint in {folder}; start the run again under another --run_name")


def read_checkpoint(path: Path) -> tuple[dict, dict, dict, dict]:
    """Read state.json, weights, their average and optimizer.pt. Raises UserError if one is damaged."""
    with damaged(path, REMEDY):
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        for name in FILES:
            if sha256(path / name) != state["sha256"][name]:
                raise ValueError(f"{name} has changed since it was written")
        saved = torch.load(path / FILES[2], map_location="cpu", weights_only=True)  # runs no code
        return state, load_file(path / FILES[0]), load_file(path / FILES[1]), saved


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; files with other names belong to the user."""
    return sorted([path for path in folder.glob("step-*") if path.name[len("step-") :].isdecimal()], key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def random_state() -> dict:
    """Return the global generators of Python, NumPy and torch, which a reward function may draw from."""
    name, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}


def set_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
