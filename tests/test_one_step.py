"""docs/one_step.md and the Chinese page: their numbers are consistent and match a real step."""

import math
import re
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch

from tests.helpers import read
from tools import one_step

PAGES = ["docs/one_step.md", "docs/one_step.zh.md"]
HALF = 5e-4  # how far a number with three decimals may be from the exact one
# Numbers of the whole batch: a regex for the sentence, and five standard deviations over the seeds 1 to 12. On another
# processor or torch version, the demo models differ slightly and write other texts, as they would with another seed.
OF_BATCH = {
    "mean score": (r"([\d.]+) on average", 0.2),
    "happy": (r"above 0.9 for (\d+)", 26),
    "negative log-ratios": (r"as with (\d+) of the 128", 39),
    "KL": (r"the 128 completions, ([\d.]+) here", 1.0),
    "mean V": (r"the batch V is ([\d.]+) on average", 0.24),
    "mean G": (r"on average and G is ([\d.]+)\. ", 0.15),
    "tokens": (r"over all ([\d,]+) tokens", 260),
    "mean product of the unhappy": (r"of all 34 is ([\d.]+)\.\n", 0.2),
    "ratios beyond the limits": (r"the step (\d+) of the", 150),
    "next beta, adaptive": (r"10,000\) \| ([\d.]+) \|", 1e-4),
    "value loss 1": (r"\| 1 \| 0.0000 \| ([\d.]+) \|", 0.031),
    "value loss 4": (r"\| 4 \| -[\d.]+ \| ([\d.]+) \|", 0.029),
}


def rows_of(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in read(page).splitlines() if line[:2] == "| "]


def tables_of(name: str) -> list[list[list[float]]]:
    """Return the columns of the three per-token tables for one completion."""
    rows, tables = rows_of(PAGES[0]), []
    for start in [i for i, row in enumerate(rows) if row[0] == f"**{name}**" and not any(row[1:])]:
        of_tokens = [[float(cell.strip("*")) for cell in row[1:]] for row in takewhile(of_a_token, rows[start + 1 :])]
        tables.append([list(column) for column in zip(*of_tokens)])
    return tables


def of_a_token(row: list[str]) -> bool:
    return re.fullmatch(r"-?\d\.\d{3}", row[1]) is not None


@pytest.mark.parametrize("name", ["happy", "unhappy"])
def test_the_numbers_in_the_tables_are_consistent(name):
    """Each number follows from its neighbours by its formula, up to rounding."""
    (old, ref, penalty, reward), (V, r, delta, A, G, whitened), (w, prob, after, *ratios) = tables_of(name)
    score = float(next(row[2] for row in rows_of(PAGES[0]) if row[0] == f"**{name}**" and row[1]))
    last = len(r) - 1
    assert r == reward and w == whitened and ratios[0] == [1] * (last + 1) and last > 2
    for t in range(last + 1):
        assert penalty[t] == pytest.approx(0.15 * (ref[t] - old[t]), abs=1.3 * HALF)
        assert reward[t] == pytest.approx(penalty[t] + score * (t == last), abs=3 * HALF)
        next_V, next_A = (V[t + 1], A[t + 1]) if t < last else (0, 0)
        assert delta[t] == pytest.approx(r[t] + next_V - V[t], abs=4 * HALF)
        assert A[t] == pytest.approx(delta[t] + next_A, abs=3 * HALF)
        assert G[t] == pytest.approx(A[t] + V[t], abs=3 * HALF)
        assert prob[t] == pytest.approx(math.exp(old[t]), abs=2 * HALF)
        assert after[t] == pytest.approx(prob[t] * ratios[-1][t], abs=4 * HALF)
    scale = (max(A) - min(A)) / (max(w) - min(w))  # the standard deviation that whitening divides by
    mean = float(re.search(r"tokens of the batch, (-?[\d.]+)", read(PAGES[0]))[1])
    assert w == pytest.approx([(a - mean) / scale for a in A], abs=4 * HALF / scale)


def test_the_losses_are_consistent():
    rows = [row[1:] for row in rows_of(PAGES[0]) if len(row) == 5 and re.fullmatch(r"-?\d\.\d{4}", row[1])]
    *epochs, mean = [list(map(float, row)) for row in rows]
    assert mean == pytest.approx([sum(column) / 4 for column in zip(*epochs)], abs=1e-4)
    for policy, value, total, _ in epochs:
        assert total == pytest.approx(policy + 0.1 * value, abs=1.1e-4)


def test_both_languages_have_the_same_numbers():
    english, chinese = (re.findall(r"-?\d[\d,]*\.\d{2,}|\d,\d{3}", read(page)) for page in PAGES)
    assert sorted(english) == sorted(chinese) and len(english) > 100


def test_the_page_shows_a_clipped_completion_rather_than_a_shorter_one():
    ratios = torch.tensor([[1.1, 1.1], [1.1, 1.3], [0.9, 0.9], [0.9, 0.7]])
    whitened, scores = torch.tensor([[1.0], [1], [-1], [-1]]).expand(4, 2), torch.tensor([0.95, 0.95, 0.05, 0.05])
    step = SimpleNamespace(tokens=["a", "ab"] * 2, scores=scores, whitened=whitened, ratios=[ratios, ratios])
    assert one_step.happy_and_unhappy(step, 0.2) == {"happy": 1, "unhappy": 3}


def test_the_numbers_match_a_real_step(demo):
    config = one_step.demo_config()
    step = one_step.take_step(config)
    found = one_step.of_batch(step, config)
    for name, (sentence, error) in OF_BATCH.items():
        said = float(re.search(sentence, read(PAGES[0]))[1].replace(",", ""))
        assert said == pytest.approx(found[name], abs=error), name
    shown = one_step.happy_and_unhappy(step, config.cliprange)
    assert step.scores[shown["happy"]] > 0.9 and step.scores[shown["unhappy"]] < 0.1
    for loss in ("policy", "value", "total"):  # an epoch has one optimiser step
        mean = sum(found[f"{loss} loss {k}"] for k in range(1, 5)) / 4
        assert mean == pytest.approx(step.stats[f"ppo/loss/{loss}"], rel=1e-3, abs=1e-5)
    assert one_step.columns(step).keys() >= {"penalty", "delta", "ratio 4", "ratio after"}
