"""docs/one_step.md and its Chinese twin: their numbers follow from each other, and are those of a real step."""

import dataclasses
import math
import re

import pytest
import torch

from tests.helpers import read
from tools import one_step

PAGES = {"docs/one_step.md": ("happy", "unhappy"), "docs/one_step.zh.md": ("好评", "差评")}
HALF = 5e-4  # how far a number with three decimals may be from the exact one
IN_ENGLISH = {  # the numbers about the whole batch, by their names in tools/one_step.py
    "mean score": r"([\d.]+) on average", "happy": r"above 0.9 for (\d+)", "unhappy": r"below 0.1 for (\d+)",
    "negative log-ratios": r"as with (\d+) of the 128", "KL": r"the 128 completions, ([\d.]+) here",
    "standard error of the KL": r"a standard error of ([\d.]+)\.\n", "mean V": r"the batch V is ([\d.]+) on average",
    "mean G": r"on average and G is ([\d.]+)\. ", "mean A": r"tokens of the batch, ([\d.]+), is taken",
    "tokens": r"over all ([\d,]+) tokens", "happy that rose": r"above 0.9, (\d+) became",
    "mean product of the happy": r"of all 98 is ([\d.]+)\. ", "unhappy that fell": r"below 0.1, (\d+)\s+became",
    "mean product of the unhappy": r"of all 30 is ([\d.]+)\.\n", "ratios beyond the limits": r"the step (\d+) of the",
    "of them not clipped": r"the limits, (\d+) of them", "reward unit": r"which is ([\d.]+) in scores",
    "first V": r"V at the first token was ([\d.]+)", "first V after": r"and is ([\d.]+) after the step",
    "mean first G": r"the mean G there\nis ([\d.]+)\.", "next beta, adaptive": r"10,000\) \| ([\d.]+) \|",
}  # fmt: skip


def rows_of(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in read(page).splitlines() if line[:2] == "| "]


def tokens_of(page: str, name: str) -> list[list[list[str]]]:
    """The rows of one completion in the three tables of tokens."""
    rows, found = rows_of(page), []
    for start in [i for i, row in enumerate(rows) if row[0] == f"**{name}**" and not any(row[1:])]:
        length = next(i for i, row in enumerate(rows[start + 1 :]) if not re.match(r".$|\[SEP\]$", row[0]))
        found.append(rows[start + 1 : start + 1 + length])
    return found


def numbers(rows: list[list[str]]) -> list[list[float]]:
    return [list(map(float, column)) for column in zip(*([cell.strip("*") for cell in row[1:]] for row in rows))]


def losses(page: str) -> list[list[float]]:
    return [
        list(map(float, row[1:])) for row in rows_of(page) if len(row) == 5 and re.fullmatch(r"-?\d\.\d{4}", row[1])
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_follow_from_each_other(page):
    """Each number from those beside it by its formula, as exactly as their roundings allow."""
    for name in PAGES[page]:
        rewards, advantages, epochs = tokens_of(page, name)
        assert [row[0] for row in rewards] == [row[0] for row in advantages] == [row[0] for row in epochs]
        score = float(next(row[2] for row in rows_of(page) if row[0] == f"**{name}**" and row[1]))
        old, ref, penalty, reward = numbers(rewards)
        V, r, delta, A, G, whitened = numbers(advantages)
        w, prob, after, *ratios = numbers(epochs)
        assert r == reward and w == whitened
        last = len(old) - 1
        for t in range(last + 1):
            assert penalty[t] == pytest.approx(0.15 * (ref[t] - old[t]), abs=1.3 * HALF)
            assert reward[t] == pytest.approx(penalty[t] + score * (t == last), abs=3 * HALF)
            next_V, next_A = (V[t + 1], A[t + 1]) if t < last else (0, 0)
            assert delta[t] == pytest.approx(r[t] + next_V - V[t], abs=4 * HALF)
            assert A[t] == pytest.approx(delta[t] + next_A, abs=3 * HALF)
            assert G[t] == pytest.approx(A[t] + V[t], abs=3 * HALF)
            assert prob[t] == pytest.approx(math.exp(old[t]), abs=2 * HALF)
            assert after[t] == pytest.approx(prob[t] * ratios[-1][t], abs=4 * HALF)
            assert ratios[0][t] == 1
            clipped = [(a > 1.2 and w[t] > 0) or (a < 0.8 and w[t] < 0) for a in (ratio[t] for ratio in ratios)]
            assert [cell.startswith("**") for cell in epochs[t][4:]] == clipped
        (mean,) = re.findall(r"(?:tokens of the batch, |token 的均值 )([\d.]+)", read(page))
        scale = (max(A) - min(A)) / (max(w) - min(w))  # the standard deviation that whitening divides by
        assert w == pytest.approx([(a - float(mean)) / scale for a in A], abs=4 * HALF / scale)
        said = set(re.findall(r"-?\d+\.\d{3}", re.sub(r"^\|.*", "", read(page), flags=re.M)))
        sums = [sum(penalty), sum(o - x for o, x in zip(old, ref)), math.prod(ratios[-1])]
        for total in sums:  # a sum or product of six rounded numbers, two of them in the log-ratio
            assert any(abs(float(number) - total) <= 14 * HALF for number in said), total
        for number in (V[0], A[0], G[0]):
            assert f"{number:.3f}" in said
    assert [tokens_of("docs/one_step.md", "happy"), tokens_of("docs/one_step.md", "unhappy")] == [
        tokens_of(page, name) for name in PAGES[page]
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_losses_follow_from_each_other(page):
    *epochs, mean = losses(page)
    assert mean == pytest.approx([sum(column) / 4 for column in zip(*epochs)], abs=1e-4)
    for policy, value, total, _ in epochs:
        assert total == pytest.approx(policy + 0.1 * value, abs=1.1e-4)
    assert epochs[0][0] == 0 == epochs[0][3] and losses("docs/one_step.md") == [*epochs, mean]
    english, chinese = (
        re.findall(r"-?\d[\d,]*\.\d{2,}|\d,\d{3}", re.sub(r"^\|.*", "", read(p), flags=re.M)) for p in PAGES
    )
    assert sorted(english) == sorted(chinese)


@pytest.fixture(scope="module")
def config():
    return one_step.demo_config()


@pytest.fixture(scope="module")
def step(demo, config):
    return one_step.take_step(config)


def on_the_page() -> dict[str, float]:
    text = read("docs/one_step.md")
    found = {name: float(re.search(pattern, text)[1].replace(",", "")) for name, pattern in IN_ENGLISH.items()}
    for k, (policy, value, total, clipped) in enumerate(losses("docs/one_step.md")[:-1], 1):
        found |= {
            f"policy loss {k}": policy,
            f"value loss {k}": value,
            f"total loss {k}": total,
            f"clipped {k}": clipped,
        }
    return found


def test_the_numbers_are_those_of_a_real_step(step, config):
    """Another processor makes slightly other demo models, which write other texts: the page's numbers are another draw.

    They are within six standard errors (from draws of these completions) and a tenth, for the models.
    """
    found, page, generator = one_step.of_batch(step, config), on_the_page(), torch.Generator().manual_seed(0)
    assert found.keys() == page.keys()
    draws = []
    for _ in range(60):
        rows = torch.randint(len(step.scores), (len(step.scores),), generator=generator)
        drawn = {field.name: pick(getattr(step, field.name), rows) for field in dataclasses.fields(step)}
        draws.append(one_step.of_batch(dataclasses.replace(step, **drawn), config))
    for name, value in found.items():
        error = torch.tensor([draw[name] for draw in draws]).std().item()
        assert page[name] == pytest.approx(value, abs=HALF + 6 * error + abs(value) / 10), name
    shown = one_step.happy_and_unhappy(step, config.cliprange)
    assert step.scores[shown["happy"]] > 0.9 and step.scores[shown["unhappy"]] < 0.1
    assert one_step.columns(step).keys() >= {"penalty", "delta", "ratio 4", "ratio after"}


def pick(value, rows):
    """Some completions of a tensor, or of each in a list of tensors."""
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [tensor[rows] for tensor in value]
    return value[rows] if isinstance(value, torch.Tensor) else value
