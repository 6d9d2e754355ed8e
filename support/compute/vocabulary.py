"""Compute functions of each token's logits for some tokens at a time: the logits of a batch are never all in memory.

A token's output depends only on its own logits. So the gradient of the hidden states can be computed together with the
output, up to a factor that arrives in the backward pass, as Liger does for cross entropy (Hsu et al. 2024, "Liger
Kernel", arXiv:2410.10989). This works if the projection onto the vocabulary is frozen.
"""

from collections.abc import Callable

import torch

LOGITS = 2_500_000  # computed at once on a CPU: 118 tokens with a vocabulary of 21,128
LOGITS_ON_GPU = 2**26


def restrict_logits(logits: torch.Tensor, restriction: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the logits of the distribution that is sampled, logits / temperature + restriction, in float32 or better.

    logits (..., vocab), restriction (vocab,). Sampling, policy, reference and update must all use it; otherwise
    PPO's ratios and the KL would compare different distributions. Takes one pass over memory, including the cast.
    """
    return torch.add(restriction, logits, alpha=1 / temperature)


def per_token(
    function: Callable,
    heads: list,
    hidden_states: list[torch.Tensor],
    labels: torch.Tensor,
    restriction: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return function(logits, labels) for each token, (..., n, T).

    heads: the `Projection` of each model. hidden_states: what they project, each (n, T, hidden). labels (n, T).
    function: from the restricted logits (tokens, V) of each model and labels (tokens,) to (..., tokens); each token's
    output must depend only on its own logits. Only the first model gets gradients.
    """
    if torch.is_grad_enabled() and heads[0].weight.requires_grad:  # the gradient of these weights needs all logits
        logits = [head(states) for head, states in zip(heads, hidden_states)]
        return function(*[restrict_logits(each, restriction, temperature) for each in logits], labels)
    first, *others = (states.flatten(0, -2) for states in hidden_states)
    found = PerToken.apply(first, others, function, heads, labels.flatten(), restriction, temperature)
    return found.unflatten(-1, labels.shape)


class PerToken(torch.autograd.Function):
    """`per_token` for a frozen projection. Hidden states (tokens, hidden) and labels (tokens,) are flat."""

    @staticmethod
    def forward(ctx, states, others, function, heads, labels, restriction, temperature):
        training, found, slopes = ctx.needs_input_grad[0], [], []
        size = max(1, (LOGITS_ON_GPU if states.device.type == "cuda" else LOGITS) // len(restriction))
        pairs = [*zip(heads, (states, *others))]
        for rows in [slice(first, first + size) for first in range(0, len(states), size)]:
            logits = [restrict_logits(head(each[rows]), restriction, temperature) for head, each in pairs]
            with torch.set_grad_enabled(training):
                logits[0].requires_grad_(training)
                outputs = function(*logits, labels[rows])
                found.append(outputs.detach())
                if training:
                    each = outputs.reshape(-1, outputs.shape[-1])
                    back = [torch.autograd.grad(output.sum(), logits[0], retain_graph=True)[0] for output in each]
                    slopes.append(torch.stack([heads[0].back(slope.to(states.dtype)) for slope in back]) / temperature)
        if training:
            ctx.save_for_backward(torch.cat(slopes, dim=1))
        return torch.cat(found, dim=-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (slopes,) = ctx.saved_tensors
        gradient = (gradient.reshape(len(slopes), -1, 1) * slopes).sum(0)
        return gradient.to(slopes.dtype), *[None] * 6
