"""The mathematics of ppo.py against hand-worked numbers and against independent loops in NumPy float64."""

import math

import numpy as np
import pytest
import torch

import ppo
from support.engine import polynomial_average

INF = float("inf")


def random_batch(seed, n=5, T=7):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, n)
    mask = np.arange(T) < lengths[:, None]
    return rng, mask, lengths


# --- probabilities


def test_logprobs_by_hand():
    logits = torch.tensor([[0.0, math.log(3.0)], [math.log(4.0), 0.0]])
    got = ppo.logprobs_from_logits(logits, torch.tensor([1, 1]))
    assert torch.allclose(got, torch.tensor([math.log(0.75), math.log(0.2)]))


def test_entropy_by_hand_and_with_forbidden_tokens():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -INF, -INF], [5.0, -INF, -INF, -INF]])
    assert torch.allclose(ppo.entropy_from_logits(logits), torch.tensor([math.log(4), math.log(2), 0.0]))


def test_kl_by_hand_and_with_forbidden_tokens():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([0.25, 0.75, 0.0]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert ppo.kl_from_logits(p[None], q[None]).item() == pytest.approx(expected, rel=1e-6)


def test_forbidden_tokens_leave_gradients_finite():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    restricted = logits.index_fill(-1, torch.tensor([0, 4]), -INF)
    loss = ppo.logprobs_from_logits(restricted, torch.full((2, 3), 1)).sum()
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[..., [0, 4]] == 0).all()


# --- masked statistics


def test_masked_mean_ignores_what_is_masked():
    values = torch.tensor([[1.0, 2.0, float("nan")], [6.0, INF, INF]])
    assert ppo.masked_mean(values, torch.tensor([[1, 1, 0], [1, 0, 0]])).item() == 3.0


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_over_the_whole_batch(mask_dtype, shift_mean):
    rng, mask, _ = random_batch(0)
    values = rng.normal(3, 2, mask.shape)
    entries = values[mask]
    expected = (values - entries.mean()) / np.sqrt(((entries - entries.mean()) ** 2).sum() / len(entries) + 1e-8)
    expected = np.where(mask, expected if shift_mean else expected + entries.mean(), 0)
    got = ppo.whiten(torch.from_numpy(values), torch.from_numpy(mask).to(mask_dtype), shift_mean)
    assert got.dtype == torch.float64
    assert np.allclose(got.numpy(), expected, atol=1e-12)


def test_whiten_keeps_which_completion_was_better():
    advantages = ppo.whiten(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.ones(2, 2))
    assert torch.allclose(advantages, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), atol=1e-6)


def test_whiten_of_equal_values_is_0():
    """As of a batch whose completions all got the same reward; with more than rounding between them it is not."""
    mask = torch.tensor([[True, True, False]])
    assert torch.equal(ppo.whiten(torch.tensor([[0.7, 0.7, 9.0]]), mask), torch.zeros(1, 3))
    assert torch.allclose(
        ppo.whiten(torch.tensor([[2e-4, -2e-4, 9.0]]), mask), torch.tensor([[0.8944, -0.8944, 0]]), atol=1e-4
    )


# --- rewards and advantages


def test_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0]])
    ref_logprobs = torch.tensor([[-1.5, -1.0, -INF], [-1.0, -3.0, -1.5]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], dtype=torch.bool)
    rewards, non_score = ppo.compute_rewards(torch.tensor([0.9, 0.3]), logprobs, ref_logprobs, mask, kl_coef=0.2)
    assert torch.allclose(non_score, torch.tensor([[-0.1, 0.2, 0.0], [0.0, -0.4, -0.1]]))
    assert torch.allclose(rewards, torch.tensor([[-0.1, 1.1, 0.0], [0.0, -0.4, 0.2]]))


def test_advantages_by_hand():
    # gamma 0.5, lam 0.5, two tokens: delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.5 * 1 - 0.5 = 1; A_0 = 1 + 0.25 * 1
    values, rewards = torch.tensor([[0.5, 1.0, 7.0]]), torch.tensor([[1.0, 2.0, 9.0]])
    advantages, returns = ppo.compute_advantages(values, rewards, torch.tensor([[True, True, False]]), 0.5, 0.5)
    assert torch.allclose(advantages, torch.tensor([[1.25, 1.0, 0.0]]))
    assert torch.allclose(returns, torch.tensor([[1.75, 2.0, 0.0]]))


def test_advantages_with_lam_1_are_returns_minus_values():
    rng, mask, _ = random_batch(1)
    values, rewards = torch.from_numpy(rng.normal(size=mask.shape)), torch.from_numpy(rng.normal(size=mask.shape))
    mask = torch.from_numpy(mask)
    _, returns = ppo.compute_advantages(values, rewards, mask, 1.0, 1.0)
    to_go = rewards.where(mask, 0).flip(1).cumsum(1).flip(1).where(mask, 0)
    assert torch.allclose(returns, to_go)


@pytest.mark.parametrize("seed", range(5))
def test_advantages_against_the_sum_that_defines_them(seed):
    """A_t = sum_l (gamma lam)^l delta_{t+l}, each completion by itself, cut off at its end (GAE, equation 16)."""
    rng, mask, lengths = random_batch(seed)
    values, rewards = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    gamma, lam = rng.uniform(0.5, 1, 2)
    expected = np.zeros_like(values)
    for i, length in enumerate(lengths):
        v = np.append(values[i, :length], 0.0)
        delta = [rewards[i, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[i, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    got, returns = ppo.compute_advantages(*map(torch.from_numpy, (values, rewards, mask)), gamma, lam)
    assert got.dtype == torch.float64
    assert np.allclose(got.numpy(), expected, atol=1e-12)
    assert np.allclose(returns.numpy()[mask], (expected + values)[mask], atol=1e-12)


def test_the_score_of_a_completion_of_one_token_stands_at_that_token():
    mask = torch.tensor([[True, False], [True, True]])
    rewards, _ = ppo.compute_rewards(torch.tensor([0.4, 0.6]), torch.zeros(2, 2), torch.zeros(2, 2), mask, kl_coef=1.0)
    assert torch.equal(rewards, torch.tensor([[0.4, 0.0], [0.0, 0.6]]))


def test_nothing_leaks_past_a_completions_end():
    rng, mask, _ = random_batch(2)
    values, rewards = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    first = ppo.compute_advantages(*map(torch.from_numpy, (values, rewards, mask)), 0.9, 0.8)
    values[~mask], rewards[~mask] = np.nan, 1e9
    second = ppo.compute_advantages(*map(torch.from_numpy, (values, rewards, mask)), 0.9, 0.8)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# --- losses


def test_policy_loss_by_hand():
    # ratios 1.5, 1.5, 0.5 with advantages 1, -1, 1: clipped at 1.2, not clipped (pessimistic), not clipped
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 1.0]]).log()
    loss, clipfrac = ppo.policy_loss(
        logprobs, torch.zeros(1, 4), torch.tensor([[1.0, -1.0, 1.0, 5.0]]), torch.tensor([[1, 1, 1, 0]]), 0.2
    )
    assert loss.item() == pytest.approx((-1.2 + 1.5 - 0.5) / 3)
    assert clipfrac.item() == pytest.approx(1 / 3)


def test_policy_gradient_at_ratio_one_is_minus_the_advantage():
    logprobs = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[0.3, -2.0, 5.0]], dtype=torch.float64)
    ppo.policy_loss(logprobs, torch.zeros(1, 3).double(), advantages, torch.tensor([[1.0, 1.0, 0.0]]), 0.2)[
        0
    ].backward()
    assert torch.allclose(logprobs.grad, torch.tensor([[-0.15, 1.0, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("seed", range(5))
def test_losses_against_loops(seed):
    rng, mask, _ = random_batch(seed)
    new, old, advantages, values, old_values, returns = rng.normal(0, 0.4, (6, *mask.shape))
    policy, policy_clips, value, value_clips = [], [], [], []
    for i, t in zip(*np.nonzero(mask)):
        ratio = math.exp(new[i, t] - old[i, t])
        a, b = -advantages[i, t] * ratio, -advantages[i, t] * min(max(ratio, 0.9), 1.1)
        policy.append(max(a, b))
        policy_clips.append(b > a)
        clipped = min(max(values[i, t], old_values[i, t] - 0.15), old_values[i, t] + 0.15)
        a, b = (values[i, t] - returns[i, t]) ** 2, (clipped - returns[i, t]) ** 2
        value.append(max(a, b) / 2)
        value_clips.append(b > a)
    tensors = [torch.from_numpy(x) for x in (new, old, advantages, values, old_values, returns)]
    mask = torch.from_numpy(mask)
    loss, clipfrac = ppo.policy_loss(*tensors[:3], mask, 0.1)
    assert (loss.item(), clipfrac.item()) == pytest.approx((np.mean(policy), np.mean(policy_clips)), rel=1e-12)
    loss, clipfrac = ppo.value_loss(*tensors[3:], mask, 0.15)
    assert (loss.item(), clipfrac.item()) == pytest.approx((np.mean(value), np.mean(value_clips)), rel=1e-12)
    assert loss.dtype == torch.float64


def test_a_loss_has_no_gradient_where_the_clip_makes_it_worse():
    """Ratio 1.5 with advantage 1 and value 0.5 towards 1, both beyond a clip of 0.2: there the clipped loss counts."""
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5)]], requires_grad=True)
    ppo.policy_loss(logprobs, torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2), 0.2)[0].backward()
    assert torch.equal(logprobs.grad, torch.zeros(1, 2))
    values = torch.tensor([[0.5, 0.1]], requires_grad=True)
    ppo.value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2)[0].backward()
    assert torch.allclose(values.grad, torch.tensor([[0.0, 0.5 * (0.1 - 1)]]))


def test_padding_has_no_part_in_a_loss_or_its_gradient():
    """There a restricted log-probability is -inf, before as after."""
    logprobs, mask = torch.tensor([[-1.0, -INF]], requires_grad=True), torch.tensor([[True, False]])
    loss, _ = ppo.policy_loss(logprobs, torch.tensor([[-1.0, -INF]]), torch.tensor([[2.0, 0.0]]), mask, 0.2)
    loss.backward()
    assert loss.item() == -2 and torch.equal(logprobs.grad, torch.tensor([[-2.0, 0.0]]))


def test_value_loss_by_hand():
    # old 0, cliprange 0.2. Towards return 1 from value 0.5: clipped to 0.2 is worse, 0.64. From 0.1: not clipped, 0.81.
    loss, clipfrac = ppo.value_loss(
        torch.tensor([[0.5, 0.1]]), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2), 0.2
    )
    assert loss.item() == pytest.approx(0.5 * (0.64 + 0.81) / 2)
    assert clipfrac.item() == 0.5


def test_explained_variance_by_hand():
    mask = torch.tensor([[True, True, True, False]])
    returns = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    assert ppo.explained_variance(returns, returns, mask).item() == 1.0
    assert ppo.explained_variance(torch.zeros(1, 4), returns, mask).item() == 0.0
    assert ppo.explained_variance(returns / 2, returns, mask).item() == 0.75
    assert ppo.explained_variance(returns + 5, returns, mask).item() == 1.0  # a variance knows no offset
    assert ppo.explained_variance(-returns, returns, mask).item() == -3.0
    for values in (returns, torch.full((1, 4), 0.5)):  # nothing to explain
        assert ppo.explained_variance(values, torch.full((1, 4), 0.5), mask).item() == 0.0


# --- the KL coefficient


def test_adaptive_kl_controller_by_hand():
    controller = ppo.AdaptiveKLController(0.2, target=6, horizon=10_000)
    controller.update(0.5, 128)  # far below the target: the error is clipped to -0.2
    assert controller.value == pytest.approx(0.2 * (1 - 0.2 * 128 / 10_000))
    controller = ppo.AdaptiveKLController(0.2, target=6, horizon=10_000)
    controller.update(6.6, 1_000)  # a tenth above it
    assert controller.value == pytest.approx(0.2 * (1 + 0.1 * 1_000 / 10_000))
    controller.update(60, 100)  # far above it, from where it stands
    assert controller.value == pytest.approx(0.202 * (1 + 0.2 * 100 / 10_000))


def test_fixed_kl_controller_stays():
    controller = ppo.FixedKLController(0.2)
    controller.update(100.0, 128)
    assert controller.value == 0.2


# --- the average of the weights


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0, (4 + 8 + 0) / 3), (1, (1 * 4 + 2 * 8 + 3 * 0) / 6), (3, (4 / 5 + 8 * 4 / 5) * 2 / 6), (1e9, 0)],
)
def test_polynomial_average_by_hand(power, expected):
    """Of 4, 8 and 0, in place. Power 3: after two steps 1/5 and 4/5 of them, of which the third leaves 2/6."""
    average = torch.tensor([-100.0])
    for step, weight in enumerate([4.0, 8.0, 0.0], 1):
        polynomial_average([average], [torch.tensor([weight])], step, power)
    assert average.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("scores", "kl_coef", "unit"),
    [
        ([1.0, 0.0, 1.0, 0.0], 0.2, 1.25),  # a standard deviation of 0.5 is 0.4 units
        ([9_000.0, 1_000.0], 2000.0, 10_000.0),
        ([0.0007, 0.0003], 0.0002, 0.0005),
        ([5.0, 5.0, 5.0], 0.2, 12.5),  # no spread: their size
        ([-5.0, -5.0019, -5.0], 0.2, 12.5),  # a hundredth of the coefficient is none either
        ([0.0, 0.0], 0.2, 0.5),  # a word that has not occurred yet
        ([0.3], 0.2, 0.75),
        ([0.0, 0.0], 0.0, 1.0),
    ],
)
def test_the_unit_of_rewards_by_hand(scores, kl_coef, unit):
    assert ppo.pick_reward_unit(torch.tensor(scores), kl_coef) == pytest.approx(unit, rel=1e-3)
