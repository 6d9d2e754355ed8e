"""Check that transformers still computes what this program expects, since it calls parts of the library's GPT-2."""

import torch
import transformers

from gpt2_value_head import SharedPrompts
from support.common.errors import UserError
from support.compute.batches import Completions, Prompts
from support.compute.blocks import Texts
from support.compute.products import drawing_copy


@torch.no_grad()
def check_passes(model, computing) -> None:
    """Check that a GPT2HeadWithValueModel and its computing copy give the same logits, computed in three ways.

    Texts with two prompts go through the model in the library's own way, through the copy as completions that share
    prompts, and through the copy token by token. Raises UserError if two results differ by more than rounding: 1% of
    the logits' size in float32 (including TensorFloat-32), 9% in bfloat16. For comparison: a lost mask changes the
    logits of an untrained model by 13%, wrong positions those of a trained one by 32%.
    """
    ids = torch.arange(15, device=model.device) * 7919 % model.config.vocab_size
    queries, responses = [ids[:4], ids[:4], ids[4:6]], ids[6:].view(3, 3)
    texts = [torch.cat([query, response[:-1]])[None] for query, response in zip(queries, responses)]
    whole = torch.cat([model(text, logits_to_keep=3).logits for text in texts])
    if not whole.isfinite().all():
        return  # sampling reports it

    prompts = Prompts.from_tensors(queries, 0, model.device)
    completions = Completions(prompts, responses, torch.ones_like(responses, dtype=torch.bool))
    shared, _ = SharedPrompts(computing)(completions)
    drawing = drawing_copy(computing)
    read = Texts(drawing, prompts, 2)
    drawn = [read.states]
    for t in range(2):
        read.read(responses[:, t])
        drawn.append(read.states)
    drawn = drawing.transformer.ln_f(torch.stack(drawn, dim=1))

    rounding = max(0.01, 12 * torch.finfo(computing.dtype).eps)
    size = (whole - whole.mean(-1, keepdim=True)).norm(dim=-1)
    for way, states in {"with a shared prompt": shared, "token by token": drawn}.items():
        share = ((computing.lm_head(states) - whole).norm(dim=-1) / size).max().item()
        if not share <= rounding:
            raise UserError(
                f"transformers {transformers.__version__} and torch {torch.__version__} don't work with this program: "
                f"{way}, the logits are {share:.0%} off, and rounding explains only {rounding:.0%}; to get versions "
                "that work, run: python -m pip install -r requirements.txt -c constraints.txt"
            )
