"""Every number of a run: what it does, its unit, what it may be, and why it has the value it has.

    python train_ppo.py --lr 3e-5 --prompts "刚收到货,感觉" "这部电影很"

Change a default here, or override it by its name on the command line; a yes or no as in --detach_value False. A preset
wins over a default changed here: with --preset demo, `lr` is the demo's. A run says, and keeps in its folder, where it
differs from its preset as shipped.
"""

import math
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from decimal import Decimal
from numbers import Real
from typing import Literal, Optional


class Sentence(str):
    """What --help says of a field. With it go the limits of its value, and the title of the group in --help that begins
    with it: HfArgumentParser hands all of a field's metadata to argparse, which knows no such things."""


def option(default, help: str, *, above=-math.inf, at_least=-math.inf, at_most=math.inf, group: str | None = None):
    sentence = Sentence(help)
    sentence.above, sentence.at_least, sentence.at_most, sentence.group = above, at_least, at_most, group
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata={"help": sentence})
    return field(default=default, metadata={"help": sentence})


@dataclass(init=False)
class PPOConfig:
    """All hyperparameters of a run. `support.settings.check` refuses values that cannot work."""

    def __init__(self, **values):
        """What is not given has the value of the preset and, where that names none, the default below."""
        defaults = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(self)}
        if unknown := sorted(set(values) - set(defaults)):
            raise TypeError(f"PPOConfig has no field {unknown[0]!r}")
        for name, value in (defaults | PRESETS.get(str(values.get("preset")), {}) | values).items():
            setattr(self, name, value.copy() if isinstance(value, list) else value)

    def __setattr__(self, name, value):
        """A number of another type, as Decimal or one of NumPy's, becomes the int or the float of its field."""
        kind = type(getattr(PPOConfig, name, None))
        if kind in (int, float) and isinstance(value, (Real, Decimal)) and not isinstance(value, bool):
            with suppress(ArithmeticError, ValueError):  # of infinity or NaN, which the check refuses
                value = kind(value) if kind is float or kind(value) == value else value
        super().__setattr__(name, value)

    preset: str = option(
        "default",
        "Set of defaults: 'default' (the article's job, done as was found best here), 'thorough' (the same with eight "
        "times the completions, in batches that fill a GPU), 'article' (the article's own settings) or 'demo' (tiny "
        "models made on the spot).",
        group="models",
    )

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

    prompts: list[str] = option(["刚收到货,感觉"], "Prompts to complete, taken in turn.", group="prompts and sampling")
    prompts_file: Optional[str] = option(None, "UTF-8 text file with one prompt a line, instead of --prompts.")
    gen_len: int = option(16, "New tokens per completion at most; a [SEP] ends it earlier.", at_least=1)
    temperature: float = option(
        1.0, "Divides the logits everywhere: sampling, policy, reference and evaluation.", above=0
    )

    episodes: int = option(
        20_000, "Completions to train on, rounded up to whole batches.", at_least=1, group="PPO (Schulman et al. 2017)"
    )
    batch_size: int = option(128, "Completions sampled and scored per step.", at_least=1)
    minibatch_size: int = option(
        128,
        "Completions per optimiser step (article: 1; many small noisy steps waste KL, see docs/learning.md).",
        at_least=1,
    )
    ppo_epochs: int = option(4, "Passes over each batch.", at_least=1)
    gamma: float = option(
        1.0,
        "Discount per token, 0 to 1. At 1 the score, which comes with the last token, counts in full for every token "
        "before it, however far away.",
        at_least=0,
        at_most=1,
    )
    lam: float = option(
        1.0,
        "Lambda of generalised advantage estimation, 0 to 1 (Schulman et al. 2016; article: 0.95): the values explain "
        "little of the reward, so what a smaller one cuts off is signal; in the demo they explain more.",
        at_least=0,
        at_most=1,
    )
    cliprange: float = option(
        0.2, "The probability ratio is clipped to 1 plus or minus this (the PPO paper's best).", above=0
    )
    cliprange_value: float = option(
        0.2,
        "Values are clipped to the old value plus or minus this, in a unit in which the scores of the first batch have "
        "a standard deviation of 0.4 (the article's have about that by themselves).",
        above=0,
    )
    vf_coef: float = option(
        0.1,
        "Weight of the value loss (the article's). It matters with --detach_value False alone: else this loss trains "
        "the value head only, and Adam evens its weight out.",
        at_least=0,
    )
    detach_value: bool = option(
        True,
        "Keep the value head's gradient out of the transformer (article: False, which disturbs the policy where a "
        "batch has many minibatches; see docs/learning.md).",
    )

    frozen_share: float = option(
        2 / 3,
        "Share of the blocks, from the lowest, that stay as they are, and the embeddings with them: half the work, and "
        "with six blocks or twelve no less gain (article: 0, which trains everything; see docs/learning.md).",
        at_least=0,
        at_most=1,
    )

    init_kl_coef: float = option(
        0.2,
        "KL coefficient, in reward per nat; beta of the evaluation.",
        at_least=0,
        group="KL to the reference (Ziegler et al. 2019, section 2.2)",
    )
    kl_budget: float = option(
        0.0,
        "Finds --init_kl_coef before training, for any reward: the one at which the best possible policy is this far "
        "from the reference, in nats a completion (0.4 in the article's job); 0 for none.",
        at_least=0,
    )
    kl_controller: Literal["adaptive", "fixed"] = option(
        "fixed",
        "'fixed' keeps the coefficient, 'adaptive' steers it towards --target (article: adaptive).",
    )
    target: float = option(6.0, "KL per completion that the adaptive controller aims at, in nats.", above=0)
    horizon: int = option(10_000, "Completions over which the adaptive controller corrects its error.", at_least=1)

    lr: float = option(
        4e-5,
        "Adam's learning rate (article: 1.41e-5, with everything trained).",
        above=0,
        group="optimisation (Adam, Kingma & Ba 2015)",
    )
    value_lr: float = option(
        1e-3,
        "Adam's learning rate for the value head (article: the same as lr), which starts at zero and has to reach the "
        "mean reward in a few steps; see docs/learning.md.",
        above=0,
    )
    adam_epsilon: float = option(
        1e-5,
        "Added to the root of Adam's second moment: what moves by rounding errors alone stays where it is (article: "
        "1e-8; Baselines' PPO has 1e-5).",
        above=0,
    )
    average_power: float = option(
        3.0,
        "The saved policy is an average of the weights after each step, in which step t weighs about t to this power, "
        "so that the first steps fade however long the run is; 1e9 saves the last weights (article: these).",
        at_least=0,
    )
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm at most.", above=0)
    micro_batch_size: int = option(
        0,
        "Completions that go through a model at once, which bounds memory and changes nothing else; 0 for as many as "
        "an eighth of a CUDA GPU's memory holds, or elsewhere for 64, or for fewer where they would need over 2 GiB.",
        at_least=0,
    )

    seed: int = option(
        1,
        "Decides every random draw; on a CPU the same seed gives the same run to the bit.",
        at_least=0,
        at_most=2**63 - 1,
        group="run and logging",
    )
    device: str = option("auto", "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Arithmetic of the models; 'auto' is bfloat16 where the hardware computes it natively. Weights, optimiser "
        "and losses stay float32.",
    )
    run_name: Optional[str] = option(None, "Folder of this run below --runs_dir; a time stamp unless given.")
    runs_dir: str = option("runs", "Folder that holds the runs.")
    log_samples_every: int = option(10, "Print a few completions every this many steps; 0 for never.", at_least=0)
    track: Literal["none", "wandb", "swanlab", "trackio"] = option(
        "none",
        "Show the run in this package too, where it is installed: settings, every column of metrics.csv, samples and "
        "results. --resume goes on with the same tracked run.",
    )
    save_every: int = option(50, "Write a checkpoint every this many steps; 0 for none by steps.", at_least=0)
    save_every_minutes: float = option(
        10.0, "Write one too when the last is this old, in minutes; 0 for never.", at_least=0
    )
    keep_checkpoints: int = option(2, "Checkpoints kept in the run folder; older ones are removed.", at_least=1)
    process_timeout: float = option(
        600.0,
        "Seconds that processes wait for one another before a run ends; a reward or a download may be slow on one.",
        above=0,
        at_most=10**6,
    )
    eval_samples: int = option(
        1024, "Completions that judge the policy before and after training, at least 2.", at_least=2
    )
    resume: Optional[str] = option(None, "Continue this run folder, or 'latest', with its own settings.")
    eval_only: Optional[str] = option(None, "Judge the saved model of this run folder again, and train nothing.")


PRESETS = {
    "default": {},
    "thorough": dict(  # one pass at thrice the lr learns as much as four, for a third less work
        episodes=163_840,
        batch_size=1024,
        ppo_epochs=1,
        lr=1.2e-4,
        eval_samples=8192,
    ),
    "article": dict(  # advantages are whitened over the batch here too, not inside one sequence
        prompts=["刚收到货，感觉", "这部电影很", "说实话，真的很", "这次购物总的来说体验很"],  # with full-width commas
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
