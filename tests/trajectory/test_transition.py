"""Checks the rule that finds the transition layer on curves whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zero_ds.trajectory.transition import MIN_SAMPLES, Transition, change_points, find_transition


def two_phases(
    layers: int, k: int, *, samples: int, early: float = 2.2, late: float = 1.2, noise: float = 0.05, seed: int = 0
) -> np.ndarray:
    """Returns a small Figure 3: spread-out curves at a level, and from layer k a narrow descent that ends in zero."""
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
def test_a_fall_without_a_drop_is_found_late_never_early(data: st.DataObject, layers: int) -> None:
    """A plateau that turns into a straight fall in layer k: an error keeps more early layers, not fewer."""
    low, high = allowed(layers)
    k = data.draw(st.integers(max(low, layers // 3), high))
    found = find_transition(two_phases(layers, k, samples=100, early=1.2, late=1.2, noise=0.01), resamples=50)
    assert found.layer is not None and k <= found.layer <= k + 1 + layers / 4


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
    assert "two levels explain 0% of the mean curve" in uncertain(curves).reason


def test_a_straight_descent_has_no_transition() -> None:
    assert "two levels explain 75% of the mean curve" in uncertain(np.linspace(3, 0, 30) * np.ones((20, 1))).reason


@pytest.mark.parametrize("layers", [12, 16, 30, 80])
def test_noise_has_no_transition(layers: int) -> None:
    rng = np.random.default_rng(layers)
    clear = [find_transition(rng.normal(size=(20, layers)), resamples=50).verdict == "clear" for _ in range(100)]
    assert sum(clear) <= 3


def test_a_rise_is_not_a_transition() -> None:
    assert "rises at layer 19" in uncertain(3 - two_phases(30, 19, samples=20)).reason


def test_curves_must_draw_together() -> None:
    rng = np.random.default_rng(0)
    curves = two_phases(30, 19, samples=50) + np.where(np.arange(30) < 19, 0, 1) * rng.normal(size=(50, 1))
    assert "draw together" in uncertain(curves).reason


def test_a_wide_interval_is_uncertain() -> None:
    """One sample decides: with it the drop is at layer 8, without it at 20."""
    curves = two_phases(30, 20, samples=20)
    curves[0, :8] += 100
    found = uncertain(curves)
    assert (found.layer, found.low, found.high) == (8, 8, 20) and "from layer 8 to 20" in found.reason


def test_change_points_match_a_search_by_hand() -> None:
    curves = np.random.default_rng(1).normal(size=(20, 27)).cumsum(axis=1)
    found, shares = change_points(curves)
    for row, k, share in zip(curves, found, shares, strict=True):
        cost = {j: j * row[:j].var() + (27 - j) * row[j:].var() for j in range(3, 25)}
        assert k == min(cost, key=cost.__getitem__)
        assert share == pytest.approx(1 - cost[int(k)] / (27 * row.var()))
