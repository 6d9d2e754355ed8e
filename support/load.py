"""Everything that a run needs, loaded in the order of what it costs to look."""

from pathlib import Path

from config import PPOConfig, UserError, import_function, pick_device, pick_dtype
from support import processes
from support.hub import model_folder


def load(config: PPOConfig):
    """Trainer, tokenizer, reward, prompts, and the prompts as tokens. UserError, on all processes, where any fails."""
    from reward import read_classifier_config
    from support.text_trainer import read_policy_folder

    looks = {"model_name": read_policy_folder}
    if not config.reward:
        looks["reward_model_name"] = lambda folder: read_classifier_config(folder, config.positive_label)
    folders = [
        processes.local_rank_0_first(lambda flag=flag: model_folder(getattr(config, flag), f"--{flag}", looks[flag]))
        for flag in looks
    ]
    processes.keep_freed_memory()
    return processes.on_all_ranks(lambda: load_models(config, *folders))


def load_models(config: PPOConfig, policy_folder: Path, reward_folder: Path | None = None):
    """As `load`, from local folders: configs first, then the prompts' lengths, and the weights last."""
    from reward import SentimentReward
    from support.models import encode_prompt
    from support.text_trainer import TextPPOTrainer, read_policy_folder

    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    gpt2_config, tokenizer = read_policy_folder(policy_folder)
    prompts = config.read_prompts()
    queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest, positions = max(map(len, queries)), gpt2_config.n_positions
    if longest + config.gen_len > positions:
        room = f"the longest prompt has {longest} tokens and the model {positions} positions"
        raise UserError(f"--gen_len {config.gen_len}: {room}, which leaves {max(0, positions - longest)}")
    if config.reward:
        reward = import_function(config.reward)
    else:
        reward = SentimentReward(reward_folder, device, dtype, config.positive_label)
    trainer = TextPPOTrainer.from_folder(policy_folder, config, gpt2_config, tokenizer)
    return trainer, tokenizer, reward, prompts, queries
