"""Checkpoints: all that a run needs to go on as if it had never stopped.

    runs/<name>/checkpoints/step-000050/
        policy.safetensors     policy and value head
        average.safetensors    their running average
        optimizer.pt           Adam and the global random generators (torch format, weights_only)
        state.json             step, KL coefficient, and a SHA-256 of every file above

A checkpoint is written under a temporary name, flushed to disk and then renamed: it is there whole or not at all.
"""

import contextlib
import hashlib
import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support import collectives
from support.errors import UserError
from support.writing import whole

FILES = ("policy.safetensors", "average.safetensors", "optimizer.pt")
UNUSABLE = (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError)  # what a damaged checkpoint raises


def save_checkpoint(trainer, folder: Path, keep: int) -> Path:
    """Write `folder`/step-NNNNNN for the trainer's present step, then remove all but the newest `keep`.

    A whole checkpoint of this step that is there already is as good, and is never taken away for a new one. UserError,
    with earlier checkpoints as they were, where the disk is full or the folder cannot be written.
    """
    final = folder / f"step-{trainer.n_steps:06d}"
    weights = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    with contextlib.suppress(*UNUSABLE):
        read_state(final)
        return final
    with whole(final, 4 * weights) as partial:  # policy, average, and Adam's two moments
        write_checkpoint(trainer, partial)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def write_checkpoint(trainer, partial: Path) -> None:
    """All files of a checkpoint."""
    partial.mkdir(parents=True)
    engine = trainer.engine.state_dict()
    save_file(engine["policy"], partial / FILES[0], {"format": "pt"})
    save_file(engine["average"], partial / FILES[1], {"format": "pt"})
    torch.save({"optimizer": engine["optimizer"], "random": random_state()}, partial / FILES[2])
    state = {
        "step": trainer.n_steps,
        "kl_coef": trainer.kl_controller.value,
        "skipped_in_a_row": engine["skipped_in_a_row"],
        "sha256": {name: sha256(partial / name) for name in FILES},
    }
    (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def load_checkpoint(trainer, folder: Path) -> None:
    """Put the newest usable checkpoint below `folder` into the trainer. A damaged one is named and passed over.

    Where the run stopped before its first checkpoint the trainer stays as it is, at step 0. UserError where there are
    checkpoints, but none can be used. On several processes only rank 0 needs to see the folder.
    """
    found = collectives.broadcast_from_rank_0(lambda: newest_checkpoint(folder))
    if found is None:
        print(f"no checkpoint in {folder} yet: the run starts from the beginning")
        return
    state, policy, average, saved = found
    engine = {"policy": policy, "average": average, "optimizer": saved["optimizer"]}
    trainer.engine.load_state_dict({**engine, "skipped_in_a_row": state["skipped_in_a_row"]})
    set_random_state(saved["random"])
    trainer.n_steps, trainer.kl_controller.value = state["step"], state["kl_coef"]


def newest_checkpoint(folder: Path) -> tuple[dict, dict, dict, dict] | None:
    """state.json, weights, averaged weights and the optimiser's file of the newest checkpoint that is whole."""
    for partial in folder.glob(".partial-*"):
        shutil.rmtree(partial)
    for path in reversed(checkpoints(folder)):
        try:
            state = read_state(path)
            saved = torch.load(path / FILES[2], map_location="cpu", weights_only=True)
            return state, load_file(path / FILES[0]), load_file(path / FILES[1]), saved
        except UNUSABLE as error:
            print(f"warning: checkpoint {path} cannot be used ({str(error).splitlines()[0]})")
    if checkpoints(folder):
        raise UserError(f"no usable checkpoint in {folder}; start the run again under another --run_name")
    return None


def read_state(path: Path) -> dict:
    """A checkpoint's state.json, once every file was found whole. One of UNUSABLE where it is not."""
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    for name in FILES:
        if sha256(path / name) != state["sha256"][name]:
            raise ValueError(f"{name} is damaged")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below a folder, oldest first."""
    return sorted(folder.glob("step-*"))


def random_state() -> dict:
    """The global generators of Python, NumPy and torch, which a reward function may draw from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }


def set_random_state(state: dict) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
