"""How much of what a policy misses could be learned from its own completions.

    python -m tools.learnable RUN_DIR [--reference] [--samples 6400]

Samples completions from a run's saved model, or with --reference from the model before training. A reward model, the
policy's own network with one number read off at the last token, learns the reward from four fifths of them. On the last
fifth this compares J of the sampled policy, of the Gibbs policy of the learned reward (proportional to
ref * exp(learned reward / beta)) and of the Gibbs policy of the true one, which is the limit. With --reference the
share between them is the gain that so many completions are good for.
"""

import argparse
import copy
from pathlib import Path

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from ppo import logprobs_values_entropy
from support.errors import exits_on_user_error
from support.evaluation import sample_and_score
from support.load import load
from support.models import load_gpt2_config, load_policy
from support.settings import load_config
from support.text_trainer import TextPPOTrainer

EPOCHS, BATCH, LR, WARMUP = 4, 64, 2e-4, 50


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--samples", type=int, default=6400)
    args = parser.parse_args()
    config = load_config(args.run_dir / "config.json")
    policy, tokenizer, reward, prompts = load(config)
    trainer = TextPPOTrainer(config, policy, copy.deepcopy(policy), tokenizer)
    engine = trainer.engine
    saved = args.run_dir / "model"
    policy = trainer.ref_model if args.reference else load_policy(saved, load_gpt2_config(saved), engine.device)
    beta = config.init_kl_coef

    drawn, batch, responses, _, scores = sample_and_score(
        trainer, policy, reward, prompts, args.samples, config.seed, 2**32
    )
    drawn = torch.tensor(drawn)
    completions = engine.collator.completions(batch, responses)
    logprobs, ref_logprobs = (
        engine.evaluate(logprobs_values_entropy, completions, model)[0] for model in (policy, trainer.ref_model)
    )
    log_ratios = (logprobs - ref_logprobs).where(completions.mask, 0).sum(-1).cpu()

    ids = [torch.cat(pair) for pair in zip(batch, responses)]
    training, judged = torch.arange(args.samples).split([args.samples * 4 // 5, args.samples - args.samples * 4 // 5])
    learned = learn_reward(trainer, ids, scores, training, judged)
    left = (scores[judged] - learned).var()
    print(f"the reward model explains {1 - left / scores[judged].var():.3f} of the reward's variance in other texts")

    columns = [values[judged].double() for values in (scores, log_ratios)] + [learned.double()]
    by_prompt = [[values[drawn[judged] == i] for values in columns] for i in range(len(prompts))]
    of_policy = mean(r.mean() - beta * ratio.mean() for r, ratio, _ in by_prompt)
    of_learned = mean(gibbs_objective(estimate, r, ratio, beta) for r, ratio, estimate in by_prompt)
    limit = mean(gibbs_objective(r, r, ratio, beta) for r, ratio, _ in by_prompt)
    share = (of_learned - of_policy) / (limit - of_policy)
    print(f"J of these completions {of_policy:.3f}, with the learned reward {of_learned:.3f}, the limit {limit:.3f}")
    print(f"so {share:.2f} of what is missing can be learned from {len(training)} completions")


def learn_reward(trainer, ids: list[torch.Tensor], scores: torch.Tensor, training, judged) -> torch.Tensor:
    """Rewards in [0, 1] of the `judged` texts, as a network sees them that was trained on the `training` texts."""
    device, dtype = trainer.engine.device, trainer.engine.dtype
    model = copy.deepcopy(trainer.ref_model).float().requires_grad_(True)
    gpt2, head = list(model.transformer.parameters()), list(model.v_head.parameters())
    for parameter in head:
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW([{"params": gpt2, "lr": LR}, {"params": head, "lr": LR}], betas=(0.9, 0.99))
    steps = EPOCHS * (len(training) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1, (k + 1) / WARMUP) * (1 - k / steps))

    def read(rows):
        padded = torch.nn.utils.rnn.pad_sequence([ids[i] for i in rows], batch_first=True).to(device)
        lengths = torch.tensor([len(ids[i]) for i in rows], device=device)
        mask = (torch.arange(padded.shape[1], device=device) < lengths[:, None]).long()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden_states = model.transformer(padded, attention_mask=mask).last_hidden_state
        return model.v_head(hidden_states[torch.arange(len(rows)), lengths - 1].float())

    torch.manual_seed(0)
    for _ in range(EPOCHS):
        for rows in training[torch.randperm(len(training))][: len(training) // BATCH * BATCH].split(BATCH):
            loss = binary_cross_entropy_with_logits(read(rows), scores[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        return torch.cat([read(rows).sigmoid() for rows in judged.split(4 * BATCH)]).cpu()


def gibbs_objective(reward_seen, reward, log_ratios, beta: float) -> torch.Tensor:
    """J of the policy proportional to ref * exp(reward_seen / beta), by weighting samples of another policy.

    All (n,): what the Gibbs policy believes the rewards to be, what they are, and log(sampled policy / reference).
    """
    weights = (reward_seen / beta - log_ratios).softmax(0)
    kl = (weights * ((len(weights) * weights).log() + log_ratios)).sum()
    return (weights * reward).sum() - beta * kl


def mean(values) -> torch.Tensor:
    return torch.stack(list(values)).mean()


if __name__ == "__main__":
    with exits_on_user_error("learnable"):
        main()
