"""config.py and support/run/settings.py: the values of every preset, limits, types, flags, and config.json."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from decimal import Decimal

import numpy as np
import pytest

from config import OTHER_NAMES, PPOConfig, did_you_mean, option
from support.common.errors import UserError
from support.run.settings import changes, check, load_config, parse_args, read_prompts, save_config, total_steps
from tests.helpers import ROOT, read, read_json, tiny_run

DEFAULT = dict(
    preset="default", model_name="uer/gpt2-chinese-cluecorpussmall", reference=None,
    reward_model_name="uer/roberta-base-finetuned-jd-binary-chinese", positive_label=None, reward=[], reward_weights=[],
    prompts=["刚收到货,感觉"], prompts_file=None, gen_len=16, temperature=1.0,
    episodes=20_000, batch_size=128, minibatch_size=128, ppo_epochs=4, gamma=1.0, lam=1.0, cliprange=0.2,
    cliprange_value=0.2, vf_coef=0.1, detach_value=True, frozen_share=0.6666666666666666,
    init_kl_coef=0.2, kl_budget=0.0, kl_controller="fixed", target=6.0, horizon=10_000,
    lr=4e-5, value_lr=1e-3, adam_epsilon=1e-5, average_power=3.0, max_grad_norm=1.0, micro_batch_size=0,
    seed=1, device="auto", dtype="auto", run_name=None, runs_dir="runs", log_samples_every=10, stop_on_alarm=False,
    track="none", save_every=50, save_every_minutes=10.0, keep_checkpoints=2, process_timeout=600.0, eval_samples=1024,
    resume=None, eval_only=None, complete=None, n=5,
)  # fmt: skip
THOROUGH = {"episodes": 163_840, "batch_size": 1024, "ppo_epochs": 1, "lr": 1.2e-4, "eval_samples": 8192}
ARTICLE = {"prompts": ["刚收到货，感觉", "这部电影很", "说实话，真的很", "这次购物总的来说体验很"]}
ARTICLE |= {"minibatch_size": 1, "lam": 0.95, "detach_value": False, "frozen_share": 0.0, "kl_controller": "adaptive"}
ARTICLE |= {"lr": 1.41e-5, "value_lr": 1.41e-5, "adam_epsilon": 1e-8, "average_power": 1e9}
DEMO = {"model_name": "demo", "reward_model_name": "demo", "episodes": 10_240, "lam": 0.95, "frozen_share": 0.0}
DEMO |= {"init_kl_coef": 0.15, "lr": 1e-4, "dtype": "float32"}
CHANGES = {"default": {}, "thorough": THOROUGH, "article": ARTICLE, "demo": DEMO}
PRESETS = {preset: DEFAULT | changed | {"preset": preset} for preset, changed in CHANGES.items()}
CHOICES = {"kl_controller": ["adaptive", "fixed"], "dtype": ["auto", "float32", "bfloat16"]}
CHOICES |= {"track": ["none", "wandb", "swanlab", "trackio"]}


@pytest.fixture(autouse=True)
def versions_are_known(monkeypatch):
    """Skip the check of installed versions, because `check` is called hundreds of times here."""
    monkeypatch.setattr("support.run.settings.check_versions", lambda: None)


def typed(values: dict) -> list:
    """Return values with their types, because 1 == 1.0 == True."""
    return [(name, type(value), value) for name, value in values.items()]


def refusal(**values) -> str:
    with pytest.raises(UserError) as error:
        check(PPOConfig(**values))
    return str(error.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_the_same_values_in_python_flags_help_and_config_json(preset, tmp_path, monkeypatch, capsys):
    expected = typed(PRESETS[preset])
    config, given = parse_args(["--preset", preset])
    check(config)
    assert typed(vars(config)) == typed(vars(PPOConfig(preset=preset))) == expected and given == {"preset"}
    save_config(config, tmp_path / "config.json")
    assert typed(json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))) == expected
    assert typed(vars(load_config(tmp_path / "config.json"))) == expected
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", preset, "--help"])
    assert stop.value.code == 0
    shown = re.findall(r"\n  --(\w+) .*(?:\n {9,}.*)?\(default: (.*)\)(?=\n)", capsys.readouterr().out)
    assert shown == [(name, str(value)) for name, value in PRESETS[preset].items()]


def test_given_values_override_the_preset_and_the_preset_overrides_the_defaults():
    assert vars(PPOConfig(preset="demo", lr=2e-5, lam=0.5)) == PRESETS["demo"] | {"lr": 2e-5, "lam": 0.5}
    for argv in (["--preset", "demo", "--lr", "4e-5"], ["--lr", "4e-5", "--preset", "demo"]):
        config, given = parse_args(argv)  # the default preset's value, given explicitly
        assert vars(config) == PRESETS["demo"] | {"lr": 4e-5} and given == {"preset", "lr"}
    replaced = dataclasses.replace(PPOConfig(preset="article"), lr=1e-4)
    assert vars(replaced) == PRESETS["article"] | {"lr": 1e-4}
    assert vars(dataclasses.replace(PPOConfig(), preset="article")) == DEFAULT | {"preset": "article"}
    assert PPOConfig(lr=1e-5) == PPOConfig(lr=1e-5) != PPOConfig()
    PPOConfig(preset="article").prompts.append("衣服")  # configs don't share lists
    PPOConfig().prompts.append("衣服")
    assert [PPOConfig(preset=preset).prompts for preset in PRESETS] == [PRESETS[name]["prompts"] for name in PRESETS]
    assert total_steps(PPOConfig(episodes=129, batch_size=128)) == 2 == total_steps(PPOConfig(episodes=256))
    with pytest.raises(TypeError, match="no field 'learning_rate'; did you mean lr[?]"):
        PPOConfig(learning_rate=1e-5)


def test_a_smaller_batch_size_also_lowers_the_minibatch_size_and_says_so(capsys):
    for sizes, minibatch, said in (
        (dict(batch_size=32), 32, "minibatch_size is 32 instead of 128, because batch_size is 32\n"),
        (dict(preset="thorough", batch_size=64), 64, "minibatch_size is 64 instead of 128, because batch_size is 64\n"),
        (dict(preset="article", batch_size=32), 1, ""),
        (dict(batch_size=256), 128, ""),
        (dict(batch_size=32, minibatch_size=8), 8, ""),
    ):
        config, _ = parse_args([word for name in sizes for word in (f"--{name}", str(sizes[name]))])
        assert config.minibatch_size == PPOConfig(**sizes).minibatch_size == minibatch
        check(config)
        assert capsys.readouterr().out == 2 * said


def test_setting_names_of_other_libraries_map_to_settings_that_exist():
    """No name is listed twice, and docs/trl.md maps TRL's settings in the same way."""
    names = [name for others in OTHER_NAMES.values() for name in others.split()]
    assert len(names) == len(set(names)) and not DEFAULT.keys() & set(names)
    assert {meant for meant in OTHER_NAMES if " " not in meant} <= DEFAULT.keys()
    rows = read("docs/trl.md").partition("## Settings")[2].partition("Only here")[0].splitlines()
    told = [[re.findall(r"`(\w+)`", cell) for cell in row.split("|")[1:3]] for row in rows if row.startswith("| `")]
    for theirs, ours in told:
        for name in set(theirs) - DEFAULT.keys():
            hint = did_you_mean(name)
            assert " mean " not in hint or any(f" mean {mine}?" in hint for mine in ours), (name, hint)
    assert did_you_mean("mood") == ""


def test_changes_lists_both_values_of_each_setting_except_for_run_names():
    config = PPOConfig(preset="demo", lr=2e-4, prompts=["衣服"], seed=1, run_name="mine", runs_dir="there", resume="x")
    assert changes(config) == {"prompts": [["刚收到货,感觉"], ["衣服"]], "lr": [1e-4, 2e-4]}
    assert all(changes(PPOConfig(preset=preset)) == {} for preset in PRESETS)


TINY = 5e-324  # the smallest number above 0
AT_LEAST_1 = "gen_len episodes batch_size minibatch_size ppo_epochs horizon keep_checkpoints n".split()
AT_LEAST_0 = "vf_coef init_kl_coef kl_budget average_power save_every_minutes micro_batch_size".split()
AT_LEAST_0 += ["log_samples_every", "save_every"]
ABOVE_0 = "temperature cliprange cliprange_value target lr value_lr adam_epsilon max_grad_norm".split()
SHARES = "gamma lam frozen_share".split()
LIMITS = {  # name: (values at its limits, values just outside)
    **{name: ([1, 10**9], [0, -1]) for name in AT_LEAST_1},
    **{name: ([0, 10**9], [-1 if type(DEFAULT[name]) is int else -TINY]) for name in AT_LEAST_0},
    **{name: ([TINY, 1e308], [0.0, -TINY]) for name in ABOVE_0},
    **{name: ([0.0, 1.0], [-TINY, math.nextafter(1, 2)]) for name in SHARES},
    "seed": ([0, 2**63 - 1], [-1, 2**63]),
    "process_timeout": ([TINY, 1e6], [0.0, math.nextafter(1e6, math.inf)]),
    "eval_samples": ([2, 10**9], [1]),
}


def test_every_number_is_checked_against_its_limits():
    assert set(LIMITS) == {name for name, value in DEFAULT.items() if type(value) in (int, float)}
    for name, (allowed, refused) in LIMITS.items():
        others = {"minibatch_size": 1} if name == "batch_size" else {}
        others |= {"batch_size": 10**9} if name == "minibatch_size" else {}
        for value in allowed:
            check(PPOConfig(**{name: value}, **others))
        for value in refused + [math.nan, math.inf, -math.inf] * (type(DEFAULT[name]) is float):
            assert f"--{name} must be " in refusal(**{name: value}, **others), (name, value)


# Values that a script or an edited config.json may contain by mistake
OTHER_TYPES = {int: [1.5, "16", True, None, np.int64(1)], float: ["1e-5", False, Decimal(1), np.float32(1)]}
OTHER_TYPES |= {
    bool: [1, "true"],
    str: [1, None, ["a"]],
    list: ["好", ("好",), ["好", 1]],
    type(None): [1, True, ["a"]],
}


def test_a_value_of_the_wrong_type_is_rejected():
    for name, default in DEFAULT.items():
        for value in OTHER_TYPES[type(default)]:
            assert f"--{name} " in refusal(**{name: value}), (name, value)
    for name, choices in CHOICES.items():
        assert str(choices) in refusal(**{name: choices[0].upper()})
    check(PPOConfig(lr=1, target=np.float64(2)))  # an int is allowed for a float, and np.float64 is a float


def test_a_minibatch_must_fit_into_a_batch_and_a_run_name_must_be_a_folder_name():
    check(PPOConfig(batch_size=64, minibatch_size=64))
    assert "--minibatch_size 65 is larger than --batch_size 64" in refusal(batch_size=64, minibatch_size=65)
    for name in ("run", "a_b-c.d", "7", "感觉"):
        check(PPOConfig(run_name=name))
    for name in ("", ".", "..", "-x", "_x", "a/b", "a\\b", "a b", "a:b", "a\n", "~"):
        assert "--run_name" in refusal(run_name=name)


def test_a_prompts_file_has_one_prompt_per_line(tmp_path):
    """It is read as UTF-8 on every system. A byte order mark and empty lines at the end are ignored."""
    for content, prompts in {
        "\ufeff刚收到货,感觉\r\n这部电影很\r\n": ["刚收到货,感觉", "这部电影很"],
        "a\nb\na\n\n\n": ["a", "b", "a"],
        "a\u2028b\x0bc\nd\x85\n": ["a\u2028b\x0bc", "d\x85"],
    }.items():
        file = tmp_path / "prompts.txt"
        file.write_bytes(content.encode())
        assert read_prompts(PPOConfig(prompts_file=str(file), prompts=["书"])) == {"prompt": prompts}
    bad = {b"": "prompt 1 must be", "好\n\n坏\n".encode(): "prompt 2 must be", "感觉".encode("gbk"): "UTF-8"}
    for content, said in bad.items():
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"{file}.*{said}"):
            read_prompts(PPOConfig(prompts_file=str(file)))
    for settings in {"prompts_file": str(tmp_path)}, {"prompts": ["好", " "]}, {"prompts": []}:
        with pytest.raises(UserError, match="cannot be read|prompt 2 must be a text|prompt 1 must be a text"):
            read_prompts(PPOConfig(**settings))


def test_every_flag_sets_its_field_with_the_right_type():
    words = {int: (["7"], 7), float: (["3e-5"], 3e-5), list: (["这部-电影", "a_b"], ["这部-电影", "a_b"])}
    words |= {str: (["./a-b"], "./a-b"), type(None): (["a-b_c"], "a-b_c"), bool: (["False"], False)}
    chosen = {"kl_controller": "adaptive", "dtype": "bfloat16", "track": "swanlab"}
    for name in DEFAULT:
        args, value = words[type(DEFAULT[name])]
        args, value = ([chosen[name]], chosen[name]) if name in chosen else (args, value)
        args, value = (["-1", "0.5"], [-1.0, 0.5]) if name == "reward_weights" else (args, value)
        args, value = (["default"], "default") if name == "preset" else (args, value)
        others = {"minibatch_size": 7} if name == "batch_size" else {}
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            config, given = parse_args([flag, *args])
            assert typed(vars(config)) == typed(DEFAULT | {name: value} | others) and given == {name}


def test_a_boolean_flag_can_be_turned_on_and_off_and_the_last_value_wins():
    for argv in ("--detach_value", "--detach-value true", "--no_detach_value --detach_value=YES"):
        config, given = parse_args(["--preset", "article", *argv.split()])
        assert config.detach_value is True and given == {"preset", "detach_value"}
    for argv in ("--detach_value=no", "--no_detach_value", "--detach_value --no-detach-value", "--detach_value False"):
        config, given = parse_args(argv.split())
        assert config.detach_value is False and given == {"detach_value"}
    config, _ = parse_args(["--run-name=my-run", "--lr=1e-5", "--prompts=-5 度", "--lr", "2e-5", "--minibatch-size=32"])
    assert (config.run_name, config.lr, config.prompts, config.minibatch_size) == ("my-run", 2e-5, ["-5 度"], 32)


def test_help_shows_the_groups_without_importing_torch():
    """Runs in a separate process, because the tests have already imported torch."""
    code = (
        "import sys, train_ppo\n"
        "try: train_ppo.main(['--preset', 'demo', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "print(*{'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr.split() == []
    assert "python train_ppo.py --preset demo" in result.stdout
    kl = result.stdout.split("section 2.2):")[1].split("\n\n")[0]
    assert re.findall(r"\n  --(\w+) ", kl) == ["init_kl_coef", "kl_budget", "kl_controller", "target", "horizon"]


def test_a_config_is_unchanged_after_saving_and_loading(tmp_path):
    path = tmp_path / "config.json"
    config = PPOConfig(preset="article", prompts=["这部电影很"], run_name="感觉", seed=2**63 - 1, device="cuda:99")
    save_config(config, path)
    assert load_config(path) == config  # even if this machine lacks the device
    assert '"这部电影很"' in path.read_text(encoding="utf-8")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as some editors save it
    assert load_config(path) == config
    path.write_text('{"lr": "big"}')
    with pytest.raises(UserError, match="--lr must be float, not 'big'"):
        check(load_config(path))


def test_a_new_field_works_everywhere(policy, tmp_path, monkeypatch, capsys, without_pictures):
    """It becomes a flag with a limit, appears in --help, and is saved in the files of a run."""

    @dataclasses.dataclass(init=False)
    class Changed(PPOConfig):
        bonus: float = option(0.5, "Adds 10% of something.", at_least=0)
        plain_field: int = 2

    for module in ("support.run.settings", "tests.helpers"):
        monkeypatch.setattr(f"{module}.PPOConfig", Changed)
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    assert re.search(r"--bonus BONUS +Adds 10% of something. \(default: 0.5\)", capsys.readouterr().out)
    with pytest.raises(UserError, match="--bonus must be at least 0"):
        check(parse_args(["--bonus", "-1"])[0])
    assert tiny_run(tmp_path / "run", policy, plain_field=parse_args(["--plain-field", "3"])[0].plain_field) == 0
    settings = read_json(tmp_path / "run" / "config.json")
    assert (settings["bonus"], settings["plain_field"]) == (0.5, 3)
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert re.search(r"\| plain.?_field *\| 3 *\| 2 *\|", report) and "| bonus" not in report


def test_config_files_of_older_versions_with_one_reward_or_none_can_be_read(tmp_path):
    for saved, reward in (("my:score", ["my:score"]), (None, [])):
        (tmp_path / "config.json").write_text(json.dumps({"reward": saved}))
        assert load_config(tmp_path / "config.json").reward == reward
