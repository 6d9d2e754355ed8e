"""Loads everything that a run needs, in the order of what it costs to look at."""

import copy
import hashlib
import sys
import zlib
from pathlib import Path

import torch

from config import PPOConfig
from reward import SentimentReward, import_function, read_classifier_folder
from support.common.errors import UserError
from support.common.files import path_errors
from support.compute import processes
from support.compute.devices import environment, in_one_line, keep_freed_memory, pick_device, pick_dtype
from support.models.hub import VALUE_HEAD, model_folder
from support.models.pretrained import encode_prompt, load_policy, read_policy_folder
from support.run.settings import read_prompts


def load(config: PPOConfig):
    """Return the policy, tokenizer, reward, prompts, encoded prompts and reference of a run. Raises UserError on all
    processes if any fails or has loaded something else."""
    prompts = processes.on_all_ranks(lambda: read_prompts(config))
    device = processes.on_all_ranks(lambda: pick_device(config.device))
    print(in_one_line(environment(device)))
    checks, folders = {"model_name": read_policy_folder}, {}
    if config.reference:
        checks["reference"] = lambda folder: read_reference(folder, *read_policy_folder(folders["model_name"]))
    if not config.reward:
        checks["reward_model_name"] = lambda folder: read_classifier_folder(folder, config.positive_label)
    for flag, check in checks.items():
        folders[flag] = processes.on_all_ranks(lambda: model_folder(getattr(config, flag), f"--{flag}", check))
    keep_freed_memory()
    found = folders["model_name"], folders.get("reward_model_name"), folders.get("reference")
    loaded = processes.on_all_ranks(lambda: load_folders(config, device, prompts, *found))
    if processes.world_size() > 1:
        versions = {name: environment(device)[name] for name in ("torch", "transformers", "numpy", "code")}
        kinds = {"--device": device.type, "--dtype": str(pick_dtype(config.dtype, device))}
        processes.check_same(versions | kinds | input_hashes(config, *loaded))
    return loaded


@path_errors()
def load_folders(
    config: PPOConfig,
    device,
    prompts: list[str],
    policy_folder: Path,
    reward_folder: Path | None = None,
    reference_folder: Path | None = None,
):
    """Return what `load` returns, from local folders; configs and prompts are checked before weights are read."""
    gpt2_config, tokenizer = read_policy_folder(policy_folder)
    ref_config = read_reference(reference_folder, gpt2_config, tokenizer) if reference_folder else None
    queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, queries))
    if longest + config.gen_len > gpt2_config.n_positions:
        room = f"{gpt2_config.n_positions} positions, of which the longest prompt takes {longest}"
        raise UserError(f"--gen_len {config.gen_len} is too long: the model has {room}")
    if config.reward:
        reward = import_function(config.reward)
    else:
        reward = SentimentReward(reward_folder, device, pick_dtype(config.dtype, device), config.positive_label)
    policy = load_policy(policy_folder, gpt2_config, device)
    if not (policy_folder / VALUE_HEAD).exists():
        print(f"{policy_folder.name}: no value head in this checkpoint, starting one at zero")
    if not reference_folder:
        return policy, tokenizer, reward, prompts, queries, copy.deepcopy(policy)
    print(f"the reference is {config.reference}: KL and gain count from it, and 'before' means it")
    return policy, tokenizer, reward, prompts, queries, load_policy(reference_folder, ref_config, device)


def read_reference(folder: Path, gpt2_config, tokenizer):
    """Return the GPT-2 config of a reference's folder. Raises UserError if no policy of this config and tokenizer can
    have been trained from it."""
    ref_config, its_tokenizer = read_policy_folder(folder)
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    sizes = [(name, getattr(ref_config, name), getattr(gpt2_config, name)) for name in names]
    differ = [f"{name} {its} instead of {ours}" for name, its, ours in sizes if its != ours]
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        differ.append("another vocabulary")
    if differ:
        way = "name the model that it was trained from"
        raise UserError(f"--reference {folder} doesn't fit --model_name: it has {', '.join(differ)}; {way}")
    return ref_config


def input_hashes(
    config: PPOConfig, policy, tokenizer, reward, prompts: list[str], queries: list, reference=None
) -> dict[str, str]:
    """Return hashes, by name, of what decides a run besides its settings: models, prompts, your reward's file.

    The classifier's weights are rounded to bfloat16 first, so that a run may go on in another dtype.
    """
    models = {f"--model_name {config.model_name}": (dict(policy.named_parameters()), tokenizer)}
    if not config.reward:
        rounded = {name: weight.bfloat16() for name, weight in reward.pipeline.model.named_parameters()}
        models[f"--reward_model_name {config.reward_model_name}"] = (rounded, reward.pipeline.tokenizer)
    hashes = {"the hash of the prompts": hash_of([prompts, [query.tolist() for query in queries]])}
    for name, (weights, its_tokenizer) in models.items():
        hashes[f"the hash of the weights of {name}"] = hash_of(weights)
        hashes[f"the hash of the tokenizer of {name}"] = hash_of(sorted(its_tokenizer.get_vocab().items()))
    if config.reference:
        name = f"the hash of the weights of --reference {config.reference}"
        hashes[name] = hash_of(dict(reference.named_parameters()))
    if path := reward_file(config):
        hashes[f"the hash of the file of --reward {config.reward}"] = hash_of(path.read_bytes())
    return hashes


def reward_file(config: PPOConfig) -> Path | None:
    """Return the file of your own reward's module, which has been imported; None for a classifier."""
    file = config.reward and getattr(sys.modules[config.reward.partition(":")[0]], "__file__", None)
    return Path(file) if file else None


def hash_of(content) -> str:
    """Return 12 digits of a SHA-256 of repr(content), or of a state dict's names, shapes, dtypes and CRC-32s."""
    if not isinstance(content, dict):
        return hashlib.sha256(repr(content).encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for name, tensor in content.items():
        numbers = zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {numbers}\n".encode())
    return digest.hexdigest()[:12]
