"""Checkpoints: all that a run needs to go on as if it had never stopped.

    runs/<name>/checkpoints/step-000050/
        policy.safetensors     policy and value head
        average.safetensors    their running average
        optimizer.pt           Adam and the global random generators (torch format, weights_only)
        state.json             step, KL coefficient, unit of the rewards, and a SHA-256 of every file above

A checkpoint is written under a temporary name, flushed to disk and then renamed: it is there whole or not at all.
"""

import contextlib
import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from support import collectives
from support.errors import UserError, first_line, is_out_of_memory
from support.files import disk_errors, read_json, remove, whole

FILES = ("policy.safetensors", "average.safetensors", "optimizer.pt")
UNUSABLE = (OSError, ValueError, LookupError, TypeError)  # what `read_state` raises of a damaged one


def save_checkpoint(trainer, folder: Path, keep: int) -> Path:
    """Write `folder`/step-NNNNNN for the trainer's present step, then remove those older than the newest `keep`.

    A whole checkpoint of this step that is there already is as good, and is never taken away for a new one. UserError,
    with earlier checkpoints as they were, where the disk is full or the folder cannot be written.
    """
    final = folder / f"step-{trainer.n_steps:06d}"
    with contextlib.suppress(*UNUSABLE):
        read_state(final)
        return final
    with whole(final) as partial:
        folder.mkdir(exist_ok=True)
        write_checkpoint(trainer, partial)
    with disk_errors(folder):
        remove_older(folder, trainer.n_steps, keep)
    return final


def write_checkpoint(trainer, partial: Path) -> None:
    """All files of a checkpoint."""
    partial.mkdir()
    engine = trainer.engine.state_dict()
    save_file(engine["policy"], partial / FILES[0], {"format": "pt"})
    save_file(engine["average"], partial / FILES[1], {"format": "pt"})
    torch.save({"optimizer": engine["optimizer"], "random": random_state()}, partial / FILES[2])
    state = {
        "step": trainer.n_steps,
        "kl_coef": trainer.kl_controller.value,
        "reward_unit": trainer.reward_unit,
        "skipped_in_a_row": engine["skipped_in_a_row"],
        "sha256": {name: sha256(partial / name) for name in FILES},
    }
    (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def remove_older(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints that are older than the newest `keep` whole ones, of which that of `step` is the first."""
    for path in reversed([path for path in checkpoints(folder) if step_of(path) < step]):
        if keep == 1:
            remove(path)
        else:
            with contextlib.suppress(*UNUSABLE):
                read_state(path)
                keep -= 1


def load_checkpoint(trainer, folder: Path) -> None:
    """Put the newest usable checkpoint below `folder` into the trainer. A damaged one is named and passed over.

    Where there is none the trainer stays as it is, at step 0. UserError where there are checkpoints, but none can be
    used. On several processes only rank 0 needs to see the folder.
    """
    found = collectives.broadcast_from_rank_0(lambda: checkpoints(folder))
    for path in reversed(found):
        try:
            content = collectives.broadcast_from_rank_0(lambda: read_checkpoint(path))
            with damage_told():
                put_into(trainer, *content)
            return
        except UserError as error:
            print(f"warning: checkpoint {path} cannot be used ({error})")
    if found:
        raise UserError(f"no usable checkpoint in {folder}; start the run again under another --run_name")


def read_checkpoint(path: Path) -> tuple[dict, dict, dict, dict]:
    """state.json, weights, averaged weights and the optimiser's file of a checkpoint. UserError where it is damaged."""
    with damage_told():
        state = read_state(path)
        saved = torch.load(path / FILES[2], map_location="cpu", weights_only=True)
        return state, load_file(path / FILES[0]), load_file(path / FILES[1]), saved


@contextlib.contextmanager
def damage_told():
    """What a checkpoint that is not as it was written raises, which may be anything, as a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(first_line(error))


def put_into(trainer, state: dict, policy: dict, average: dict, saved: dict) -> None:
    """Have a trainer go on from what `read_checkpoint` gave."""
    engine = {"policy": policy, "average": average, "optimizer": saved["optimizer"]}
    trainer.engine.load_state_dict({**engine, "skipped_in_a_row": state["skipped_in_a_row"]})
    set_random_state(saved["random"])
    trainer.n_steps, trainer.kl_controller.value = state["step"], float(state["kl_coef"])
    trainer.reward_unit = state.get("reward_unit", 1.0)  # earlier versions knew none


def read_state(path: Path) -> dict:
    """A checkpoint's state.json, once every file was found whole. One of UNUSABLE where one is not."""
    state = read_json(path / "state.json", "remove this checkpoint")
    if state["step"] != step_of(path):
        raise ValueError(f"state.json is that of step {state['step']}")
    for name in FILES:
        if sha256(path / name) != state["sha256"][name]:
            raise ValueError(f"{name} is damaged")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, oldest first; what has another name is the user's own."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-(\d{6}|[1-9]\d{6,})", path.name)]
    return sorted([path for path in found if path.is_dir()], key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


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
    name, keys, position, has_gauss, cached = state["numpy"]  # NumPy 1.26 does not survive fewer
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
