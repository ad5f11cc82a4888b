"""Losses as sums over supervised tokens; the training loop divides by the count of the global batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from zero_ds.data.conversations import IGNORE


def supervised(hidden_states: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict a label, and these labels.

    hidden_states: (batch, seq, hidden); labels: (batch, seq), IGNORE where there is no loss. The state at position i
    predicts the token at i + 1. Returns (n, hidden) and (n,): the vocabulary is wide and most positions carry no label,
    so that logits are computed for these rows only.
    """
    targets = labels[:, 1:]
    mask = targets != IGNORE
    return hidden_states[:, :-1][mask], targets[mask]


def next_token_sum(
    hidden_states: torch.Tensor, labels: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens, float32 scalar; zero, and part of the graph, if there is none."""
    rows, targets = supervised(hidden_states, labels)
    logits = head(rows).float()
    return F.cross_entropy(logits, targets, reduction="sum") if len(targets) else logits.sum()


def count_supervised(labels: torch.Tensor) -> int:
    """Number of tokens that `next_token_sum` sums over."""
    return int((labels[:, 1:] != IGNORE).sum())


def hidden_distillation_sum(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error relative to the teacher's mean square, summed over positions.

    student, teacher: (batch, seq, hidden); mask: (batch, seq), the positions that count. Each position contributes
    |student - teacher|^2 / mean over positions of |teacher - mean teacher|^2. The first position is left out: it is an
    attention sink whose norm is hundreds of times that of the others.
    """
    mask = mask.bool().clone()
    mask[:, 0] = False
    goal = teacher[mask].float()
    spread = (goal - goal.mean(0)).square().sum(-1).mean().clamp_min(1e-6)
    return (student[mask].float() - goal).square().sum(-1).sum() / spread


def logit_distillation_sum(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the vocabulary, summed over rows: (n, vocabulary) each -> float32 scalar."""
    return F.kl_div(
        student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1), log_target=True, reduction="sum"
    )
