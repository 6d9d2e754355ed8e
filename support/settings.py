"""Settings: from the command line or a config.json into a PPOConfig, and what cannot work refused in one line."""

import argparse
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import os
import re
import reprlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from config import PRESETS, PPOConfig, Sentence
from support.devices import check_device, check_versions
from support.errors import UserError, first_line
from support.files import read_json, read_text, write_whole

# Settings of a start or a folder, not of the training: they are never listed as changes
NOT_COMPARED = {"preset", "run_name", "runs_dir", "track", "resume", "eval_only"}

DESCRIPTION = """Train a Chinese GPT-2 with PPO towards texts that a reward likes.

  python train_ppo.py --preset demo
  python train_ppo.py --model_name DIR --reward_model_name DIR --lr 3e-5 --prompts "刚收到货,感觉" "这部电影很"
  python train_ppo.py --complete runs/NAME --prompts "这家店" "昨天" --n 5     (a model, before and after)
"""


def parse_args(
    argv: list[str], program="python train_ppo.py", description=DESCRIPTION, parents=()
) -> tuple[PPOConfig, set[str]]:
    """The command line as a config, the preset's defaults overridden by the flags; and the names of the flags given.

    UserError, with the nearest name, for an unknown flag. --help shows the preset's defaults, and the flags of
    `parents`, which argv is without, and leaves.
    """
    check_versions()
    from transformers import HfArgumentParser

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.const is False else super()._get_help_string(action)

    class Parser(HfArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; {program} --help lists the flags")

        group = None

        def add_argument(self, *flags, **options):
            name = flags[0].lstrip("-")
            if title := getattr(options.get("help"), "group", None):
                self.group = self.add_argument_group(title)
            if name.startswith("no_"):  # the library's addition for a bool that is True by default
                options["help"] = f"Sets --{name[3:]} to False."
            if self.group is None:
                return super().add_argument(*flags, **options)
            return self.group.add_argument(flags[0], **options)

    parser = Parser(
        PPOConfig,
        usage=f"{program} [--NAME VALUE ...]",
        description=description,
        formatter_class=Formatter,
        parents=parents,
        allow_abbrev=False,
    )
    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in argv]
    absent = object()
    namespace = argparse.Namespace(**{f.name: absent for f in dataclasses.fields(PPOConfig)})
    namespace, unknown = parser.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")], namespace)
    given = {name: value for name, value in vars(namespace).items() if value is not absent}
    if unknown:
        flags = [f"--{f.name}" for f in dataclasses.fields(PPOConfig)]
        near = difflib.get_close_matches(unknown[0].split("=")[0].replace("-", "_").replace("__", "--", 1), flags, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{program} --help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    preset = given.get("preset", PPOConfig.preset)
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; choose one of {', '.join(PRESETS)}")
    if "-h" in argv or "--help" in argv:
        parser.set_defaults(preset=preset, **PRESETS[preset])
        parser.print_help()
        raise SystemExit(0)
    return PPOConfig(**given), set(given)


# ----------------------------------------------------------------------------------------------
# Checks


def check(config: PPOConfig) -> None:
    """Refuse values that cannot work, before any model is touched. UserError names the flag and what is allowed."""
    check_versions()
    for name, kind in get_type_hints(PPOConfig).items():
        check_type(name, kind, getattr(config, name))
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown; choose one of {', '.join(PRESETS)}")
    for field in dataclasses.fields(PPOConfig):
        check_limits(field.name, field.metadata["help"], getattr(config, field.name))
    if config.minibatch_size > config.batch_size:
        sizes = f"--minibatch_size {config.minibatch_size} is larger than --batch_size {config.batch_size}"
        raise UserError(sizes)
    name = config.run_name
    if name is not None and not (re.fullmatch(r"[^\W_][\w.\-]*", name) and len(name.encode()) <= 200):
        allowed = "letters, digits, '_', '-' and '.' only, a letter or digit first, 200 bytes at most"
        raise UserError(f"--run_name {name!r} is no plain name: {allowed}")
    for name in ("model_name", "reward_model_name", "runs_dir"):
        if not getattr(config, name).strip():
            raise UserError(f"--{name} is empty")
    read_prompts(config)
    if config.reward is not None and not re.fullmatch(r"[\w.]+:\w+", config.reward):
        raise UserError(f"--reward {config.reward!r} must be module:function, for example my_reward:score")
    check_device(config.device)


def check_type(name: str, kind, value) -> None:
    """Refuse a value that is not of the field's type, as a script or an edited config.json may hold; and half
    characters, which stand for bytes of a command line that is no UTF-8."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            value = value if isinstance(value, str) else reprlib.repr(value)
            raise UserError(f"--{name} {value} is unknown; choose one of {', '.join(get_args(kind))}")
        return
    if kind is float:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif get_origin(kind) is list:
        good = isinstance(value, list) and all(isinstance(item, str) for item in value)
    else:  # str, bool, Optional[str]
        good = isinstance(value, kind)
    if not good:
        raise UserError(f"{name} must be of type {getattr(kind, '__name__', kind)}, not {reprlib.repr(value)}")
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and re.search("[\0\ud800-\udfff]", text):
            raise UserError(f"--{name} {text} is no text in UTF-8")


def check_limits(name: str, limits: Sentence, value) -> None:
    """Refuse a number outside the limits of its field."""
    above, at_least, at_most = limits.above, limits.at_least, limits.at_most
    if max(above, at_least) == -math.inf:
        return
    if isinstance(value, int) and value >= 2**63:  # which neither torch nor NumPy counts
        at_most = min(at_most, 2**63 - 1)
    if not (above < value and at_least <= value <= at_most and math.isfinite(value)):
        least = f"at least {at_least}" if above == -math.inf else f"above {above}"
        most = f" and at most {at_most}" if at_most < math.inf else " and finite" if isinstance(value, float) else ""
        raise UserError(f"--{name} must be {least}{most}, not {reprlib.repr(value)}")


def read_prompts(config: PPOConfig) -> list[str]:
    """The prompts of this run, from --prompts or --prompts_file."""
    if config.prompts_file is None:
        prompts, source = config.prompts, "--prompts"
    else:
        source = f"--prompts_file {config.prompts_file}"
        text = read_text(Path(config.prompts_file), "save it as UTF-8, one prompt a line", name=source)
        prompts = text.replace("\r\n", "\n").split("\n")
        while prompts and not prompts[-1].strip():
            prompts.pop()
    if not prompts:
        raise UserError(f"{source} holds no prompt; give at least one")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"{source}: prompt {number} is empty; each needs at least one character")
    return prompts


def total_steps(config: PPOConfig) -> int:
    """Steps of a run: episodes rounded up to whole batches."""
    return math.ceil(config.episodes / config.batch_size)


# ----------------------------------------------------------------------------------------------
# config.json


def load_config(path: Path) -> PPOConfig:
    """Read the settings that a run was started with. Settings that an older run lacks have their defaults.

    Raises UserError if the file is missing or damaged, or has a setting that this program doesn't know.
    """
    values = read_json(path, "a run cannot go on without its settings")
    names = {f.name for f in dataclasses.fields(PPOConfig)}
    if unknown := sorted(set(values) - names):
        way = "use the version of the program that wrote it, or remove that line"
        raise UserError(f"{path} has a setting that this program does not know, {reprlib.repr(unknown[0])}; {way}")
    config = PPOConfig(**values)
    check(dataclasses.replace(config, device="auto"))  # the run may go on on a machine without its device
    if lacking := [f"{name} {getattr(config, name)}" for name in sorted(names - set(values))]:
        print(f"{path} is from an older version; using these defaults: {', '.join(lacking)}")
    return config


def save_config(config: PPOConfig, path: Path) -> None:
    write_whole(path, json.dumps(dataclasses.asdict(config), ensure_ascii=False, indent=2) + "\n")


def changes(config: PPOConfig) -> dict[str, list]:
    """Return the settings that differ from the config's preset: [the preset's value, the config's] by name."""
    preset, here = vars(PPOConfig(preset=config.preset)), vars(config)
    return {
        name: [preset[name], here[name]] for name in here if name not in NOT_COMPARED and preset[name] != here[name]
    }


def describe_changes(config: PPOConfig) -> str:
    """Return `changes` as one line, empty if there are none."""
    changed = [f"{name} {here} (preset: {preset})" for name, (preset, here) in changes(config).items()]
    return f"changed from the preset {config.preset}: {', '.join(changed)}" if changed else ""


def import_function(spec: str) -> Callable:
    """The callable named by 'module:function', from the working directory or the Python path: this runs its code.

    UserError where its module cannot be imported, be it that it ends the program, or where it is nothing to call.
    """
    module_name, function_name = spec.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a reward.py there must not hide this program's
    from support.user_code import apart

    try:
        with apart():
            function = getattr(importlib.import_module(module_name), function_name)
            kinds = {
                "class; name an instance of it": inspect.isclass(function),
                "coroutine function; a plain one may call asyncio.run": inspect.iscoroutinefunction(function),
                type(function).__name__: not callable(function),
            }
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise UserError(f"--reward {spec} cannot be imported ({first_line(error)})")
    for kind in (kind for kind, is_it in kinds.items() if is_it):
        raise UserError(f"--reward {spec} is no function but a {kind}")
    return function
