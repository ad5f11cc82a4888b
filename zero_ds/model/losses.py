"""Losses as sums over supervised tokens; the training loop divides by their number in the global batch.

The loss of every stage is the next-token loss, to which a recipe adds terms by name: `losses: {NAME: weight}`. A new
term is a function of `Predictions` and an entry in `TERMS`, and nothing else; its value is logged as `loss/NAME`.
Distillation, which also runs layers of the target, is in distillation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from zero_ds.config.schema import DynamicLossConfig
from zero_ds.data.batches import Batch
from zero_ds.data.conversations import IGNORE
from zero_ds.model.vocabulary import cross_entropies, divergences
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError, did_you_mean

Places = tuple[torch.Tensor, ...]
"""Indices of n positions of a batch, row and column: ((n,), (n,)), int64. `hidden[places]` is (n, hidden)."""


class Loss(NamedTuple):
    """Result of a forward pass; a tuple, because DeepSpeed looks for tensors in tuples that a model returns."""

    total: torch.Tensor
    """Sum of all terms over the supervised tokens, float32 scalar."""
    tokens: torch.Tensor
    """Cross-entropy of each supervised token, unweighted: (n,), float32, without gradient."""
    terms: torch.Tensor | None = None
    """Values of the terms that the recipe adds, before they are weighted: (terms,), float32, without gradient."""


# -- supervised tokens -------------------------------------------------------------------------------------------------


def supervised_rows(labels: torch.Tensor) -> Places:
    """Returns the n positions whose hidden state predicts a label: (batch, seq) -> ((n,), (n,)).

    The hidden state at position i predicts the token at i + 1. Logits are computed at these positions only, because the
    vocabulary is wide and most positions are image or prompt. The result is indices instead of a mask, because the
    number of positions in a mask is known only after waiting for the GPU.
    """
    return (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)


def supervised(values: torch.Tensor, rows: Places) -> torch.Tensor:
    """Returns the values at the n labels that the positions in `rows` predict: (batch, seq) -> (n,)."""
    return values[rows[0], rows[1] + 1]


def count_supervised(labels: torch.Tensor) -> int:
    """Returns the number of supervised tokens of a micro-batch: (batch, seq) -> n."""
    return int((labels[:, 1:] != IGNORE).sum())


# -- terms of the loss -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """Inputs of the terms of the loss: the outcome of a forward pass, and the labels that it is compared with."""

    hidden_states: torch.Tensor
    """Hidden states after the final norm: (batch, seq, hidden)."""
    logits: torch.Tensor
    """Logits at the n positions that predict a label: (n, vocabulary)."""
    tokens: torch.Tensor
    """Cross-entropy of each of the n labels, unweighted: (n,), float32."""
    rows: Places
    """The n positions (`supervised_rows`)."""
    labels: torch.Tensor
    """Token ids, or IGNORE at positions without loss: (batch, seq)."""
    token_weights: torch.Tensor | None
    """Factor for the next-token loss of each label: (batch, seq); None: all 1."""
    attention_mask: torch.Tensor
    """1 at tokens, 0 at padding: (batch, seq)."""
    position_ids: torch.Tensor | None
    """Positions within samples, where rows hold several samples: (batch, seq)."""

    def hidden_mask(self) -> torch.Tensor:
        """Returns the positions at which hidden states are compared: (batch, seq).

        The first token of every sample that shares its row is not among them, because it is an attention sink (see
        `hidden_distillation_sum`).
        """
        if self.position_ids is None:
            return self.attention_mask
        return self.attention_mask * (self.position_ids > 0)


def next_token_term(predictions: Predictions) -> torch.Tensor:
    """Returns the weighted next-token loss: float32 scalar."""
    return weighted_sum(predictions.tokens, predictions.rows, predictions.token_weights)


TERMS: dict[str, Callable[[Predictions], torch.Tensor]] = {}
"""Terms that a recipe can add to the next-token loss, by the names of their weights in its `losses`.

Each returns a sum over supervised tokens or positions, as a float32 scalar.
"""


def check_terms(weights: Mapping[str, float]) -> None:
    """Raises ConfigError if a recipe's `losses` name a term that does not exist."""
    for name in weights:
        if name not in TERMS:
            remedy = did_you_mean(name, list(TERMS)) if TERMS else "; add it to TERMS in model/losses.py."
            raise ConfigError(f"losses names '{name}', which is not a term of the loss{remedy}")


def total_loss(predictions: Predictions, weights: Mapping[str, float]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the next-token loss plus the weighted terms that a recipe adds.

    weights: weights of these terms, by name.

    Returns the sum, a float32 scalar, and the terms before they are weighted, (terms,), float32, without gradient; None
    if there are none.
    """
    total = next_token_term(predictions)
    values = []
    for name, weight in weights.items():
        value = TERMS[name](predictions)
        total = total + weight * value
        values.append(value.detach())
    return total, torch.stack(values) if values else None


def next_token_losses(logits: torch.Tensor, labels: torch.Tensor, rows: Places) -> torch.Tensor:
    """Returns the cross-entropy of every supervised token: (n,), float32.

    logits: (n, vocabulary), at the n positions in `rows`; labels: (batch, seq).
    """
    return cross_entropies(logits, supervised(labels, rows))


def next_token_sum(
    logits: torch.Tensor, labels: torch.Tensor, rows: Places, token_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns the sum of `next_token_losses`, float32 scalar; zero, and part of the graph, if nothing is supervised.

    token_weights: (batch, seq), a factor for each label's loss.
    """
    return weighted_sum(next_token_losses(logits, labels, rows), rows, token_weights)


def weighted_sum(losses: torch.Tensor, rows: Places, token_weights: torch.Tensor | None) -> torch.Tensor:
    """Sums the losses of the supervised tokens, each times its label's weight: (n,), float32 -> float32 scalar.

    token_weights: (batch, seq); None: all 1.
    """
    if token_weights is None:
        return losses.sum()
    return (losses * supervised(token_weights, rows)).sum()


def hidden_distillation_sum(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sums, over positions, the squared error of hidden states relative to the teacher's squared norm.

    student, teacher: (batch, seq, hidden); mask: (batch, seq), the positions to compare. The first position never
    counts: it is an attention sink, whose norm is hundreds of times that of the others. Like every loss here this is a
    sum over single positions, so it does not matter how samples are split over micro-batches and ranks.
    """
    mask = mask.bool().clone()
    mask[:, 0] = False
    goal = teacher[mask].float()
    error = (student[mask].float() - goal).square().sum(-1)
    return (error / goal.square().sum(-1).clamp_min(1e-6)).sum()


def logit_distillation_sum(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Sums KL(teacher || student) over the vocabulary, over all rows: (n, vocabulary) each -> float32 scalar."""
    return divergences(student_logits, teacher_logits).sum()


# -- loss by length of response ----------------------------------------------------------------------------------------

LENGTHS = (8, 32, 128)
"""Upper ends, in tokens, of the classes of response lengths by which the loss is reported; the last class is open."""


def length_classes() -> list[str]:
    """Returns the names of the classes: `1-8`, `9-32`, `33-128`, `129-`."""
    starts = [1, *(end + 1 for end in LENGTHS)]
    ends = [*(str(end) for end in LENGTHS), ""]
    return [f"{start}-{end}" for start, end in zip(starts, ends, strict=True)]


def sums_by_length(losses: torch.Tensor, labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the losses and the number of tokens of each class: (n,) -> (classes, 2), float64.

    losses: (n,), of the supervised tokens; labels, responses: (batch, seq).
    """
    number = supervised(responses, supervised_rows(labels))
    inside = number >= 0
    lengths = response_lengths(labels, responses)
    kind = torch.bucketize(lengths, torch.tensor(LENGTHS, device=lengths.device))[number[inside]]
    sums = torch.zeros(len(LENGTHS) + 1, 2, dtype=torch.float64, device=losses.device)
    both = torch.stack([losses[inside].double(), torch.ones_like(losses[inside], dtype=torch.float64)], dim=1)
    return sums.index_add_(0, kind, both)


def sums_by_source(losses: torch.Tensor, batch: Batch, sources: int) -> torch.Tensor:
    """Returns the sum of the losses and the number of tokens of each source: (n,) -> (sources, 2), float64.

    losses: (n,), of the supervised tokens of the batch.
    """
    rows = supervised_rows(batch.labels)
    number = torch.zeros(len(losses), dtype=torch.long)
    if batch.sources is not None:
        number = supervised(batch.sources, rows).long()
    both = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)], dim=1)
    return torch.zeros(sources, 2, dtype=torch.float64).index_add_(0, number, both)


def response_lengths(labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
    """Returns the number of supervised tokens of each response: (batch, seq), (batch, seq) -> (responses,), int64.

    responses: number of the response that each token belongs to, -1 outside of responses.
    """
    number = supervised(responses, supervised_rows(labels))
    return torch.bincount(number[number >= 0], minlength=int(responses.max()) + 1)


# -- dynamic loss weights ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ResponseWeights:
    """Dynamic loss weights (appendix A.7) of one global batch of responses with L_i supervised tokens each.

        w_i = (max_j L_j / log L_i)^order, then w_i <- w_i * factor

    The factor is the same for all responses. As printed in the paper (`paper`) it is sum_j L_j / sum_j w_j, which makes
    the mean weight of a response the mean length of a response instead of 1. `mean` takes sum_j L_j / sum_j w_j L_j,
    which leaves the scale of the loss, and so of the gradient, unchanged. log L_i is 0 for a response of one token,
    whose weight would be infinite, so a response of one token gets the weight of one with two tokens.
    """

    order: float
    longest: float
    """Largest number of supervised tokens in a response of the global batch."""
    factor: float = 1.0
    outside: float = 1.0
    """Weight of supervised tokens outside of responses: the mean weight of all tokens in responses."""

    def of(self, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the weights of responses from their lengths: (responses,) -> (responses,), float64."""
        return self.factor * (self.longest / lengths.double().clamp_min(2).log()) ** self.order

    def sums(self, lengths: torch.Tensor) -> tuple[float, float, float]:
        """Returns a rank's share of sum w_j, sum w_j L_j and sum L_j."""
        weights = self.of(lengths)
        counted = lengths > 0  # a response that was cut off has no token and no weight
        return (
            float(weights[counted].sum()),
            float((weights * lengths)[counted].sum()),
            float(lengths.sum()),
        )

    def normalized(self, how: str, total: float, total_by_length: float, tokens: float) -> ResponseWeights:
        """Returns the weights with their factor, from the three sums over the global batch."""
        by = total if how == "paper" else total_by_length
        factor = tokens / by if by else 1.0
        outside = factor * total_by_length / tokens if tokens else 1.0
        return ResponseWeights(self.order, self.longest, factor, outside)

    def token_weights(self, labels: torch.Tensor, responses: torch.Tensor) -> torch.Tensor:
        """Returns a factor for each label's loss: (batch, seq), (batch, seq) -> (batch, seq), float32."""
        values = torch.cat([self.of(response_lengths(labels, responses)), torch.tensor([self.outside])])
        return values[responses].float()  # tokens outside of responses have number -1, which is the last value


def with_token_weights(batches: list[Batch], config: DynamicLossConfig) -> list[Batch]:
    """Returns a rank's micro-batches with `token_weights`, which depend on the response lengths of the global batch.

    A collective.
    """
    lengths = torch.cat([response_lengths(batch.labels, batch.responses) for batch in batches])
    (longest,) = distributed.max_over_ranks(float(lengths.max()) if len(lengths) else 0.0)
    weights = ResponseWeights(config.order, longest)
    weights = weights.normalized(config.normalize, *distributed.sum_over_ranks(*weights.sums(lengths)))
    return [replace(batch, token_weights=weights.token_weights(batch.labels, batch.responses)) for batch in batches]
