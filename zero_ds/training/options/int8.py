"""Frozen decoder layers in 8 bits, a switch of a run: half of bfloat16's memory for weights that gradients only pass.

A weight is a whole number from -127 to 127 times the scale of its row (one output), and is multiplied in the type of
the model: inputs, outputs and gradients are not rounded to 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zero_ds.model.vlm import VisionLanguageModel

LARGEST = 127
"""Of the whole numbers; the same on either side of zero."""


class FrozenLinear(nn.Module):
    """A linear layer that does not train: (..., in_features) -> (..., out_features)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        largest = weight.abs().amax(1, keepdim=True).float()
        # rounded before anything is divided by it, for that is what is multiplied later; in float16 small ones vanish
        kind = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        scale = (largest / LARGEST).clamp_min(torch.finfo(kind).tiny).to(kind)
        numbers = (weight.float() / scale.float()).round_().clamp_(-LARGEST, LARGEST)
        self.weight = nn.Parameter(numbers.to(torch.int8), requires_grad=False)
        self.scale: torch.Tensor
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = _Product.apply(hidden_states, self.weight, self.scale)
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """x W^T. What stays for the backward pass is W in 8 bits, where autograd would keep the numbers made of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, (weight * scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return upstream[0] @ (weight * scale).to(upstream[0].dtype), None, None


def quantize_(model: VisionLanguageModel) -> int:
    """Puts the linear layers of all decoder layers that are wholly frozen into 8 bits, those of a teacher as well.

    Every rank does the same with its own whole weights. Parameters keep their names. Returns the number of such layers.
    """
    kind = type(model.family.layers(model.decoder)[0])
    layers = [module for module in model.modules() if isinstance(module, kind)]
    frozen = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
    for layer in frozen:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                if type(child) is nn.Linear:
                    setattr(module, name, FrozenLinear(child))
    return len(frozen)
