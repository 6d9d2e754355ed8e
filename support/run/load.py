"""Load everything that a run needs, the cheapest checks first."""

import copy
import sys
from pathlib import Path

from config import PPOConfig
from reward import HumanReward, Rewards, SentimentReward, import_function, read_classifier_folder
from support.common.errors import UserError
from support.common.files import path_errors
from support.compute import processes
from support.compute.devices import environment, in_one_line, pick_device, pick_dtype
from support.models.hub import VALUE_HEAD, model_folder
from support.models.pretrained import encode_prompt, hash_of, load_policy, read_policy_folder
from support.run.settings import own_rewards, read_prompts, reward_models


def load(config: PPOConfig):
    """Return the policy, tokenizer, reward, prompts, encoded prompts and reference of a run. Raises UserError on all
    processes if any fails or has loaded something else."""
    columns = processes.on_all_ranks(lambda: read_prompts(config))
    device = processes.on_all_ranks(lambda: pick_device(config.device))
    print(in_one_line(environment(device)))

    def find(name: str, flag: str, check) -> Path:
        return processes.on_all_ranks(lambda: model_folder(name, flag, check))

    policy, reference, rewards = find(config.model_name, "--model_name", read_policy_folder), None, {}
    if config.reference:

        def fits(folder: Path):
            return read_reference(folder, *read_policy_folder(policy))

        reference = find(config.reference, "--reference", fits)
    for name, (flag, model, label) in reward_models(config).items():
        rewards[name] = find(model, flag, lambda folder: read_classifier_folder(folder, label))
    loaded = processes.on_all_ranks(lambda: load_folders(config, device, columns, policy, rewards, reference))
    if processes.world_size() > 1:
        versions = {name: environment(device)[name] for name in ("torch", "transformers", "numpy", "code")}
        kinds = {"--device": device.type, "--dtype": str(pick_dtype(config.dtype, device))}
        processes.check_same(versions | kinds | input_hashes(config, *loaded))
    return loaded


@path_errors()
def load_folders(
    config: PPOConfig,
    device,
    columns: dict[str, list],
    policy_folder: Path,
    reward_folders: dict[str, Path],
    reference_folder: Path | None = None,
):
    """Return what `load` returns, from local folders; configs and prompts are checked before weights are read.

    columns: the prompts and their columns, see `read_prompts`. reward_folders: folders of reward models, by name.
    """
    prompts = columns["prompt"]
    gpt2_config, tokenizer = read_policy_folder(policy_folder)
    ref_config = read_reference(reference_folder, gpt2_config, tokenizer) if reference_folder else None
    queries = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, queries))
    if longest + config.gen_len > gpt2_config.n_positions:
        room = f"{gpt2_config.n_positions} positions, and the longest prompt takes {longest} of them"
        raise UserError(f"--gen_len {config.gen_len} is too long: the model has {room}")
    rewards, dtype = {}, pick_dtype(config.dtype, device)
    for name in config.reward or ["classifier"]:
        if name in reward_folders:
            rewards[name] = SentimentReward(reward_folders[name], device, dtype, reward_models(config)[name][2])
        else:
            rewards[name] = HumanReward() if name == "human" else import_function(name)
    reward = Rewards(rewards, config.reward_weights, columns)
    policy = load_policy(policy_folder, gpt2_config, device)
    if not (policy_folder / VALUE_HEAD).exists():
        print(f"{policy_folder.name} has no value head; a new one starts at zero")
    if not reference_folder:
        return policy, tokenizer, reward, prompts, queries, copy.deepcopy(policy)
    print(f"the reference is {config.reference}: KL and gain are measured from it, and 'before' is its result")
    return policy, tokenizer, reward, prompts, queries, load_policy(reference_folder, ref_config, device)


def read_reference(folder: Path, gpt2_config, tokenizer):
    """Return the GPT-2 config of a reference's folder. Raises UserError if a policy with this config and tokenizer
    can't have been trained from it."""
    ref_config, its_tokenizer = read_policy_folder(folder)
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    sizes = [(name, getattr(ref_config, name), getattr(gpt2_config, name)) for name in names]
    differ = [f"{name} {its} instead of {ours}" for name, its, ours in sizes if its != ours]
    if its_tokenizer.get_vocab() != tokenizer.get_vocab():
        differ.append("a different vocabulary")
    if differ:
        way = "give the model that --model_name was trained from"
        raise UserError(f"--reference {folder} doesn't fit --model_name: it has {', '.join(differ)}; {way}")
    return ref_config


def input_hashes(
    config: PPOConfig, policy, tokenizer, reward: Rewards, prompts: list[str], queries: list, reference=None
) -> dict[str, str]:
    """Return hashes, by name, of what affects a run besides its settings: models, prompts, your rewards' files.

    Reward models' weights are rounded to bfloat16 first, so that a run can be evaluated in another dtype.
    """
    models = {f"--model_name {config.model_name}": (hash_of(dict(policy.named_parameters())), tokenizer)}
    for name, (flag, model, _) in reward_models(config).items():
        models[f"{flag} {model}"] = (reward.functions[name].weights_hash, reward.functions[name].pipeline.tokenizer)
    other_columns = {name: values for name, values in reward.columns.items() if name != "prompt"}
    asked = [prompts, [query.tolist() for query in queries], *([other_columns] if other_columns else [])]
    hashes = {"the hash of the prompts": hash_of(asked)}
    for name, (weights_hash, its_tokenizer) in models.items():
        hashes[f"the hash of the weights of {name}"] = weights_hash
        hashes[f"the hash of the tokenizer of {name}"] = hash_of(sorted(its_tokenizer.get_vocab().items()))
    if config.reference:
        name = f"the hash of the weights of --reference {config.reference}"
        hashes[name] = hash_of(dict(reference.named_parameters()))
    for path, name in reward_files(config).items():
        hashes[f"the hash of the file of --reward {name}"] = hash_of(path.read_bytes())
    return hashes


def reward_files(config: PPOConfig) -> dict[Path, str]:
    """Return the files of your own rewards' imported modules, each with the name of a reward in it."""
    files = {name: getattr(sys.modules[name.partition(":")[0]], "__file__", None) for name in own_rewards(config)}
    return {Path(file): name for name, file in files.items() if file}
