"""support/compare.py: which runs are one curve, what they are called, and the table, by hand."""

import json

import numpy as np
import pytest

from config import PPOConfig
from plot_rewards import main
from support.compare import (
    Run,
    curves,
    order,
    read_run,
    remarks,
    short,
    table,
    what_does_not_compare,
)
from support.errors import UserError
from tests.helpers import COLUMNS, MEAN, judged, write_evaluation, write_run

pytestmark = pytest.mark.usefixtures("in_a_folder_of_its_own")
DEMO = vars(PPOConfig(preset="demo"))


def run(name="run", episodes=(128, 256), evaluation=None, hashes=None, **settings) -> Run:
    """A run of the demo but for these settings; `name` is its folder's."""
    episodes = np.array(episodes, dtype=float)
    metrics = {"step": episodes / 128, "episodes": episodes, MEAN: episodes / 1000}
    return Run(name, metrics, evaluation or {}, {**DEMO, "run_name": name, **settings}, hashes or {})


def labels(*runs, by=()) -> list[str]:
    return [curve.label for curve in curves(list(runs), by)]


def test_runs_that_differ_in_the_seed_alone_are_one_curve_called_by_what_differs_from_the_others():
    runs = [run(f"{lr} {seed}", lr=lr, seed=seed) for lr in (1e-4, 3e-4, 3e-5) for seed in (1, 2, 3)]
    found = curves(runs)
    assert [curve.label for curve in found] == [f"lr {lr}, 3 seeds" for lr in ("3e-5", "1e-4", "3e-4")]
    assert [[r.name for r in curve.runs] for curve in found] == [
        [f"{lr} {seed}" for seed in (1, 2, 3)] for lr in (3e-5, 1e-4, 3e-4)
    ]
    assert labels(*runs[:4]) == ["lr 1e-4, 3 seeds", "lr 3e-4"]
    assert labels(*runs[:3]) == ["3 seeds"]
    assert labels(runs[0]) == ["0.0001 1"]


def test_what_changes_nothing_that_is_computed_tells_no_runs_apart():
    other = dict(seed=2, run_name="b", runs_dir="x", resume="y", save_every=1, keep_checkpoints=9, process_timeout=5.0)
    assert labels(run("a"), run("b", **other)) == ["2 seeds"]
    assert labels(run("a"), run("b", device="cuda")) == ["device auto", "device cuda"]  # another time a step


def test_a_seed_that_comes_twice_is_no_second_seed():
    """Somebody changed the program between the two: their names tell."""
    assert labels(run("old"), run("new")) == ["old", "new"]
    assert labels(run("old"), run("new"), run("c", lr=0.5)) == ["lr 1e-4, old", "lr 1e-4, new", "lr 0.5"]


def test_values_that_read_the_same_are_told_apart_by_the_runs_names():
    assert labels(run("a", model_name="x/gpt2"), run("b", model_name="y/gpt2")) == [
        "model_name gpt2, a",
        "model_name gpt2, b",
    ]


def test_a_preset_stands_for_what_follows_from_it():
    article, default = vars(PPOConfig(preset="article")), vars(PPOConfig())
    presets = [run("a", **article), run("b", **default)]
    assert labels(*presets) == ["preset article", "preset default"]
    own = run("c", **default | {"lr": 0.5})
    assert labels(*presets, own) == [
        "preset article, lr 1.41e-5",
        "preset default, lr 4e-5",
        "preset default, lr 0.5",
    ]
    assert labels(run("a", preset="default"), run("b", seed=2)) == ["2 seeds"]  # of other presets, but the same
    assert labels(run("a", preset="gone", lr=0.5), run("b")) == ["lr 1e-4", "lr 0.5"]


def test_settings_that_an_earlier_version_lacked_are_unknown():
    old = run("old")
    del old.settings["average_power"]
    assert labels(old, run("new", seed=2)) == ["average_power 3", "average_power unknown"]


def test_a_reward_s_file_that_changed_tells_runs_apart_but_the_hash_of_another_model_does_not():
    name = "hash of the file of --reward"
    runs = [run("a", hashes={name: "3f"}), run("b", hashes={name: "4e"}, seed=2)]
    assert labels(*runs) == [f"{name} 3f", f"{name} 4e"]
    runs = [run(value, hashes={"hash of the weights of --model_name": value}, model_name=value) for value in "ab"]
    assert labels(*runs) == ["model_name a", "model_name b"]
    assert labels(run("a", hashes={name: "3f"}), run("b", seed=2)) == ["2 seeds"]  # of an earlier version


def test_by_takes_together_what_differs_in_other_settings():
    runs = [run(f"{lr} {beta}", lr=lr, init_kl_coef=beta) for lr in (0.5, 0.1) for beta in (0.2, 0.1)]
    assert labels(*runs) == [f"init_kl_coef {beta}, lr {lr}" for beta in (0.1, 0.2) for lr in (0.1, 0.5)]
    assert labels(*runs, by=["lr"]) == ["lr 0.1, 2 runs", "lr 0.5, 2 runs"]
    assert labels(*runs[::2], by=["lr"]) == ["lr 0.1", "lr 0.5"]
    assert labels(run("a"), run("b", seed=2), by=["lr"]) == ["lr 1e-4, 2 seeds"]
    assert labels(run("a"), run("b", seed=2), by=["run_name"]) == ["a", "b"]
    assert labels(run("a", seed=2), run("b"), by=["lr", "seed"]) == ["lr 1e-4, seed 1", "lr 1e-4, seed 2"]
    with pytest.raises(UserError) as error:
        curves(runs, ["rate"])
    said = "--by rate: no run here has such a setting; take some of init_kl_coef, lr, run_name, seed"
    assert str(error.value) == said


def test_runs_without_their_settings_are_called_by_their_names_and_come_last():
    bare = run("bare")
    bare.settings = {}
    assert labels(bare, run("a", lr=0.5), run("b", lr=0.1)) == ["lr 0.1", "lr 0.5", "bare"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("lr", 3e-5, "3e-5"),
        ("lr", 1.41e-5, "1.41e-5"),
        ("lr", 1e-3, "1e-3"),
        ("frozen_share", 2 / 3, "0.666667"),
        ("horizon", 10_000, "10000"),
        ("average_power", 1e9, "1e+09"),
        ("detach_value", False, "False"),
        ("positive_label", None, "None"),
        ("model_name", "../models/gpt2", "gpt2"),
        ("reward", "a/b", "a/b"),
        ("prompts", ["好/坏"], "好/坏"),
        ("prompts", ["好", "坏", "一般"], "好 and 2 more"),
        ("prompts", [], "[]"),
        ("prompts", ["好" * 30], "好" * 24 + "…"),
    ],
)
def test_values_are_short(name, value, text):
    assert short(name, value) == text


def test_numbers_are_ordered_by_size_and_stand_before_all_else():
    values = [None, "b", 10, 9.5, "a", -1]
    assert sorted(values, key=order) == [-1, 9.5, 10, "a", "b", None]


def test_a_curve_is_the_mean_at_the_episodes_that_all_its_runs_have_done():
    """Of batches of 128 and 256, at every second step of the first; columns that one lacks are left out."""
    first, second = run("a", [128, 256, 384, 512]), run("b", [256, 512, 768], seed=2)
    second.metrics[MEAN] = second.metrics[MEAN] * 3
    first.metrics["more"] = first.metrics["step"]
    (curve,) = curves([first, second])
    assert curve.metrics["episodes"].tolist() == [[256, 512]] * 2
    assert curve.metrics[MEAN].tolist() == [[0.256, 0.512], pytest.approx([0.768, 1.536])]
    assert list(curve.metrics) == ["step", "episodes", MEAN]
    (curve,) = curves([run("a", [128]), run("b", [100], batch_size=100)], ["lr"])
    with pytest.raises(UserError, match="the runs of lr 1e-4, 2 runs share no number of episodes"):
        curve.metrics


def evaluated(gain, se=0.05, reward=0.9, kl=0.5, unique=0.9) -> dict:
    known = {"gain": gain, "gain_se": se} if gain is not None else {"gain": None, "why": "too few", "gain_se": 9.0}
    return {"after": {"reward": reward, "kl": kl, "unique": unique}, "gain": known}


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]


def test_the_table_by_hand():
    """J of 0.9 and 0.7 at 0.5 and 0.3 nats and beta 0.15 is 0.825 and 0.655; the standard deviation of 0.8 and 0.6 is
    the root of 0.02."""
    runs = [
        run("a", evaluation=evaluated(0.8, 0.02)),
        run("b", seed=2, evaluation=evaluated(0.6, 0.04, 0.7, 0.3, 1.0)),
        run("c", lr=0.5, evaluation=evaluated(None), episodes=[128 * i for i in range(1, 11)]),
        run("d", lr=0.7),
    ]
    for number, each in enumerate(runs):  # a median, which a slow first step does not move
        steps = len(each.metrics["step"])
        each.metrics["time/step"] = np.array([9.0] * (steps > 2) + [number] * (steps - (steps > 2)))
    header, rule, *rows = cells(table(curves(runs)))
    assert header == "lr,seeds,episodes,R,KL,J,gain,SD,error of judging,unique,seconds a step".split(",")
    assert set("".join(rule)) == {"-"}
    assert rows == [
        ["1e-4", "2", "256", "0.800", "0.400", "0.740", "0.70", "0.14", "0.03", "95.0%", "0.50"],
        ["0.5", "1", "1,280", "0.900", "0.500", "0.825", "-", "-", "-", "90.0%", "2.00"],
        ["0.7", "1", "256", "-", "-", "-", "-", "-", "-", "-", "3.00"],
    ]


@pytest.mark.parametrize(("unit", "shown"), [(1, "0.900"), (1e4, "9000.0"), (1e-3, "0.000900")])
def test_rewards_have_the_decimals_of_their_own_unit(unit, shown):
    """A standard deviation of 0.4 needs two, one of 4,000 none, one of 0.0004 five; the table has one more."""
    each = run("a", evaluation=evaluated(0.8, 0.02))
    each.evaluation["after"] = each.evaluation["after"] | {"reward": 0.9 * unit}
    each.metrics["env/reward_std"] = np.array([0.4, 0.1]) * unit
    other = run("b", lr=0.5)
    other.metrics["env/reward_std"] = np.array([0.8, 0.1]) * unit * 100
    header, _, row, _ = cells(table(curves([each, other])))
    assert row[header.index("R")] == shown and len(row[header.index("J")]) >= len(shown)


def test_episodes_have_one_column_and_what_a_value_holds_breaks_none():
    runs = [run("a", episodes=[128]), run("b", prompts=["a|b\\c\n"])]
    runs[0].settings["episodes"] = 128
    text = table(curves(runs))
    assert cells(text)[0][:4] == ["prompts", "seeds", "episodes", "R"]
    assert text.splitlines()[3].startswith("| a\\|b\\\\c\\\\n ")


def test_columns_stand_below_one_another_where_values_are_chinese():
    lines = table(curves([run("a", prompts=["感觉"]), run("b", prompts=["good"])])).splitlines()
    assert [line.split("|")[1] for line in lines] == [" prompts ", " ------- ", " 感觉    ", " good    "]


def test_runs_that_do_not_compare_are_said_to():
    def said(**other):
        return what_does_not_compare([run("a"), run("b", **other)])

    assert said(lr=0.5) == said(seed=2, batch_size=4) == ""
    its_own = "of its own, and their gains do not compare"
    assert said(init_kl_coef=0.5) == f"these runs differ in init_kl_coef: each has a limit {its_own}"
    for name in ("model_name", "reward_model_name", "reward", "prompts", "gen_len", "temperature"):
        assert said(**{name: "x"}) == f"these runs differ in {name}: each has a frontier and a limit {its_own}"
    assert said(model_name="x", init_kl_coef=1).startswith(
        "these runs differ in model_name, init_kl_coef: each has a fro"
    )
    hashes = {"hash of the weights of --model_name": "1"}, {"hash of the weights of --model_name": "2"}
    runs = [run(hashes=these) for these in hashes]
    assert what_does_not_compare(runs).startswith(
        "these runs differ in hash of the weights of --model_name: each has a f"
    )


def test_the_reader_is_told_what_is_missing_or_mixed():
    runs = [
        run("a", evaluation=evaluated(0.8)),
        run("b", [128], seed=2, batch_size=4),
        run("c", lr=0.5, evaluation=evaluated(None)),
        run("d", lr=0.7, evaluation=evaluated(None)),
    ]
    assert remarks(runs, curves(runs, ["lr"])) == [
        "runs in one line of this table differ in batch_size, too; --by tells them apart",
        "lr 1e-4, 2 runs: 1 of 2 not judged yet",
        "lr 1e-4, 2 runs: drawn as far as all of them have come",
        "gain unknown of lr 0.5; lr 0.7: too few",
    ]
    assert remarks([runs[0]], curves([runs[0]])) == []


# ----------------------------------------------------------------------------------------------
# Read from folders


def test_hashes_are_called_by_what_they_are_of_and_the_demo_s_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", 2, settings={})
    inputs = {"model_name /a b/--x": "1", "reward_model_name demo": "2"}
    inputs = {f"the hash of the weights of --{name}": value for name, value in inputs.items()}
    inputs |= {"the hash of the file of --reward my:score": "3", "the hash of the prompts": "4"}
    (folder / "inputs.json").write_text(json.dumps(inputs))
    assert read_run(folder).hashes == {
        "hash of the weights of --model_name": "1",
        "hash of the file of --reward": "3",
        "hash of the prompts": "4",
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "it is no JSON"),
        ('{"preset": "demo", "seed": 1}', "init_kl_coef is missing"),
        ('{"preset": [], "seed": 1, "init_kl_coef": 1}', "preset is missing, or not what it should be"),
        ('{"preset": "demo", "seed": true, "init_kl_coef": 1}', "seed is missing, or not what it should be"),
    ],
)
def test_a_damaged_config_is_told_and_the_run_is_called_by_its_name(tmp_path, content, said, capsys):
    folders = [write_run(tmp_path / f"run{i}", 2, without=COLUMNS[1:], settings={"lr": i + 0.5}) for i in range(3)]
    (folders[0] / "config.json").write_text(content)
    assert main([*map(str, folders), "--out", str(tmp_path / "x.png")]) == 0
    out, err = capsys.readouterr()
    assert err.startswith(f"warning: {folders[0] / 'config.json'} is damaged: ") and said in err
    assert err.endswith("; the run is drawn without it\n") and err.count("\n") == 1
    assert [row[:2] for row in cells(out)[2:5]] == [["1.5", "-"], ["2.5", "-"], ["-", "run0"]]


def test_what_is_printed_is_what_the_file_holds(tmp_path, capsys):
    folders = [
        write_run(tmp_path / f"run{i}", 2, without=COLUMNS[1:], settings={"init_kl_coef": i + 0.5}) for i in (0, 1)
    ]
    write_evaluation(folders[0], after={**judged(0.9, 0.4, [0.5]), "unique": 0.5}, gain={"gain": 0.5, "gain_se": 0.1})
    assert main(["run0", "run1"]) == 0
    written = (tmp_path / "compare.md").read_text()
    assert capsys.readouterr().out == f"{written}wrote compare.png and compare.md\n"
    assert written.count("| 0.5 ") == 1 and "these runs differ in init_kl_coef" in written
    assert main(["run0", "run1", "--by", "lr,seed", "--only", "plane", "--out", "both.svg"]) == 0
    assert "| lr   | seed | runs |" in (tmp_path / "compare.md").read_text()


def test_a_setting_that_no_run_has_is_one_line(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 2, settings={})
    assert main([str(folder), "--by", "lr,rate"]) == 2
    said = "plot_rewards.py: error: --by rate: no run here has such a setting; take some of run_name, seed\n"
    assert capsys.readouterr() == ("", said)
