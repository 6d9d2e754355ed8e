"""Every hyperparameter: its default, what it does, its unit and its limits.

    python train_ppo.py --lr 3e-5 --prompts "刚收到货,感觉" "这部电影很"

Change a default here, or set it by name on the command line (--detach_value False). Any field you add becomes a flag,
too. Presets override these defaults: with --preset demo, `lr` is the demo's. Flags override both.
"""

import copy
import difflib
from dataclasses import MISSING, dataclass, field, fields
from typing import Literal


def option(default, help: str, *, above=None, at_least=None, at_most=None, group: str | None = None):
    """Define a field with its --help text and the limits of its value. `group` starts a new group in --help."""
    metadata = {"help": help, "above": above, "at_least": at_least, "at_most": at_most, "group": group}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(init=False)
class PPOConfig:
    """All settings of a run; `support.run.settings.check` rejects invalid values."""

    def __init__(self, preset: str = "default", **given):
        """Given values override the preset's, which override the defaults.

        If batch_size is given without minibatch_size, minibatch_size is at most batch_size.
        """
        values = {f.name: f.default_factory() if f.default is MISSING else f.default for f in fields(self)}
        if unknown := sorted(given.keys() - values.keys()):
            raise TypeError(f"PPOConfig has no field {unknown[0]!r}{did_you_mean(unknown[0])}")
        values |= PRESETS.get(str(preset), {}) | given | {"preset": preset}
        batch, minibatch = given.get("batch_size"), values["minibatch_size"]
        if "minibatch_size" not in given and type(batch) is int and 0 < batch < minibatch:
            values["minibatch_size"] = batch
            print(f"minibatch_size is {batch} instead of {minibatch}, because batch_size is {batch}")
        vars(self).update(copy.deepcopy(values))

    preset: str = option(
        "default",
        "Set of defaults: 'default' (the article's task with the settings that worked best here), 'thorough' (eight "
        "times the completions, in large batches for a GPU, with lr and epochs to match), 'article' (the article's "
        "hyperparameters) or 'demo' (tiny models, built on the spot).",
        group="models",
    )

    model_name: str = option("uer/gpt2-chinese-cluecorpussmall", "GPT-2 to train: a Hub id, a local folder, or 'demo'.")
    reference: str | None = option(
        None,
        "The model from which KL and gain are measured: a Hub id, a local folder, or 'demo'. By default --model_name; "
        "if that is itself a fine-tuned model, you can give the model that it was fine-tuned from.",
    )
    reward_model_name: str = option(
        "uer/roberta-base-finetuned-jd-binary-chinese",
        "Sentiment classifier, or reward model with one label, that scores texts: a Hub id, a local folder, or 'demo'.",
    )
    positive_label: str | None = option(
        None,
        "The classifier's label whose probability is the reward; by default found in the model's id2label.",
    )
    reward: list[str] = option(
        [],
        "One or several rewards; PPO maximises their weighted sum. Each is 'classifier' (--reward_model_name; the "
        "default), module:function (yours; takes a list of texts, returns a number for each), a model's Hub id or "
        "folder, or 'human' (you type scores).",
    )
    reward_weights: list[float] = option(
        [],
        "A weight for each --reward, by default 1. A reward of weight 0 is a judge: it is reported but not trained on.",
    )

    prompts: list[str] = option(["刚收到货,感觉"], "Prompts to complete, used in turn.", group="prompts and sampling")
    prompts_file: str | None = option(
        None,
        "UTF-8 text file with one prompt per line, used instead of --prompts. In a .jsonl file each line is an object "
        "with 'prompt'; its other keys are passed to reward functions that have parameters with these names.",
    )
    gen_len: int = option(16, "Maximum number of new tokens per completion; [SEP] ends it earlier.", at_least=1)
    temperature: float = option(
        1.0, "Divides the logits everywhere: sampling, policy, reference and evaluation.", above=0
    )

    episodes: int = option(
        20_000, "Completions to train on, rounded up to whole batches.", at_least=1, group="PPO (Schulman et al. 2017)"
    )
    batch_size: int = option(128, "Completions sampled and scored per step.", at_least=1)
    minibatch_size: int = option(
        128,
        "Completions per optimiser step (article: 1; its many noisy steps cost KL but bring little reward; see "
        "docs/settings.md).",
        at_least=1,
    )
    ppo_epochs: int = option(4, "Passes over each batch.", at_least=1)
    gamma: float = option(
        1.0,
        "Discount per token, 0 to 1. The score (minus the batch's mean) arrives at the last token; with 1, every "
        "earlier token is credited with all of it.",
        at_least=0,
        at_most=1,
    )
    lam: float = option(
        1.0,
        "Lambda of generalised advantage estimation, 0 to 1 (Schulman et al. 2016; article: 0.95). Below 1, early "
        "tokens rely on the value head to predict the score, which it does poorly except on the demo's models.",
        at_least=0,
        at_most=1,
    )
    cliprange: float = option(
        0.2, "The probability ratio is clipped to 1 plus or minus this (the best value in the PPO paper).", above=0
    )
    cliprange_value: float = option(
        0.2,
        "Values are clipped to the old value plus or minus this. Scores and values are rescaled together, so that the "
        "first batch's scores have a standard deviation of 0.4 (about that of the article's raw scores).",
        above=0,
    )
    vf_coef: float = option(
        0.1,
        "Weight of the value loss (0.1 as in the article). It matters with --detach_value False. Otherwise this loss "
        "trains only the value head, where Adam cancels the weight; it then affects only --max_grad_norm's clipping.",
        at_least=0,
    )
    detach_value: bool = option(
        True,
        "Keep the value head's gradient out of the transformer (article: False, which disturbs the policy if a batch "
        "has many minibatches; see docs/settings.md).",
    )

    frozen_share: float = option(
        2 / 3,
        "Share of the transformer blocks to freeze, from the bottom up, together with the embeddings. 2/3 halves the "
        "work for the same gain, in models with 6 or 12 blocks (article: 0; see docs/settings.md).",
        at_least=0,
        at_most=1,
    )

    init_kl_coef: float = option(
        0.2,
        "KL coefficient, in reward per nat; also the beta in J = R - beta * KL, by which a run is evaluated.",
        at_least=0,
        group="KL to the reference (Ziegler et al. 2019, section 2.2)",
    )
    kl_budget: float = option(
        0.0,
        "KL to the reference, in nats per completion, that the best possible policy should have. Before training, "
        "--init_kl_coef is chosen to match, whatever the reward's unit. 0.4 suits the article's task; 0 turns it off.",
        at_least=0,
    )
    kl_controller: Literal["adaptive", "fixed"] = option(
        "fixed", "'fixed' keeps the coefficient, 'adaptive' steers it towards --target (article: adaptive)."
    )
    target: float = option(6.0, "KL per completion that the adaptive controller aims at, in nats.", above=0)
    horizon: int = option(
        10_000, "Completions after which a KL 10% above --target has raised the coefficient by about 10%.", at_least=1
    )

    lr: float = option(
        4e-5,
        "Adam's learning rate (article: 1.41e-5, with all weights trained).",
        above=0,
        group="optimisation (Adam, Kingma & Ba 2015)",
    )
    value_lr: float = option(
        1e-3,
        "Adam's learning rate for the value head, a single linear layer that starts at zero (article: the same as lr; "
        "see docs/settings.md).",
        above=0,
    )
    adam_epsilon: float = option(
        1e-5,
        "Added to the square root of Adam's second moment, so that weights whose gradient is only rounding error don't "
        "move (article: 1e-8; PPO in OpenAI Baselines: 1e-5).",
        above=0,
    )
    average_power: float = option(
        3.0,
        "The saved policy averages the weights over all steps. Step t counts roughly in proportion to t to this power, "
        "so early steps hardly count; 1e9 saves the last weights (as the article does).",
        at_least=0,
    )
    max_grad_norm: float = option(1.0, "Gradients with a larger norm are scaled down to this norm.", above=0)
    micro_batch_size: int = option(
        0,
        "Completions per forward pass, which limits memory and changes nothing else. 0: as many as fit in an eighth of "
        "a CUDA GPU's memory, or in 128 MiB on other devices (but at least 32, if those fit in 2 GiB).",
        at_least=0,
    )

    seed: int = option(
        1,
        "Seeds all random draws; on a CPU, the same seed repeats a run bit for bit.",
        at_least=0,
        at_most=2**63 - 1,
        group="run and logging",
    )
    device: str = option("auto", "'auto', 'cpu', 'cuda', 'cuda:N' or 'mps'.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "Precision in which the models compute; 'auto' is bfloat16 if the hardware supports it natively. Weights, "
        "optimiser and losses stay float32.",
    )
    run_name: str | None = option(None, "Name of the run's folder in --runs_dir; by default the current time.")
    runs_dir: str = option("runs", "Folder that contains the runs.")
    log_samples_every: int = option(10, "Steps between printouts of a few completions; 0 for never.", at_least=0)
    stop_on_alarm: bool = option(
        False,
        "Stop at the first warning of collapse or reward hacking (the alarms 'far away', 'narrow' and 'alike', see "
        "docs/experiments.md); checkpoint, model and report are still written.",
    )
    track: Literal["none", "wandb", "swanlab", "trackio"] = option(
        "none",
        "Also log the run with this package, which must be installed: settings, every column of metrics.csv, samples "
        "and results. --resume continues the same tracked run.",
    )
    save_every: int = option(50, "Steps between checkpoints; 0 for never.", at_least=0)
    save_every_minutes: float = option(
        10.0, "Also write a checkpoint once the last one is this many minutes old; 0 for never.", at_least=0
    )
    keep_checkpoints: int = option(2, "Checkpoints to keep; older ones are removed.", at_least=1)
    process_timeout: float = option(
        600.0,
        "With several processes: seconds that one waits for the others before the run fails; allow for a slow reward "
        "or download.",
        above=0,
        at_most=10**6,
    )
    eval_samples: int = option(
        1024, "Completions for evaluating the policy, before and after training; at least 2.", at_least=2
    )
    resume: str | None = option(
        None,
        "Continue the run in this folder, or the 'latest' run, with its saved settings; more --episodes extend it.",
    )
    eval_only: str | None = option(None, "Evaluate the saved model of this run folder again, without training.")
    complete: str | None = option(
        None, "Complete --prompts with the model of this run folder as it was before and after training."
    )
    n: int = option(5, "Completions per prompt that --complete shows.", at_least=1)


PRESETS = {
    "default": {},
    "thorough": dict(  # one epoch at 3 times the default lr learns as much as 4 at the default, in 2/3 of the time
        episodes=163_840,
        batch_size=1024,
        ppo_epochs=1,
        lr=1.2e-4,
        eval_samples=8192,
    ),
    "article": dict(  # the article's, but advantages are whitened over the batch, and no [SEP] follows a prompt
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
        dtype="float32",
    ),
}

# A setting, or a sentence if we have no such setting -> its names in other programs
OTHER_NAMES = {
    "model_name": "model model_path model_name_or_path sft_model_path pretrain actor_model",
    "reward_model_name": "reward_model reward_model_path rm_path",
    "reference": "ref_model ref_model_name ref_model_path reference_model",
    "reward": "reward_func reward_funcs reward_fn reward_function reward_functions",
    "prompts_file": "dataset dataset_name dataset_path train_file prompt_data",
    "gen_len": "max_new_tokens max_tokens max_length response_length output_max_length max_gen_len generate_max_len",
    "episodes": "steps num_steps total_steps max_steps train_steps num_episodes total_episodes total_timesteps",
    "batch_size": "per_device_train_batch_size train_batch_size rollout_batch_size",
    "minibatch_size": "mini_batch_size backward_batch_size gradient_accumulation_steps",
    "micro_batch_size": "forward_batch_size gradient_checkpointing",
    "ppo_epochs": "num_ppo_epochs update_epochs n_epochs",
    "gamma": "discount",
    "lam": "gae_lambda lambda lambd",
    "cliprange": "clip_range clip_coef clip_eps eps_clip clip_epsilon",
    "cliprange_value": "clip_range_vf vf_clip value_clip cliprange_vf",
    "vf_coef": "value_coef value_loss_coef vf_loss_coef",
    "frozen_share": "num_shared_layers num_layers_unfrozen",
    "init_kl_coef": "kl_coef kl_coeff beta kl_beta kl_weight",
    "kl_controller": "adap_kl_ctrl",
    "lr": "learning_rate actor_lr actor_learning_rate policy_lr",
    "value_lr": "critic_lr critic_learning_rate",
    "adam_epsilon": "adam_eps",
    "max_grad_norm": "grad_clip max_norm",
    "dtype": "bf16 fp16 torch_dtype precision mixed_precision",
    "run_name": "exp_name experiment_name",
    "runs_dir": "output_dir save_path",
    "track": "report_to log_with use_wandb with_tracking",
    "save_every": "save_steps save_freq",
    "resume": "resume_from_checkpoint",
    "--ppo_epochs are passes over each batch, --episodes the length of the run": "epochs num_epochs num_train_epochs",
    "there is no entropy bonus; docs/changing_ppo.md shows how to add one": "ent_coef entropy_coef entropy_coeff",
    "there is no early stopping; lower --lr or --ppo_epochs instead": "target_kl early_stopping",
    "Adam's learning rate is constant": "lr_scheduler_type scheduler warmup_steps warmup_ratio",
    "completions are always sampled from the full distribution": "top_k top_p do_sample min_length",
    "LoRA isn't supported; --frozen_share sets what is trained": "lora use_lora lora_r lora_rank peft use_peft",
    "start several processes with torchrun, see docs/several_gpus.md": "local_rank num_processes n_gpu num_gpus",
}


def did_you_mean(name: str, dashes: str = "") -> str:
    """Return what to append to an unknown-setting error: the likely name, the reason there is none, or ""."""
    found = [meant for meant, names in OTHER_NAMES.items() if name in names.split()]
    found += difflib.get_close_matches(name, [field.name for field in fields(PPOConfig)], cutoff=0.75)
    if not found:
        return ""
    return f"; {found[0]}" if " " in found[0] else f"; did you mean {dashes}{found[0]}?"
