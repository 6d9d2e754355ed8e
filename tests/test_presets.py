"""The values of every setting: of `PPOConfig()`, of each preset, and that a run's folder keeps its own."""

import dataclasses
import json
import re

import pytest
from transformers import HfArgumentParser

from config import PRESETS, PPOConfig
from support.errors import UserError
from support.settings import (
    changes,
    check,
    describe_changes,
    load_config,
    parse_args,
    save_config,
    total_steps,
)

DEFAULT = {
    "preset": "default",
    "model_name": "uer/gpt2-chinese-cluecorpussmall",
    "reward_model_name": "uer/roberta-base-finetuned-jd-binary-chinese",
    "positive_label": None,
    "reward": None,
    "prompts": ["刚收到货,感觉"],
    "prompts_file": None,
    "gen_len": 16,
    "temperature": 1.0,
    "episodes": 20_000,
    "batch_size": 128,
    "minibatch_size": 128,
    "ppo_epochs": 4,
    "gamma": 1.0,
    "lam": 1.0,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "detach_value": True,
    "frozen_share": 0.6666666666666666,
    "init_kl_coef": 0.2,
    "kl_budget": 0.0,
    "kl_controller": "fixed",
    "target": 6.0,
    "horizon": 10_000,
    "lr": 4e-5,
    "value_lr": 1e-3,
    "adam_epsilon": 1e-5,
    "average_power": 3.0,
    "max_grad_norm": 1.0,
    "micro_batch_size": 0,
    "seed": 1,
    "device": "auto",
    "dtype": "auto",
    "run_name": None,
    "runs_dir": "runs",
    "log_samples_every": 10,
    "track": "none",
    "save_every": 50,
    "save_every_minutes": 10.0,
    "keep_checkpoints": 2,
    "process_timeout": 600.0,
    "eval_samples": 1024,
    "resume": None,
    "eval_only": None,
}
PRESET_VALUES = {
    "default": DEFAULT,
    "thorough": DEFAULT
    | {
        "preset": "thorough",
        "episodes": 163_840,
        "batch_size": 1024,
        "ppo_epochs": 1,
        "lr": 1.2e-4,
        "eval_samples": 8192,
    },
    "article": DEFAULT
    | {
        "preset": "article",
        "minibatch_size": 1,
        "lam": 0.95,
        "detach_value": False,
        "frozen_share": 0.0,
        "prompts": ["刚收到货，感觉", "这部电影很", "说实话，真的很", "这次购物总的来说体验很"],
        "kl_controller": "adaptive",
        "lr": 1.41e-5,
        "value_lr": 1.41e-5,
        "adam_epsilon": 1e-8,
        "average_power": 1e9,
    },
    "demo": DEFAULT
    | {
        "preset": "demo",
        "model_name": "demo",
        "reward_model_name": "demo",
        "episodes": 10_240,
        "lam": 0.95,
        "frozen_share": 0.0,
        "init_kl_coef": 0.15,
        "lr": 1e-4,
        "value_lr": 1e-2,
        "dtype": "float32",
    },
}


def typed(values: dict) -> dict:
    """Values with their types, since 1 == 1.0 == True."""
    return {name: (type(value), value) for name, value in values.items()}


def test_every_setting_has_the_value_that_is_written_here():
    assert typed(dataclasses.asdict(PPOConfig())) == typed(DEFAULT)


@pytest.mark.parametrize("preset", PRESET_VALUES)
def test_a_preset_has_the_same_values_from_python_from_the_command_line_and_in_its_file(preset, tmp_path):
    expected = typed(PRESET_VALUES[preset])
    config, given = parse_args(["--preset", preset])
    check(config)
    assert typed(dataclasses.asdict(config)) == expected and given == {"preset"}
    assert typed(dataclasses.asdict(PPOConfig(preset=preset))) == expected
    save_config(config, tmp_path / "config.json")
    assert typed(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == expected
    assert typed(dataclasses.asdict(load_config(tmp_path / "config.json"))) == expected


def test_no_flag_is_the_preset_default():
    config, given = parse_args([])
    assert dataclasses.asdict(config) == DEFAULT and given == set()


@pytest.mark.parametrize("preset", PRESET_VALUES)
def test_help_shows_the_preset_s_values(preset, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", preset, "--help"])
    assert stop.value.code == 0
    shown = re.findall(r"\n  --(\w+) .*(?:\n {9,}.*)?\(default: (.*)\)(?=\n)", capsys.readouterr().out)
    assert shown == [(name, str(value)) for name, value in PRESET_VALUES[preset].items()]


def test_the_presets_are_these():
    assert list(PRESETS) == list(PRESET_VALUES)
    for refuse in (lambda: check(PPOConfig(preset="big")), lambda: parse_args(["--preset", "big", "--help"])):
        with pytest.raises(
            UserError, match="^--preset big is unknown; choose one of default, thorough, article, demo$"
        ):
            refuse()


@pytest.mark.parametrize("preset", [["demo"], {}, 1, None])
def test_a_preset_that_is_no_name_is_refused(preset):
    with pytest.raises(UserError, match="^preset must be of type str"):
        check(PPOConfig(preset=preset))


def test_what_is_given_counts_more_than_the_preset():
    demo, article = PPOConfig(preset="demo", lr=2e-5, lam=0.5), PPOConfig(preset="article", minibatch_size=4)
    assert dataclasses.asdict(demo) == PRESET_VALUES["demo"] | {"lr": 2e-5, "lam": 0.5}
    assert dataclasses.asdict(article) == PRESET_VALUES["article"] | {"minibatch_size": 4}
    for argv in (["--preset", "demo", "--lr", "4e-5"], ["--lr", "4e-5", "--preset", "demo"]):
        config, given = parse_args(argv)  # the default preset's value, given
        assert dataclasses.asdict(config) == PRESET_VALUES["demo"] | {"lr": 4e-5} and given == {"preset", "lr"}


def test_a_replaced_preset_changes_no_other_value():
    """All values are given then, as `dataclasses.replace` gives them."""
    article = PPOConfig(preset="article")
    assert dataclasses.asdict(dataclasses.replace(article, lr=1e-4)) == PRESET_VALUES["article"] | {"lr": 1e-4}
    assert dataclasses.asdict(dataclasses.replace(PPOConfig(), preset="article")) == DEFAULT | {"preset": "article"}


def test_an_older_article_run_keeps_the_values_it_wrote(tmp_path):
    """Before there was `default`, its values were called `article`: what is written counts, not the name."""
    (tmp_path / "config.json").write_text(json.dumps(DEFAULT | {"preset": "article"}), encoding="utf-8")
    assert dataclasses.asdict(load_config(tmp_path / "config.json")) == DEFAULT | {"preset": "article"}


def test_configs_share_no_list():
    PPOConfig().prompts.append("这部电影很")
    assert PPOConfig().prompts == ["刚收到货,感觉"]


def test_a_name_that_is_no_setting_is_a_type_error():
    with pytest.raises(TypeError, match="learning_rate"):
        PPOConfig(learning_rate=1e-5)
    with pytest.raises(TypeError):
        PPOConfig("demo")


@pytest.mark.parametrize(
    ("episodes", "batch_size", "steps"), [(1, 1, 1), (1, 128, 1), (128, 128, 1), (129, 128, 2), (20_000, 128, 157)]
)
def test_episodes_are_rounded_up_to_whole_batches(episodes, batch_size, steps):
    assert total_steps(PPOConfig(episodes=episodes, batch_size=batch_size)) == steps


# --- where a run differs from its preset


def test_changes_name_both_values_and_leave_out_names_of_runs():
    config = PPOConfig(preset="demo", lr=2e-4, prompts=["衣服"], seed=1, run_name="mine", runs_dir="there", resume="x")
    assert changes(config) == {"prompts": [["刚收到货,感觉"], ["衣服"]], "lr": [1e-4, 2e-4]}
    said = "changed from the preset demo: prompts ['衣服'] (preset: ['刚收到货,感觉']), lr 0.0002 (preset: 0.0001)"
    assert describe_changes(config) == said
    for preset in PRESETS:
        assert changes(PPOConfig(preset=preset)) == {} and describe_changes(PPOConfig(preset=preset)) == ""


def test_other_parsers_of_dataclasses_take_the_config():
    parser = HfArgumentParser(PPOConfig)
    (config,) = parser.parse_args_into_dataclasses(["--lr", "2e-5", "--prompts", "衣服", "苹果"])
    assert config == PPOConfig(lr=2e-5, prompts=["衣服", "苹果"])
    assert dataclasses.replace(config, gamma=0.9).lr == 2e-5
