"""Whole runs with unusual rewards: the KL budget, the checks before and after training, and alarms."""

import copy
import random

import pytest
from tqdm import tqdm

from config import PPOConfig
from support.common.errors import UserError
from support.run.text_trainer import TextPPOTrainer
from tests.helpers import PROMPTS, read_json, rows, tiny_run

pytestmark = pytest.mark.usefixtures("without_pictures")


def variety(texts):
    return [100.0 * len(set(text)) for text in texts]


def rare(texts):
    return [float(i == 0) for i in range(len(texts))]


def test_a_kl_budget_sets_the_coefficient_of_a_run_and_of_your_own_loop(policy, tmp_path, capsys):
    assert tiny_run(tmp_path / "run", policy, variety, kl_budget=0.3, eval_samples=64) == 0
    coefficient = read_json(tmp_path / "run" / "config.json")["init_kl_coef"]
    gain = read_json(tmp_path / "run" / "evaluation.json")["gain"]
    assert coefficient != PPOConfig().init_kl_coef and gain["beta"] == coefficient
    assert gain["limit"]["kl"] == pytest.approx(0.3, rel=1e-3) and f"{coefficient:.3g}" in capsys.readouterr().out
    assert {float(row["objective/kl_coef"]) for row in rows(tmp_path / "run")} == {coefficient}

    config = PPOConfig(device="cpu", dtype="float32", gen_len=4, eval_samples=64)
    trainer = TextPPOTrainer(config, policy[0], copy.deepcopy(policy[0]), policy[1])
    assert trainer.fit_kl_coef(PROMPTS[1:], variety, 0.3) == coefficient


@pytest.mark.parametrize(
    ("reward", "budget", "why"), [(rare, 0.3, "must differ from the rest"), (variety, 60.0, "is too high for these")]
)
def test_a_kl_budget_that_cannot_be_met_ends_the_run_before_training(policy, tmp_path, reward, budget, why):
    with pytest.raises(UserError, match=f"^--kl_budget.*{why}"):
        tiny_run(tmp_path / "run", policy, reward, kl_budget=budget, eval_samples=64)
    assert not (tmp_path / "run" / "model").exists()


def test_a_random_reward_is_reported_and_its_gain_is_unknown(policy, tmp_path, capsys):
    draw = random.Random(1)
    assert tiny_run(tmp_path / "run", policy, lambda texts: [draw.random() for _ in texts], eval_samples=64) == 0
    results = read_json(tmp_path / "run" / "evaluation.json")
    assert results["before"]["noise"] == pytest.approx(1, abs=0.5) and "is noise" in capsys.readouterr().out
    assert results["gain"]["gain"] is None and "twice" in results["verdict"]


class Novelty(set):
    """A reward that is 1 for texts it hasn't seen before, and 0 for others."""

    def __call__(self, texts):
        scores = [text not in self for text in texts]
        self.update(texts)
        return scores


def drifts_with_steps(texts, calls=[]):
    """Return text lengths in the first ten calls, which evaluate, and add 1 more with each call after that."""
    calls.append(texts)
    return [length + max(0, len(calls) - 10) for length in map(len, texts)]


def test_a_reward_that_changes_is_reported_before_and_after_training(policy, tmp_path, capsys):
    seen = "warning: the reward changes from call to call: the same 64 texts score "
    with pytest.raises(UserError, match="^--kl_budget"):
        tiny_run(tmp_path / "novelty", policy, Novelty(), kl_budget=0.3, eval_samples=64)
    assert seen in capsys.readouterr().out
    assert tiny_run(tmp_path / "run", policy, drifts_with_steps, eval_samples=64) == 0
    out, results = capsys.readouterr().out, read_json(tmp_path / "run" / "evaluation.json")
    assert seen not in out and results["verdict"] in out and results["gain"]["gain"] is None
    assert "isn't the same before and after training: the same 64 texts score 12 higher" in results["verdict"]


def test_a_slow_reward_is_evaluated_in_training_sized_batches_with_a_progress_bar(
    policy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("support.run.evaluation.tqdm", lambda *args, **options: tqdm(*args, **options | {"delay": 0}))
    sizes = []

    def reward(texts):
        sizes.append(len(texts))
        return variety(texts)

    assert tiny_run(tmp_path / "run", policy, reward, eval_samples=20, batch_size=10, minibatch_size=10) == 0
    assert sizes == [10, 10, 20, 10, *[10] * 3, 10, 10, 20]  # evaluate and check; train; evaluate and check
    out, err = capsys.readouterr()
    assert out.count("evaluating 20 completions") == 2 and err.count("scoring: 100%") >= 2


def test_an_alarm_is_printed_once_and_kept_in_evaluation_json(policy, tmp_path, capsys):
    fast = {"lr": 0.1, "minibatch_size": 4, "frozen_share": 0.0}
    assert tiny_run(tmp_path / "run", policy, variety, **fast) == 0
    assert capsys.readouterr().out.count("the policy moves too fast") == 1
    alarms = read_json(tmp_path / "run" / "evaluation.json")["alarms"]
    assert tiny_run(tmp_path / "run", policy, variety, resume=True, episodes=32, **fast) == 0
    assert "moves too fast" not in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "evaluation.json")["alarms"][: len(alarms)] == alarms != []
