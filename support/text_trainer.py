"""PPOTrainer with its tokenizer, for a training loop of your own (README, "From Python") and for train_ppo.py."""

import copy
import dataclasses
from pathlib import Path

import torch

from config import PPOConfig
from ppo import PPOTrainer
from support.devices import pick_device
from support.files import disk_errors, path_errors
from support.hub import model_folder
from support.model_card import write_card
from support.models import decode, encode_prompt, load_policy, read_policy_folder, save_policy
from support.settings import check
from support.user_code import listed, shown


class TextPPOTrainer(PPOTrainer):
    """A PPOTrainer that also encodes prompts, decodes responses and saves. Raises ValueError if a setting is wrong."""

    def __init__(self, config: PPOConfig, model, ref_model, tokenizer):
        super().__init__(config, model, ref_model, tokenizer)
        self.tokenizer = tokenizer
        self.example = config.prompts[0]  # a prompt for the model card
        self.n_trained = sum(weight.numel() for weight in self.engine.weights)
        self.n_parameters = model.num_parameters()
        print(f"{self.n_trained / 1e6:.1f} of {self.n_parameters / 1e6:.1f} million parameters train")

    @classmethod
    @path_errors()
    def from_pretrained(cls, name: str | Path, config: PPOConfig | None = None) -> "TextPPOTrainer":
        """Load a hub id, a folder (such as one of `save`) or "demo". Doesn't use the config's prompts and rewards."""
        config = PPOConfig() if config is None else config
        check(config)
        if config.kl_budget:
            raise ValueError("kl_budget is for train_ppo.py; in your own loop, call fit_kl_coef before the first step")
        config = dataclasses.replace(config, model_name=str(name))
        device = pick_device(config.device)
        folder = model_folder(config.model_name, "--model_name", read_policy_folder)
        gpt2_config, tokenizer = read_policy_folder(folder)
        policy = load_policy(folder, gpt2_config, device)
        return cls(config, policy, copy.deepcopy(policy), tokenizer)

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """Encode prompts as queries for `generate` and `step`: 1-d int64, with [CLS] first and no [SEP]."""
        texts = listed(prompts)
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"encode() takes a list of texts, for example encode(['刚收到货']), not {shown(prompts)}")
        self.example = texts[0] if texts else self.example
        return [encode_prompt(self.tokenizer, text) for text in texts]

    def decode(self, *parts: list[torch.Tensor]) -> list[str]:
        """Decode responses, or queries with their responses, to texts without special tokens."""
        parts = [self.engine.collator.token_ids("sequence", part) for part in parts]
        return decode(self.tokenizer, [torch.cat(text) for text in zip(*parts, strict=True)])

    def fit_kl_coef(self, prompts: list[str], reward, kl_budget: float) -> float:
        """Set the KL coefficient as --kl_budget does, and return it. reward: a function from a list of texts (prompt
        and completion) to as many numbers. Raises ValueError if no coefficient fits, or after the first step."""
        from support.evaluation import sample_and_score
        from support.prospect import kl_coef_for

        if not listed(prompts) or not kl_budget > 0:
            raise ValueError(f"fit_kl_coef() takes at least one prompt and a budget above 0, not {shown(kl_budget)}")
        prompt_index, *_, rewards = sample_and_score(self, self.ref_model, reward, prompts, self.config.eval_samples)
        self.set_kl_coef(kl_coef_for(rewards, torch.tensor(prompt_index), kl_budget))
        return self.config.init_kl_coef

    def save(self, folder: str | Path) -> None:
        """Write the trained policy (see `policy_for_saving`), its value head in the unit of the scores, tokenizer and
        model card. Opens with `from_pretrained` and in plain `transformers`. Your own README.md there is kept."""
        with disk_errors(Path(folder)):
            policy, config, unit = self.policy_for_saving, self.config, self.reward_unit or 1.0
            save_policy(policy, self.tokenizer, Path(folder), config.temperature, config.gen_len, unit)
            write_card(Path(folder), config, self.example)
