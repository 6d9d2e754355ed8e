"""report.md of folders made by hand; of a whole run it is looked at in test_run_recounted.py and test_resume.py."""

import json

import pytest

from config import PPOConfig
from support.errors import UserError
from support.evaluation import figures
from support.figures import in_markdown
from support.report import read_starts, run_report
from support.settings import save_config

JUDGED = {"n": 1500, "reward_ci95": 0.011, "kl": 0.0, "distinct_1": 0.1, "distinct_2": 0.5, "unique": 0.9}
JUDGED |= {"length": 12.3, "ended": 0.25, "ref_logprob": -2.5, "commonest": [], "kls": [0.5, 0.25]}
GAIN = {"beta": 0.15, "limit": {"reward": 0.9317, "kl": 1.3579, "J": 0.7284, "effective_samples": 300.0}}
GAIN |= {"J_before": 0.2546, "J": 0.6904, "gain": 0.9177, "gain_se": 0.0234}
INPUTS = {"the hash of the weights of --model_name ./gpt2": "0123456789ab", "the hash of the prompts": "ba9876543210"}


def judged(completions: list[str], **values) -> dict:
    samples = [["好", text, score] for text, score in zip(completions, (0.1, 0.9))]
    return JUDGED | {"samples": samples} | values


@pytest.fixture
def results() -> dict:
    """A run that has been judged; its scores have a standard deviation of 0.4."""
    before, after = judged(["a|b", "c\\"], reward=0.2546), judged(["<b>", "两\n行"], reward=0.876, kl=1.2345)
    drafts = [{"n": 2, "reward": 0.5, "kl": 0.19, "gain": 0.456}, {"n": 3, "reward": 0.5, "kl": 0.43, "gain": 0.7}]
    found = {"before": before, "after": after, "steps": 3, "alarms": [{"step": 2, "alarm": "x", "says": "too fast"}]}
    return found | {"gain": GAIN, "frontier": [], "best_of_n": drafts, "verdict": "good: 92% of what is possible"}


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "my_run"
    folder.mkdir()
    save_config(PPOConfig(preset="demo", lr=2e-4, run_name="my_run"), folder / "config.json")
    (folder / "metrics.csv").write_text(
        "step,episodes,env/reward_mean,objective/kl,time/step\n1,2,0,0,50\n2,4,0,0,7\n3,6,0,0,8.6\n"
    )
    (folder / "rewards.png").touch()
    starts = [
        {
            "command": "python train_ppo.py --lr 2e-4 --prompts '好 `x` <b>'",
            "step": 1,
            "torch": "2.6.0",
            "device": "cpu",
        },
        {"command": "python train_ppo.py --resume runs/my_run", "step": 3, "torch": "2.13.0", "device": "cpu"},
        {"step": None, "torch": "2.6.0", "device": "cpu", "parameters": 102068736},
    ]
    (folder / "environment.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return folder


def test_a_report_says_what_came_of_the_run_and_how_it_was_made(run, results):
    assert run_report(run, results, INPUTS, read_starts(run)).split("\n") == [
        "# my\\_run",
        "",
        "**good: 92% of what is possible**",
        "",
        "![curves of the run](rewards.png)",
        "",
        "## Results",
        "",
        "Judged on 1,500 completions before training and as many after it, of the same random draws. The limit is the "
        "best policy that this KL coefficient allows, and the gain the share of the way there; KL is in nats a "
        "completion.",
        "",
        "| | before | after | the limit |",
        "| --- | ---: | ---: | ---: |",
        "| mean reward | 0.255 | 0.876 | 0.932 |",
        "|   95% interval, plus or minus | 0.011 | 0.011 |  |",
        "| KL to the reference, nats | 0.000 | 1.234 | 1.358 |",
        "| distinct-1, characters | 0.100 | 0.100 |  |",
        "| distinct-2, pairs of characters | 0.500 | 0.500 |  |",
        "| unique completions | 90.0% | 90.0% |  |",
        "| mean length, tokens | 12.3 | 12.3 |  |",
        "| ended by [SEP] | 25.0% | 25.0% |  |",
        "| log-probability a token, reference | -2.50 | -2.50 |  |",
        "| J = reward - 0.15 KL | 0.255 | 0.690 | 0.728 |",
        "| gain | 0 | 0.92 (standard error 0.02) | 1 |",
        "",
        "Without any training, the best of several drafts by the original model has a gain of 0.46 with 2, 0.70 with "
        "3.",
        "",
        "Warnings while it trained:",
        "",
        "- step 2: too fast",
        "",
        "## The first 5 completions, before and after",
        "",
        "| prompt | before | score | after | score |",
        "| --- | --- | --- | --- | --- |",
        r"| 好 | a\|b | 0.10 | \<b> | 0.10 |",
        r"| 好 | c\\ | 0.90 | 两 行 | 0.90 |",
        "",
        "## How it was made",
        "",
        "    python train_ppo.py --lr 2e-4 --prompts '好 `x` <b>'  # from step 1",
        "    python train_ppo.py --resume runs/my_run  # from step 3",
        "    (command not kept)  # judged again",
        "",
        "Settings that differ from the preset demo:",
        "",
        "| setting | here | preset |",
        "| --- | --- | --- |",
        "| lr | 0.0002 | 0.0001 |",
        "",
        "| input | hash |",
        "| --- | --- |",
        r"| the weights of --model\_name ./gpt2 | 0123456789ab |",
        "| the prompts | ba9876543210 |",
        "",
        "| what | here |",
        "| --- | --- |",
        "| training | 3 steps in 1 min 6 s, without loading and judging; 8.60 s a step in the median |",
        "| torch | 2.6.0 (from step 1), 2.13.0 (from step 3), 2.6.0 (judged again) |",
        "| device | cpu |",
        "| parameters | unknown (from step 1), 102,068,736 (judged again) |",
        "",
    ]


def test_what_is_not_known_is_left_out_of_a_report(run, results):
    """No gain, no alarms, no metrics.csv and so no picture, no line of a start; settings as published."""
    save_config(PPOConfig(preset="demo"), run / "config.json")
    (run / "metrics.csv").unlink()
    (run / "rewards.png").unlink()
    results |= {"gain": {"gain": None, "why": "no price"}, "best_of_n": [{"n": 2, "gain": None}], "alarms": []}
    report = run_report(run, results, INPUTS, [])
    assert "All settings are those of the preset demo.\n" in report
    for left_out in ("![", "| J", "| gain", "drafts", "Warnings", "python", "| training", "| setting"):
        assert left_out not in report
    assert "| mean reward | 0.255 | 0.876 |  |" in report


def test_a_command_of_a_strangers_folder_stays_one_line_of_code(run, results):
    start = {"command": "python x\n# Title\r\n<script>", "step": 1}
    assert r"    python x\n# Title\r\n<script>  # from step 1" in run_report(run, results, INPUTS, [start]).split("\n")


@pytest.mark.parametrize("line", ["nice!", "[]", '{"step": "1"}', '{"step": 1, "command": ["python"]}'])
def test_a_damaged_line_of_a_start_is_refused_with_its_place(run, line):
    path = run / "environment.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n')
    with pytest.raises(UserError, match=f"line 2 of {path} is damaged: .*; mend that line, or remove it"):
        read_starts(run)


def test_a_text_in_markdown_is_shown_as_it_stands():
    """What begins markup, HTML, an entity or a new cell has a backslash; white space of any kind is one space."""
    text = "a *b* _c_ `d` [e](f) ![g](h) <i> &lt; ~~j~~ | k\\\n\u2028 # l\x1b[0m"
    shown = r"a \*b\* \_c\_ \`d\` \[e](f) !\[g](h) \<i> \&lt; \~\~j\~\~ \| k\\ # l\\x1b\[0m"
    assert in_markdown(text) == shown


def test_the_figures_come_without_the_samples_and_first_what_matters_most(results):
    shown = figures(results)
    assert list(shown)[:2] == ["verdict", "gain"] and set(shown) == set(results)
    for when in ("before", "after"):
        assert shown[when] == {name: value for name, value in results[when].items() if name not in ("samples", "kls")}
    assert len(results["before"]["samples"]) == 2  # which evaluation.json still holds
