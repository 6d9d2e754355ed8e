"""Everything that a run needs, loaded in the order of what it costs to look."""

import hashlib
import sys
from pathlib import Path

from config import PPOConfig, UserError, import_function, pick_device, pick_dtype
from support import processes
from support.hub import model_folder

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [ROOT / f"{name}.py" for name in ("config", "gpt2_value_head", "ppo", "reward", "train_ppo")]
PROGRAM += sorted((ROOT / "support").glob("*.py"))


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
    return load_models(config, *folders)


def load_models(config: PPOConfig, policy_folder: Path, reward_folder: Path | None = None):
    """As `load`, from local folders."""
    from support.text_trainer import TextPPOTrainer

    loaded = processes.on_all_ranks(lambda: load_parts(config, policy_folder, reward_folder))
    if processes.world_size() > 1:
        check_same(config, *loaded)
    policy, tokenizer, *others = loaded
    return TextPPOTrainer.from_policy(policy, tokenizer, config), tokenizer, *others


def load_parts(config: PPOConfig, policy_folder: Path, reward_folder: Path | None):
    """Policy, tokenizer, reward, prompts and tokens: configs first, then the prompts' lengths, and the weights last."""
    from reward import SentimentReward
    from support.models import encode_prompt, load_policy
    from support.text_trainer import read_policy_folder

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
    policy = load_policy(policy_folder, gpt2_config, device)
    return policy, tokenizer, reward, prompts, queries


def check_same(config: PPOConfig, policy, tokenizer, reward, prompts, queries) -> None:
    """See that all processes loaded the same: UserError, on all of them, that names what differs and the hosts.

    The demo's models, which every machine makes for itself, differ in the last digits between processors: of them all
    take rank 0's weights.
    """
    import numpy
    import torch
    import transformers

    versions = {library.__name__: library.__version__ for library in (torch, transformers, numpy)}
    dtype = str(pick_dtype(config.dtype, policy.device)).removeprefix("torch.")
    picked = {f"--device {config.device}": policy.device.type, f"--dtype {config.dtype}": dtype}
    program = {"the hash of this program's files": hash_of([path.read_bytes() for path in PROGRAM])}
    if config.reward and (path := getattr(sys.modules[config.reward.partition(":")[0]], "__file__", None)):
        program[f"the hash of the file of --reward {config.reward}"] = hash_of(Path(path).read_bytes())
    processes.check_same(versions | program | picked)
    models = {"model_name": (policy, tokenizer)}
    if not config.reward:
        models["reward_model_name"] = (reward.pipeline.model, reward.pipeline.tokenizer)
    hashes = {}
    for flag, (model, its_tokenizer) in models.items():
        name = f"--{flag} {getattr(config, flag)}"
        if getattr(config, flag) == "demo":
            processes.broadcast_weights(model)
        hashes[f"the hash of the weights of {name}"] = hash_of(model.state_dict())
        hashes[f"the hash of the tokenizer of {name}"] = hash_of(sorted(its_tokenizer.get_vocab().items()))
    hashes["the hash of the prompts"] = hash_of([prompts, [ids.tolist() for ids in queries]])
    processes.check_same(hashes)


def hash_of(content) -> str:
    """The first digits of a SHA-256 of a state dict's names and tensors, or of what repr() shows whole."""
    import torch

    if not isinstance(content, dict):
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for name, tensor in content.items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
