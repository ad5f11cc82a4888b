"""Losses are sums over supervised tokens, which equal the plain definition and add up over any split of a batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zero_ds.data.conversations import IGNORE
from zero_ds.model.losses import (
    ResponseWeights,
    count_supervised,
    hidden_distillation_sum,
    length_classes,
    logit_distillation_sum,
    next_token_losses,
    next_token_sum,
    response_lengths,
    sums_by_length,
    supervised_rows,
)

VOCABULARY = 11


def drawn(seed: int, batch: int, length: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits (batch, length, vocabulary) and labels (batch, length), of which about `share` are supervised."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, length, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) > share] = IGNORE
    return logits, labels


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = supervised_rows(labels)
    return next_token_sum(logits[rows], labels, rows)


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=50)
def test_next_token_sum_is_the_shifted_cross_entropy(seed: int, batch: int, length: int, share: float) -> None:
    logits, labels = drawn(seed, batch, length, share)
    plain = F.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(loss(logits, labels), plain)
    assert count_supervised(labels) == len(supervised_rows(labels)[0]) == int((labels[:, 1:] != IGNORE).sum())
    # a sum over samples is a sum of sums
    torch.testing.assert_close(sum(loss(logits[i : i + 1], labels[i : i + 1]) for i in range(batch)), plain)


def test_rows_without_a_label_are_not_looked_at() -> None:
    logits, labels = drawn(0, 2, 6, 0.5)
    rows = supervised_rows(labels)
    others = torch.ones_like(labels, dtype=torch.bool)
    others[rows] = False
    logits[others] = float("nan")
    assert torch.isfinite(loss(logits, labels))
    assert others[:, -1].all(), "nothing follows the last position"


def test_no_supervised_token_is_zero_in_the_graph() -> None:
    logits, labels = drawn(0, 2, 6, 0.0)
    logits.requires_grad_()
    nothing = loss(logits, labels)
    nothing.backward()
    assert nothing.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_low_precision_is_summed_in_float32() -> None:
    logits, labels = drawn(0, 4, 9, 1.0)
    assert loss(logits.bfloat16(), labels).dtype == torch.float32


@given(st.integers(0, 999), st.integers(1, 6))
@settings(max_examples=25)
def test_logit_distillation_is_the_kl_divergence(seed: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, VOCABULARY, generator=generator)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(logit_distillation_sum(student, teacher), (p * (p / q).log()).sum())
    assert abs(float(logit_distillation_sum(teacher, teacher))) < 1e-5
    shifted = logit_distillation_sum(student + 3, teacher - 2)
    torch.testing.assert_close(shifted, logit_distillation_sum(student, teacher))


def test_hidden_distillation_is_relative_to_the_teacher_at_each_position() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = 5 + 3 * torch.randn(2, 7, 4, generator=generator)
    mask = torch.ones(2, 7)
    mask[1, 5:] = 0
    assert hidden_distillation_sum(teacher, teacher, mask) == 0
    torch.testing.assert_close(hidden_distillation_sum(0 * teacher, teacher, mask), torch.tensor(10.0))
    wrong = teacher.clone()
    wrong[:, 0] += 1000  # the attention sink
    wrong[1, 5:] -= 1000  # padding
    assert hidden_distillation_sum(wrong, teacher, mask) == 0
    student = teacher + torch.randn(2, 7, 4, generator=generator)
    whole = hidden_distillation_sum(student, teacher, mask)
    torch.testing.assert_close(hidden_distillation_sum(student * 4, teacher * 4, mask), whole)
    parts = [hidden_distillation_sum(student[i : i + 1], teacher[i : i + 1], mask[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)
    assert mask[0, 0] == 1, "the caller's mask is not touched"


# -- responses: loss by their length, and dynamic weights (A.7) --------------------------------------------------------


def spread(lengths: list[int], gap: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns labels and responses, (1, seq), with responses of these lengths and one supervised token outside."""
    labels, responses = [IGNORE], [-1]
    for number, length in enumerate(lengths):
        labels += [IGNORE] * gap + [1] * length
        responses += [-1] * gap + [number] * length
    return torch.tensor([[*labels, 1]]), torch.tensor([[*responses, -1]])


LENGTHS_OF_RESPONSES = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(LENGTHS_OF_RESPONSES)
@settings(max_examples=50)
def test_lengths_and_sums_by_length(lengths: list[int]) -> None:
    labels, responses = spread(lengths)
    assert response_lengths(labels, responses).tolist() == lengths
    generator = torch.Generator().manual_seed(sum(lengths))
    losses = torch.rand(sum(lengths) + 1, generator=generator)
    sums = sums_by_length(losses, labels, responses)
    torch.testing.assert_close(sums[:, 0].sum(), losses[:-1].double().sum())
    ends = [8, 32, 128, math.inf]
    for row, (low, high) in zip(sums, zip([1, 9, 33, 129], ends, strict=True), strict=True):
        assert row[1] == sum(length for length in lengths if low <= length <= high)
    assert length_classes() == ["1-8", "9-32", "33-128", "129-"]


def by_definition(lengths: list[int], order: float) -> list[float]:
    """The weights are those of A.7 as printed, with length 2 instead of 1 in the logarithm, which would be zero."""
    raw = [(max(lengths) / math.log(max(n, 2))) ** order for n in lengths]
    return [w / (sum(raw) / sum(lengths)) for w in raw]


@given(LENGTHS_OF_RESPONSES, LENGTHS_OF_RESPONSES, st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=50)
def test_dynamic_weights_are_those_of_the_global_batch(here: list[int], there: list[int], order: float) -> None:
    whole = here + there
    start = ResponseWeights(order, float(max(whole)))
    parts = [start.sums(torch.tensor(lengths)) for lengths in (here, there)]
    sums = [sum(values) for values in zip(*parts, strict=True)]
    paper = start.normalized("paper", *sums)
    expected = by_definition(whole, order)
    torch.testing.assert_close(paper.of(torch.tensor(whole)).tolist(), expected)
    mean = start.normalized("mean", *sums).of(torch.tensor(whole))
    assert float((mean * torch.tensor(whole)).sum()) == pytest.approx(sum(whole)), "the loss keeps its scale"
    torch.testing.assert_close((mean / mean[0]).tolist(), [w / expected[0] for w in expected])
    labels, responses = spread(here)
    weights = paper.token_weights(labels, responses)
    for number, weight in enumerate(expected[: len(here)]):
        assert weights[responses == number].tolist() == pytest.approx([weight] * here[number])
    average = sum(w * n for w, n in zip(expected, whole, strict=True)) / sum(whole)
    assert weights[0, -1] == pytest.approx(average), "outside of responses: as much as a token of them on average"


def test_short_responses_weigh_more_and_one_token_is_not_infinite() -> None:
    one, two, ten, hundred = ResponseWeights(0.5, 100.0).of(torch.tensor([1, 2, 10, 100])).tolist()
    assert one == two > ten > hundred > 0 and math.isfinite(one)


@given(st.integers(0, 99), LENGTHS_OF_RESPONSES)
@settings(max_examples=20)
def test_weights_scale_the_loss_of_every_token(seed: int, lengths: list[int]) -> None:
    labels, _ = spread(lengths)
    logits = torch.randn(1, labels.shape[1], VOCABULARY, generator=torch.Generator().manual_seed(seed))
    rows = supervised_rows(labels)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed + 1))
    plain = next_token_losses(logits[rows], labels, rows)
    torch.testing.assert_close(
        next_token_sum(logits[rows], labels, rows, weights), (plain * weights[rows[0], rows[1] + 1]).sum()
    )
