"""The command line: what it accepts, what it shows, and one line for everything it refuses."""

import importlib.machinery
import json
import math
import os
import re
import runpy
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from config import PPOConfig
from support import user_code
from support.errors import UserError
from support.settings import check, import_function, load_config, parse_args, read_prompts, save_config
from tests.helpers import ROOT
from tests.test_presets import DEFAULT

NUMBERS = {  # name: (values taken, values refused, what is allowed)
    "gen_len": ([1, 4096], [0, -1], "at least 1"),
    "temperature": ([5e-324, 1e308], [0.0, -1.0, math.inf, math.nan], "above 0 and finite"),
    "episodes": ([1, 10**12], [0, -5], "at least 1"),
    "batch_size": ([1, 10**9], [0, -1], "at least 1"),
    "minibatch_size": ([1, 128], [0, -1], "at least 1"),
    "ppo_epochs": ([1, 10**6], [0, -1], "at least 1"),
    "gamma": ([0.0, 0.5, 1.0], [-1e-9, 1.0001, math.inf, math.nan], "at least 0 and at most 1"),
    "lam": ([0.0, 0.95, 1.0], [-1e-9, 1.0001, math.inf, math.nan], "at least 0 and at most 1"),
    "cliprange": ([5e-324, 1e308], [0.0, -0.2, math.inf, math.nan], "above 0 and finite"),
    "cliprange_value": ([5e-324, 1e308], [0.0, -0.2, math.inf, math.nan], "above 0 and finite"),
    "vf_coef": ([0.0, 1e308], [-1e-9, math.inf, math.nan], "at least 0 and finite"),
    "frozen_share": ([0.0, 0.5, 1.0], [-1e-9, 1.0001, math.inf, math.nan], "at least 0 and at most 1"),
    "init_kl_coef": ([0.0, 1e308], [-1e-9, math.inf, math.nan], "at least 0 and finite"),
    "kl_budget": ([0.0, 1e308], [-1e-9, math.inf, math.nan], "at least 0 and finite"),
    "target": ([5e-324, 1e308], [0.0, -6.0, math.inf, math.nan], "above 0 and finite"),
    "horizon": ([1, 10**12], [0, -1], "at least 1"),
    "lr": ([5e-324, 1e308], [0.0, -1e-5, math.inf, math.nan], "above 0 and finite"),
    "value_lr": ([5e-324, 1e308], [0.0, -1e-5, math.inf, math.nan], "above 0 and finite"),
    "adam_epsilon": ([5e-324, 1e308], [0.0, -1e-8, math.inf, math.nan], "above 0 and finite"),
    "average_power": ([0.0, 1e9, 1e308], [-1e-9, math.inf, math.nan], "at least 0 and finite"),
    "max_grad_norm": ([5e-324, 1e308], [0.0, -1.0, math.inf, math.nan], "above 0 and finite"),
    "micro_batch_size": ([0, 1, 10**9], [-1], "at least 0"),
    "seed": ([0, 9223372036854775807], [-1, 9223372036854775808], "at least 0 and at most 9223372036854775807"),
    "log_samples_every": ([0, 1, 10**9], [-1], "at least 0"),
    "save_every": ([0, 1, 10**9], [-1], "at least 0"),
    "save_every_minutes": ([0.0, 1e308], [-1e-9, math.inf, math.nan], "at least 0 and finite"),
    "keep_checkpoints": ([1, 10**9], [0, -1], "at least 1"),
    "process_timeout": ([5e-324, 1e6], [0.0, -1.0, 1000000.5, math.inf, math.nan], "above 0 and at most 1000000"),
    "eval_samples": ([2, 10**9], [1, 0, -1], "at least 2"),
}
OTHER_TYPES = {int: [1.5, "16", True, None, [1]], float: ["1e-5", False, None, [1.0]], bool: [1, "true", None]}
OTHER_TYPES |= {str: [1, None, ["a"]], list: ["好", ("好",), ["好", 1], None], type(None): [1, True, ["a"]]}
CHOICES = {"kl_controller": ["adaptive", "fixed"], "dtype": ["auto", "float32", "bfloat16"]}
CHOICES |= {"track": ["none", "wandb", "swanlab", "trackio"]}
FLAGS = {  # name: (words after the flag, the value)
    "preset": (["demo"], "demo"),
    "model_name": (["./gpt2"], "./gpt2"),
    "reward_model_name": (["owner/sentiment"], "owner/sentiment"),
    "positive_label": (["LABEL_1"], "LABEL_1"),
    "reward": (["math:sqrt"], "math:sqrt"),
    "prompts": (["刚收到货,感觉", "这部电影-很"], ["刚收到货,感觉", "这部电影-很"]),
    "prompts_file": (["my-prompts.txt"], "my-prompts.txt"),
    "gen_len": (["7"], 7),
    "temperature": (["0.7"], 0.7),
    "episodes": (["100"], 100),
    "batch_size": (["256"], 256),
    "minibatch_size": (["64"], 64),
    "ppo_epochs": (["2"], 2),
    "gamma": (["0.9"], 0.9),
    "lam": (["0.8"], 0.8),
    "cliprange": (["0.3"], 0.3),
    "cliprange_value": (["0.4"], 0.4),
    "vf_coef": (["0.5"], 0.5),
    "detach_value": (["False"], False),
    "frozen_share": (["0.25"], 0.25),
    "init_kl_coef": (["0.05"], 0.05),
    "kl_budget": (["0.4"], 0.4),
    "kl_controller": (["adaptive"], "adaptive"),
    "target": (["4"], 4.0),
    "horizon": (["500"], 500),
    "lr": (["3e-5"], 3e-5),
    "value_lr": (["2e-3"], 2e-3),
    "adam_epsilon": (["1e-7"], 1e-7),
    "average_power": (["1e9"], 1e9),
    "max_grad_norm": (["0.5"], 0.5),
    "micro_batch_size": (["8"], 8),
    "seed": (["0"], 0),
    "device": (["cpu"], "cpu"),
    "dtype": (["bfloat16"], "bfloat16"),
    "run_name": (["my-run"], "my-run"),
    "runs_dir": (["else/where"], "else/where"),
    "log_samples_every": (["0"], 0),
    "track": (["swanlab"], "swanlab"),
    "save_every": (["5"], 5),
    "save_every_minutes": (["0.5"], 0.5),
    "keep_checkpoints": (["9"], 9),
    "process_timeout": (["30"], 30.0),
    "eval_samples": (["64"], 64),
    "resume": (["latest"], "latest"),
    "eval_only": (["runs/a-b"], "runs/a-b"),
}


def parsed(*argv) -> PPOConfig:
    values, _ = parse_args(list(argv))
    check(values)
    return values


def refusal(**values) -> str:
    with pytest.raises(UserError) as error:
        check(PPOConfig(**values))
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    return str(error.value)


# --- values


def test_every_number_has_its_limits():
    assert [name for name, value in DEFAULT.items() if type(value) in (int, float)] == list(NUMBERS)


@pytest.mark.parametrize("name", NUMBERS)
def test_both_ends_of_a_limit(name):
    taken, refused, allowed = NUMBERS[name]
    others = {"minibatch_size": 1} if name == "batch_size" else {}
    for value in taken:
        check(PPOConfig(**{name: value}, **others))
    for value in refused:
        assert refusal(**{name: value}, **others) == f"--{name} must be {allowed}, not {value}"


@pytest.mark.parametrize("name", DEFAULT)
def test_a_value_of_another_type_is_refused(name):
    """As a script or an edited config.json may hold it."""
    if name in CHOICES:
        for value in (1, None, "Fixed"):
            said = f"--{name} {value} is unknown; choose one of {', '.join(CHOICES[name])}"
            assert refusal(**{name: value}) == said
        return
    for value in OTHER_TYPES[type(DEFAULT[name])]:
        said = refusal(**{name: value})
        assert said.startswith(f"{name} must be of type ") and said.endswith(f", not {value!r}")
    if type(DEFAULT[name]) is float:
        check(PPOConfig(**{name: 1}))  # a whole number is one, too


@pytest.mark.parametrize("name", ["prompts", "model_name", "run_name", "prompts_file", "runs_dir", "positive_label"])
def test_half_a_character_is_refused(name):
    """As Python reads bytes of a command line that are no UTF-8."""
    text = "a\udcff"
    assert refusal(**{name: [text] if name == "prompts" else text}).endswith("a\\udcff is no text in UTF-8")


@pytest.mark.parametrize("number", [Decimal("2"), np.float32(2), np.float64(2), np.int64(2), np.uint8(2), Fraction(2)])
def test_a_number_of_any_library_is_one(tmp_path, number):
    config = PPOConfig(target=number, ppo_epochs=number)
    config.batch_size = config.minibatch_size = number
    check(config)
    for value in (config.ppo_epochs, config.batch_size, config.minibatch_size):
        assert type(value) is int and value == 2
    assert type(config.target) is float and config.target == 2.0
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config


def test_a_number_that_is_none_for_its_field_is_still_refused():
    assert refusal(ppo_epochs=Decimal("1.5")) == "ppo_epochs must be of type int, not Decimal('1.5')"
    assert refusal(ppo_epochs=np.float32("nan")).startswith("ppo_epochs must be of type int, not ")
    assert refusal(lr=Decimal("Infinity")) == "--lr must be above 0 and finite, not inf"
    assert refusal(detach_value=np.int64(1)).startswith("detach_value must be of type bool, not ")
    assert PPOConfig(lr=Decimal("0.1")).lr == 0.1


def test_a_type_is_called_by_its_name():
    assert refusal(lr="fast") == "lr must be of type float, not 'fast'"
    assert refusal(batch_size=1.5) == "batch_size must be of type int, not 1.5"
    assert refusal(runs_dir=None) == "runs_dir must be of type str, not None"
    assert refusal(detach_value=0) == "detach_value must be of type bool, not 0"


def test_a_minibatch_is_at_most_a_batch():
    check(PPOConfig(batch_size=64, minibatch_size=64))
    said = "--minibatch_size 65 is larger than --batch_size 64"
    assert refusal(batch_size=64, minibatch_size=65) == said


@pytest.mark.parametrize("name", ["run", "a_b-c.d", "7", "感觉", "2024-01-01.x", "a.", "a" * 200, "感" * 66])
def test_a_plain_run_name_is_taken(name):
    check(PPOConfig(run_name=name))


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "-x", "_x", "a/b", "a\\b", "a b", "a:b", "a\n", "/a", "~", "a" * 201, "感" * 67]
)
def test_a_run_name_that_is_no_plain_name_is_refused(name):
    allowed = "letters, digits, '_', '-' and '.' only, a letter or digit first, 200 bytes at most"
    assert refusal(run_name=name) == f"--run_name {name!r} is no plain name: {allowed}"


@pytest.mark.parametrize("name", ["model_name", "reward_model_name", "runs_dir"])
def test_an_empty_name_is_refused(name):
    for value in ("", "  "):
        assert refusal(**{name: value}) == f"--{name} is empty"


# --- prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("好\n", ["好"]),
        ("好", ["好"]),
        ("\ufeff刚收到货,感觉\r\n这部电影很\r\n", ["刚收到货,感觉", "这部电影很"]),
        ("a\nb\na\n\n  \n\n", ["a", "b", "a"]),
        (" I went \n", [" I went "]),
        ("a\u2028b\x0bc\nd\x85\n", ["a\u2028b\x0bc", "d\x85"]),
    ],
)
def test_a_prompts_file_holds_a_prompt_a_line(tmp_path, content, prompts):
    """Whatever the system's encoding; a byte order mark and empty lines at the end do not count."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(content.encode())
    assert read_prompts(parsed("--prompts_file", str(file))) == prompts
    assert read_prompts(parsed("--prompts_file", str(file), "--prompts", "书")) == prompts


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", " holds no prompt; give at least one"),
        (b" \n\n", " holds no prompt; give at least one"),
        ("好\n\n坏\n".encode(), ": prompt 2 is empty; each needs at least one character"),
        (b"\n\na\n", ": prompt 1 is empty; each needs at least one character"),
        ("好\n感觉".encode()[:-1], " is damaged in line 2: it is no UTF-8 text; save it as UTF-8, one prompt a line"),
        ("感觉".encode("gbk"), " is damaged in line 1: it is no UTF-8 text; save it as UTF-8, one prompt a line"),
    ],
)
def test_a_prompts_file_that_will_not_do_is_named(tmp_path, content, said):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    assert refusal(prompts_file=str(file)) == f"--prompts_file {file}{said}"


@pytest.mark.parametrize("kind", ["device", "pipe", "link to a device"])
def test_a_prompts_file_that_may_never_end_is_not_read(tmp_path, kind):
    file = tmp_path / "prompts.txt"
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    file = Path("/dev/zero") if kind == "device" else file
    said = f"--prompts_file {file} is no file, but a device or a pipe; save what it gives in a file"
    assert refusal(prompts_file=str(file)) == said


def test_a_prompts_file_that_cannot_be_read_is_named(tmp_path):
    assert refusal(prompts_file=str(tmp_path)) == f"--prompts_file {tmp_path} cannot be read: Is a directory"
    missing = tmp_path / "missing.txt"
    assert refusal(prompts_file=str(missing)) == f"--prompts_file {missing} cannot be read: No such file or directory"


def test_prompts_without_a_character_are_refused():
    assert refusal(prompts=[]) == "--prompts holds no prompt; give at least one"
    assert refusal(prompts=["好", " "]) == "--prompts: prompt 2 is empty; each needs at least one character"
    assert read_prompts(PPOConfig(prompts=["好", "坏"])) == ["好", "坏"]


# --- flags


def test_every_flag_reaches_its_field():
    assert list(FLAGS) == list(DEFAULT)
    for name, (words, value) in FLAGS.items():
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            config, given = parse_args([flag, *words])
            expected = vars(PPOConfig(preset=value)) if name == "preset" else DEFAULT | {name: value}
            assert vars(config) == expected and given == {name}, flag
            assert type(getattr(config, name)) is type(value), flag


def test_all_flags_at_once():
    argv = [word for name, (words, _) in FLAGS.items() for word in (f"--{name}", *words)]
    config, given = parse_args(argv)
    assert vars(config) == {name: value for name, (_, value) in FLAGS.items()} and given == set(FLAGS)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--detach_value"], True),
        (["--detach-value", "true"], True),
        (["--detach_value=no"], False),
        (["--no_detach_value"], False),
        (["--no-detach-value"], False),
        (["--detach_value", "--no-detach-value"], False),
    ],
)
def test_a_switch_goes_both_ways(argv, value):
    config, given = parse_args(["--preset", "article" if value else "default", *argv])
    assert config.detach_value is value and given == {"preset", "detach_value"}


def test_a_value_may_stand_behind_an_equals_sign_and_the_last_counts():
    config = parsed("--run-name=my-run", "--lr=1e-5", "--prompts=-5 度", "--lr", "2e-5", "--minibatch-size=32")
    assert (config.run_name, config.lr, config.prompts, config.minibatch_size) == ("my-run", 2e-5, ["-5 度"], 32)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--batchsize", "5"], "unknown argument --batchsize; did you mean --batch_size?"),
        (["--batch-siz=5"], "unknown argument --batch_siz=5; did you mean --batch_size?"),
        (
            ["--model-nam=uer/gpt2-chinese-cluecorpussmall"],
            "unknown argument --model_nam=uer/gpt2-chinese-cluecorpussmall; did you mean --model_name?",
        ),
        (["--episode", "5"], "unknown argument --episode; did you mean --episodes?"),
        (["--learning_rate", "5"], "unknown argument --learning_rate; python train_ppo.py --help lists the flags"),
        (["--frozen", "5"], "unknown argument --frozen; did you mean --frozen_share?"),
        (["--xyz"], "unknown argument --xyz; python train_ppo.py --help lists the flags"),
        (["demo"], "unknown argument demo; "),
        (["--lr"], "argument --lr: expected one argument; python train_ppo.py --help lists the flags"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--gen_len", "1.5"], "argument --gen_len: invalid int value: '1.5'"),
        (["--dtype", "float16"], "argument --dtype: invalid choice: 'float16'"),
        (["--detach_value", "maybe"], "argument --detach_value"),
        (["--preset", "big"], "--preset big is unknown; choose one of default, thorough, article, demo"),
    ],
)
def test_a_flag_that_will_not_do_is_named(argv, said):
    with pytest.raises(UserError) as error:
        parse_args(argv)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("tool", ["benchmark", "limit_text"])
def test_a_tool_that_takes_these_flags_shows_its_own_use_and_ends_in_one_line(tool, monkeypatch, capsys):
    def typed(*argv):
        monkeypatch.setattr(sys, "argv", [tool, *argv])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
        return stop.value.code, capsys.readouterr()

    code, output = typed("--help")
    assert code == 0 and output.out.startswith(f"usage: python -m tools.{tool} [--NAME VALUE ...]\n")
    assert f"python -m tools.{tool} --model_name" in output.out and "train_ppo.py --preset" not in output.out
    code, output = typed("--lr")
    said = f"{tool}: error: argument --lr: expected one argument; python -m tools.{tool} --help lists the flags\n"
    assert (code, output.out, output.err) == (2, "", said)


def test_help_in_a_fresh_process_loads_no_model_library():
    code = (
        "import sys; sys.argv = ['train_ppo.py', '--preset', 'demo', '--help']\n"
        "import train_ppo\n"
        "try: train_ppo.main()\n"
        "except SystemExit as e: assert e.code == 0\n"
        "print(*{'torch', 'transformers.models'} & set(sys.modules), file=sys.stderr)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if Version(transformers.__version__) >= Version("5.10"):  # earlier ones load torch with anything
        assert result.stderr.split() == []
    text = " ".join(result.stdout.split())
    assert all(result.stdout.count(f"\n  --{name} ") == 1 for name in DEFAULT)
    titles = [line[:-1] for line in result.stdout.splitlines() if re.fullmatch(r"\w.*:", line)]
    assert titles == [
        "options",
        "models",
        "prompts and sampling",
        "PPO (Schulman et al. 2017)",
        "KL to the reference (Ziegler et al. 2019, section 2.2)",
        "optimisation (Adam, Kingma & Ba 2015)",
        "run and logging",
    ]
    options = result.stdout.split("options:")[1].split("models:")[0]
    assert re.findall(r"\n  (?:-h, )?(--\w+) ", options) == ["--help", "--complete", "--n"]
    kl = result.stdout.split("KL to the reference (Ziegler et al. 2019, section 2.2):")[1].split("\n\n")[0]
    assert re.findall(r"\n  --(\w+) ", kl) == ["init_kl_coef", "kl_budget", "kl_controller", "target", "horizon"]
    assert result.stdout.startswith("usage: python train_ppo.py [--NAME VALUE ...]\n\n")
    assert result.stdout.count("\n  python train_ppo.py --") == 3
    assert "--no_detach_value Sets --detach_value to False." in text


# --- a reward of one's own


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """An empty working folder outside of the Python path; modules that are imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(ROOT), *(path for path in sys.path if path not in ("", str(ROOT)))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_imported_from_the_working_folder(working_folder):
    (working_folder / "my_own_reward.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    for _ in range(2):
        assert import_function("my_own_reward:score")(["a", "b"]) == [0.5, 0.5]
    assert sys.path.count(str(working_folder)) == 1
    assert import_function("os.path:join")  # in a package


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import sys; sys.exit()", "cannot be imported (SystemExit)"),
        ("raise BaseException('enough\\nof it')", "cannot be imported (BaseException: enough)"),
        ("import no_such_thing", "cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("def score(texts) 1", "cannot be imported (SyntaxError: expected ':' (broken_reward.py, line 1))"),
        ("other = []", "cannot be imported (AttributeError: module 'broken_reward' has no attribute 'score')"),
        ("score = []", "is no function but a list"),
        ("class score(list): pass", "is no function but a class; name an instance of it"),
        ("async def score(texts): pass", "is no function but a coroutine function; a plain one may call asyncio.run"),
    ],
)
def test_a_reward_that_cannot_be_had_is_one_line(working_folder, module, said):
    (working_folder / "broken_reward.py").write_text(module)
    with pytest.raises(UserError) as error:
        import_function("broken_reward:score")
    assert str(error.value) == f"--reward broken_reward:score {said}"


def test_ctrl_c_while_a_reward_is_imported_is_ctrl_c(working_folder):
    (working_folder / "slow_reward.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        import_function("slow_reward:score")


def test_a_reward_s_module_sees_no_flags_and_sets_nothing_for_the_program(working_folder, monkeypatch):
    """Also not the second time that it is asked for, when Python has it already."""
    monkeypatch.setattr(user_code, "its_own", {})
    monkeypatch.setattr(sys, "argv", ["train_ppo.py", "--preset", "demo"])
    (working_folder / "own_flags.py").write_text(
        "import argparse, torch\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--judge', default='me')\n"
        "judge = parser.parse_args().judge\n"
        "torch.set_grad_enabled(False)\n"
        "def score(texts):\n    return [judge, torch.is_grad_enabled()]\n"
    )
    for _ in range(2):
        score = import_function("own_flags:score")
        assert torch.is_grad_enabled() and sys.argv == ["train_ppo.py", "--preset", "demo"]
    with user_code.apart():
        assert score([]) == ["me", False]
    assert torch.is_grad_enabled()


def test_files_beside_a_reward_of_ones_own_do_not_hide_the_programs(working_folder):
    (working_folder / "reward.py").write_text("raise SystemExit('the wrong file')\n")
    (working_folder / "my_own_reward.py").write_text("def score(texts):\n    return [0.5] * len(texts)\n")
    import_function("my_own_reward:score")
    found = importlib.machinery.PathFinder.find_spec("reward", sys.path)
    assert found.origin == str(ROOT / "reward.py")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("no_such_module:f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_module')"),
        ("math:no_such", "cannot be imported (AttributeError: "),
        ("broken_reward:f", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("math:pi", "is no function but a float"),
    ],
)
def test_a_function_that_is_not_there_is_refused(working_folder, spec, said):
    (working_folder / "broken_reward.py").write_text("1 / 0\n")
    with pytest.raises(UserError) as error:
        import_function(spec)
    assert str(error.value).startswith(f"--reward {spec} {said}")


@pytest.mark.parametrize("spec", ["nothing", ":f", "math:", "", "a b:f", "math:sqrt; rm -rf ~", "math:pi\n", "a:b:c"])
def test_a_reward_that_is_no_name_of_a_function_is_refused(spec):
    assert refusal(reward=spec) == f"--reward {spec!r} must be module:function, for example my_reward:score"


def test_a_check_runs_no_reward(working_folder):
    (working_folder / "broken_reward.py").write_text("1 / 0\n")
    check(PPOConfig(reward="broken_reward:f"))


# --- config.json


def test_a_config_survives_its_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("an older one")
    config = PPOConfig(**{name: value for name, (_, value) in FLAGS.items() if name not in ("reward", "prompts_file")})
    save_config(config, path)
    assert load_config(path) == config
    text = path.read_text(encoding="utf-8")
    assert text.startswith('{\n  "preset": "demo",\n') and '"这部电影-很"' in text and text.endswith("}\n")
    assert list(tmp_path.iterdir()) == [path]


def test_a_config_that_an_editor_has_marked_is_read(tmp_path):
    """A byte order mark before it, and lines that end as Windows ends them."""
    path = tmp_path / "config.json"
    save_config(PPOConfig(lr=1e-3), path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load_config(path) == PPOConfig(lr=1e-3)


def test_a_config_opens_where_its_device_is_not(tmp_path):
    save_config(PPOConfig(device="cuda:99"), tmp_path / "config.json")
    assert load_config(tmp_path / "config.json").device == "cuda:99"


def test_a_config_of_an_older_version_has_defaults_for_the_rest(tmp_path, capsys):
    values = {name: value for name, value in DEFAULT.items() if name not in ("horizon", "adam_epsilon")}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert load_config(tmp_path / "config.json") == PPOConfig()
    assert "adam_epsilon 1e-05, horizon 10000\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", " is damaged: it is no JSON (Expecting property name"),
        (b"{\n\xff\xfe", " is damaged in line 2: it is no UTF-8 text; a run cannot go on without its settings"),
        (b"[]", " is damaged: it is missing, or not what it should be; a run cannot go on without its settings"),
        (b"[" * 10_000, " is damaged: it is no JSON (maximum recursion depth exceeded"),
        (b'{"lr":' * 10_000, " is damaged: it is no JSON (maximum recursion depth exceeded"),
        (b'{"lr": ' + b"[" * 500 + b"]" * 500 + b"}", "lr must be of type float, not [[[[[[[...]]]]]]]"),
        (b'{"preset": ' + b"[" * 500 + b"]" * 500 + b"}", "preset must be of type str, not [[[[[[[...]]]]]]]"),
        (b'{"dtype": ' + b"[" * 500 + b"]" * 500 + b"}", "--dtype [[[[[[[...]]]]]]] is unknown"),
        (b'{"lr": 1e-5, "seed": 1, "lr": 2e-5}', " is damaged: it is no JSON ('lr' stands there twice)"),
        (b'{"lr": 1' + b"0" * 5000 + b"}", " is damaged: it is no JSON (Exceeds the limit"),
        (b'{"lr": 1' + b"0" * 400 + b"}", "--lr must be above 0 and at most 9223372036854775807, not 1000000000000"),
        (
            b'{"batch_size": 9223372036854775808}',
            "--batch_size must be at least 1 and at most 9223372036854775807, not",
        ),
        (b'{"prompts": ["\\ud800"]}', " is damaged: it holds half a character"),
        (b'{"runs_dir": "a\\u0000b"}', "--runs_dir a\\x00b is no text in UTF-8"),
        (b'{"lr": 1e-5, "mood": 1, "zeal": 2}', " has a setting that this program does not know, 'mood'"),
        (b'{"lr": "big"}', "lr must be of type float, not 'big'"),
        (b'{"lr": Infinity}', "--lr must be above 0 and finite, not inf"),
        (b'{"batch_size": 1.5}', "batch_size must be of type int"),
        ('{"prompts": "好"}'.encode(), "prompts must be of type"),
        (b'{"dtype": "int8"}', "--dtype int8 is unknown"),
        (b'{"detach_value": 1}', "detach_value must be of type bool"),
        (b'{"resume": 3}', "resume must be of type"),
        (b'{"preset": []}', "preset must be of type str, not []"),
    ],
)
def test_broken_config_files_are_named(tmp_path, content, said):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert str(error.value).startswith(f"{path}{said}" if said[0] == " " else said)


def test_a_config_file_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="config.json cannot be read: No such file or directory"):
        load_config(path)
