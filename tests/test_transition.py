"""The rule that picks the transition layer, on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from zero_ds.transition import MIN_SAMPLES, Transition, breaks, explained, find_transition, line_residual


def two_phases(
    layers: int, k: int, *, samples: int, early: float = 2.2, late: float = 1.2, noise: float = 0.05, seed: int = 0
) -> np.ndarray:
    """Figure 3 in small: spread-out curves at a level, from layer k on a narrow descent that ends in zero."""
    rng = np.random.default_rng(seed)
    x = np.arange(layers)
    shape = np.where(x < k, early, late * (layers - 1 - x) / (layers - 1 - k))
    spread = np.where(x < k, 0.3, 0.1)
    own = rng.normal(size=(samples, 1)) * spread + rng.normal(size=(samples, layers)) * noise
    own[:, -1] = 0
    return shape + own


def allowed(layers: int) -> tuple[int, int]:
    shortest = max(3, (layers - 1) // 8)
    return shortest, layers - 1 - shortest


@given(st.data(), st.integers(12, 80), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_finds_a_drop_where_it_is(data: st.DataObject, layers: int, seed: int) -> None:
    low, high = allowed(layers)
    k = data.draw(st.integers(low, high))
    found = find_transition(two_phases(layers, k, samples=40, seed=seed), resamples=100)
    assert found.layer == k
    assert found.low is not None and found.high is not None and found.low <= k <= found.high


@given(st.data(), st.integers(24, 80))
@settings(max_examples=40, deadline=None)
def test_finds_a_corner_without_a_drop(data: st.DataObject, layers: int) -> None:
    """Plateau and descent that meet in layer k: k, or k + 1, which lies on both lines as well."""
    low, high = allowed(layers)
    k = data.draw(st.integers(low + 1, high - 1))
    curves = two_phases(layers, k, samples=40, early=1.2, late=1.2, noise=0.0)
    shape = curves.mean(axis=0, keepdims=True)[:, :-1]
    assume(explained(shape[0], k) > 0.6)
    ideal = np.where(np.arange(layers - 1) < k, 1.2, 1.2 * (layers - 1 - np.arange(layers - 1)) / (layers - 1 - k))
    assert breaks(ideal[None])[0] in (k, k + 1)


@given(st.floats(0.01, 1000), st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_scale_and_level_do_not_matter(scale: float, level: float) -> None:
    curves = two_phases(30, 19, samples=20)
    first, second = find_transition(curves, resamples=200), find_transition(curves * scale + level, resamples=200)
    assert (first.layer, first.low, first.high) == (second.layer, second.low, second.high)
    assert first.verdict == second.verdict


def test_the_last_layer_has_no_say() -> None:
    curves = two_phases(30, 19, samples=20)
    changed = curves.copy()
    changed[:, -1] = 17.0
    assert find_transition(curves) == find_transition(changed)


def test_clear_on_curves_like_the_papers() -> None:
    found = find_transition(two_phases(28, 16, samples=300))
    assert (found.layer, found.low, found.high, found.verdict) == (16, 16, 16, "clear")
    assert found.explained is not None and found.explained > 0.8


def test_same_seed_same_interval() -> None:
    curves = two_phases(30, 19, samples=10, noise=0.5)
    assert find_transition(curves, seed=3) == find_transition(curves, seed=3)


def test_too_few_samples() -> None:
    found = find_transition(two_phases(30, 19, samples=MIN_SAMPLES - 1))
    assert (found.layer, found.low, found.high, found.verdict) == (None, None, None, "uncertain")
    assert found.reason == "7 samples are too few to tell the phases apart; give at least 8."


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_too_few_layers(layers: int) -> None:
    found = find_transition(np.ones((20, layers)))
    assert found.layer is None and found.verdict == "uncertain"
    assert found.reason.startswith(f"{layers} layers are too few")


def uncertain(curves: np.ndarray) -> Transition:
    found = find_transition(curves)
    assert found.verdict == "uncertain"
    assert found.reason.endswith(".") and found.reason.count(". ") == 0
    return found


@pytest.mark.parametrize("level", [0.0, 1.0, 1e-7])
def test_flat_curves_have_no_transition(level: float) -> None:
    curves = np.full((20, 30), level)
    curves[:, -1] = 0
    assert "explains only 0%" in uncertain(curves).reason


def test_a_straight_descent_has_no_transition() -> None:
    assert "explains only 0%" in uncertain(np.linspace(3, 0, 30) * np.ones((20, 1))).reason


@pytest.mark.parametrize("layers", [12, 16, 30, 80])
def test_noise_has_no_transition(layers: int) -> None:
    rng = np.random.default_rng(layers)
    clear = [find_transition(rng.normal(size=(20, layers)), resamples=50).verdict == "clear" for _ in range(100)]
    assert sum(clear) <= 3


def test_a_rise_is_no_transition() -> None:
    assert "does not fall" in uncertain(3 - two_phases(30, 19, samples=20)).reason


def test_curves_must_draw_together() -> None:
    rng = np.random.default_rng(0)
    curves = two_phases(30, 19, samples=50) + np.where(np.arange(30) < 19, 0, 1) * rng.normal(size=(50, 1))
    assert "draw together" in uncertain(curves).reason


def test_a_wide_interval_is_uncertain() -> None:
    """Half of the samples drop early, half late."""
    curves = np.concatenate([two_phases(30, 6, samples=8), two_phases(30, 24, samples=8, seed=1)])
    found = uncertain(curves)
    assert found.layer is not None and found.low is not None and found.high is not None
    assert found.high - found.low > 10 and f"from layer {found.low} to {found.high}" in found.reason


def test_line_residual_is_least_squares() -> None:
    values = np.random.default_rng(0).normal(size=(5, 9))
    design = np.stack([np.ones(9), np.arange(9)], axis=1)
    expected = [np.linalg.lstsq(design, row, rcond=None)[1][0] for row in values]
    np.testing.assert_allclose(line_residual(values), expected)


def test_breaks_match_a_search_by_hand() -> None:
    for row in np.random.default_rng(1).normal(size=(20, 27)).cumsum(axis=1):
        cost = {
            k: sum(np.polyfit(np.arange(len(part)), part, 1, full=True)[1][0] for part in (row[:k], row[k:]))
            for k in range(3, 25)
        }
        assert breaks(row[None])[0] == min(cost, key=cost.__getitem__)
