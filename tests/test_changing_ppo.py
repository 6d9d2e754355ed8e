"""docs/changing_ppo.md: each diff applies to the current program and does what the page says."""

import importlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import ppo
from config import PPOConfig
from support.compute.batches import Completions, Prompts
from support.run.settings import parse_args
from tests.helpers import ROOT, batch_of, code_blocks, load_gpt2, make, rows, tiny_run

PAGES = ["docs/changing_ppo.md", "docs/changing_ppo.zh.md"]
CHECKS = ["entropy_bonus", "reinforce", "group_relative", "linear_decay", "statistic"]  # in the order of the page
OURS = {path.stem for path in ROOT.glob("*.py")} | {"support", "tests"}


def loss_of_two_tokens(config) -> tuple[float, np.ndarray]:
    """Return `ppo_loss` and its gradient. The first token has advantage 2 and probability 1/3, the second has advantage
    -1 and probability 3/4, and the third is padding. The old probabilities are 1, and the values are exact."""
    logits = torch.tensor([[[0, 0, 0], [0, np.log(3), -np.inf], [0, 0, -np.inf]]], requires_grad=True)
    prompts, mask = Prompts(torch.tensor([[2]]), None, torch.tensor([0])), torch.tensor([[True, True, False]])
    completions, zeros = Completions(prompts, torch.tensor([[0, 1, 2]]), mask), torch.zeros(1, 3)
    batch = ppo.Experience(completions, zeros, zeros, torch.tensor([[2.0, -1, 0]]), zeros)
    logprobs = ppo.logprobs_from_logits(logits, completions.ids)
    loss, _ = ppo.ppo_loss(config, logprobs, zeros, batch)
    loss.backward()
    return loss.item(), logits.grad[0].numpy()


def entropy_bonus(gpt2_folder, *_):
    """The bonus lowers the first loss by entropy_coef times the entropy. A large bonus raises the entropy."""
    losses, entropies = [], []
    for coef in ("0.5", "0.0", "100.0"):
        entropy_coef, seen = parse_args(["--entropy_coef", coef])[0].entropy_coef, []
        trainer = make(policy := load_gpt2(gpt2_folder), lr=1e-2, entropy_coef=entropy_coef)
        backward = trainer.engine.backward
        trainer.engine.backward = lambda loss, backward=backward, seen=seen: (seen.append(loss.item()), backward(loss))
        batch = batch_of(trainer, policy)
        entropies.append(trainer.step(*batch)["objective/entropy"])
        losses.append(seen[0])
        entropies.append(trainer.step(*batch)["objective/entropy"])
    assert losses[1] - losses[0] == pytest.approx(0.5 * entropies[0], rel=1e-4)
    assert entropies[5] > entropies[3] + 0.3


def reinforce(*_):
    loss, gradient = loss_of_two_tokens(config := PPOConfig())
    assert loss == pytest.approx(-(2 * np.log(1 / 3) - np.log(3 / 4)) / 2, rel=1e-5)
    expected = [[-2 / 3, 1 / 3, 1 / 3], [-1 / 8, 1 / 8, 0], [0, 0, 0]]  # -advantage * (one-hot - p) / 2 tokens
    assert gradient == pytest.approx(np.array(expected), abs=1e-6)
    assert config.ppo_epochs == 1 and config.minibatch_size == config.batch_size


def group_relative(gpt2_folder, *_):
    made, root, experience = [], 0.5**0.5, ppo.Experience
    ppo.Experience = lambda *args: made.append(experience(*args)) or made[-1]  # a step's first is the whole batch
    trainer = make(load_gpt2(gpt2_folder), lr=1e-2, batch_size=5, minibatch_size=5)
    queries = [torch.tensor([2, token]) for token in (9, 15, 9, 15, 15)]
    responses = trainer.generate(queries)
    assert trainer.step(queries, responses, [0, 5, 1, 5, 8])["ppo/loss/value"] == 0
    trainer.step(queries, responses, [3, 7, 3, 7, 7])  # now completions of the same prompt differ only in their KL
    first, second = made[0], made[len(made) // 2]
    expected = [-1, -root, 1, -root, 2 * root]  # 0 and 1: mean 1/2, deviation 1/2; 5, 5 and 8: mean 6, deviation √2
    assert torch.allclose(first.advantages * first.mask, torch.tensor(expected)[:, None] * first.mask, atol=1e-4)
    kl = (second.logprobs - first.logprobs).where(first.mask, 0).sum(-1)
    assert second.advantages[[0, 2], 0].tolist() == pytest.approx([1, -1] if kl[0] < kl[2] else [-1, 1], abs=0.1)


def linear_decay(gpt2_folder, run_dir, _):
    policy, rates = load_gpt2(gpt2_folder), []
    hook = register_optimizer_step_pre_hook(lambda adam, *_: rates.append([group["lr"] for group in adam.param_groups]))
    for episodes in (24, 32):  # three steps, then a fourth
        assert tiny_run(run_dir, policy, resume=bool(rates), episodes=episodes, lr=3e-4, value_lr=6e-3) == 0
    hook.remove()
    assert np.array(rates) == pytest.approx(np.outer([1, 2 / 3, 1 / 3, 1 / 4], [3e-4, 6e-3]))


def statistic(gpt2_folder, run_dir, figures):
    queries, responses, scores = batch_of(trainer := make(policy := load_gpt2(gpt2_folder)), policy)
    responses = [response[:length] for length, response in enumerate(responses, 1)]
    spread = np.repeat(scores, [len(response) for response in responses]).std()  # at first, these are scores
    assert trainer.step(queries, responses, scores)["ppo/advantages/std"] == pytest.approx(spread, rel=1e-5)
    assert tiny_run(run_dir, policy) == 0
    (axes,) = [axes for axes in figures[0][0].axes if axes.get_title() == "spread of the advantages"]
    assert list(axes.lines[0].get_ydata()) == [float(row["ppo/advantages/std"]) for row in rows(run_dir)]


def apply(folder, *diffs: str) -> None:
    """Copy the program to `folder` and apply the diffs."""
    shutil.copytree(ROOT / "support", folder / "support")
    for path in [*ROOT.glob("*.py"), ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    subprocess.run(["git", "apply", "-"], input="".join(diffs), cwd=folder, check=True, encoding="utf-8")


@pytest.mark.parametrize("name", CHECKS)
def test_a_change_does_what_the_page_says(name, gpt2_folder, tmp_path, figures, monkeypatch):
    """Import the changed program and this file again, and restore all modules afterwards."""
    apply(tmp_path, code_blocks(PAGES[0], "diff")[CHECKS.index(name)])
    monkeypatch.syspath_prepend(tmp_path)
    own = {module: sys.modules.pop(module) for module in [*sys.modules] if module.split(".")[0] in OURS}
    try:
        getattr(importlib.import_module(__name__), name)(gpt2_folder, tmp_path / "run", figures)
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] in OURS]:
            del sys.modules[module]
        sys.modules.update(own)


def test_all_diffs_of_the_chinese_page_apply_together(tmp_path):
    diffs = code_blocks(PAGES[1], "diff")  # test_pages.py compares them with the English ones
    assert len(diffs) == len(CHECKS)
    apply(tmp_path, *diffs)
