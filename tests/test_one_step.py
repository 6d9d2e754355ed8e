"""docs/one_step.md: its numbers worked out once more by loops over plain numbers, and its text."""

import copy
import dataclasses
import math
import re
import statistics
import string

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from support.load import load
from support.text_trainer import TextPPOTrainer
from tests.helpers import FORBIDDEN, anchors, links, plain_gpt2
from tools import one_step

LANGUAGES = list(one_step.TEXTS)


@pytest.fixture(scope="module")
def loaded():
    config = one_step.demo_config()
    policy, tokenizer, reward, (prompt,) = load(config)
    return TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer), reward, prompt


@pytest.fixture(scope="module")
def step(loaded):
    return one_step.take_step(*loaded)


@pytest.fixture(scope="module")
def expected(step):
    return by_hand(step)


def by_hand(step) -> dict:
    """The step once more, from its log-probabilities, values and scores alone: lists of completions of tokens."""
    c, n = step.config, len(step.responses)
    raw = {name: getattr(step, name).double().tolist() for name in ("logprobs", "ref_logprobs", "values", "scores")}
    result = {name: [] for name in ("penalties", "rewards", "deltas", "advantages", "returns", "ratios", "clipped")}
    for i, response in enumerate(step.responses):
        last = len(response) - 1
        values = raw["values"][i]
        penalties = [c.init_kl_coef * (raw["ref_logprobs"][i][t] - raw["logprobs"][i][t]) for t in range(last + 1)]
        rewards = [penalty + raw["scores"][i] * (t == last) for t, penalty in enumerate(penalties)]
        deltas = [rewards[t] + (c.gamma * values[t + 1] if t < last else 0) - values[t] for t in range(last + 1)]
        advantages = [
            sum((c.gamma * c.lam) ** (k - t) * deltas[k] for k in range(t, last + 1)) for t in range(last + 1)
        ]
        returns = [advantage + value for advantage, value in zip(advantages, values)]
        of_completion = (penalties, rewards, deltas, advantages, returns)
        for name, row in zip(("penalties", "rewards", "deltas", "advantages", "returns"), of_completion):
            result[name].append(row)
    together = [advantage for row in result["advantages"] for advantage in row]
    mean = sum(together) / len(together)
    deviation = math.sqrt(sum((advantage - mean) ** 2 for advantage in together) / len(together))
    result["whitened"] = [[(advantage - mean) / deviation for advantage in row] for row in result["advantages"]]
    result["mean_advantage"] = mean

    result["losses"] = []
    low, high = 1 - c.cliprange, 1 + c.cliprange
    for epoch in step.epochs:
        logprobs, new_values = epoch.logprobs.double().tolist(), epoch.values.double().tolist()
        ratios, clipped, policy, value = [], [], [], []
        for i, response in enumerate(step.responses):
            ratios.append([math.exp(logprobs[i][t] - raw["logprobs"][i][t]) for t in range(len(response))])
            clipped.append([])
            for ratio, a in zip(ratios[i], result["whitened"][i]):
                clipped[i].append(a > 0 and ratio > high or a < 0 and ratio < low)
                policy.append(-a * (high if a > 0 else low) if clipped[i][-1] else -a * ratio)
            for new, old, wanted in zip(new_values[i], raw["values"][i], result["returns"][i]):
                clip = c.cliprange_value * step.reward_unit
                near = min(max(new, old - clip), old + clip)
                value.append(max((new - wanted) ** 2, (near - wanted) ** 2) / 2 / step.reward_unit**2)
        result["ratios"].append(ratios)
        result["clipped"].append(clipped)
        policy, value = sum(policy) / len(policy), sum(value) / len(value)
        result["losses"].append((policy, value, policy + c.vf_coef * value, np.mean(sum(clipped, []))))
    result["losses"][-1] = tuple(np.mean(result["losses"][:-1], axis=0))  # in place of the state after the last epoch
    result["log_ratios"] = [-sum(row) / c.init_kl_coef for row in result["penalties"]]
    result["kl"] = sum(result["log_ratios"]) / n
    result["products"] = [math.prod(row) for row in result["ratios"][-1]]
    return result


def of_tokens(step, tensor) -> list[list[float]]:
    return [row[: len(response)] for row, response in zip(tensor.tolist(), step.responses)]


def close(rows, others, tolerance=1e-5) -> bool:
    return all(a == pytest.approx(b, abs=tolerance) for a, b in zip(rows, others, strict=True))


def test_the_step_agrees_with_loops_over_plain_numbers(step, expected):
    for name in ("penalties", "rewards", "deltas", "advantages", "returns", "whitened"):
        assert close(of_tokens(step, getattr(step, name)), expected[name]), name
    for k, epoch in enumerate(step.epochs):
        assert close(of_tokens(step, epoch.ratios), expected["ratios"][k])
        assert of_tokens(step, epoch.clipped) == expected["clipped"][k]
    for stats, losses in zip([*(epoch.stats for epoch in step.epochs[:-1]), step.stats], expected["losses"]):
        assert [stats[name] for name in one_step.LOSSES] == pytest.approx(losses, abs=1e-5)
    assert step.stats["objective/kl"] == pytest.approx(expected["kl"], abs=1e-5)
    assert step.stats["ppo/returns/mean"] == pytest.approx(np.mean(sum(expected["returns"], [])), abs=1e-5)
    assert step.stats["ppo/val/mean"] == pytest.approx(step.values[step.mask].mean().item(), abs=1e-5)


def test_the_probabilities_are_those_of_the_reference_and_of_the_new_policy(step, loaded, demo):
    trainer, _, prompt = loaded
    tokenizer, (query,) = trainer.tokenizer, trainer.encode([prompt])
    head = trainer.model.v_head.summary
    reference, policy = GPT2LMHeadModel.from_pretrained(demo[0]).double(), plain_gpt2(trainer.model)
    for i in one_step.happy_and_unhappy(step):
        response = torch.tensor(tokenizer.convert_tokens_to_ids(step.responses[i]))
        for model, logprobs in ((reference, step.ref_logprobs), (policy, step.epochs[-1].logprobs)):
            with torch.no_grad():
                output = model(torch.cat([query, response])[None], output_hidden_states=True)
            logits = output.logits[0, len(query) - 1 : -1].index_fill(-1, torch.tensor(FORBIDDEN), -math.inf)
            wanted = logits.log_softmax(-1)[torch.arange(len(response)), response]
            assert logprobs[i, : len(response)].tolist() == pytest.approx(wanted.tolist(), abs=1e-4)
        values = output.hidden_states[-1][0, len(query) - 1 : -1] @ head.weight[0].double() + head.bias.double()
        values *= step.reward_unit
        assert step.epochs[-1].values[i, : len(response)].tolist() == pytest.approx(values.tolist(), abs=1e-4)


# ----------------------------------------------------------------------------------------------
# The pages


ROWS, NUMBER_OR_TOKENS = r"\|[^\n]*\|(?:\n\|[^\n]*\|)*", r"-?[\d.,]*\d|(?<=「)[^」\n]+(?=」)"


def fields(text: str, language: str) -> dict[str, str] | None:
    """What stands in a page where its template has a {field}; None where they differ elsewhere."""
    pattern, seen = "", set()
    for literal, field, *_ in string.Formatter().parse(one_step.TEXTS[language][0]):
        pattern += re.escape(literal)
        if field in seen:
            pattern += f"(?P={field})"
        elif field is not None:
            seen.add(field)
            pattern += f"(?P<{field}>{ROWS if field.endswith('_rows') else NUMBER_OR_TOKENS})"
    found = re.fullmatch(pattern, text)
    return found and found.groupdict()


def cells(rows: str) -> list[list[str]]:
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows.splitlines()]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_tables_hold_these_numbers(step, expected, language):
    found = fields(one_step.page(step, language), language)
    shown, (_, *names, mean) = one_step.happy_and_unhappy(step), one_step.TEXTS[language]
    before, after = (of_tokens(step, epoch.logprobs.exp()) for epoch in (step.epochs[0], step.epochs[-1]))
    logprobs, ref_logprobs, values = (
        of_tokens(step, tensor) for tensor in (step.logprobs, step.ref_logprobs, step.values)
    )
    columns = {
        "reward_rows": [logprobs, ref_logprobs, expected["penalties"], expected["rewards"]],
        "advantage_rows": [
            values, *(expected[name] for name in ("rewards", "deltas", "advantages", "returns", "whitened"))
        ],
        "epoch_rows": [expected["whitened"], before, after, *expected["ratios"]],
    }  # fmt: skip
    for table, wanted in columns.items():
        rows = iter(cells(found[table]))
        for i, name in zip(shown, names):
            assert next(rows) == [f"**{name}**"] + [""] * len(wanted)
            for t, token in enumerate(step.responses[i]):
                first, *numbers = next(rows)
                assert first == token
                assert [float(cell.strip("*")) for cell in numbers] == pytest.approx(
                    [column[i][t] for column in wanted], abs=6e-4
                )
                assert all(
                    re.fullmatch(r"\*{0,2}-?\d+\.\d{3}\*{0,2}", cell) and "-0.000" not in cell for cell in numbers
                )
                bold = [cell.startswith("**") for cell in numbers]
                marks = [clipped[i][t] for clipped in expected["clipped"]] if table == "epoch_rows" else []
                assert bold == [False] * (len(numbers) - len(marks)) + marks
        assert next(rows, None) is None
    for row, name, losses in zip(cells(found["loss_rows"]), [*"1234", mean], expected["losses"], strict=True):
        assert row[0] == name and list(map(float, row[1:])) == pytest.approx(losses, abs=6e-5)
    texts = [[f"**{name}**", f"{step.prompt}**{step.completions[i]}**"] for i, name in zip(shown, names)]
    assert [row[:2] for row in cells(found["completion_rows"])] == texts
    assert [float(row[2]) for row in cells(found["completion_rows"])] == pytest.approx(
        [step.scores[i].item() for i in shown], abs=6e-4
    )


def test_the_shortest_that_follow_their_score_are_shown(step, expected):
    lengths = [len(response) for response in step.responses]

    def shortest(scored, moved, grew):
        caught = [
            any(clipped and (ratio > 1) == grew for clipped, ratio in zip(expected["clipped"][-2][i], ratios))
            for i, ratios in enumerate(expected["ratios"][-2])
        ]
        return min(n for n, *shown in zip(lengths, scored, moved, caught) if all(shown)), caught

    scores, products = step.scores.tolist(), expected["products"]
    happy, unhappy = one_step.happy_and_unhappy(step)
    n, caught = shortest([score > 0.9 for score in scores], [product > 1 for product in products], True)
    assert lengths[happy] == n and caught[happy] and scores[happy] > 0.9 and products[happy] > 1
    n, caught = shortest([score < 0.1 for score in scores], [product < 1 for product in products], False)
    assert lengths[unhappy] == n and caught[unhappy] and scores[unhappy] < 0.1 and products[unhappy] < 1


@pytest.mark.parametrize("which, factor", [(0, 1e-3), (1, 1e3)])
def test_what_moved_against_its_score_is_not_shown(step, which, factor):
    shown, (*before, last) = one_step.happy_and_unhappy(step)[which], step.epochs
    ratios = last.ratios.clone()
    ratios[shown, 0] *= factor
    other = dataclasses.replace(step, epochs=[*before, dataclasses.replace(last, ratios=ratios)])
    assert one_step.happy_and_unhappy(other)[which] != shown


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_sentences_hold_these_numbers_and_say_what_is_so(step, expected, language):
    found = fields(one_step.page(step, language), language)
    happy, unhappy = one_step.happy_and_unhappy(step)
    c, scores = step.config, step.scores.tolist()
    values, returns, whitened = of_tokens(step, step.values), expected["returns"], expected["whitened"]
    error = min(max(expected["kl"] / c.target - 1, -0.2), 0.2)
    log_ratios, products, last = expected["log_ratios"], expected["products"], expected["ratios"][-1]
    rose = [product for product, score in zip(products, scores) if score > 0.9]
    fell = [product for product, score in zip(products, scores) if score < 0.1]
    beyond = [
        clipped
        for row, marks in zip(last, expected["clipped"][-1])
        for ratio, clipped in zip(row, marks)
        if not 0.8 <= ratio <= 1.2
    ]
    lowest = min(range(len(whitened[happy])), key=whitened[happy].__getitem__)
    away = [math.log(ratio) * (-1 if a > 0 else 1) for ratio, a in zip(last[happy], whitened[happy])]
    against = away.index(max(away))
    wanted = {
        "mean_score": np.mean(scores), "n_happy": len(rose), "n_unhappy": len(fell),
        "happy_log_ratio": log_ratios[happy], "unhappy_log_ratio": log_ratios[unhappy],
        "n_negative": sum(log_ratio < 0 for log_ratio in log_ratios),
        "kl_error": statistics.stdev(log_ratios) / math.sqrt(len(log_ratios)), "noisy_kl": 2 / len(scores),
        "happy_product": products[happy], "unhappy_product": products[unhappy],
        "n_rose": sum(product > 1 for product in rose), "n_fell": sum(product < 1 for product in fell),
        "happy_mean_product": np.mean(rose), "unhappy_mean_product": np.mean(fell),
        "n_beyond": len(beyond), "n_against": beyond.count(False),
        "lowest_advantage": whitened[happy][lowest], "lowest_value": values[happy][lowest],
        "against_advantage": whitened[happy][against], "against_ratio": last[happy][against],
        "value_clip": c.cliprange_value * step.reward_unit, "unit": step.reward_unit,
        "first_return": np.mean([row[0] for row in returns]),
        "happy_penalty": sum(expected["penalties"][happy]), "unhappy_penalty": sum(expected["penalties"][unhappy]),
        "kl": expected["kl"],
        "first_value": values[happy][0], "new_first_value": step.epochs[-1].values[happy, 0].item(),
        "happy_return": returns[happy][0], "unhappy_return": returns[unhappy][0],
        "happy_advantage": expected["advantages"][happy][0], "unhappy_advantage": expected["advantages"][unhappy][0],
        "mean_value": np.mean(sum(values, [])), "mean_return": np.mean(sum(returns, [])),
        "mean_advantage": expected["mean_advantage"], "n_tokens": len(sum(values, [])),
        "happy_positive": sum(a > 0 for a in whitened[happy]), "happy_tokens": len(values[happy]),
        "unhappy_positive": sum(a > 0 for a in whitened[unhappy]), "unhappy_tokens": len(values[unhappy]),
        "step": one_step.WARM_UP + 1, "warm_up": one_step.WARM_UP, "batch": len(scores), "beta": c.init_kl_coef,
        "low": 0.8, "high": 1.2,
        "fixed": c.init_kl_coef, "adaptive": c.init_kl_coef * (1 + error * len(scores) / c.horizon),
    }  # fmt: skip
    for name, value in wanted.items():
        assert float(found[name].replace(",", "")) == pytest.approx(value, abs=6e-4), name
    assert float(found["adaptive"]) == pytest.approx(wanted["adaptive"], abs=6e-5)

    def argmax(i, sign):
        return max(range(len(step.responses[i])), key=lambda t: sign * expected["penalties"][i][t])

    dear, cheap = argmax(happy, -1), argmax(unhappy, 1)
    assert (found["dear"], found["cheap"]) == (step.responses[happy][dear], step.responses[unhappy][cheap])
    assert (found["lowest"], found["against"]) == (step.responses[happy][lowest], step.responses[happy][against])
    assert wanted["against_advantage"] * (wanted["against_ratio"] - 1) < 0
    assert expected["penalties"][happy][dear] < -0.01 and expected["penalties"][unhappy][cheap] > 0.01
    for i, name, more in ((happy, "happy_clipped", True), (unhappy, "unhappy_clipped", False)):
        last = zip(step.responses[i], expected["ratios"][-2][i], expected["clipped"][-2][i])
        assert found[name].split() == [token for token, ratio, clipped in last if clipped and (ratio > 1) == more] != []
    assert values[happy][0] == pytest.approx(values[unhappy][0], abs=1e-5)
    assert (c.gamma, c.lam) == (1, 1)
    policy, value, _, clipped = zip(*expected["losses"][:-1])
    assert policy[0] == pytest.approx(0, abs=1e-6) and policy[-1] < -1e-3
    assert value[-1] < value[0] and clipped[0] == 0 < clipped[-1]


@pytest.fixture(scope="module")
def committed():
    pages = {language: path.read_text(encoding="utf-8") for language, path in one_step.PAGES.items()}
    return {language: fields(text, language) for language, text in pages.items()}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_committed_page_is_of_this_text(step, committed, language):
    assert committed[language], "write it anew: python -m tools.one_step"
    made = fields(one_step.page(step, language), language)
    for table in (name for name in made if name.endswith("_rows")):
        assert {len(row) for row in cells(committed[language][table])} == {len(row) for row in cells(made[table])}


def rows_of(table: str) -> tuple[list[list[str]], list[list[str]]]:
    """The happy and the unhappy completion's rows in a table of tokens."""
    (_, *rows), second = cells(table), 0
    while not rows[second][0].startswith("**"):
        second += 1
    return rows[:second], rows[second + 1 :]


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_committed_sentences_agree_with_the_tables_over_them(committed, language):
    page = committed[language]

    def says(name):
        return float(page[name].replace(",", ""))

    def numbers(rows, column):
        return [float(row[column].strip("*")) for row in rows]

    def token(rows, column, pick):
        return rows[column.index(pick(column))][0]

    rounding = 6e-4
    rewards, advantages, epochs = (rows_of(page[name]) for name in ("reward_rows", "advantage_rows", "epoch_rows"))
    for name, *tables in zip(("happy", "unhappy"), rewards, advantages, epochs):
        of_rewards, of_advantages, of_epochs = tables
        tokens = len(of_rewards)
        assert [row[0] for row in of_rewards] == [row[0] for row in of_advantages] == [row[0] for row in of_epochs]
        assert says(f"{name}_tokens") == tokens
        assert says(f"{name}_penalty") == pytest.approx(sum(numbers(of_rewards, 3)), abs=tokens * rounding)
        distances = [new - ref for new, ref in zip(numbers(of_rewards, 1), numbers(of_rewards, 2))]
        assert says(f"{name}_log_ratio") == pytest.approx(sum(distances), abs=2 * tokens * rounding)
        assert says("first_value") == numbers(of_advantages, 1)[0]
        assert says(f"{name}_return") == numbers(of_advantages, 5)[0]
        assert says(f"{name}_advantage") == numbers(of_advantages, 4)[0]
        assert says(f"{name}_positive") == sum(advantage > 0 for advantage in numbers(of_advantages, 6))
        assert says(f"{name}_product") == pytest.approx(math.prod(numbers(of_epochs, 8)), rel=tokens * rounding)
        caught = [row[0] for row, ratio in zip(of_epochs, numbers(of_epochs, 7))
                  if row[7].startswith("**") and (ratio > 1) == (name == "happy")]  # fmt: skip
        assert page[f"{name}_clipped"].split() == caught
    assert says("happy_product") > 1 > says("unhappy_product")
    assert page["dear"] == token(rewards[0], numbers(rewards[0], 3), min)
    assert page["cheap"] == token(rewards[1], numbers(rewards[1], 3), max)
    whitened = numbers(advantages[0], 6)
    assert says("lowest_advantage") == min(whitened) and page["lowest"] == token(advantages[0], whitened, min)
    assert says("lowest_value") == numbers(advantages[0], 1)[whitened.index(min(whitened))]
    against = numbers(epochs[0], 1).index(says("against_advantage"))
    assert epochs[0][against][0] == page["against"] and numbers(epochs[0], 8)[against] == says("against_ratio")
    assert says("against_advantage") * (says("against_ratio") - 1) < 0

    assert says("mean_advantage") == pytest.approx(says("mean_return") - says("mean_value"), abs=3 * rounding)
    assert says("value_clip") == pytest.approx(says("cliprange_value") * says("unit"), abs=rounding)
    assert says("noisy_kl") == pytest.approx(2 / says("batch"), abs=rounding)
    assert says("step") == says("warm_up") + 1 and says("fixed") == says("beta")
    error = min(max(says("kl") / says("target") - 1, -0.2), 0.2)
    assert says("adaptive") == pytest.approx(says("beta") * (1 + error * says("batch") / says("horizon")), abs=1e-4)
    assert (says("low"), says("high")) == pytest.approx((1 - says("cliprange"), 1 + says("cliprange")))
    losses = [[float(cell) for cell in row[1:]] for row in cells(page["loss_rows"])]
    assert losses[-1] == pytest.approx(np.mean(losses[:-1], axis=0), abs=1e-4)
    assert all(a + says("vf_coef") * b == pytest.approx(total, abs=2e-4) for a, b, total, _ in losses)


def test_both_pages_are_of_one_step(committed):
    english, chinese = committed["en"], committed["zh"]
    assert english.keys() == chinese.keys()
    assert all(english[name] == chinese[name] for name in english if not name.endswith("_rows"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_links_within_a_page_lead_to_its_sections(language):
    page = one_step.PAGES[language]
    sections = {anchor for file, anchor in links(page) if not file}
    assert sections and sections <= anchors(page)


def test_the_chinese_page_has_chinese_punctuation_and_spacing():
    text = one_step.TEXTS["zh"][0]
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|<[^>]*>|^    .*$", "|", text, flags=re.M)
    text = re.sub(r"\{[^}]*\}", "0", text)
    chinese = r"[\u4e00-\u9fff]"
    for wrong in (
        f"{chinese}[,:;()!?]|[,:;()!?]{chinese}",
        f"{chinese}[A-Za-z0-9]|[A-Za-z0-9]{chinese}",
        rf"\*\*[^*\n]*[，。：；！？、）」]\*\*{chinese}",  # GitHub shows these asterisks
    ):
        assert re.findall(f".{{0,9}}(?:{wrong}).{{0,9}}", text) == []
