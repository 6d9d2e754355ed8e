"""Everything that a run needs, loaded in the order of what it costs to look."""

import hashlib
import sys
import zlib
from pathlib import Path

from config import PPOConfig
from support import collectives
from support.devices import environment, in_one_line, keep_freed_memory, pick_device, pick_dtype
from support.errors import UserError
from support.files import path_errors
from support.hub import model_folder
from support.settings import read_prompts

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = [ROOT / f"{name}.py" for name in ("config", "gpt2_value_head", "ppo", "reward", "train_ppo")]
PROGRAM += sorted((ROOT / "support").glob("*.py"))


def load(config: PPOConfig):
    """Policy, tokenizer, reward and prompts of a run: configs first, then the prompts' lengths, and the weights last.

    Each process loads for itself, and all must have loaded the same. UserError, on all of them, where any fails.
    """
    from reward import read_classifier_config
    from support.models import read_policy_folder

    device = collectives.on_all_ranks(lambda: pick_device(config.device))
    print(in_one_line(environment(device)))
    looks = {"model_name": read_policy_folder}
    if not config.reward:
        looks["reward_model_name"] = lambda folder: read_classifier_config(folder, config.positive_label)
    folders = [
        collectives.local_rank_0_first(lambda flag=flag: model_folder(getattr(config, flag), f"--{flag}", looks[flag]))
        for flag in looks
    ]
    keep_freed_memory()
    loaded = collectives.on_all_ranks(lambda: load_folders(config, device, *folders))
    if collectives.world_size() > 1:
        check_same(config, *loaded)
    return loaded


@path_errors()
def load_folders(config: PPOConfig, device, policy_folder: Path, reward_folder: Path | None = None):
    """As `load`, in this process alone, from local folders."""
    from reward import SentimentReward
    from support.models import encode_prompt, load_policy, read_policy_folder
    from support.user_code import import_function

    gpt2_config, tokenizer = read_policy_folder(policy_folder)
    prompts = read_prompts(config)
    longest = max(len(encode_prompt(tokenizer, prompt)) for prompt in prompts)
    positions = gpt2_config.n_positions
    if longest + config.gen_len > positions:
        room = f"the longest prompt has {longest} tokens and the model {positions} positions"
        raise UserError(f"--gen_len {config.gen_len}: {room}, which leaves {max(0, positions - longest)}")
    if config.reward:
        reward = import_function(config.reward)
    else:
        reward = SentimentReward(reward_folder, device, pick_dtype(config.dtype, device), config.positive_label)
    return load_policy(policy_folder, gpt2_config, device), tokenizer, reward, prompts


def check_same(config: PPOConfig, policy, tokenizer, reward, prompts: list[str]) -> None:
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
    collectives.check_same(versions | program | picked)
    if config.model_name == "demo":
        collectives.broadcast_weights(policy)
    if config.reward_model_name == "demo" and not config.reward:
        collectives.broadcast_weights(reward.pipeline.model)
    collectives.check_same(input_hashes(config, policy, tokenizer, reward, prompts))


def input_hashes(config: PPOConfig, policy, tokenizer, reward, prompts: list[str]) -> dict[str, str]:
    """Hashes, by name, of what decides a run besides its settings: models, prompts, the file of a reward of one's own.

    A classifier counts rounded: a run may go on where it computes in another dtype.
    """
    from support.models import encode_prompt

    models = {f"--model_name {config.model_name}": (dict(policy.named_parameters()), tokenizer)}
    if not config.reward:
        rounded = {name: weight.bfloat16() for name, weight in reward.pipeline.model.named_parameters()}
        models[f"--reward_model_name {config.reward_model_name}"] = (rounded, reward.pipeline.tokenizer)
    hashes = {}
    for name, (weights, its_tokenizer) in models.items():
        hashes[f"the hash of the weights of {name}"] = hash_of(weights)
        hashes[f"the hash of the tokenizer of {name}"] = hash_of(sorted(its_tokenizer.get_vocab().items()))
    if path := reward_file(config):
        hashes[f"the hash of the file of --reward {config.reward}"] = hash_of(path.read_bytes())
    tokens = [encode_prompt(tokenizer, prompt).tolist() for prompt in prompts]
    return {**hashes, "the hash of the prompts": hash_of([prompts, tokens])}


def reward_file(config: PPOConfig) -> Path | None:
    """The file of a reward of one's own, which has been imported; None of a module without one, or of a classifier."""
    file = config.reward and getattr(sys.modules[config.reward.partition(":")[0]], "__file__", None)
    return Path(file) if file else None


def own_files(config: PPOConfig) -> list[Path]:
    """The files of the user's own that decide a run: of a reward, and of prompts."""
    return [path for path in (reward_file(config), config.prompts_file and Path(config.prompts_file)) if path]


def hash_of(content) -> str:
    """The first digits of a SHA-256 of a state dict's names, shapes and tensors, or of what repr() shows whole.

    Of each tensor its CRC-32, which is computed several times as fast: of the article's two models in 0.2 s.
    """
    import torch

    if not isinstance(content, dict):
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for name, tensor in content.items():
        numbers = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {numbers}\n".encode())
    return digest.hexdigest()[:12]
