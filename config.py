"""Every number of the program: what it does, its unit, and why it has the value it has.

    python train_ppo.py --lr 3e-5 --prompts "刚收到货,感觉" "这部电影很"

Change a default here, or override it by its name on the command line.
"""

import argparse
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, get_args, get_origin, get_type_hints


class UserError(ValueError):
    """A mistake that the user can mend: printed as one line on stderr, exit code 2, no traceback."""


def option(default, help: str):
    """A dataclass field with its sentence for --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class PPOConfig:
    """All hyperparameters of a run. What is not given has the value of the preset, 'default' unless `preset` is given.

    `check` refuses values that cannot work with UserError, a ValueError.
    """

    preset: str = option(
        "default",
        "Set of defaults: 'default' (the article's job, done as was found best here), 'article' (the article's own "
        "settings) or 'demo' (tiny models made on the spot).",
    )

    # --- models
    model_name: str = option("uer/gpt2-chinese-cluecorpussmall", "GPT-2 to train: a hub id, a local folder, or 'demo'.")
    reward_model_name: str = option(
        "uer/roberta-base-finetuned-jd-binary-chinese",
        "Sentiment classifier that scores the texts: a hub id, a local folder, or 'demo'.",
    )
    positive_label: Optional[str] = option(
        None,
        "The classifier's label whose probability is the reward; found from the model's id2label unless given.",
    )
    reward: Optional[str] = option(
        None,
        "Your own reward instead of the classifier, as module:function; it gets a list of texts and returns as "
        "many numbers.",
    )

    # --- prompts and sampling
    prompts: list[str] = option(["刚收到货,感觉"], "Prompts to complete, taken in turn.")
    prompts_file: Optional[str] = option(None, "UTF-8 text file with one prompt a line, instead of --prompts.")
    gen_len: int = option(16, "New tokens per completion at most; a [SEP] ends it earlier.")
    temperature: float = option(1.0, "Divides the logits everywhere: sampling, policy, reference and evaluation.")

    # --- PPO (Schulman et al. 2017)
    episodes: int = option(20_000, "Completions to train on, rounded up to whole batches.")
    batch_size: int = option(128, "Completions sampled and scored per step.")
    minibatch_size: int = option(
        128,
        "Completions per optimiser step (article: 1; many small noisy steps waste KL, see docs/learning.md).",
    )
    ppo_epochs: int = option(4, "Passes over each batch.")
    gamma: float = option(1.0, "Discount per token, 0 to 1.")
    lam: float = option(
        1.0,
        "Lambda of generalised advantage estimation, 0 to 1 (Schulman et al. 2016; article: 0.95).",
    )
    cliprange: float = option(0.2, "The probability ratio is clipped to 1 plus or minus this.")
    cliprange_value: float = option(0.2, "Values are clipped to the old value plus or minus this.")
    vf_coef: float = option(0.1, "Weight of the value loss.")
    detach_value: bool = option(
        True,
        "Keep the value head's gradient out of the trunk (article: False, which disturbs the policy; see "
        "docs/learning.md).",
    )

    frozen_share: float = option(
        2 / 3,
        "Share of the blocks, from the lowest, that stay as they are, and the embeddings with them: half the work, and "
        "with six blocks or twelve no less gain (article: 0, which trains everything; see docs/learning.md).",
    )

    # --- KL to the reference (Ziegler et al. 2019, section 2.2)
    init_kl_coef: float = option(0.2, "KL coefficient, in reward per nat; beta of the evaluation.")
    kl_controller: Literal["adaptive", "fixed"] = option(
        "fixed",
        "'fixed' keeps the coefficient, 'adaptive' steers it towards --target (article: adaptive).",
    )
    target: float = option(6.0, "KL per completion that the adaptive controller aims at, in nats.")
    horizon: int = option(10_000, "Completions over which the adaptive controller corrects its error.")

    # --- optimisation (Adam, Kingma & Ba 2015)
    lr: float = option(4e-5, "Adam's learning rate (article: 1.41e-5, with everything trained).")
    value_lr: float = option(
        1e-3,
        "Adam's learning rate for the value head (article: the same as lr; see docs/learning.md).",
    )
    adam_epsilon: float = option(
        1e-5,
        "Added to the root of Adam's second moment: what moves by rounding errors alone stays where it is (article: "
        "1e-8; Baselines' PPO has 1e-5).",
    )
    average_power: float = option(
        3.0,
        "The saved policy is an average of the weights after each step, in which step t weighs about t to this power, "
        "so that the first steps fade however long the run is; 1e9 saves the last weights (article: these).",
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm at most.")
    micro_batch_size: int = option(
        0,
        "Completions that go through a model at once, which bounds memory and changes nothing else; 0 for 64 or, on a "
        "CUDA GPU, as many as an eighth of its memory holds the logits of.",
    )

    # --- run and logging
    seed: int = option(1, "Decides every random draw; on a CPU the same seed gives the same run to the bit.")
    device: str = option("auto", "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Arithmetic of the models; 'auto' is bfloat16 where the hardware computes it natively. Weights, optimiser "
        "and losses stay float32.",
    )
    run_name: Optional[str] = option(None, "Folder of this run below --runs_dir; a time stamp unless given.")
    runs_dir: str = option("runs", "Folder that holds the runs.")
    log_samples_every: int = option(10, "Print a few completions every this many steps; 0 for never.")
    save_every: int = option(50, "Write a checkpoint every this many steps; 0 for none by steps.")
    save_every_minutes: float = option(10.0, "Write one too when the last is this old, in minutes; 0 for never.")
    keep_checkpoints: int = option(2, "Checkpoints kept in the run folder; older ones are removed.")
    process_timeout: float = option(
        600.0,
        "Seconds that processes wait for one another before a run ends; a reward or a download may be slow on one.",
    )
    eval_samples: int = option(1024, "Completions that judge the policy before and after training, at least 2.")
    resume: Optional[str] = option(None, "Continue this run folder, or 'latest', with its own settings.")
    eval_only: Optional[str] = option(None, "Judge the saved model of this run folder again, and train nothing.")

    def check(self) -> None:
        """Refuse values that cannot work, before any model is touched. UserError names the flag and what is allowed."""
        for name, kind in get_type_hints(PPOConfig).items():
            check_type(name, kind, getattr(self, name))
        if self.preset not in PRESETS:
            raise UserError(f"--preset {self.preset} is unknown; choose one of {', '.join(PRESETS)}")
        for name, (low, high, low_ok) in LIMITS.items():
            value = getattr(self, name)
            if not (low <= value if low_ok else low < value) or not value <= high or not math.isfinite(value):
                least = f"at least {low}" if low_ok else f"above {low}"
                most = (
                    f" and at most {high}" if math.isfinite(high) else " and finite" if isinstance(value, float) else ""
                )
                raise UserError(f"--{name} must be {least}{most}, not {value}")
        if self.minibatch_size > self.batch_size:
            raise UserError(f"--minibatch_size {self.minibatch_size} is larger than --batch_size {self.batch_size}")
        if self.run_name is not None and not re.fullmatch(r"[^\W_][\w.\-]*", self.run_name):
            allowed = "letters, digits, '_', '-' and '.' only, a letter or digit first"
            raise UserError(f"--run_name {self.run_name!r} is no plain name: {allowed}")
        for name in ("model_name", "reward_model_name", "runs_dir"):
            if not getattr(self, name).strip():
                raise UserError(f"--{name} is empty")
        self.read_prompts()
        if self.reward is not None:
            import_function(self.reward)
        check_device(self.device)

    def read_prompts(self) -> list[str]:
        """The prompts of this run, from --prompts or --prompts_file."""
        if self.prompts_file is None:
            prompts, source = self.prompts, "--prompts"
        else:
            source = f"--prompts_file {self.prompts_file}"
            try:
                prompts = Path(self.prompts_file).read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError:
                raise UserError(f"{source} is not UTF-8 text; save it as UTF-8, one prompt a line")
            except OSError as error:
                raise UserError(f"{source} cannot be read: {error.strerror}")
            while prompts and not prompts[-1].strip():
                prompts.pop()
        if not prompts:
            raise UserError(f"{source} holds no prompt; give at least one")
        for number, prompt in enumerate(prompts, 1):
            if not prompt.strip():
                raise UserError(f"{source}: prompt {number} is empty; each needs at least one character")
        return prompts

    def n_steps(self) -> int:
        """Steps of the run: episodes rounded up to whole batches."""
        return math.ceil(self.episodes / self.batch_size)

    def save(self, path: Path) -> None:
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text(json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


PRESETS = {
    "default": {},
    "article": dict(  # advantages are whitened over the batch here too, not inside one sequence
        minibatch_size=1,
        lam=0.95,
        detach_value=False,
        frozen_share=0.0,
        kl_controller="adaptive",
        lr=1.41e-5,
        value_lr=1.41e-5,
        adam_epsilon=1e-8,
        average_power=1e9,
    ),
    "demo": dict(
        model_name="demo",
        reward_model_name="demo",
        episodes=10_240,
        lam=0.95,
        frozen_share=0.0,
        init_kl_coef=0.15,
        lr=1e-4,
        value_lr=1e-2,
        dtype="float32",
    ),
}


@functools.wraps(PPOConfig.__init__)
def init_with_preset(self, __init__=PPOConfig.__init__, **values):
    __init__(self, **{**PRESETS.get(str(values.get("preset")), {}), **values})


PPOConfig.__init__ = init_with_preset

INF = math.inf
LIMITS = {  # name: (lowest, highest, whether the lowest itself is allowed)
    "gen_len": (1, INF, True), "temperature": (0, INF, False),
    "episodes": (1, INF, True), "batch_size": (1, INF, True), "minibatch_size": (1, INF, True),
    "ppo_epochs": (1, INF, True), "gamma": (0, 1, True), "lam": (0, 1, True), "cliprange": (0, INF, False),
    "cliprange_value": (0, INF, False), "vf_coef": (0, INF, True), "frozen_share": (0, 1, True),
    "init_kl_coef": (0, INF, True), "target": (0, INF, False), "horizon": (1, INF, True),
    "lr": (0, INF, False), "value_lr": (0, INF, False), "adam_epsilon": (0, INF, False),
    "average_power": (0, INF, True), "max_grad_norm": (0, INF, False), "micro_batch_size": (0, INF, True),
    "seed": (0, 2**63 - 1, True), "log_samples_every": (0, INF, True), "save_every": (0, INF, True),
    "save_every_minutes": (0, INF, True), "process_timeout": (0, 10**6, False),
    "keep_checkpoints": (1, INF, True), "eval_samples": (2, INF, True),
}  # fmt: skip


GROUPS = {  # of --help, each by its first field
    "preset": "models",
    "prompts": "prompts and sampling",
    "episodes": "PPO (Schulman et al. 2017)",
    "init_kl_coef": "KL to the reference (Ziegler et al. 2019, section 2.2)",
    "lr": "optimisation (Adam, Kingma & Ba 2015)",
    "seed": "run and logging",
}
DESCRIPTION = """Train a Chinese GPT-2 with PPO towards texts that a reward likes.

  python train_ppo.py --preset demo
  python train_ppo.py --model_name DIR --reward_model_name DIR --lr 3e-5 --prompts "刚收到货,感觉" "这部电影很"
"""


def parse_args(argv: list[str]) -> tuple[PPOConfig, set[str]]:
    """The command line as a config, the preset's defaults overridden by the flags; and the names of the flags given.

    UserError, with the nearest name, for an unknown flag. --help shows the preset's defaults and leaves.
    """
    from transformers import HfArgumentParser

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.const is False else super()._get_help_string(action)

    class Parser(HfArgumentParser):
        def error(self, message):
            raise UserError(f"{message}; python train_ppo.py --help lists the flags")

        group = None

        def add_argument(self, *flags, **options):
            name = flags[0].lstrip("-")
            if name in GROUPS:
                self.group = self.add_argument_group(GROUPS[name])
            if name.startswith("no_"):  # the library's addition for a bool that is True by default
                options["help"] = f"Sets --{name[3:]} to False."
            if self.group is None:
                return super().add_argument(*flags, **options)
            return self.group.add_argument(flags[0], **options)

    parser = Parser(
        PPOConfig,
        usage="python train_ppo.py [--NAME VALUE ...]",
        description=DESCRIPTION,
        formatter_class=Formatter,
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
        hint = f"did you mean {near[0]}?" if near else "python train_ppo.py --help lists the flags"
        raise UserError(f"unknown argument {unknown[0]}; {hint}")
    preset = given.get("preset", PPOConfig.preset)
    if preset not in PRESETS:
        raise UserError(f"--preset {preset} is unknown; choose one of {', '.join(PRESETS)}")
    if "-h" in argv or "--help" in argv:
        parser.set_defaults(preset=preset, **PRESETS[preset])
        parser.print_help()
        raise SystemExit(0)
    return PPOConfig(**given), set(given)


def load_config(path: Path, may_lack: set[str] = frozenset()) -> PPOConfig:
    """The config that a run was started with; of the fields in `may_lack` the default where it has none.

    UserError where the file is missing, broken or has other fields.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}")
    except ValueError:
        raise UserError(f"{path} is not JSON")
    names = {f.name for f in dataclasses.fields(PPOConfig)}
    if not isinstance(values, dict) or not set(values) <= names:
        wrong = sorted(set(values) - names) if isinstance(values, dict) else [type(values).__name__]
        raise UserError(f"{path} is no config of this program: it holds {wrong[0]!r}")
    config = PPOConfig(**values)
    dataclasses.replace(config, device="auto").check()  # a run may go on where its device is not
    if absent := sorted(names - set(values) - may_lack):
        wrote = f"{path} was written by another version of this program and lacks {absent[0]!r}"
        raise UserError(f"{wrote}; add it with the value that the run was made with")
    return config


# ----------------------------------------------------------------------------------------------
# Checks of single values


def check_type(name: str, kind, value) -> None:
    """Refuse a value that is not of the field's type, as a script or an edited config.json may hold."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
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
        raise UserError(f"{name} must be of type {getattr(kind, '__name__', kind)}, not {value!r}")


def check_device(device: str) -> None:
    """Refuse an unknown device, or one that this machine lacks."""
    if device in ("auto", "cpu"):
        return
    if not re.fullmatch(r"cuda(:\d+)?|mps", device):
        raise UserError(f"--device {device} is unknown; choose auto, cpu, cuda, cuda:N or mps")
    import torch

    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: this machine has no Apple GPU that torch can use; try --device cpu")
    # torch counts a GPU whose driver is too old for it, too
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda") and int(device[5:] or 0) >= usable:
        raise UserError(f"--device {device}: torch sees {usable} CUDA GPUs here; try --device cpu")


def pick_device(device: str):
    """The torch.device of a --device value; 'auto' is a CUDA GPU, else an Apple GPU, else the CPU.

    Below torchrun each process takes a GPU of its own. UserError where there are fewer GPUs than processes.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda") and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        check_device(device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
    return torch.device(device)


def pick_dtype(dtype: str, device):
    """The torch.dtype of a --dtype value; 'auto' is bfloat16 where `device` computes it natively, else float32."""
    import torch

    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return torch.bfloat16 if native else torch.float32


def pick_micro_batch_size(config: PPOConfig, vocab_size: int, device) -> int:
    """How many completions go through a model at once, as --micro_batch_size says.

    Logits take most of the memory: some six passes over them in float32 live at the same time, 24 bytes a token and
    vocabulary entry. A GPU is idle between small micro-batches, so there they are as large as an eighth of it holds.
    """
    if config.micro_batch_size:
        return config.micro_batch_size
    if device.type != "cuda":
        return 64
    import torch

    memory = torch.cuda.get_device_properties(device).total_memory
    return max(1, memory // 8 // (24 * config.gen_len * vocab_size))


def import_function(spec: str) -> Callable:
    """The callable named by 'module:function', from the working directory or the Python path."""
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise UserError(f"--reward {spec} must be module:function, for example my_reward:score")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last: a reward.py there must not hide this program's
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise UserError(f"--reward {spec} cannot be imported ({type(error).__name__}: {error})")
    if not callable(function):
        raise UserError(f"--reward {spec} is no function but a {type(function).__name__}")
    return function
