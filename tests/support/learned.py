"""Compares losses and gradients of one training step between two models that should learn the same."""

from __future__ import annotations

import torch

from zero_ds.data.batches import Batch
from zero_ds.model.vlm import VisionLanguageModel

TOLERANCE = 1e-5


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the 2-norm of the difference, divided by the 2-norm of `theirs`."""
    return float((ours.detach().float() - theirs.detach().float()).norm() / theirs.detach().float().norm())


def learned(model: VisionLanguageModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Returns the losses and the gradients of all trained tensors except the vision encoder's key biases.

    A softmax does not change with those, so their gradients are rounding noise.
    """
    model.train().zero_grad()
    outcome = model(**batch.inputs())
    outcome.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {n: g for n, g in gradients.items() if not (n.startswith("encoder.") and n.endswith("k_proj.bias"))}
    return {"total": outcome.total.detach(), "tokens": outcome.tokens, **gradients}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Fails with the name of the tensor that differs most, if it differs by more than the tolerance."""
    assert ours.keys() == theirs.keys()
    difference, name = max((apart(ours[name], theirs[name]), name) for name in theirs)
    assert difference < TOLERANCE, name
