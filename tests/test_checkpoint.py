"""What a checkpoint gives back: everything that decides how a run goes on."""

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

from support.checkpoint import load_checkpoint, save_checkpoint
from support.errors import UserError
from tests.helpers import batch_of, change_json, contents, make, read_json


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


def test_a_loaded_trainer_goes_on_as_the_saved_one(policy, tmp_path):
    changes = dict(kl_controller="adaptive", target=0.01, horizon=20)
    trainer, batch = trained(policy, **changes)
    trainer.engine.skipped_in_a_row = 3
    save_checkpoint(trainer, tmp_path, keep=1)
    other = twin(policy, **changes)
    load_checkpoint(other, tmp_path)
    assert other.n_steps == 2 and other.engine.skipped_in_a_row == 3
    assert other.kl_controller.value == trainer.kl_controller.value != other.config.init_kl_coef
    assert other.reward_unit == trainer.reward_unit != 1
    assert_same_weights(trainer, other)
    assert trainer.step(*batch) == other.step(*batch)
    assert_same_weights(trainer, other)


def test_a_run_goes_on_on_a_device_with_another_kernel_for_adam(policy):
    """A checkpoint of an Apple GPU says fused=False, one of a CPU or of CUDA True; this device decides."""
    trainer, batch = trained(policy)
    state = copy.deepcopy(trainer.engine.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = False
    other = twin(policy)
    other.engine.load_state_dict(state)
    other.n_steps, other.reward_unit = trainer.n_steps, trainer.reward_unit
    assert [group["fused"] for group in other.engine.optimizer.param_groups] == [True, True]
    assert other.step(*batch) == trainer.step(*batch)


# --- damage


def rewrite(file, change) -> None:
    """Change a file of a checkpoint, with a sum that says it is whole."""
    change(file)
    state = read_json(file.with_name("state.json"))
    sums = state["sha256"] | {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    change_json(file.with_name("state.json"), sha256=sums)


def with_another_shape(file) -> None:
    save_file({"transformer.ln_f.bias": torch.zeros(33)}, file)


def without_generators(file) -> None:
    torch.save(torch.load(file, weights_only=True) | {"random": None}, file)


DAMAGES = {
    "cut weights": lambda path: os.truncate(path / "policy.safetensors", 5000),
    "a changed byte": lambda path: (path / "average.safetensors").open("r+b").write(b"x"),
    "a missing file": lambda path: (path / "average.safetensors").unlink(),
    "a cut state": lambda path: (path / "state.json").write_text("{"),
    "another shape": lambda path: rewrite(path / "policy.safetensors", with_another_shape),
    "no generators": lambda path: rewrite(path / "optimizer.pt", without_generators),
}


@pytest.fixture
def two_checkpoints(policy, tmp_path):
    trainer, batch = trained(policy)
    trainer.n_steps = 1
    save_checkpoint(trainer, tmp_path, keep=2)
    trainer.step(*batch)
    save_checkpoint(trainer, tmp_path, keep=2)
    return tmp_path


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_passed_over(policy, two_checkpoints, damage, capsys):
    DAMAGES[damage](two_checkpoints / "step-000002")
    other = twin(policy)
    load_checkpoint(other, two_checkpoints)
    assert other.n_steps == 1
    out = capsys.readouterr().out
    assert "warning: " in out and str(two_checkpoints / "step-000002") in out and out.count("\n") == 1


def test_without_any_usable_checkpoint_loading_fails_and_changes_nothing(policy, two_checkpoints, capsys):
    for path in two_checkpoints.iterdir():
        DAMAGES["cut weights"](path)
    before = contents(two_checkpoints)
    with pytest.raises(UserError, match=f"no usable checkpoint in {two_checkpoints}"):
        load_checkpoint(twin(policy), two_checkpoints)
    assert contents(two_checkpoints) == before and capsys.readouterr().out.count("warning: ") == 2


class Evil:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.pt"])
def test_a_strangers_checkpoint_runs_no_code(policy, two_checkpoints, monkeypatch, name):
    monkeypatch.chdir(two_checkpoints)
    for save in (lambda file: file.write_bytes(pickle.dumps(Evil())), lambda file: torch.save(Evil(), file)):
        rewrite(two_checkpoints / "step-000002" / name, save)
        other = twin(policy)
        load_checkpoint(other, two_checkpoints)
        assert other.n_steps == 1 and not (two_checkpoints / "ran").exists()


# --- which ones are kept


def write_checkpoints(policy, folder, *steps, keep=99):
    trainer = twin(policy)
    for trainer.n_steps in steps:
        save_checkpoint(trainer, folder, keep=keep)
    return trainer


def test_older_checkpoints_are_removed_and_damaged_newer_ones_replaced(policy, tmp_path):
    """A newer one is there after a resume that passed it over."""
    write_checkpoints(policy, tmp_path, 1, 2, 3, 9)
    DAMAGES["cut weights"](tmp_path / "step-000009")
    trainer = write_checkpoints(policy, tmp_path, 4, keep=3)
    assert names(tmp_path) == [f"step-00000{step}" for step in (2, 3, 4, 9)]
    write_checkpoints(policy, tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-000005", "step-000009"]
    write_checkpoints(policy, tmp_path, 9, keep=2)
    load_checkpoint(trainer, tmp_path)
    assert names(tmp_path) == ["step-000005", "step-000009"] and trainer.n_steps == 9


def test_checkpoints_go_by_number_and_a_valid_one_and_the_users_own_are_kept(policy, tmp_path):
    write_checkpoints(policy, tmp_path, 999_999, 1_000_000)
    inode = (tmp_path / "step-1000000").stat().st_ino
    write_checkpoints(policy, tmp_path, 1_000_000)
    assert (tmp_path / "step-1000000").stat().st_ino == inode
    own = ["step-000007-best", "mine"]
    for name in own:
        shutil.copytree(tmp_path / "step-999999", tmp_path / name)
    trainer = twin(policy)
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 1_000_000
    write_checkpoints(policy, tmp_path, 1_000_001, keep=2)
    assert names(tmp_path) == sorted([*own, "step-1000000", "step-1000001"])


def test_the_global_random_generators_go_on(policy, tmp_path):
    trainer = twin(policy)
    np.random.randn()  # the next one is kept already
    random.gauss(0, 1)
    save_checkpoint(trainer, tmp_path, keep=1)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    expected = draw()
    draw()
    load_checkpoint(trainer, tmp_path)
    assert draw() == expected
