"""What the limit writes: completions of the Gibbs policy itself, and how varied they are.

    python -m tools.limit_text --model_name GPT2_DIR --reward_model_name SENTIMENT_DIR [--prompts TEXT --eval_samples N]

A completion of the reference is kept with probability exp((r - 1) / beta); what is kept is distributed as the Gibbs
policy, ref * exp(r / beta), exactly (rejection sampling, for rewards of at most 1). No training can aim at better text
than this, so its diversity is what a diversity can be held against.
"""

import copy
import sys

import torch

from support.errors import exits_on_user_error
from support.evaluation import SHOWN, distinct, sample_and_score
from support.load import load
from support.settings import check, parse_args
from support.text_trainer import TextPPOTrainer

DRAWN = 4096  # completions of the reference at a time


def main() -> None:
    config, _ = parse_args(sys.argv[1:], "python -m tools.limit_text", __doc__)
    check(config)
    if config.init_kl_coef == 0:
        raise SystemExit("--init_kl_coef 0: without a KL penalty the best policy has no limit")
    policy, tokenizer, reward, prompts = load(config)
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    generator = torch.Generator().manual_seed(config.seed)
    print(f"{'prompt':16}{'kept':>8}{'unique':>10}{'distinct-2':>12}{'over the reference':>20}")
    for prompt in prompts:
        drawn, kept = [], []
        while len(kept) < config.eval_samples:
            draws = (DRAWN, config.seed, 2**32 + len(drawn))
            *_, texts, scores = sample_and_score(trainer, trainer.ref_model, reward, [prompt], *draws)
            if scores.max() > 1:
                raise SystemExit(f"a reward of {scores.max():.3f}: this needs rewards of at most 1")
            keep = torch.rand(DRAWN, generator=generator) < ((scores - 1) / config.init_kl_coef).exp()
            drawn += texts
            kept += [text for text, good in zip(texts, keep) if good]
        share, kept = len(kept) / len(drawn), kept[: config.eval_samples]
        of_limit, of_reference = distinct(kept, 2), distinct(drawn[: config.eval_samples], 2)
        unique = len(set(kept)) / len(kept)
        print(f"{prompt:16}{share:>8.1%}{unique:>10.1%}{of_limit:>12.3f}{of_limit / of_reference:>20.2f}")
        print(*(f"    {prompt}{text}" for text in kept[:SHOWN]), sep="\n")


if __name__ == "__main__":
    with exits_on_user_error("limit_text"):
        main()
