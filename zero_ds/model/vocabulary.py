"""Losses of single positions over the vocabulary, whose gradient is computed in the forward pass, some rows at a time.

Scores of 1,000 positions over a vocabulary of 128,000 words are 0.5 GB in float32, and autograd keeps several such
tensors: the float32 copy, the log-probabilities, their gradient. Here float32 exists only for a few rows at a time,
which fit a cache, and a single tensor in the dtype of the scores is kept for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

ROWS_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bytes of float32 scores that are computed at a time: they fit a CPU core's cache, or fill a GPU."""


def cross_entropies(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Returns -log softmax(scores)[label] of every row: (n, vocabulary), (n,) -> (n,), float32."""
    losses: torch.Tensor = _CrossEntropies.apply(scores, labels)
    return losses


def divergences(scores: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    """Returns KL(softmax(goals) || softmax(scores)) of every row: (n, vocabulary) each -> (n,), float32.

    The goals get no gradient.
    """
    losses: torch.Tensor = _Divergences.apply(scores, goals)
    return losses


def _gradient_buffer(scores: torch.Tensor) -> torch.Tensor:
    """Returns an uninitialised tensor for the gradient, in the dtype of the scores, or float32 for float16.

    In float16 small gradients would become zero, because the loss scale is applied only later.
    """
    return torch.empty_like(scores, dtype=torch.float32 if scores.dtype == torch.float16 else scores.dtype)


def _slices(scores: torch.Tensor) -> Iterator[slice]:
    """Yields slices of rows that are computed at a time."""
    step = max(1, ROWS_BYTES.get(scores.device.type, 1 << 28) // (4 * scores.shape[1]))
    return (slice(start, start + step) for start in range(0, len(scores), step))


def _log_sum(scores: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Returns log sum exp of every row, from its largest score and probability: (n, vocabulary) each -> (n,)."""
    return scores.amax(1) - probabilities.amax(1).log()


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.dtype = scores.dtype
        losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
        gradient = _gradient_buffer(scores) if ctx.needs_input_grad[0] else None
        for rows in _slices(scores):
            part, column = scores[rows].float(), labels[rows].unsqueeze(1)
            probabilities = part.softmax(1)
            # the difference comes first, so that a label with the largest score loses no digits
            losses[rows] = part.amax(1) - part.gather(1, column).squeeze(1) - probabilities.amax(1).log()
            if gradient is not None:
                # not scatter_add_, for which CUDA may have no deterministic algorithm
                gradient[rows] = probabilities.scatter_(1, column, probabilities.gather(1, column) - 1)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scaled(ctx, upstream[0]), None


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        ctx.dtype = scores.dtype
        losses = torch.empty(len(scores), dtype=torch.float32, device=scores.device)
        gradient = _gradient_buffer(scores) if ctx.needs_input_grad[0] else None
        for rows in _slices(scores):
            part, goal = scores[rows].float(), goals[rows].float()
            probabilities, wanted = part.softmax(1), goal.softmax(1)
            normalizers = _log_sum(part, probabilities) - _log_sum(goal, wanted)
            losses[rows] = torch.linalg.vecdot(wanted, goal - part) + normalizers
            if gradient is not None:
                gradient[rows] = probabilities.sub_(wanted)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _scaled(ctx, upstream[0]), None


def _scaled(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
    """Returns the kept gradient times each row's upstream gradient. In place, so a second backward pass is an error."""
    (gradient,) = ctx.saved_tensors
    scaled: torch.Tensor = gradient.mul_(upstream.unsqueeze(1))
    return scaled.to(ctx.dtype)
