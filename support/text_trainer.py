"""A loop of one's own, in Python: the trainer together with its tokenizer, from one name.

trainer = TextPPOTrainer.from_pretrained("uer/gpt2-chinese-cluecorpussmall", PPOConfig(lr=2e-5))
queries = trainer.encode(["刚收到货,感觉"] * 128)
responses = trainer.generate(queries)
stats = trainer.step(queries, responses, my_scores(trainer.decode(queries, responses)))
trainer.save("my_model")
"""

import copy
from pathlib import Path

import torch

from config import PPOConfig, UserError, pick_device, pick_dtype
from ppo import PPOTrainer
from support.hub import model_folder
from support.models import decode, encode_prompt, load_gpt2_config, load_policy, load_tokenizer, save_policy


class TextPPOTrainer(PPOTrainer):
    """A PPOTrainer, with its `generate` and `step`, that also turns prompts into tokens, responses into texts, and
    saves. Whatever is wrong with a name, a folder or a setting is a ValueError with one clear line."""

    @classmethod
    def from_pretrained(cls, name: str | Path, config: PPOConfig | None = None) -> "TextPPOTrainer":
        """Policy, reference, tokenizer and trainer from a hub id, a local folder, or a folder that `save` wrote.

        Of the config, what concerns PPO, sampling, optimisation, device and dtype counts; prompts, rewards and folders
        are the loop's own. Says how many parameters train.
        """
        config = PPOConfig() if config is None else config
        config.check()
        folder = model_folder(str(name), "--model_name", read_policy_folder)
        gpt2_config, tokenizer = read_policy_folder(folder)
        return cls.from_policy(load_policy(folder, gpt2_config, pick_device(config.device)), tokenizer, config)

    @classmethod
    def from_policy(cls, policy, tokenizer, config: PPOConfig) -> "TextPPOTrainer":
        """As `from_pretrained`, from a policy as it was loaded; the reference is a copy of it."""
        reference = copy.deepcopy(policy).to(pick_dtype(config.dtype, policy.device))
        trainer = cls(config, policy, reference, tokenizer)
        trainer.tokenizer = tokenizer
        trained, total = (
            sum(weight.numel() for weight in weights) for weights in (trainer.trained, policy.parameters())
        )
        print(f"{trained / 1e6:.1f} of {total / 1e6:.1f} million parameters train")
        return trainer

    def encode(self, prompts: list[str]) -> list[torch.Tensor]:
        """The prompts as queries for `generate` and `step`: 1-d int64, with a [CLS] before and nothing after."""
        return [encode_prompt(self.tokenizer, prompt) for prompt in prompts]

    def decode(self, query_tensors: list[torch.Tensor], response_tensors: list[torch.Tensor]) -> list[str]:
        """The texts of queries with their responses, without special tokens, as a reward reads them."""
        pairs = zip(query_tensors, response_tensors, strict=True)
        return decode(self.tokenizer, [torch.cat([torch.as_tensor(ids).cpu() for ids in pair]) for pair in pairs])

    def save(self, folder: str | Path) -> None:
        """Write the trained policy (the average of its weights, see `policy_for_saving`) with its tokenizer.

        The folder opens here by `from_pretrained`, value head included, and in plain `transformers`.
        """
        save_policy(self.policy_for_saving, self.tokenizer, Path(folder), self.config.temperature)


def read_policy_folder(folder: Path):
    """The GPT-2 config and the tokenizer of a model folder, which are small. UserError where they do not fit.

    Embeddings may have more rows than the tokenizer has tokens, to fill up a round number.
    """
    gpt2_config, tokenizer = load_gpt2_config(folder), load_tokenizer(folder)
    if not len(tokenizer) <= gpt2_config.vocab_size <= 1.1 * len(tokenizer) + 128:
        sizes = f"{len(tokenizer)} tokens, the model {gpt2_config.vocab_size}"
        raise UserError(f"the tokenizer in {folder} has {sizes}: they do not belong together")
    return gpt2_config, tokenizer
