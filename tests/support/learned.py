"""What one step of training sees, of two models that should learn the same."""

from __future__ import annotations

import torch

from zero_ds.data.batches import Batch
from zero_ds.model.vlm import VisionLanguageModel

TOLERANCE = 1e-5


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """2-norm of the difference over that of theirs."""
    return float((ours.detach().float() - theirs.detach().float()).norm() / theirs.detach().float().norm())


def learned(model: VisionLanguageModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Losses, and the gradient of all that trains, but for the encoder's key biases.

    A softmax does not change with those, so that their gradients are rounding.
    """
    model.train().zero_grad()
    outcome = model(**batch.inputs())
    outcome.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients = {n: g for n, g in gradients.items() if not (n.startswith("encoder.") and n.endswith("k_proj.bias"))}
    return {"total": outcome.total.detach(), "tokens": outcome.tokens, **gradients}


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Fails, naming the tensor that is furthest apart, if that is more than the tolerance."""
    assert ours.keys() == theirs.keys()
    difference, name = max((apart(ours[name], theirs[name]), name) for name in theirs)
    assert difference < TOLERANCE, name
