"""What a checkpoint gives back: everything that decides how a run goes on."""

import copy
import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoint import load_checkpoint, save_checkpoint
from support.models import load_gpt2_config, load_policy, load_tokenizer, save_policy
from tests.helpers import batch_of, make, write_gpt2


def trained(policy, **changes):
    trainer = make((copy.deepcopy(policy[0]), policy[1]), **changes)
    batch = batch_of(trainer, policy)
    for _ in range(2):
        trainer.step(*batch)
    return trainer, batch


def test_a_loaded_trainer_goes_on_as_the_saved_one(policy, tmp_path):
    changes = dict(kl_controller="adaptive", target=0.01, horizon=20)
    trainer, batch = trained(policy, **changes)
    trainer.engine.skipped_in_a_row = 3
    save_checkpoint(trainer, tmp_path, keep=1)
    twin = make((copy.deepcopy(policy[0]), policy[1]), **changes)
    load_checkpoint(twin, tmp_path)
    assert twin.n_steps == 2 and twin.engine.skipped_in_a_row == 3
    assert twin.kl_controller.value == trainer.kl_controller.value != twin.config.init_kl_coef
    for mine, other in ((trainer.model, twin.model), (trainer.policy_for_saving, twin.policy_for_saving)):
        for weight, same in zip(mine.parameters(), other.parameters()):
            assert torch.equal(weight, same)
    assert trainer.step(*batch) == twin.step(*batch)
    for mine, other in ((trainer.model, twin.model), (trainer.policy_for_saving, twin.policy_for_saving)):
        for weight, same in zip(mine.parameters(), other.parameters()):
            assert torch.equal(weight, same)


def test_a_checkpoint_of_before_there_was_a_unit_goes_on_in_that_of_the_scores(policy, tmp_path):
    trainer, _ = trained(policy)
    path = save_checkpoint(trainer, tmp_path, keep=1) / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("reward_unit") == trainer.reward_unit != 1
    path.write_text(json.dumps(state))
    twin = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(twin, tmp_path)
    assert twin.reward_unit == 1 and twin.model.v_head.summary.weight.equal(trainer.model.v_head.summary.weight)


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_goes_on_on_a_device_with_another_kernel_for_adam(policy, fused):
    """Fused or not is the device's: a checkpoint of an Apple GPU says False, one of a CPU or of CUDA True."""
    trainer, batch = trained(policy)
    state = copy.deepcopy(trainer.engine.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = not fused
    twin = make((copy.deepcopy(policy[0]), policy[1]))
    if not fused:
        groups = [{"params": group["params"], "lr": group["lr"]} for group in twin.engine.optimizer.param_groups]
        twin.engine.optimizer = torch.optim.Adam(groups, eps=twin.config.adam_epsilon, fused=False)
    twin.engine.load_state_dict(state)
    twin.n_steps, twin.reward_unit = trainer.n_steps, trainer.reward_unit
    assert [group["fused"] for group in twin.engine.optimizer.param_groups] == [fused, fused]
    assert twin.step(*batch) == pytest.approx(trainer.step(*batch), abs=1e-5)
    for weight, same in zip(trainer.model.parameters(), twin.model.parameters()):
        assert torch.allclose(weight, same, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda saved: saved.clear(),
        lambda saved: saved.update(random=None),
        lambda saved: saved["optimizer"].pop("state"),
        lambda saved: saved["random"].update(torch=torch.zeros(3, dtype=torch.uint8)),
        lambda saved: saved["random"]["python"].append(1),
        lambda saved: saved["random"]["python"][1].clear(),
        lambda saved: saved["random"]["numpy"].pop(),
    ],
)
def test_a_checkpoint_whose_hashes_fit_strange_content_is_passed_over(policy, tmp_path, capsys, change):
    """For an older one, as any damaged checkpoint."""
    trainer, batch = trained(policy)
    save_checkpoint(trainer, tmp_path, keep=2)
    trainer.step(*batch)
    file = save_checkpoint(trainer, tmp_path, keep=2) / "optimizer.pt"
    saved = torch.load(file, weights_only=True)
    change(saved)
    torch.save(saved, file)
    state = json.loads(file.with_name("state.json").read_text())
    state["sha256"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    file.with_name("state.json").write_text(json.dumps(state))
    twin = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(twin, tmp_path)
    assert twin.n_steps == 2
    assert f"warning: checkpoint {tmp_path / 'step-000003'} cannot be used (" in capsys.readouterr().out


def test_an_output_projection_of_its_own_is_kept(tmp_path):
    """Untied and trained, it goes into the checkpoint and comes back, and so into the saved model."""
    folder = write_gpt2(tmp_path / "untied", tie_word_embeddings=False)
    policy = load_policy(folder, load_gpt2_config(folder)), load_tokenizer(folder)
    trainer, batch = trained(policy, frozen_share=0.0)
    save_checkpoint(trainer, tmp_path / "checkpoints", keep=1)
    twin = make((copy.deepcopy(policy[0]), policy[1]), frozen_share=0.0)
    load_checkpoint(twin, tmp_path / "checkpoints")
    assert not torch.equal(twin.model.lm_head.weight, policy[0].lm_head.weight)
    assert not torch.equal(twin.model.lm_head.weight, twin.model.transformer.wte.weight)
    assert torch.equal(twin.model.lm_head.weight, trainer.model.lm_head.weight)
    save_policy(twin.policy_for_saving, policy[1], tmp_path / "saved", 1.0, 8)
    saved = load_policy(tmp_path / "saved", load_gpt2_config(tmp_path / "saved"))
    assert torch.equal(saved.lm_head.weight, trainer.policy_for_saving.lm_head.weight)


def test_the_global_random_generators_go_on_too(policy, tmp_path):
    trainer, _ = trained(policy)
    save_checkpoint(trainer, tmp_path, keep=1)

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()

    expected = draw()
    draw()
    load_checkpoint(trainer, tmp_path)
    assert draw() == expected


def test_a_damaged_checkpoint_is_passed_over_and_older_ones_are_removed(policy, tmp_path):
    trainer, batch = trained(policy)
    for _ in range(3):
        save_checkpoint(trainer, tmp_path, keep=2)
        trainer.step(*batch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    weights = tmp_path / "step-000004" / "average.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    twin = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(twin, tmp_path)
    assert twin.n_steps == 3


def whole_ones(policy, folder, *steps) -> None:
    trainer = make((copy.deepcopy(policy[0]), policy[1]))
    for trainer.n_steps in steps:
        save_checkpoint(trainer, folder, keep=99)


def damage(path: Path) -> None:
    (path / "optimizer.pt").write_bytes(b"damaged")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_only_whole_checkpoints_are_counted_and_a_new_one_always_stays(policy, tmp_path):
    """A damaged newer one takes nobody's place; damaged older ones go with those that are older than what is kept."""
    whole_ones(policy, tmp_path, 1, 2, 3, 4, 9)
    for step in (3, 9):
        damage(tmp_path / f"step-00000{step}")
    trainer = make((copy.deepcopy(policy[0]), policy[1]))
    trainer.n_steps = 5
    save_checkpoint(trainer, tmp_path, keep=3)
    assert names(tmp_path) == [f"step-00000{step}" for step in (2, 3, 4, 5, 9)]
    trainer.n_steps = 6
    save_checkpoint(trainer, tmp_path, keep=1)
    assert names(tmp_path) == ["step-000006", "step-000009"]
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 6
    trainer.n_steps = 9
    save_checkpoint(trainer, tmp_path, keep=1)
    load_checkpoint(trainer, tmp_path)
    assert names(tmp_path) == ["step-000009"] and trainer.n_steps == 9


def test_checkpoints_go_by_number_and_the_users_own_names_are_left_alone(policy, tmp_path):
    whole_ones(policy, tmp_path, 999_999, 1_000_000)
    own = ["step-000007-best", "step-7", "step-0000008", "mine"]
    for name in own:
        shutil.copytree(tmp_path / "step-999999", tmp_path / name)
    (tmp_path / "step-000005").write_text("a note")
    trainer = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 1_000_000
    trainer.n_steps += 1
    save_checkpoint(trainer, tmp_path, keep=2)
    assert names(tmp_path) == sorted([*own, "step-000005", "step-1000000", "step-1000001"])


def rewritten(path: Path, change) -> None:
    """A checkpoint whose weights were changed, with sums that say it is whole."""
    state = json.loads((path / "state.json").read_text())
    for name in ("policy.safetensors", "average.safetensors"):
        weights = load_file(path / name)
        change(weights)
        save_file(weights, path / name)
        state["sha256"][name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("transformer.ln_f.bias"),
        lambda weights: weights.pop("transformer.wte.weight"),
        lambda weights: weights.update({"transformer.h.2.ln_1.bias": torch.zeros(32)}),
        lambda weights: weights.update({"transformer.ln_f.bias": torch.zeros(33)}),
    ],
    ids=["one is missing", "the tied one is missing", "one more", "another shape"],
)
def test_a_checkpoint_of_other_weights_is_passed_over(policy, tmp_path, change, capsys):
    whole_ones(policy, tmp_path, 1, 2)
    rewritten(tmp_path / "step-000002", change)
    trainer = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 1
    assert "step-000002 cannot be used (ValueError: its weights are not those of this model)" in capsys.readouterr().out


def test_a_checkpoint_under_the_name_of_another_step_is_passed_over(policy, tmp_path):
    whole_ones(policy, tmp_path, 1, 2)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "step-000005")
    trainer = make((copy.deepcopy(policy[0]), policy[1]))
    load_checkpoint(trainer, tmp_path)
    assert trainer.n_steps == 2


def test_a_step_with_an_infinite_gradient_is_not_taken(policy):
    trainer = make(policy, ppo_epochs=2)
    queries, responses, scores = batch_of(trainer, policy)
    trainer.step(queries, responses, scores)  # Adam goes on in its direction even where a gradient is 0
    before = copy.deepcopy(trainer.model.state_dict())
    stats = trainer.step(queries, responses, [1e30 * (i + 1) for i in range(len(scores))])
    assert stats["ppo/grad_norm"] == float("inf") and stats["ppo/skipped"] == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())
    assert int(trainer.engine.skipped_in_a_row) == 2
    assert trainer.step(queries, responses, scores)["ppo/skipped"] == 0 and int(trainer.engine.skipped_in_a_row) == 0


@pytest.mark.parametrize(("kl", "factor"), [(100.0, 1.02), (0.0, 0.98), (6.6, 1.01)])
def test_the_controllers_error_is_clipped_at_a_fifth(kl, factor):
    from ppo import AdaptiveKLController

    controller = AdaptiveKLController(0.5, target=6.0, horizon=1000)
    controller.update(kl, 100)
    assert controller.value == pytest.approx(0.5 * factor)


def test_a_system_that_opens_no_folders_still_writes_checkpoints(policy, tmp_path, monkeypatch):
    """As Windows: PermissionError for every folder, and files are flushed all the same."""
    flushed, opens = [], os.open

    def windows_open(path, *args, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        flushed.append(Path(path).name)
        return opens(path, *args, **options)

    trainer, _ = trained(policy)
    monkeypatch.setattr(os, "open", windows_open)
    save_checkpoint(trainer, tmp_path, keep=1)
    assert {"policy.safetensors", "average.safetensors", "optimizer.pt", "state.json"} <= set(flushed)
    load_checkpoint(make((copy.deepcopy(policy[0]), policy[1])), tmp_path)
