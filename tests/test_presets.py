"""The presets: what each sets, that a run's folder names its own, and that older folders still open."""

import dataclasses
import json

import pytest

from config import PRESETS, PPOConfig, load_config, parse_args

ARTICLE = {
    "frozen_share": 0,
    "lr": 1.41e-5,
    "value_lr": 1.41e-5,
    "detach_value": False,
    "lam": 0.95,
    "kl_controller": "adaptive",
    "init_kl_coef": 0.2,
    "target": 6,
    "horizon": 10_000,
    "batch_size": 128,
    "minibatch_size": 1,
    "ppo_epochs": 4,
    "gamma": 1,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "adam_epsilon": 1e-8,
    "average_power": 1e9,
}


def test_without_a_flag_the_preset_is_default_and_changes_nothing():
    config, given = parse_args([])
    assert config == PPOConfig() and config.preset == "default" and not given


def test_article_has_the_articles_settings():
    config, _ = parse_args(["--preset", "article"])
    config.check()
    assert {name: getattr(config, name) for name in ARTICLE} == ARTICLE


@pytest.mark.parametrize("preset", PRESETS)
def test_config_json_names_its_preset(preset, tmp_path):
    config, _ = parse_args(["--preset", preset])
    config.save(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["preset"] == preset
    assert load_config(tmp_path / "config.json") == config


def test_an_older_article_run_keeps_the_values_it_wrote(tmp_path):
    """Before there was `default`, its values were called `article`: what is written counts, not the name."""
    written = dataclasses.asdict(PPOConfig()) | {"preset": "article"}
    (tmp_path / "config.json").write_text(json.dumps(written), encoding="utf-8")
    assert dataclasses.asdict(load_config(tmp_path / "config.json")) == written
