"""Read settings from the command line or a config.json into a PPOConfig, and reject invalid values."""

import argparse
import json
import math
import operator
import re
import reprlib
from dataclasses import Field, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from config import PRESETS, PPOConfig, did_you_mean
from support.common.errors import UserError
from support.common.files import FIX_LINE, damaged, read_json, read_text, write_whole
from support.compute.devices import check_versions

# Settings of one start or one folder that don't affect training; never listed as changes
NOT_COMPARED = {"preset", "run_name", "runs_dir", "track", "resume", "eval_only", "complete", "n"}
LIMITS = {"above": operator.gt, "at_least": operator.ge, "at_most": operator.le}


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; {self.prog} --help lists the flags")


def parse_args(
    argv: list[str], program: str = "python train_ppo.py", description: str = ""
) -> tuple[PPOConfig, set[str]]:
    """Return the config and the names of the flags that were given. --help shows the preset's defaults, and exits.

    Raises UserError for a wrong flag.
    """
    parser = Parser(program, f"{program} [--NAME VALUE ...]", description, add_help=False, allow_abbrev=False)
    parser.formatter_class, parser.argument_default = argparse.RawDescriptionHelpFormatter, argparse.SUPPRESS
    parser.add_argument("-h", "--help", action="store_true", help="Show this help and exit.")
    group, flags = parser, {}
    for field in fields(PPOConfig):
        name, kind = field.name, get_type_hints(PPOConfig)[field.name]
        if title := field.metadata.get("group"):
            group = parser.add_argument_group(title)
        options = {"type": get_args(kind)[0] if get_args(kind) else kind}  # for `str | None`, str
        if kind is bool:
            options = {"type": true_or_false, "nargs": "?", "const": True}
        elif get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        elif get_origin(kind) is list:
            options["nargs"] = "+"
        text = field.metadata.get("help", "").replace("%", "%%")
        flags[name] = group.add_argument(f"--{name}", help=text, **options)
        if kind is bool:
            group.add_argument(f"--no_{name}", dest=name, action="store_false", help=f"Set --{name} to False.")

    argv = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in argv]
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0].removeprefix("--")
        parser.error(f"unknown argument {unknown[0]}{did_you_mean(name, '--')}")
    given = vars(namespace)
    if given.pop("help", False):
        for name, default in vars(PPOConfig(given.get("preset", "default"))).items():
            flags[name].help += f" (default: {default})".replace("%", "%%")
        parser.print_help()
        raise SystemExit(0)
    return PPOConfig(**given), set(given)


def true_or_false(word: str) -> bool:
    if word.lower() not in ("true", "yes", "1", "false", "no", "0"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {word!r}")
    return word.lower() in ("true", "yes", "1")


def check(config: PPOConfig) -> None:
    """Raise UserError, with the flag and what is allowed, if a value is invalid."""
    check_versions()
    kinds = get_type_hints(PPOConfig)
    for field in fields(PPOConfig):
        check_value(field, kinds[field.name], getattr(config, field.name))
    if config.preset not in PRESETS:
        raise UserError(f"--preset {config.preset} is unknown; choose one of {', '.join(PRESETS)}")
    if config.minibatch_size > config.batch_size:
        raise UserError(f"--minibatch_size {config.minibatch_size} is larger than --batch_size {config.batch_size}")
    check_rewards(config)
    if config.run_name is not None and not re.fullmatch(r"[^\W_][\w.\-]*", config.run_name):
        allowed = "letters, digits, '_', '-' and '.', and begin with a letter or digit"
        raise UserError(f"--run_name {config.run_name!r} must consist of {allowed}")


def check_value(field: Field, kind, value) -> None:
    """Raise UserError if a value doesn't have its field's type or is outside its limits."""
    flag = f"--{field.name}"
    if not has_type(value, kind):
        allowed = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")
        raise UserError(f"{flag} must be {allowed}, not {reprlib.repr(value)} of type {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{flag} must be a finite number, not {value}")
    for name, holds in LIMITS.items():
        limit = field.metadata.get(name)
        if limit is not None and value is not None and not holds(value, limit):
            raise UserError(f"{flag} must be {name.replace('_', ' ')} {limit}, not {value}")


def own_rewards(config: PPOConfig) -> list[str]:
    """Return the rewards that are your own code, module:function."""
    return [name for name in config.reward if re.fullmatch(r"[\w.]+:\w+", name)]


def reward_models(config: PPOConfig) -> dict[str, tuple[str, str, str | None]]:
    """Return the rewards that are models: by name, the flag that gives the model, its value, and the happy label."""
    others = [name for name in config.reward or ["classifier"] if name not in (*own_rewards(config), "human")]
    own = {"classifier": ("--reward_model_name", config.reward_model_name, config.positive_label)}
    return {name: own.get(name, ("--reward", name, None)) for name in others}


def check_rewards(config: PPOConfig) -> None:
    """Raise UserError if a reward is of an unknown kind or given twice, or if the number of weights is wrong."""
    for name, (flag, *_) in reward_models(config).items():
        if flag == "--reward" and "/" not in name and not Path(name).expanduser().is_dir():
            kinds = "module:function, classifier, human, or a model's folder or Hub id (owner/model)"
            raise UserError(f"--reward {name} must be {kinds}")
    if repeated := [name for name in config.reward if config.reward.count(name) > 1]:
        raise UserError(f"--reward {repeated[0]} is given twice; give each reward only once")
    weights = config.reward_weights
    if weights and not (len(weights) == len(config.reward) and all(map(math.isfinite, weights)) and any(weights)):
        needed = "needs a finite number for each --reward, and not all 0"
        raise UserError(f"--reward_weights {needed}; got {len(config.reward)} rewards and the weights {weights}")


def has_type(value, kind) -> bool:
    """Return whether a value is of an annotated type. An int is also a float; a bool is neither."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(has_type(item, get_args(kind)[0]) for item in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def read_prompts(config: PPOConfig) -> dict[str, list]:
    """Return the prompts of --prompts or --prompts_file as "prompt", and the other columns of a .jsonl file by name.

    Raises UserError if a prompt is empty, the file is unreadable, or a line lacks a column that another line has.
    """
    prompts, source = config.prompts or [""], "--prompts"
    if config.prompts_file is not None:
        source = f"--prompts_file {config.prompts_file}"
        text = read_text(Path(config.prompts_file), "save it as UTF-8, one prompt per line", name=source)
        prompts = text.replace("\r\n", "\n").rstrip("\n").split("\n")
    records = [{"prompt": prompt} for prompt in prompts]
    if source.endswith(".jsonl"):
        for i, line in enumerate(prompts):
            with damaged(f"line {i + 1} of {config.prompts_file}", FIX_LINE):
                records[i] = dict(json.loads(line))
    names = dict.fromkeys(["prompt", *(name for record in records for name in record)])
    for number, record in enumerate(records, 1):
        if lacking := [name for name in names if name not in record]:
            raise UserError(f"{source}: line {number} has no {lacking[0]!r}; it has {', '.join(map(repr, record))}")
        if not isinstance(prompt := record["prompt"], str) or not prompt.strip():
            raise UserError(f"{source}: prompt {number} must be a text that isn't empty, not {reprlib.repr(prompt)}")
    return {name: [record[name] for record in records] for name in names}


def total_steps(config: PPOConfig) -> int:
    """Return the number of steps of a run: episodes rounded up to whole batches."""
    return math.ceil(config.episodes / config.batch_size)


def load_config(path: Path) -> PPOConfig:
    """Read the settings that a run was started with. Settings that an older run lacks get their defaults.

    Raises UserError if the file is missing or damaged, or has a setting that this program doesn't know.
    """
    values = read_json(path, "a run can't continue without its settings")
    names = {field.name for field in fields(PPOConfig)}
    if unknown := sorted(values.keys() - names):
        way = "use the version of the program that wrote it, or remove that line"
        raise UserError(f"{path} has a setting that this program doesn't know, {reprlib.repr(unknown[0])}; {way}")
    if not isinstance(values.get("reward", []), list):  # an older version had only one
        values["reward"] = [values["reward"]] if values["reward"] else []
    config = PPOConfig(**values)
    if lacking := [f"{name} {getattr(config, name)}" for name in sorted(names - values.keys() - NOT_COMPARED)]:
        print(f"{path} is from an older version; using these defaults: {', '.join(lacking)}")
    return config


def save_config(config: PPOConfig, path: Path) -> None:
    write_whole(path, json.dumps(vars(config), ensure_ascii=False, indent=2) + "\n")


def changes(config: PPOConfig) -> dict[str, list]:
    """Return the settings that differ from the config's preset: [the preset's value, the config's] by name."""
    preset, here = vars(PPOConfig(config.preset)), vars(config)
    changed = [name for name in here if name not in NOT_COMPARED and here[name] != preset[name]]
    return {name: [preset[name], here[name]] for name in changed}
