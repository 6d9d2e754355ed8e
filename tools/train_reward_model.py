"""Train a reward model on rankings, for --reward_model_name or --reward.

    python -m tools.train_reward_model rankings.jsonl --base hfl/chinese-roberta-wwm-ext --out reward_model
    python train_ppo.py --reward_model_name reward_model --kl_budget 0.4

The loss of a ranking is the mean over its pairs of -log sigmoid(r_better - r_worse), the negative log-likelihood of the
Bradley-Terry model (Ouyang et al. 2022, arXiv:2203.02155, equation 1). Training stops after --epochs, or when
the loss on held-out rankings no longer falls. The output folder contains the model, its card and a picture of the loss.
"""

import argparse
import copy
import random
import statistics
from pathlib import Path

import torch
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

from reward import SentimentReward, most_tokens
from support.common.errors import UserError
from support.common.files import path_errors, whole, write_whole
from support.compute.devices import keep_freed_memory, pick_device
from support.models.demo_models import descend
from support.models.hub import model_folder
from support.models.pretrained import (
    clean_text,
    is_bert,
    loading,
    open_tokenizer,
    quiet_transformers,
    read_model_config,
    share_weights,
)
from tools import exits_on_user_error
from tools.rank import Ranking, read_rankings

FEWEST = 10  # rankings
NEXT = "python train_ppo.py --reward {} classifier --reward_weights 1 0 --kl_budget 0.4"
CARD = """---
pipeline_tag: text-classification
tags: [reward-model]
---

# Reward model

{base}, trained on {n} rankings of completions. It gives a text (a prompt with its completion) one number, its `logits`;
only differences between these numbers are meaningful. On held-out data: {told}.

![loss](loss.png)
"""


@path_errors()
def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("rankings", type=Path, help="a file from tools.rank, or tab-separated texts, best first")
    parser.add_argument("--base", required=True, help="encoder or GPT-2 to start from: a Hub id, a folder, or 'demo'")
    parser.add_argument("--out", type=Path, default=Path("reward_model"), help="folder to write")
    parser.add_argument("--epochs", type=int, default=4, help="maximum number of passes over the rankings (default: 4)")
    parser.add_argument("--lr", type=float, default=5e-5, help="peak learning rate of AdamW (default: 5e-5)")
    parser.add_argument("--batch_size", type=int, default=16, help="rankings per optimiser step (default: 16)")
    parser.add_argument("--test", type=Path, help="measure the accuracy on this file instead of held-out rankings")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    if args.out.exists():
        raise UserError(f"{args.out} already exists; choose another folder, or remove it")
    rankings, test = read_rankings(args.rankings), read_rankings(args.test) if args.test else []
    if len(rankings) < FEWEST:
        raise UserError(f"{args.rankings} has {len(rankings)} rankings to learn from; at least {FEWEST} are needed")
    random.Random(args.seed).shuffle(rankings)
    n_held_out = max(2, len(rankings) // 10)
    held_out, training = rankings[:n_held_out], rankings[n_held_out:]
    device, folder = pick_device("auto"), model_folder(args.base, "--base", read_model_config)
    keep_freed_memory()
    model, tokenizer = load_base(folder, device, args.seed)
    losses = fit(model, tokenizer, training, held_out, args)
    with quiet_transformers(), whole(args.out) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        share_weights(partial)
        draw_losses(losses, partial / "loss.png")
        accuracy = accuracy_of(SentimentReward(partial, device), test or held_out)
        told = f"accuracy {accuracy} on the pairs of {len(test or held_out)} rankings that it wasn't trained on"
        write_whole(partial / "README.md", CARD.format(base=args.base, n=len(training), told=told))
    demo = " --preset demo" if args.base == "demo" else ""
    print(told, f"next: {NEXT.format(args.out)}{demo}", sep="\n")


def load_base(folder: Path, device, seed: int):
    """Return a model with one label, and its tokenizer. Raises UserError if the folder can't be used."""
    config = read_model_config(folder)
    tokenizer = open_tokenizer(folder, config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    tokenizer.padding_side = "right"
    # A GPT-2 would add the embedding of token 0 for each 0 in BERT's token_type_ids; init_kwargs are saved
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names = ["input_ids", "attention_mask"]
    torch.manual_seed(seed)
    with loading(f"the weights in {folder}"), quiet_transformers():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, config=config, dtype=torch.float32, ignore_mismatched_sizes=True
        )
    tokenizer.model_max_length = most_tokens(model, tokenizer)
    if device.type == "cpu":  # faster on a CPU for short texts
        model.set_attn_implementation("eager")
    return model.to(device), tokenizer  # in eval mode, so without dropout, which hurts with only a few hundred rankings


def fit(model, tokenizer, training: list[Ranking], held_out: list[Ranking], args) -> list[tuple[float, float, bool]]:
    """Train a model, and restore the weights that had the lowest held-out loss. Returns (epoch, loss, whether this is
    the held-out loss) of each step and epoch."""
    steps = args.epochs * -(-len(training) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    draw, losses, best = random.Random(args.seed), [], float("inf")
    for epoch in range(args.epochs):
        batches = batched(draw.sample(training, len(training)), args.batch_size)
        for i, batch in enumerate(tqdm(batches, f"epoch {epoch + 1} of {args.epochs}", unit="step", disable=None), 1):
            loss = torch.stack(ranking_losses(model, tokenizer, batch)).mean()
            descend(model, loss, optimizer, schedule)
            losses.append((epoch + i / len(batches), loss.item(), False))
        with torch.no_grad():
            parts = [ranking_losses(model, tokenizer, batch) for batch in batched(held_out, args.batch_size)]
        loss = statistics.fmean(each.item() for part in parts for each in part)
        losses.append((epoch + 1, loss, True))
        print(f"epoch {epoch + 1}: loss {loss:.3f} on held-out rankings", flush=True)
        if loss >= best:
            break
        best, weights = loss, copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return losses


def batched(rankings: list[Ranking], size: int) -> list[list[Ranking]]:
    return [rankings[i : i + size] for i in range(0, len(rankings), size)]


def ranking_losses(model, tokenizer, rankings: list[Ranking]) -> list[torch.Tensor]:
    """Return the loss of each ranking: the mean over its pairs, so that each ranking counts once."""
    texts = [text for ranking in rankings for text in ranking.texts]
    if is_bert(tokenizer):
        texts = [clean_text(text) for text in texts]  # as SentimentReward reads them
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(model.device)
    scores, losses = model(**inputs).logits[:, 0].split([len(ranking.texts) for ranking in rankings]), []
    for of_ranking, ranking in zip(scores, rankings):
        better, worse = torch.tensor(ranking.better, device=model.device).T
        losses.append(-logsigmoid(of_ranking[better] - of_ranking[worse]).mean())
    return losses


def accuracy_of(reward, rankings: list[Ranking]) -> str:
    """Return the share of pairs that a reward orders correctly: the mean over rankings, and its standard error."""
    scores, shares = reward([text for ranking in rankings for text in ranking.texts]), []
    for of_ranking, ranking in zip(scores.split([len(ranking.texts) for ranking in rankings]), rankings):
        shares.append(statistics.fmean(float(of_ranking[i] > of_ranking[j]) for i, j in ranking.better))
    error = statistics.stdev(shares) / len(shares) ** 0.5
    return f"{statistics.fmean(shares):.3f} (standard error {error:.3f})"


def draw_losses(losses: list[tuple[float, float, bool]], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (fig := Figure(figsize=(6.3, 3.3), layout="constrained")).add_subplot()
    for held_out, style, label in ((False, ".", "a step"), (True, "o-", "held-out rankings")):
        axes.plot(*zip(*[(epoch, loss) for epoch, loss, kind in losses if kind == held_out]), style, label=label)
    axes.set(xlabel="epoch", ylabel="loss, nats per pair", ylim=(0, None))
    axes.legend()
    fig.savefig(path, dpi=150)


if __name__ == "__main__":
    with exits_on_user_error("train_reward_model"):
        main()
