"""The mathematics of ppo.py, checked against numbers computed by hand and float64 loops in NumPy."""

import math

import numpy as np
import pytest
import torch

import ppo

INF, NAN = float("inf"), float("nan")
T = torch.tensor


def random_batch(seed, n=5, length=7):
    """Return a NumPy generator and a mask of completions of random lengths."""
    rng = np.random.default_rng(seed)
    return rng, np.arange(length) < rng.integers(1, length + 1, n)[:, None]


# --- probabilities


def test_logprobs_and_entropy_by_hand():
    got = ppo.logprobs_from_logits(T([[0, math.log(3)], [math.log(4), 0]]), T([1, 1]))
    assert got.tolist() == pytest.approx([math.log(0.75), math.log(0.2)])
    logits = T([[0.0, 0, 0, 0], [0, 0, -INF, -INF], [5, -INF, -INF, -INF]])
    logprobs, entropy = ppo.logprobs_and_entropy(logits, T([2, 1, 0]))
    assert logprobs.tolist() == pytest.approx([-math.log(4), -math.log(2), 0])
    assert entropy.tolist() == pytest.approx([math.log(4), math.log(2), 0])


def test_kl_by_hand_and_with_forbidden_tokens():
    p, q = T([[0.5, 0.5, 0]]).log(), T([[0.25, 0.75, 0]]).log()
    assert ppo.kl_from_logits(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert ppo.kl_from_logits(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))


MASK = T([[True, True, False], [True, False, False]])
GRADIENTS = {  # functions of logits (2, 3, 5) with forbidden tokens, and of x, y (2, 3) with NaN in the padding
    "logprobs_from_logits": lambda logits, x, y: ppo.logprobs_from_logits(logits, torch.ones(2, 3, dtype=torch.int64)),
    "logprobs_and_entropy": lambda logits, x, y: ppo.logprobs_and_entropy(logits, torch.ones(2, 3, dtype=torch.int64)),
    "kl_from_logits": lambda logits, x, y: ppo.kl_from_logits(logits, logits.flip(0)),
    "masked_mean": lambda logits, x, y: ppo.masked_mean(x, MASK),
    "whiten": lambda logits, x, y: ppo.whiten(x, MASK),
    "explained_variance": lambda logits, x, y: ppo.explained_variance(x, y, MASK),
    "compute_rewards": lambda logits, x, y: ppo.compute_rewards(T([0.1, 0.2]), x, y, MASK, 0.2)[0],
    "compute_advantages": lambda logits, x, y: ppo.compute_advantages(x, y, MASK, 0.9, 0.8)[0],
    "policy_loss": lambda logits, x, y: ppo.policy_loss(x, y, x.detach(), MASK, 0.2)[0],
    "value_loss": lambda logits, x, y: ppo.value_loss(x, y, y.detach(), MASK, 0.2)[0],
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_are_finite_with_forbidden_tokens_and_nan_in_the_padding(name):
    generator = torch.Generator().manual_seed(0)
    logits, x, y = (torch.randn(shape, generator=generator) for shape in ((2, 3, 5), (2, 3), (2, 3)))
    inputs = [logits.index_fill(-1, T([0, 4]), -INF), x.where(MASK, NAN), y.where(MASK, NAN)]
    GRADIENTS[name](*(tensor.requires_grad_() for tensor in inputs)).square().sum().backward()
    gradients = torch.cat([tensor.grad.flatten() for tensor in inputs if tensor.grad is not None])
    assert gradients.isfinite().all() and gradients.any()


# --- masked statistics


def test_masked_mean_ignores_masked_entries():
    assert ppo.masked_mean(T([[1, 2, NAN], [6, INF, INF]]), T([[1, 1, 0], [1, 0, 0]])).item() == 3


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_uses_the_statistics_of_the_whole_batch(mask_dtype, shift_mean):
    rng, mask = random_batch(0)
    values = rng.normal(3, 2, mask.shape)
    entries = values[mask]
    expected = (values - entries.mean()) / np.sqrt(entries.var() + 1e-8) + (0 if shift_mean else entries.mean())
    got = ppo.whiten(torch.from_numpy(values), torch.from_numpy(mask).to(mask_dtype), shift_mean)
    assert got.numpy() == pytest.approx(np.where(mask, expected, 0), abs=1e-12)


def test_whiten_by_hand():
    """The better completion stays better. Equal values give 0, not NaN. The 1e-8 matters next to a variance of 4e-8."""
    mask = T([[True, True, False]] * 2)
    whitened = {1.0: 1.0, 0.0: 0.0, 2e-4: 5**0.5 * 0.4}
    for size, expected in whitened.items():
        values = T([[7 - size, 7 - size, 9], [7 + size, 7 + size, 9]], dtype=torch.float64)
        assert ppo.whiten(values, mask).tolist() == [
            pytest.approx([sign * expected] * 2 + [0], abs=1e-7) for sign in (-1, 1)
        ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2, 3], 1), ([0, 0, 0], 0), ([0.5, 1, 1.5], 0.75), ([6, 7, 8], 1), ([-1, -2, -3], -3)],
)
def test_explained_variance_by_hand(values, expected):
    """A constant offset doesn't matter. The last entry is masked."""
    values, returns, mask = T([[*values, 0.0]]), T([[1.0, 2, 3, 99]]), T([[True, True, True, False]])
    assert ppo.explained_variance(values, returns, mask).item() == pytest.approx(expected)
    assert ppo.explained_variance(values, torch.full((1, 4), 0.5), mask).item() == 0  # nothing to explain


# --- rewards and advantages


def test_rewards_by_hand():
    logprobs = T([[-1.0, -2, -9], [-1, -1, -1], [-2, -INF, -INF]])
    ref_logprobs = T([[-1.5, -1, -INF], [-1, -3, -1.5], [-1, -INF, -9]])
    mask = T([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    rewards, penalties = ppo.compute_rewards(T([0.9, 0.3, 0.4]), logprobs, ref_logprobs, mask, kl_coef=0.2)
    assert penalties.flatten().tolist() == pytest.approx([-0.1, 0.2, 0, 0, -0.4, -0.1, 0.2, 0, 0])
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 1.1, 0, 0, -0.4, 0.2, 0.6, 0, 0])


@pytest.mark.parametrize(("gamma", "lam"), [(1, 1), (1, 0.95), (1, 0), (0.9, 1), (0.9, 0.8), (0.5, 0), (0, 0.95)])
def test_advantages_match_the_sum_that_defines_them(gamma, lam):
    """A_t = sum_l (gamma lambda)^l delta_{t+l}, up to the completion's end (GAE, equation 16). Padding may be NaN."""
    rng, mask = random_batch(1)
    values, rewards = rng.normal(size=mask.shape), rng.normal(size=mask.shape)
    expected = np.zeros_like(values)
    for i, length in enumerate(mask.sum(1)):
        v = np.append(values[i, :length], 0)
        delta = [rewards[i, t] + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected[i, t] = sum((gamma * lam) ** k * delta[t + k] for k in range(length - t))
    values[~mask], rewards[~mask] = NAN, 1e9
    got, returns = ppo.compute_advantages(*map(torch.from_numpy, (values, rewards, mask)), gamma, lam)
    assert got.numpy() == pytest.approx(expected, abs=1e-12)
    assert returns.numpy() == pytest.approx(np.where(mask, expected + values, 0), abs=1e-12)


# --- losses


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped", "gradient"),
    [
        (1.5, 1, -1.2, 1, 0),
        (1.5, -1, 1.5, 0, 1.5),  # never clipped: a high ratio with a negative advantage
        (0.5, 1, -0.5, 0, -0.5),
        (0.5, -2, 1.6, 1, 0),
        (1.1, 2, -2.2, 0, -2.2),
        (0.9, -1, 0.9, 0, 0.9),
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, clipped, gradient):
    """The clip range is 0.2. A second token has ratio 1 and advantage 1, and a third is padding."""
    logprobs = T([[math.log(ratio), 0, -INF]], requires_grad=True)
    advantages, mask = T([[float(advantage), 1, 0]]), T([[1, 1, 0]])
    got, clipfrac = ppo.policy_loss(logprobs, T([[0.0, 0, -INF]]), advantages, mask, 0.2)
    assert (got.item(), clipfrac.item()) == pytest.approx(((loss - 1) / 2, clipped / 2))
    got.backward()
    assert logprobs.grad.tolist() == [pytest.approx([gradient / 2, -0.5, 0])]


@pytest.mark.parametrize(
    ("value", "target", "loss", "clipped", "gradient"),
    [
        (0.5, 1, 0.8**2, 1, 0),  # clipped to 0.2, which is farther from 1
        (0.5, 0.1, 0.4**2, 0, 0.4),  # the unclipped error is larger
        (0.1, 1, 0.9**2, 0, -0.9),
        (-0.5, -1, 0.8**2, 1, 0),
        (-0.5, 0, 0.5**2, 0, -0.5),
    ],
)
def test_value_loss_by_hand(value, target, loss, clipped, gradient):
    """The old value is 0 and the clip range 0.2. A second token has an error of 0.1, and a third is padding."""
    values, old_values = T([[value, 0.1, NAN]], requires_grad=True), T([[0, 0.1, 0]])
    got, clipfrac = ppo.value_loss(values, old_values, T([[float(target), 0.2, 0]]), T([[1, 1, 0]]), 0.2)
    assert (got.item(), clipfrac.item()) == pytest.approx((0.5 * (loss + 0.1**2) / 2, clipped / 2))
    got.backward()
    assert values.grad[0, :2].tolist() == pytest.approx([gradient / 2, -0.1 / 2])


# --- the KL coefficient, the average of the weights, the unit of rewards


@pytest.mark.parametrize(
    ("kl", "n", "error"),
    [(0.5, 128, -0.2), (6, 128, 0), (-1, 50, -0.2), (6.6, 1000, 0.1), (5.7, 10, -0.05), (60, 100, 0.2)],
)
def test_adaptive_kl_controller_by_hand(kl, n, error):
    controller = ppo.AdaptiveKLController(0.2, target=6, horizon=10_000)
    for times in (1, 2):
        controller.update(kl, n)
        assert controller.value == pytest.approx(0.2 * (1 + error * n / 10_000) ** times)


@pytest.mark.parametrize(
    ("power", "expected"),
    [(0, (4 + 8 + 0) / 3), (1, (1 * 4 + 2 * 8 + 3 * 0) / 6), (3, (4 / 5 + 8 * 4 / 5) * 2 / 6), (1e9, 0)],
)
def test_polynomial_average_by_hand(power, expected):
    """The average of 4, 8 and 0. With power 3, the second value is mixed in with weight 4/5 and the third with 4/6."""
    average = T([-100.0], dtype=torch.float64)
    for step, weight in enumerate([4.0, 8, 0], 1):
        ppo.polynomial_average([average], [T([weight], dtype=torch.float64)], step, power)
    assert average.item() == pytest.approx(expected, abs=1e-7)  # 1e9: 8 * 2 / (1e9 + 3) is left


@pytest.mark.parametrize(
    ("scores", "kl_coef", "unit"),
    [
        ([1, 0, 1, 0], 0.2, 1.25),  # a standard deviation of 0.5 is 0.4 units
        ([9_000, 1_000], 2000, 10_000),
        ([0.0007, 0.0003], 0.0002, 0.0005),
        ([-1, -1, 1, 1], 99, 2.5),  # a standard deviation of 1, which is just above kl_coef / 100
        ([-1, -1, 1, 1], 101, 252.5),  # just below it; the mean is 0, so the coefficient is used
        ([5, 5, 5], 0.2, 0.5),  # no spread
        ([1e6, 1e6 + 1], 0.2, 1.25),  # some spread despite a large offset
        ([1e7, 1e7 + 1], 0.2, 0.5),  # the spread is only rounding
        ([0, 0], 0.2, 0.5),  # for example, the reward counts a word that hasn't occurred yet
        ([0.3], 0.2, 0.5),
        ([0, 0], 0, 1),
    ],
)
def test_the_unit_of_rewards_by_hand(scores, kl_coef, unit):
    assert ppo.pick_reward_unit(T(scores, dtype=torch.float32), kl_coef) == pytest.approx(unit)
