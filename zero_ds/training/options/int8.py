"""`frozen_weights=int8`: frozen decoder layers in 8 bits, half of bfloat16's memory.

A weight is a whole number from -127 to 127 times the scale of its row (one output). It is multiplied in the type of
the model, so inputs, outputs and gradients are not rounded to 8 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError

LARGEST = 127
"""Largest of the whole numbers, on either side of zero."""


class FrozenLinear(nn.Module):
    """A linear layer that does not train, with its weight in 8 bits: (..., in_features) -> (..., out_features)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        largest = weight.abs().amax(1, keepdim=True).float()
        # rounded before the division, because products use the rounded scale; small scales would underflow in fp16
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
    """Computes x W^T, and keeps W in 8 bits for the backward pass, where autograd would keep the dequantized W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, scale)
        return functional.linear(x, (weight * scale).to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return upstream[0] @ (weight * scale).to(upstream[0].dtype), None, None


def apply_(model: VisionLanguageModel) -> None:
    """Applies `frozen_weights=int8` to a run's model.

    Raises:
        ConfigError: all decoder layers train.
    """
    if not quantize_(model):
        raise ConfigError("frozen_weights=int8 needs frozen decoder layers, and all of them train; set it to native.")


def quantize_(model: VisionLanguageModel) -> int:
    """Converts the linear layers of all wholly frozen decoder layers to 8 bits, those of a teacher as well.

    Every rank converts its own whole weights. Parameters keep their names. Returns the number of such decoder layers.
    """
    kinds = tuple({type(layer) for layer in model.family.layers(model.decoder)})
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    frozen = [layer for layer in layers if not any(p.requires_grad for p in layer.parameters())]
    for layer in frozen:
        for module in list(layer.modules()):
            for name, child in list(module.named_children()):
                routes = name in ("gate", "router") and hasattr(module, "experts")  # which experts, must not change
                if type(child) is nn.Linear and not routes:
                    setattr(module, name, FrozenLinear(child))
    return len(frozen)
