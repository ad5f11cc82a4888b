"""Losses as sums over supervised tokens; the training loop divides by the count of the global batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from zero_ds.config.schema import DynamicLossConfig
from zero_ds.data.batches import Batch
from zero_ds.data.conversations import IGNORE
from zero_ds.model.vocabulary import cross_entropies, divergences
from zero_ds.runtime import distributed

Places = tuple[torch.Tensor, ...]
"""Indices of n positions of a batch, by rows and within them: ((n,), (n,)), int64. `hidden[places]` is (n, hidden)."""


def supervised_rows(labels: torch.Tensor) -> Places:
    """The n positions whose hidden state predicts a label: (batch, seq) -> ((n,), (n,)).

    The state at position i predicts the token at i + 1. Logits are computed for these rows only: the vocabulary is wide
    and most positions are image or prompt. Indices, not a mask: how many a mask holds, a GPU would have to be asked.
    """
    return (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)


class Loss(NamedTuple):
    """What a forward pass returns; a tuple, because DeepSpeed looks for tensors in what a model returns."""

    total: torch.Tensor
    """Sum over the supervised tokens, float32 scalar, with everything that is added to the cross-entropy."""
    tokens: torch.Tensor
    """Cross-entropy of each supervised token, unweighted: (n,), float32, without gradient."""


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, rows: Places) -> torch.Tensor:
    """Cross-entropy of every supervised token: (n,), float32.

    logits: (n, vocabulary), at the n positions that `rows` names; labels: (batch, seq).
    """
    return cross_entropies(logits, supervised(labels, rows))


def next_token_sum(
    logits: torch.Tensor, labels: torch.Tensor, rows: Places, token_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy summed over the supervised tokens, float32 scalar; zero, and part of the graph, if there is none.

    logits, labels, rows: as above; token_weights: (batch, seq), a factor for each label's loss.
    """
    return weighted_sum(next_token_losses(logits, labels, rows), rows, token_weights)


def weighted_sum(losses: torch.Tensor, rows: Places, token_weights: torch.Tensor | None) -> torch.Tensor:
    """(n,) losses of the supervised tokens, which `rows` names -> scalar; token_weights, if any: (batch, seq)."""
    return losses.sum() if token_weights is None else (losses * supervised(token_weights, rows)).sum()


def supervised(values: torch.Tensor, rows: Places) -> torch.Tensor:
    """Values that stand beside the n labels which `rows` predict: (batch, seq) -> (n,)."""
    return values[rows[0], rows[1] + 1]


def count_supervised(labels: torch.Tensor) -> int:
    """Number of tokens that `next_token_sum` sums over."""
    return int((labels[:, 1:] != IGNORE).sum())


LENGTHS = (8, 32, 128)
"""Upper ends of the classes of response lengths, in tokens, by which the loss is reported; the last class is open."""


def length_classes() -> list[str]:
    """Their names: `1-8`, `9-32`, `33-128`, `129-`."""
    starts = [1, *(end + 1 for end in LENGTHS)]
    return [f"{start}-{end}" for start, end in zip(starts, [*map(str, LENGTHS), ""], strict=True)]


def sums_by_length(losses: torch.Tensor, labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Sum of the losses, and number of tokens, for each class of response lengths: (n,) -> (classes, 2), float64.

    losses: (n,), of the supervised tokens; labels, responses: (batch, seq).
    """
    number = supervised(responses, supervised_rows(labels))
    inside = number >= 0
    lengths = response_lengths(labels, responses)
    kind = torch.bucketize(lengths, torch.tensor(LENGTHS, device=lengths.device))[number[inside]]
    sums = torch.zeros(len(LENGTHS) + 1, 2, dtype=torch.float64, device=losses.device)
    both = torch.stack([losses[inside].double(), torch.ones_like(losses[inside], dtype=torch.float64)], dim=1)
    return sums.index_add_(0, kind, both)


def response_lengths(labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Supervised tokens of each response of a micro-batch: (batch, seq), (batch, seq) -> (responses,), int64."""
    number = supervised(responses, supervised_rows(labels))
    return torch.bincount(number[number >= 0], minlength=int(responses.max()) + 1)


@dataclass(frozen=True)
class ResponseWeights:
    """Dynamic loss weights (appendix A.7) of one global batch with N responses, of L_i supervised tokens each.

        w_i = (max_j L_j / log L_i)^order, then w_i <- w_i * factor

    The factor is the same for all. As printed (`paper`) it is sum_j L_j / sum_j w_j, which makes the weights' mean over
    responses the mean length of a response, not 1; `mean` takes sum_j L_j / sum_j w_j L_j instead, which leaves the
    scale of the loss, and so of the gradient, as it is. log L_i is 0 for a response of one token, whose weight would be
    infinite: a response of one token is weighted like one of two.
    """

    order: float
    longest: float
    factor: float = 1.0
    outside: float = 1.0
    """Weight of supervised tokens that belong to no response: the mean over all tokens of responses."""

    def of(self, lengths: torch.Tensor) -> torch.Tensor:
        """(responses,) -> (responses,), float64."""
        return self.factor * (self.longest / lengths.double().clamp_min(2).log()) ** self.order

    def sums(self, lengths: torch.Tensor) -> tuple[float, float, float]:
        """A rank's share of sum w_j, sum w_j L_j and sum L_j."""
        weights = self.of(lengths)
        counted = lengths > 0  # a response that was cut off has no token, and no weight
        return (
            float(weights[counted].sum()),
            float((weights * lengths)[counted].sum()),
            float(lengths.sum()),
        )

    def normalized(self, how: str, total: float, total_by_length: float, tokens: float) -> ResponseWeights:
        """The weights with their factor, from the three sums over the global batch."""
        by = total if how == "paper" else total_by_length
        factor = tokens / by if by else 1.0
        outside = factor * total_by_length / tokens if tokens else 1.0
        return ResponseWeights(self.order, self.longest, factor, outside)

    def token_weights(self, labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """A factor for each label's loss: (batch, seq), (batch, seq) -> (batch, seq), float32."""
        values = torch.cat([self.of(response_lengths(labels, responses)), torch.tensor([self.outside])])
        return values[responses].float()  # -1, outside of responses, is the last


def with_token_weights(batches: list[Batch], config: DynamicLossConfig) -> list[Batch]:
    """Returns a rank's micro-batches with `token_weights`, which follow from the lengths of the responses in the whole
    global batch. A collective.
    """
    lengths = torch.cat([response_lengths(batch.labels, batch.responses) for batch in batches])
    (longest,) = distributed.max_over_ranks(float(lengths.max()) if len(lengths) else 0.0)
    weights = ResponseWeights(config.order, longest)
    weights = weights.normalized(config.normalize, *distributed.sum_over_ranks(*weights.sums(lengths)))
    return [replace(batch, token_weights=weights.token_weights(batch.labels, batch.responses)) for batch in batches]


def hidden_distillation_sum(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Squared error of hidden states relative to the teacher's square, summed over positions.

    student, teacher: (batch, seq, hidden); mask: (batch, seq), the positions that count. The first position is left
    out: it is an attention sink whose norm is hundreds of times that of the others. A sum over single positions, like
    every loss here, so that it does not matter how samples are split over micro-batches and ranks.
    """
    mask = mask.bool().clone()
    mask[:, 0] = False
    goal = teacher[mask].float()
    error = (student[mask].float() - goal).square().sum(-1)
    return (error / goal.square().sum(-1).clamp_min(1e-6)).sum()


def logit_distillation_sum(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the vocabulary, summed over rows: (n, vocabulary) each -> float32 scalar."""
    return divergences(student_logits, teacher_logits).sum()
