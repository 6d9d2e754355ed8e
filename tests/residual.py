"""What keeps a trained policy from the limit: the part of r - beta * log-ratio that differs between its completions.

    python -m tests.residual RUN_DIR [--samples 8192]

At the limit r - beta * log(policy / reference) is the same for every completion; to second order the distance to it is
J* - J = variance / (2 beta). This samples completions from a run's saved model, prints that variance and distance, and
then asks how much of it could be learned: a copy of the whole model is trained to predict it from four fifths of the
completions, and judged on the last fifth (at the last token, with all before it in view).
"""

import argparse
import copy
from pathlib import Path

import torch

from config import load_config
from gpt2_value_head import load_gpt2_config, load_policy
from ppo import masked_mean
from reward import clean_text, score_texts
from train_ppo import load

EPOCHS, BATCH, LR = 3, 64, 1e-4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--samples", type=int, default=8192)
    args = parser.parse_args()
    config = load_config(args.run_dir / "config.json")
    trainer, tokenizer, reward, prompts, queries = load(config)
    policy = load_policy(args.run_dir / "model", load_gpt2_config(args.run_dir / "model"), trainer.device)

    drawn = [i % len(prompts) for i in range(args.samples)]
    batch = [queries[i] for i in drawn]
    responses = trainer.generate(batch, policy, seed=config.seed, step=2**32)
    texts = [prompts[i] + clean_text(text) for i, text in zip(drawn, tokenizer.batch_decode(responses))]
    scores = score_texts(reward, texts).to(trainer.device)
    batched, tokens, mask = trainer.collate(batch, responses, scores)
    log_ratios = trainer.score(policy, batched, tokens)[0] - trainer.score(trainer.ref_model, batched, tokens)[0]
    beta = config.init_kl_coef
    residual = scores - beta * log_ratios.where(mask, 0).sum(-1)
    print(
        f"reward {scores.mean():.3f}, J {residual.mean():.3f}, standard deviation of the residual {residual.std():.3f}"
    )
    print(f"J* - J, from its variance: {residual.var() / (2 * beta):.3f}")

    target = (residual - residual.mean()) / residual.std()
    training, judged = torch.arange(args.samples).split([args.samples * 4 // 5, args.samples - args.samples * 4 // 5])
    model = copy.deepcopy(policy)
    torch.nn.init.zeros_(model.v_head.summary.weight)
    torch.nn.init.zeros_(model.v_head.summary.bias)
    trunk, head = model.transformer.parameters(), model.v_head.parameters()
    optimizer = torch.optim.AdamW([{"params": trunk}, {"params": head, "lr": 10 * LR}], lr=LR)
    torch.manual_seed(config.seed)
    for epoch in range(1, EPOCHS + 1):
        for rows in training[torch.randperm(len(training))].split(BATCH):
            _, values = model.score_completions(batched.select(rows), tokens[rows])
            loss = masked_mean((values - target[rows, None]) ** 2, mask[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        with torch.no_grad():
            values = torch.cat([model.score_completions(batched.select(r), tokens[r])[1] for r in judged.split(256)])
        last = values.gather(1, mask[judged].sum(-1, keepdim=True) - 1).squeeze(1)
        left = (target[judged] - last).var() / target[judged].var()
        print(f"epoch {epoch}: explained {1 - left:.3f} of the residual's variance")


if __name__ == "__main__":
    main()
