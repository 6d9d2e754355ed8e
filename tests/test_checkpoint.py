"""A checkpoint restores everything that affects how a run continues."""

import copy
import hashlib
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from support.common.errors import UserError
from support.run.checkpoint import load_checkpoint, save_checkpoint
from tests.helpers import batch_of, change_json, contents, load_gpt2, make, read_json


def twin(policy, **changes):
    return make((copy.deepcopy(policy[0]), policy[1]), **changes)


def trained(policy, **changes):
    trainer = twin(policy, **changes)
    batch = batch_of(trainer, policy)
    for _ in range(2):
        trainer.step(*batch)
    return trainer, batch


def assert_same_weights(one, other):
    for mine, its in ((one.model, other.model), (one.policy_for_saving, other.policy_for_saving)):
        assert all(torch.equal(weight, same) for weight, same in zip(mine.parameters(), its.parameters()))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_trainer_loaded_from_a_checkpoint_continues_like_the_saved_one(policy, tmp_path):
    """A checkpoint from an Apple GPU has fused=False, but the current device decides whether the optimizer is fused."""
    changes = dict(kl_controller="adaptive", target=0.01, horizon=20)
    trainer, batch = trained(policy, **changes)
    trainer.engine.skipped_in_a_row = 3
    for group in trainer.engine.optimizer.param_groups:
        group["fused"] = False
    save_checkpoint(trainer, tmp_path, keep=1)
    for group in trainer.engine.optimizer.param_groups:
        group["fused"] = True
    other = twin(policy, **changes)
    load_checkpoint(other, tmp_path)
    assert [group["fused"] for group in other.engine.optimizer.param_groups] == [True, True]
    assert other.n_steps == 2 and other.engine.skipped_in_a_row == 3
    assert other.kl_controller.value == trainer.kl_controller.value != other.config.init_kl_coef
    assert other.reward_unit == trainer.reward_unit != 1 and other.reward_mean == trainer.reward_mean != 0
    assert_same_weights(trainer, other)
    assert trainer.step(*batch) == other.step(*batch)
    assert_same_weights(trainer, other)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


DAMAGES = {
    "truncated weights": ("policy.safetensors", lambda file: os.truncate(file, 5000)),
    "one changed byte": ("average.safetensors", lambda file: file.open("r+b").write(b"x")),
    "a missing file": ("average.safetensors", lambda file: file.unlink()),
    "truncated state": ("state.json", lambda file: file.write_text("{")),
}
WITH_A_RIGHT_SUM = {
    "another shape": ("policy.safetensors", lambda file: save_file({"transformer.ln_f.bias": torch.zeros(33)}, file)),
    "another model": ("policy.safetensors", lambda file: save_file({"transformer.ln_f.bias": torch.zeros(32)}, file)),
    "no random state": ("optimizer.pt", lambda file: torch.save(torch.load(file) | {"random": None}, file)),
    "malicious weights": ("policy.safetensors", lambda file: file.write_bytes(pickle.dumps(Evil()))),
    "malicious pickle": ("optimizer.pt", lambda file: file.write_bytes(pickle.dumps(Evil()))),
    "malicious optimizer": ("optimizer.pt", lambda file: torch.save(Evil(), file)),
}


def damage(checkpoint, name) -> None:
    file, change = (DAMAGES | WITH_A_RIGHT_SUM)[name]
    change(checkpoint / file)
    if name in WITH_A_RIGHT_SUM:
        digest = hashlib.sha256((checkpoint / file).read_bytes()).hexdigest()
        change_json(checkpoint / "state.json", sha256=read_json(checkpoint / "state.json")["sha256"] | {file: digest})


@pytest.fixture(scope="module")
def two(gpt2_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    trainer, batch = trained(load_gpt2(gpt2_folder))
    trainer.n_steps = 1
    save_checkpoint(trainer, folder, keep=2)
    trainer.step(*batch)
    save_checkpoint(trainer, folder, keep=2)
    return folder


@pytest.fixture
def two_checkpoints(two, tmp_path):
    return shutil.copytree(two, tmp_path / "checkpoints")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", [*DAMAGES, *WITH_A_RIGHT_SUM])
def test_a_damaged_checkpoint_is_reported_and_skipped(policy, two_checkpoints, name, capsys, monkeypatch):
    """A malicious checkpoint can't run code."""
    monkeypatch.chdir(two_checkpoints)
    damage(two_checkpoints / "step-000002", name)
    other = twin(policy)
    load_checkpoint(other, two_checkpoints)
    assert other.n_steps == 1 and not (two_checkpoints / "ran").exists()
    out = capsys.readouterr().out
    assert "warning: " in out and str(two_checkpoints / "step-000002") in out and out.count("\n") == 1


def test_loading_fails_and_changes_nothing_if_no_checkpoint_is_usable(policy, two_checkpoints, capsys):
    for path in two_checkpoints.iterdir():
        damage(path, "truncated weights")
    before = contents(two_checkpoints)
    with pytest.raises(UserError, match=f"no usable checkpoint in {two_checkpoints}"):
        load_checkpoint(twin(policy), two_checkpoints)
    assert contents(two_checkpoints) == before and capsys.readouterr().out.count("warning: ") == 2


def write_checkpoints(policy, folder, *steps, keep=99):
    trainer = twin(policy)
    for trainer.n_steps in steps:
        save_checkpoint(trainer, folder, keep=keep)
    return trainer


def test_older_checkpoints_are_removed_and_damaged_newer_ones_replaced(policy, tmp_path):
    """A resume that skips a damaged checkpoint leaves it in the folder until the run reaches that step again."""
    write_checkpoints(policy, tmp_path, 2, 3, 9)
    damage(tmp_path / "step-000009", "truncated weights")
    trainer = write_checkpoints(policy, tmp_path, 4, keep=2)
    assert names(tmp_path) == [f"step-00000{step}" for step in (3, 4, 9)]
    write_checkpoints(policy, tmp_path, 5, keep=1)
    write_checkpoints(policy, tmp_path, 9, keep=2)
    load_checkpoint(trainer, tmp_path)
    assert names(tmp_path) == ["step-000005", "step-000009"] and trainer.n_steps == 9


def test_checkpoints_are_sorted_by_number_and_valid_or_renamed_ones_are_kept(policy, tmp_path):
    write_checkpoints(policy, tmp_path, 999_999, 1_000_000)
    inode = (tmp_path / "step-1000000").stat().st_ino
    own = ["step-000007-best", "mine"]
    for name in own:
        shutil.copytree(tmp_path / "step-999999", tmp_path / name)
    trainer = write_checkpoints(policy, tmp_path, 1_000_000)
    assert (tmp_path / "step-1000000").stat().st_ino == inode
    trainer.n_steps = 0
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 1_000_000
    write_checkpoints(policy, tmp_path, 1_000_001, keep=2)
    assert names(tmp_path) == sorted([*own, "step-1000000", "step-1000001"])


def test_the_global_random_generators_are_restored(policy, tmp_path):
    np.random.randn()  # NumPy keeps a second sample for the next call
    random.gauss(0, 1)
    trainer = write_checkpoints(policy, tmp_path, 1)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    expected = draw()
    draw()
    load_checkpoint(trainer, tmp_path)
    assert draw() == expected
