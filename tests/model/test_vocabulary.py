"""Losses over the vocabulary against PyTorch's own: values and gradients, with the tolerance at each comparison."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from zero_ds.model import vocabulary
from zero_ds.model.vocabulary import cross_entropies, divergences

VOCABULARY = 23


def drawn(seed: int, rows: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns scores and goals (rows, vocabulary), labels and factors (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    scores, goals = scale * torch.randn(2, rows, VOCABULARY, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return scores, goals, labels, torch.randn(rows, generator=generator, dtype=torch.float64)


def plain_divergences(scores: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
    pair = (scores.log_softmax(1), goals.log_softmax(1))
    return F.kl_div(*pair, log_target=True, reduction="none").sum(1)


def with_gradient(
    of: Callable[[torch.Tensor], torch.Tensor], scores: torch.Tensor, factors: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.clone().requires_grad_()
    losses = of(scores)
    (losses * factors.to(losses.dtype)).sum().backward()
    assert scores.grad is not None
    return losses.detach(), scores.grad


@given(
    st.integers(0, 9999), st.integers(0, 9), st.sampled_from([0.1, 3.0, 40.0]), st.sampled_from([1, 200, 300, 10**6])
)
@settings(max_examples=100, deadline=None)
def test_values_and_gradients_are_those_of_pytorch(seed: int, rows: int, scale: float, size: int) -> None:
    """Values and gradients are those of float64 within 2e-6 of the largest score, for any number of rows at a time."""
    scores, goals, labels, factors = drawn(seed, rows, scale)
    close = {"atol": 2e-6 * max(1.0, scale), "rtol": 2e-6}
    with mock.patch.dict(vocabulary.ROWS_BYTES, cpu=size):
        entropy = with_gradient(lambda s: cross_entropies(s, labels), scores.float(), factors)
        divergence = with_gradient(lambda s: divergences(s, goals.float()), scores.float(), factors)
    plain = with_gradient(lambda s: F.cross_entropy(s, labels, reduction="none"), scores, factors)
    for ours, theirs in zip(entropy, plain, strict=True):
        torch.testing.assert_close(ours.double(), theirs, **close)
    for ours, theirs in zip(
        divergence, with_gradient(lambda s: plain_divergences(s, goals), scores, factors), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, **close)


def test_a_label_that_is_nearly_certain_keeps_its_digits() -> None:
    """A largest score of 1e8 does not swallow the rest: like PyTorch's, the loss is within float32's step at 1."""
    scores = torch.full((1, VOCABULARY), 1e8)
    scores[0, 5] += 16
    expected = F.cross_entropy(scores.double(), torch.tensor([5], dtype=torch.long))
    assert 1e-6 < float(expected) < 1e-5
    torch.testing.assert_close(cross_entropies(scores, torch.tensor([5]))[0].double(), expected, atol=1.2e-7, rtol=0)


def test_gradients_have_the_type_of_the_scores_and_nothing_else_is_kept() -> None:
    scores, goals, labels, _ = drawn(0, 6, 3.0)
    low = scores.bfloat16()
    for ours, plain in (
        (lambda s: cross_entropies(s, labels), lambda s: F.cross_entropy(s, labels, reduction="none")),
        (lambda s: divergences(s, goals.bfloat16()), lambda s: plain_divergences(s, goals.bfloat16().double())),
    ):
        leaf = low.clone().requires_grad_()
        losses = ours(leaf)
        assert losses.dtype == torch.float32
        kept = losses.grad_fn.saved_tensors  # type: ignore[union-attr]
        assert [(t.dtype, t.shape) for t in kept] == [(torch.bfloat16, low.shape)]
        losses.sum().backward()
        assert leaf.grad is not None and leaf.grad.dtype == torch.bfloat16
        _, expected = with_gradient(plain, low.double(), torch.ones(6))
        torch.testing.assert_close(leaf.grad.double(), expected, atol=2**-8, rtol=2**-8)


def test_without_gradient_no_graph_is_kept() -> None:
    scores, goals, labels, _ = drawn(0, 6, 3.0)
    with torch.no_grad():
        assert not cross_entropies(scores.float(), labels).requires_grad
        assert not divergences(scores.float(), goals.float()).requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float) -> None:
    scores, goals, labels, _ = drawn(0, 3, 3.0)
    scores[1, 2] = value
    for losses in (cross_entropies(scores.float(), labels), divergences(scores.float(), goals.float())):
        assert losses.isfinite().tolist() == [True, False, True]


def test_a_second_backward_pass_is_an_error_not_another_gradient() -> None:
    scores, _, labels, _ = drawn(0, 3, 3.0)
    loss = cross_entropies(scores.float().requires_grad_(), labels).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_small_gradients_of_half_precision_survive_until_the_loss_scale_is_on_them() -> None:
    scores = torch.zeros(2, 30000, dtype=torch.float16)
    scores[:, 0] = 12.0
    labels, factors = torch.zeros(2, dtype=torch.long), torch.full((2,), 2.0**14)
    _, ours = with_gradient(lambda s: cross_entropies(s, labels), scores, factors)
    _, theirs = with_gradient(lambda s: F.cross_entropy(s, labels, reduction="none"), scores.double(), factors)
    assert ours.dtype == torch.float16
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-6)
    _, ours = with_gradient(lambda s: divergences(s, torch.zeros_like(s)), scores, factors)
    _, theirs = with_gradient(lambda s: plain_divergences(s, torch.zeros_like(s)), scores.double(), factors)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-6)
