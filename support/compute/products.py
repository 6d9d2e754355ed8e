"""Copies of a model that do its arithmetic, in their own dtype and with fast matrix products on CPUs.

A library that multiplies by a weight matrix first copies it into its own memory layout, at every call. For 32 rows (one
token of 32 completions) this takes as long as the product itself. If the weights don't change, it can be avoided. In
bfloat16 they are converted to oneDNN's layout once. In float32 that would need a second copy in memory, so the matrix
becomes the left factor, which MKL reads without copying. docs/speed.md says how much each of these saves.
"""

import copy

import torch
from torch import nn

FEW_ROWS = 128  # up to so many rows, a float32 product is faster with the matrix on the left


class FixedProduct(nn.Module):
    """Computes states weight^T + bias, with a weight (out, in) that doesn't change. Weight and bias get no gradient.

    reorder: keep the weight only in oneDNN's layout, if this torch and processor can do that.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, reorder: bool):
        super().__init__()
        self.bias = None if bias is None else bias.detach()
        self.ordered = in_own_order(weight.detach()) if reorder else None
        self.weight = weight.detach() if self.ordered is None else weight.new_empty(0)  # T5 asks for its dtype

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states (..., in) to (..., out)."""
        if self.ordered is not None:
            return torch.ops.mkldnn._linear_pointwise(states, self.ordered, self.bias, "none", [], "")
        if states.numel() > FEW_ROWS * states.shape[-1] or states.dtype != torch.float32:
            return torch.nn.functional.linear(states, self.weight, self.bias)
        rows = states.flatten(0, -2).t()
        rows = self.weight @ rows if self.bias is None else torch.addmm(self.bias[:, None], self.weight, rows)
        return rows.t().unflatten(0, states.shape[:-1])


def in_own_order(weight: torch.Tensor) -> torch.Tensor | None:
    """Return a weight (out, in) in oneDNN's layout, or None if this torch or processor can't do that."""
    try:  # private; torch.compile has used both since torch 2.0
        ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), FEW_ROWS)
        torch.ops.mkldnn._linear_pointwise(weight[:1].contiguous(), ordered, None, "none", [], "")
    except (AttributeError, RuntimeError):  # NotImplementedError is a RuntimeError
        return None
    return ordered


class Projection(nn.Module):
    """The projection onto the vocabulary, for hidden states and for gradients. weight (V, hidden)."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight, self.onto, self.back_from = weight, None, None
        if weight.device.type == "cpu" and not weight.requires_grad:
            reorder = weight.dtype != torch.float32
            self.onto, self.back_from = FixedProduct(weight, None, reorder), FixedProduct(weight.t(), None, reorder)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map hidden states (..., hidden) to logits (..., V)."""
        return torch.nn.functional.linear(states, self.weight) if self.onto is None else self.onto(states)

    def back(self, gradient: torch.Tensor) -> torch.Tensor:
        """Map a gradient of logits (..., V) to one of hidden states (..., hidden)."""
        return gradient @ self.weight if self.back_from is None else self.back_from(gradient)


def computing_copy(model, dtype: torch.dtype, other=None):
    """Return a copy of a GPT2HeadWithValueModel that computes in `dtype`; its value head stays in float32. Weights that
    already have this dtype are shared with the model. other: a computing copy whose frozen part is used."""
    shared = {id(weight): weight for weight in model.parameters()} if model.dtype == dtype else {}
    if other is not None:
        shared |= {id(own): theirs for own, theirs in zip(frozen_part(model), frozen_part(other))}
    computing = copy.deepcopy(model, shared).to(dtype)
    computing.v_head.float()
    if other is None:
        computing.lm_head = Projection(computing.lm_head.weight)
        fix_products(computing.transformer.h[: model.n_frozen])
    return computing


def frozen_part(model) -> list[nn.Module]:
    """Return the modules of a model that `freeze` has frozen."""
    gpt2 = model.transformer
    return [gpt2.wte, gpt2.wpe, model.lm_head, *gpt2.h[: model.n_frozen]] if model.n_frozen else []


def frozen_weights(model) -> list[nn.Parameter]:
    """Return the weights of a model that aren't trained."""
    return [weight for weight in model.parameters() if not weight.requires_grad]


def share_frozen(model, other) -> bool:
    """Let another model use the frozen weights of `model` if its own are equal after rounding to its dtype. Returns
    whether they are."""
    pairs = [pair for pair in zip(model.parameters(), other.parameters()) if not pair[0].requires_grad]
    if equal := all(weight.to(theirs.dtype).equal(theirs) for weight, theirs in pairs):
        for weight, theirs in pairs:
            theirs.data = weight.data
    return equal


def drawing_copy(computing):
    """Return a copy of a computing copy for sampling completions with the current weights."""
    shared = {id(weight): weight for weight in computing.parameters()}
    drawing = copy.deepcopy(computing, shared | {id(module): module for module in frozen_part(computing)})
    fix_products(drawing.transformer.h[computing.n_frozen :])
    return drawing


def fix_products(blocks) -> None:
    """Replace the matrix products of some GPT-2 blocks with `FixedProduct`, if they are on a CPU."""
    for layer, name, part in products(blocks):
        setattr(layer, name, FixedProduct(part.weight.t().contiguous(), part.bias, part.weight.dtype != torch.float32))


def fix_classifier(model) -> None:
    """Replace the linear layers of a model that is never trained with `FixedProduct`, if it is on a CPU."""
    for layer in list(model.modules()) if model.device.type == "cpu" else ():
        for name, part in layer.named_children():
            if type(part) is nn.Linear:
                setattr(layer, name, FixedProduct(part.weight, part.bias, reorder=True))


def products(blocks) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return (layer, name, part) of each matrix product in GPT-2 blocks on a CPU: the library's Conv1D, (in, out)."""
    layers = [layer for block in blocks for layer in (block.attn, block.mlp)]
    named = [(layer, name, part) for layer in layers for name, part in layer.named_children() if hasattr(part, "nf")]
    return [(layer, name, part) for layer, name, part in named if part.weight.device.type == "cpu"]


def store_transposed(blocks) -> None:
    """Store the weights of some blocks on a CPU in the layout that `FixedProduct` needs, so that it makes no copy."""
    for _, _, part in products(blocks):
        part.weight.data = part.weight.data.t().contiguous().t()
