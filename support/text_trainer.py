"""A loop of one's own, in Python: the trainer together with its tokenizer, from one name. `train_ppo.py` uses the same.

from config import PPOConfig
from support.text_trainer import TextPPOTrainer    (the one thing in this folder that is meant to be imported; it stays)

trainer = TextPPOTrainer.from_pretrained("uer/gpt2-chinese-cluecorpussmall", PPOConfig(lr=2e-5))
queries = trainer.encode(["刚收到货,感觉"] * 128)
responses = trainer.generate(queries)
stats = trainer.step(queries, responses, my_scores(trainer.decode(queries, responses)))
trainer.save("my_model")
"""

import copy
import dataclasses
import math
import os
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
    """A PPOTrainer, with its `generate` and `step`, that also turns prompts into tokens, responses into texts, and
    saves. Whatever is wrong with a name, a folder or a setting is a ValueError with one clear line. Says how many
    parameters train."""

    def __init__(self, config: PPOConfig, model, ref_model, tokenizer):
        super().__init__(config, model, ref_model, tokenizer)
        self.tokenizer = tokenizer
        self.example = config.prompts[0]  # of the model card
        self.n_trained, self.n_parameters = (
            sum(weight.numel() for weight in of) for of in (self.engine.weights, model.parameters())
        )
        print(f"{self.n_trained / 1e6:.1f} of {self.n_parameters / 1e6:.1f} million parameters train")

    @classmethod
    @path_errors()
    def from_pretrained(cls, name: str | Path, config: PPOConfig | None = None) -> "TextPPOTrainer":
        """Policy, reference, tokenizer and trainer from a hub id, a local folder, or a folder that `save` wrote.

        Of the config, what concerns PPO, sampling, optimisation, device and dtype counts; prompts, rewards and folders
        are the loop's own.
        """
        config = PPOConfig() if config is None else config
        check(config)
        if config.kl_budget:
            call = f"trainer.fit_kl_coef(prompts, reward, {config.kl_budget:g})"
            raise ValueError(f"kl_budget is train_ppo.py's; in your own loop, {call} before the first step")
        config = dataclasses.replace(config, model_name=str(name))
        device = pick_device(config.device)
        folder = model_folder(config.model_name, "--model_name", read_policy_folder)
        gpt2_config, tokenizer = read_policy_folder(folder)
        policy = load_policy(folder, gpt2_config, device)
        return cls(config, policy, copy.deepcopy(policy), tokenizer)

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """The prompts as queries for `generate` and `step`: 1-d int64, with a [CLS] before and nothing after."""
        texts = listed(prompts)
        if texts is None or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"encode() takes a list of texts, as in encode(['刚收到货']), not {shown(prompts)}")
        self.example = texts[0] if texts else self.example
        return [encode_prompt(self.tokenizer, text) for text in texts]

    def decode(self, *parts: list[torch.Tensor]) -> list[str]:
        """Texts without special tokens: of queries and responses, as a reward reads them, or of responses alone."""
        parts = [self.engine.collator.token_ids("sequence", part) for part in parts]
        if len({len(part) for part in parts}) > 1:
            counts = " and ".join(str(len(part)) for part in parts)
            raise ValueError(f"decode() needs one response for each query, not {counts}")
        return decode(self.tokenizer, [torch.cat(text) for text in zip(*parts)])

    def fit_kl_coef(self, prompts: list[str], reward, kl_budget: float) -> float:
        """Set the KL coefficient at which the best possible policy lies `kl_budget` nats a completion from the
        reference, and return it: what --kl_budget does, on the same draws.

        reward: a function from a list of texts, each a prompt with its completion, to as many numbers. ValueError where
        no coefficient fits, or after the first step.
        """
        from support.evaluation import sample_and_score
        from support.prospect import kl_coef_for

        if not listed(prompts) or not isinstance(kl_budget, (int, float)) or not 0 < kl_budget < math.inf:
            what = f"not {shown(prompts)} and {shown(kl_budget)}"
            raise ValueError(f"fit_kl_coef() takes one prompt or more, and a budget above 0 in nats, {what}")
        n = self.config.eval_samples
        prompt_index, *_, rewards = sample_and_score(self, self.ref_model, reward, prompts, n)
        self.set_kl_coef(kl_coef_for(rewards, torch.tensor(prompt_index), kl_budget))
        return self.config.init_kl_coef

    def save(self, folder: str | Path) -> None:
        """Write the trained policy (the average of its weights, see `policy_for_saving`), tokenizer and model card.

        The folder opens here by `from_pretrained`, value head included, and in plain `transformers`. Its values are in
        the unit of the scores. A README.md of one's own stays in place of the card.
        """
        if not str(folder).strip() or os.path.isfile(folder):
            raise ValueError(f"save() takes the name of a folder, not {str(folder)!r}")
        with disk_errors(Path(folder)):
            policy, config, unit = self.policy_for_saving, self.config, self.reward_unit or 1.0
            save_policy(policy, self.tokenizer, Path(folder), config.temperature, config.gen_len, unit)
            write_card(Path(folder), config, self.example)
