"""report.md for hand-made run folders and for small runs, and Markdown formatting."""

import json
from pathlib import Path

import numpy as np
import pytest

from config import PPOConfig
from support.common.figures import in_markdown, table
from support.compute.devices import code_hash
from support.run.compare import read_run
from support.run.evaluation import Results
from support.run.report import run_report
from support.run.results import before_after_table, prompts_table, results_table
from support.run.settings import save_config
from tests.helpers import MEAN, evaluation, example_results, load_gpt2, read_json, rows, tiny_run, write_bpe_gpt2

STARTS = [
    {"command": "python train_ppo.py --lr 2e-4\n# Title", "step": 1, "torch": "2.6.0", "device": "cpu"},
    {"command": "python train_ppo.py --resume x", "step": 2, "torch": "2.6.0", "device": "cpu"},
    {"command": "python train_ppo.py --resume x", "step": 3, "torch": "2.13.0", "device": "cpu"},
    {"step": None, "torch": "2.6.0", "device": "cpu", "parameters": 102068736},
]


def test_a_report_shows_the_results_of_the_run_and_how_it_was_made(tmp_path, monkeypatch):
    """The steps take 65.6 seconds. The slow first one doesn't affect the median. The second start is like the first."""
    run = tmp_path / "my_run"
    run.mkdir()
    save_config(PPOConfig(preset="demo", lr=2e-4, run_name="my_run"), run / "config.json")
    (run / "metrics.csv").write_text("step,time/step\n1,50\n2,7\n3,8.6\n")
    (run / "rewards.png").touch()
    results = example_results()
    results.before.n = results.after.n = 1500
    results.best_of_n = [{"n": 2, "gain": 0.456}, {"n": 3, "gain": 0.7}]
    results.alarms = [{"step": 2, "alarm": "x", "says": "too <b>fast"}]
    (run / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in STARTS))
    (run / "inputs.json").write_text('{"the hash of the prompts": "ba98"}')
    monkeypatch.chdir(run)
    report = run_report(Path("."), results)
    assert report.startswith("# my_run\n\n**good**\n\n![curves of the run](rewards.png)\n")
    assert (
        results_table(results) in report and before_after_table(results.before.samples, results.after.samples) in report
    )
    lines = report.split("\n")
    for line in (
        r"    python train_ppo.py --lr 2e-4\n# Title  # from step 1",
        "    (unknown)  # evaluated again",
        r"- step 2: too \<b>fast",
        "3 steps in 01:05, excluding loading and evaluation; median 8.60 s per step.",
    ):
        assert line in lines
    assert "1,500 completions before and after training" in report
    assert "best-of-n from the original model has a gain of 0.46 with n = 2, 0.70 with n = 3." in report
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    for row in (
        ["lr", "0.0002", "0.0001"],
        ["the prompts", "ba98"],
        ["environment", "from step 1", "from step 3", "evaluated again"],
        ["torch", "2.6.0", "2.13.0", "2.6.0"],
        ["parameters", "", "", "102068736"],
    ):
        assert row in shown

    save_config(PPOConfig(preset="demo"), run / "config.json")
    for name in ("metrics.csv", "rewards.png", "inputs.json", "environment.jsonl"):
        (run / name).unlink()
    results.gain, results.best_of_n, results.alarms = {"gain": None, "why": "no price"}, [{"n": 2, "gain": None}], []
    report = run_report(run, results)
    assert "All settings are those of the preset demo." in report
    assert not any(part in report for part in ("![", "| J", "| gain", "drafts", "Warnings", " steps in ", "| setting"))


def by_prompt(rewards: dict[str, tuple], n=200, beta=0.5) -> Results:
    """Return results for {prompt: ((low, high), after, KL)}. Before training, half of the rewards are low."""
    before = [(prompt, "x", low_high[i % 2]) for prompt, (low_high, *_) in rewards.items() for i in range(n)]
    after = [(prompt, "x", reward) for prompt, (_, reward, _) in rewards.items() for _ in range(n)]
    results = Results(evaluation(before), evaluation(after, [kl for *_, kl in rewards.values() for _ in range(n)]))
    results.measure(beta)
    return results


def test_the_prompts_table_shows_reward_kl_and_gain_of_each_prompt():
    """With rewards 0 and 1, J is 0.5 before and at most 0.5 log((1 + e^2) / 2) = 0.717. R 0.9 at KL 0.4 is J 0.7."""
    results = by_prompt({"bad": ((0.0, 1.0), 0.5, 0.2), "flat": ((0.3, 0.3), 0.3, 0.0), "good": ((0.0, 1.0), 0.9, 0.4)})
    assert [(each["prompt"], each["n"]) for each in results.by_prompt] == [("good", 200), ("flat", 200), ("bad", 200)]
    good, flat, bad = results.by_prompt
    assert (good["before"], good["after"], good["kl"], good["J"]) == pytest.approx((0.5, 0.9, 0.4, 0.2))
    assert (good["gain"], bad["gain"]) == pytest.approx((0.2 / 0.2169, -0.1 / 0.2169), rel=0.01) and flat[
        "gain"
    ] is None
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in prompts_table(results).split("\n")]
    assert rows[3] == ["flat", "200", "0.300", "0.300", "0.000", "+0.000", "-"]
    assert rows[4][:6] == ["bad", "200", "0.500", "0.500", "0.200", "-0.100"] and rows[4][6].startswith("-0.46 (stand")
    assert results.without_samples()["by_prompt"] == results.by_prompt
    assert by_prompt({"one": ((0.0, 1.0), 0.9, 0.4)}).by_prompt == []
    many = prompts_table(by_prompt({f"{i:02d}": ((0.0, 1.0), 1 - 0.01 * i, 0.0) for i in range(50)}, n=2)).split("\n")
    assert [row[2:4] for row in many[2:]] == [*(f"{i:02d}" for i in range(10)), "… ", *(f"{i}" for i in range(40, 50))]


@pytest.mark.parametrize(("start", "unit"), [(1e6, 1.0), (0.0, 1e-9)])
def test_the_report_names_the_end_token_and_shows_large_and_tiny_rewards(tmp_path, without_pictures, start, unit):
    """Around a million, float32 has steps of 1/16. A mean in float32 would be off by that much, and so would a gain."""
    policy, run = load_gpt2(write_bpe_gpt2(tmp_path / "gpt2")), tmp_path / "run"
    assert (
        tiny_run(run, policy, lambda texts: [start + 0.3 * unit * len(text) for text in texts], init_kl_coef=unit) == 0
    )
    found, report = read_json(run / "evaluation.json"), (run / "report.md").read_text(encoding="utf-8")
    means = [np.mean([score for *_, score in found[when]["samples"]]) for when in ("before", "after")]
    assert [found["before"]["reward"], found["after"]["reward"]] == pytest.approx(means, rel=1e-12)
    scores = [json.loads(line)["score"] for line in (run / "samples.jsonl").read_text("utf-8").splitlines()[:8]]
    assert float(rows(run)[0][MEAN]) == pytest.approx(np.mean(scores), rel=1e-12)
    shown = [[cell.strip() for cell in line.split(" | ")] for line in report.split("\n") if line.startswith("| ")]
    before, after = next(row[1:3] for row in shown if row[0] == "| mean reward")
    assert [float(before), float(after)] == pytest.approx(means, abs=1e-2 * unit)
    assert prompts_table(Results.read(run / "evaluation.json")) in report
    assert read_run(run).settings["code"] == code_hash()
    assert "| ended by endoftext " in report


def test_special_characters_of_a_text_are_escaped_in_markdown():
    """A backslash escapes whatever starts markup, HTML, an entity or a new cell. Whitespace becomes one space."""
    text = "a *b* _c_ `d` [e](f) ![g](h) <i> &lt; ~~j~~ | k\\\n\u2028 # l\x1b[0m init_kl_coef __m__"
    shown = r"a \*b\* \_c\_ \`d\` \[e](f) !\[g](h) \<i> \&lt; \~\~j\~\~ \| k\\ # l\\x1b\[0m init_kl_coef \_\_m\_\_"
    assert in_markdown(text) == shown


def test_a_table_is_aligned_with_chinese_characters_two_columns_wide():
    assert table(["", "b"], [["感觉", "1|"], ["x", ""]]).split("\n") == [
        "|      | b   |",
        "| ---- | --- |",
        "| 感觉 | 1\\| |",
        "| x    |     |",
    ]
