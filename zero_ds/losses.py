"""Losses as sums over supervised tokens; the training loop divides by the count of the global batch."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from zero_ds.data.conversations import IGNORE


def supervised_rows(labels: torch.Tensor) -> torch.Tensor:
    """Mask of the positions whose hidden state predicts a label: (batch, seq) -> (batch, seq).

    The state at position i predicts the token at i + 1. Logits are computed for these rows only: the vocabulary is wide
    and most positions are image or prompt.
    """
    rows = torch.zeros_like(labels, dtype=torch.bool)
    rows[:, :-1] = labels[:, 1:] != IGNORE
    return rows


def next_token_sum(logits: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens, float32 scalar; zero, and part of the graph, if there is none.

    logits: (n, vocabulary), at the n positions that `rows` (batch, seq) marks; labels: (batch, seq).
    """
    if not len(logits):
        return logits.float().sum()
    return F.cross_entropy(logits.float(), labels[:, 1:][rows[:, :-1]], reduction="sum")


def count_supervised(labels: torch.Tensor) -> int:
    """Number of tokens that `next_token_sum` sums over."""
    return int((labels[:, 1:] != IGNORE).sum())


def scale_excess_mean(
    embeddings: torch.Tensor, images: torch.Tensor, words: torch.Tensor, limit: float
) -> torch.Tensor:
    """How far image tokens exceed `limit` times the scale of words: mean of max(0, log(ratio / limit))^2.

    embeddings: (batch, seq, hidden); images, words: (batch, seq), disjoint masks. A token's scale is its root mean
    square over `hidden`, the words' scale the mean over `words`, without gradient. Zero, and part of the graph, where
    there is no image token. The thought behind it: large image tokens pass through a decoder's early layers nearly
    unchanged, so that late layers read them directly, and those are not the same in surrogate and target.
    """
    if not images.any():
        return 0.0 * embeddings.float().sum()
    scale = embeddings[images].float().square().mean(-1).sqrt()
    usual = embeddings[words].detach().float().square().mean(-1).sqrt().mean()
    return (scale / (limit * usual)).clamp_min(1e-6).log().clamp_min(0).square().mean()


def hidden_distillation_mean(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error relative to the teacher's variance, averaged over positions.

    student, teacher: (batch, seq, hidden); mask: (batch, seq), the positions that count. 1 means as wrong as the
    teacher's mean. The first position is left out: it is an attention sink whose norm is hundreds of times that of the
    others.
    """
    mask = mask.bool().clone()
    mask[:, 0] = False
    goal = teacher[mask].float()
    spread = (goal - goal.mean(0)).square().sum(-1).mean().clamp_min(1e-6)
    return (student[mask].float() - goal).square().sum(-1).mean() / spread


def logit_distillation_sum(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the vocabulary, summed over rows: (n, vocabulary) each -> float32 scalar."""
    return F.kl_div(
        student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1), log_target=True, reduction="sum"
    )
