"""PPOTrainer for your own training loop (README, "From Python"): it loads, encodes, decodes and saves. It takes lists,
tensors and arrays of any library; they are only converted and checked here."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from config import PPOConfig
from gpt2_value_head import completion_mask, never_sampled_ids
from ppo import PPOTrainer
from reward import Rewards
from support.common.files import disk_errors, path_errors
from support.compute.batches import Completions, Prompts, listed, shown, to_device, to_float32, to_ids
from support.compute.devices import pick_device
from support.models.hub import model_folder
from support.models.model_card import write_card
from support.models.pretrained import decode, encode_prompt, load_policy, read_policy_folder, save_policy
from support.run.evaluation import sample_and_score
from support.run.limit import kl_coef_for
from support.run.load import read_reference
from support.run.settings import check


class TextPPOTrainer(PPOTrainer):
    """A PPOTrainer that takes texts, lists and any numbers. Raises ValueError if a setting is wrong."""

    def __init__(self, config: PPOConfig, model, ref_model, tokenizer):
        super().__init__(config, model, ref_model, tokenizer)
        self.example = config.prompts[0]  # a prompt for the model card
        self.never_sampled = set(never_sampled_ids(tokenizer, model.config.vocab_size))

    @classmethod
    @path_errors()
    def from_pretrained(cls, name: str | Path, config: PPOConfig | None = None) -> "TextPPOTrainer":
        """Load a Hub id, a folder (for example from `save`) or "demo". Ignores the config's prompts and rewards."""
        config = PPOConfig() if config is None else config
        check(config)
        if config.kl_budget:
            raise ValueError("kl_budget is for train_ppo.py; in your own loop, call fit_kl_coef before the first step")
        config = dataclasses.replace(config, model_name=str(name))
        device = pick_device(config.device)
        folder = model_folder(config.model_name, "--model_name", read_policy_folder)
        gpt2_config, tokenizer = read_policy_folder(folder)
        policy = load_policy(folder, gpt2_config, device)
        if config.reference is None:
            return cls(config, policy, copy.deepcopy(policy), tokenizer)
        ref_folder = model_folder(config.reference, "--reference", read_policy_folder)
        reference = load_policy(ref_folder, read_reference(ref_folder, gpt2_config, tokenizer), device)
        return cls(config, policy, reference, tokenizer)

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Encode prompts as queries for `generate` and `step`: 1-d int64, with [CLS] first and no [SEP]."""
        texts = listed(prompts)
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"encode() takes a list of texts, for example encode(['刚收到货']), not {shown(prompts)}")
        self.example = texts[0] if texts else self.example
        return [encode_prompt(self.tokenizer, text) for text in texts]

    def generate(self, query_tensors, model=None, seed=None, step=None) -> list[torch.Tensor]:
        """Continue each query (1-d int64, or a list of ids). Returns responses, 1-d int64 on the CPU, including [SEP].

        Model, seed and step are those of `PPOTrainer.generate`. Raises ValueError if a query leaves no room for
        `gen_len` tokens.
        """
        gen_len, n_positions = self.config.gen_len, self.model.config.n_positions
        for i, query in enumerate(query_tensors := self.token_ids("query", query_tensors)):
            if query[-1] == self.tokenizer.sep_token_id != self.tokenizer.cls_token_id:
                raise ValueError(f"query {i} ends with {self.tokenizer.sep_token}, which ends a text; remove it")
            if len(query) + gen_len > n_positions:
                raise ValueError(f"query {i}: {len(query)} tokens + gen_len {gen_len} > {n_positions} positions")
        completions = super().generate(query_tensors, model, seed, step)
        return [torch.tensor(ids) for ids in completions.token_lists()]

    def decode(self, *parts: Sequence) -> list[str]:
        """Decode responses, or queries with their responses, to texts without special tokens."""
        parts = [self.token_ids("sequence", part) for part in parts]
        return decode(self.tokenizer, [torch.cat(text) for text in zip(*parts, strict=True)])

    def step(self, query_tensors, response_tensors, rewards) -> dict[str, float]:
        """Take one PPO step on a batch of any size. Returns its statistics as floats.

        query_tensors, response_tensors: lists of 1-d int64 tensors, or of lists of ids, of any lengths (a response
        includes its [SEP]). rewards: a finite score for each response, in a list, tensor or array. Raises ValueError,
        before anything changes, if the lists don't match, a score isn't finite or a response cannot have been sampled;
        FloatingPointError like `PPOTrainer.step`.
        """
        completions = self.collate(query_tensors, response_tensors)
        n = len(completions.ids)
        if (found := listed(rewards)) is None or len(found) != n:
            raise ValueError(f"expected a list or tensor of {n} rewards, one for each response, not {shown(rewards)}")
        scores, wrong = to_float32(found)
        for i, score in wrong:
            raise ValueError(f"reward {i} is {score}; rewards must be finite numbers, one for each response")
        return super().step(completions, scores)

    def collate(self, query_tensors, response_tensors) -> Completions:
        """Pad queries and their responses into one batch. Raises ValueError if they can't be used for training."""
        queries, responses = self.token_ids("query", query_tensors), self.token_ids("response", response_tensors)
        if not len(queries) == len(responses) > 0:
            raise ValueError(f"expected one response per query, got {len(responses)} for {len(queries)} queries")
        sep, pad, n_positions = self.tokenizer.sep_token_id, self.tokenizer.pad_token_id, self.model.config.n_positions
        for i, (query, response) in enumerate(zip(queries, responses)):
            if len(query) + len(response) > n_positions:
                raise ValueError(f"query/response {i}: {len(query)} + {len(response)} tokens > {n_positions} positions")
            sampled = response[completion_mask(response, sep)].tolist()
            if forbidden := self.never_sampled.intersection(sampled):
                names = self.tokenizer.convert_ids_to_tokens(sorted(forbidden))
                raise ValueError(f"response {i} contains {names} before its end, but these tokens are never sampled")
        ids = pad_sequence(responses, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(response) for response in responses])
        mask = completion_mask(ids, sep) & (torch.arange(ids.shape[1]) < lengths[:, None])
        device = self.engine.device
        return Completions(Prompts.from_tensors(queries, pad, device), to_device(ids, device), to_device(mask, device))

    def token_ids(self, what: str, sequences) -> list[torch.Tensor]:
        """Convert token ids, in tensors, arrays or lists, to 1-d int64 tensors on the CPU. what: name for errors."""
        if (found := listed(sequences)) is None:
            raise ValueError(f"expected a list with one {what} for each completion, not {shown(sequences)}")
        for i, ids in enumerate(tensors := [to_ids(ids) for ids in found]):
            if ids is None or not len(ids):
                raise ValueError(f"{what} {i} must be a 1-d tensor or a list of token ids, not {shown(found[i])}")
            if ids.min() < 0 or ids.max() >= self.model.config.vocab_size:
                raise ValueError(
                    f"{what} {i} has an id outside the vocabulary of {self.model.config.vocab_size} tokens"
                )
        return tensors

    def fit_kl_coef(self, prompts: list[str], reward, kl_budget: float) -> float:
        """Set the KL coefficient as --kl_budget does, and return it. reward: a function from a list of texts (prompt
        and completion) to as many numbers. Raises ValueError if no coefficient fits, or after the first step."""
        if not listed(prompts) or not kl_budget > 0:
            raise ValueError(f"fit_kl_coef needs prompts and a budget > 0, not {shown(prompts)} and {shown(kl_budget)}")
        queries = self.encode(prompts)
        rewards = Rewards({"reward": reward}, columns={"prompt": prompts})
        prompt_index, *_, scores = sample_and_score(self, self.ref_model, rewards, prompts, queries)
        self.set_kl_coef(kl_coef_for(scores[:, 0], prompt_index, kl_budget))
        return self.config.init_kl_coef

    def save(self, folder: str | Path) -> None:
        """Write what `save_trained` writes, into a folder that may have your own README.md, which is kept."""
        save_trained(self, folder, self.example)


def save_trained(trainer: PPOTrainer, folder: str | Path, example: str) -> None:
    """Write the trained policy (see `policy_for_saving`), its value head in the unit of the scores, tokenizer and model
    card with an example prompt. Opens with `from_pretrained` and in plain `transformers`."""
    with disk_errors(Path(folder)):
        policy, config, unit = trainer.policy_for_saving, trainer.config, trainer.reward_unit or 1.0
        values = trainer.reward_mean, unit
        save_policy(policy, trainer.tokenizer, Path(folder), config.temperature, config.gen_len, values)
        write_card(Path(folder), config, example)
