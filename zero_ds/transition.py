"""The transition point: the layer where the early phase ends, read from the curves of a trajectory by a rule.

The paper reads it off Figure 3 by eye: the layer where curves that spread out coalesce and then fall monotonically.
Here it is the break of a two-segment least-squares fit to the mean curve: the early phase is one straight line over the
layers, the late phase another one, they need not meet (the coalescence is a sudden drop), and of all breaks the one
with the smallest sum of squares is taken. k is the first layer of the late phase, the k of T(k, e).

Why this form, with figures of SmolLM2-135M-Instruct (30 layers, 300 samples; by eye the drop begins at layer 19):

* Lines, not two constant levels. The late phase is a descent to zero, and two levels break in the middle of a descent
  rather than at its start: 20 with the `sequence` metric, 20 to 21 with `vocabulary`. Two lines give 19 with both.
* The mean curve, not the spread. The spread is a second moment, its estimate needs hundreds of samples (two lines on
  the standard deviation of 16 samples: anything from 2 to 19), and with `vocabulary` it hardly narrows. Standardised
  and joined to the mean it only adds that noise. It serves as a condition instead: curves that do not draw together
  have no transition in the paper's sense.
* Without the last layer: its divergence is zero by definition, the jump to it says nothing, and as the end point it has
  the strongest pull on the late line (with it `vocabulary` gives 18).
* Both phases hold at least an eighth of the layers, and three, so that no end effect passes for a phase. The paper's
  own readings lie between 0.50 and 0.62 of the depth.

How sure: the samples are drawn again with replacement 1000 times; the middle 95 % of the breaks are the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METHOD = "two lines, least squares on the mean curve without its last layer; 1000 bootstrap draws of the samples"
MIN_SAMPLES = 8
MIN_PHASE = 3
"""Fewest layers of a phase; a line through two is no evidence."""
MIN_EXPLAINED = 0.5
RESAMPLES = 1000


@dataclass(frozen=True)
class Transition:
    """The first layer of the late phase and how sure that is."""

    layer: int | None
    """None where it was not looked for: too few samples or layers."""
    low: int | None
    high: int | None
    """95 % interval of `layer` over samples."""
    verdict: Literal["clear", "uncertain"]
    reason: str
    """One sentence: why it is uncertain, or what makes it clear."""
    explained: float | None
    """Share of what one straight line leaves of the mean curve that a second one explains."""
    method: str = METHOD


def find_transition(curves: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> Transition:
    """The transition point of curves (samples, layers), in which the last layer's value is zero by definition.

    Uncertain, with the reason: fewer than 8 samples or 7 layers (then `layer` is None); a second line that explains too
    little; a late phase that is no lower, or no narrower, than the early one; an interval wider than a third of the
    layers. "Too little" is half of what one line leaves, or, in a shallow model, what the best of all breaks reaches in
    1 % of straight lines with white noise: 30 / (layers + 24), a bound fitted to simulations of 10 to 80 layers.
    """
    samples, layers = curves.shape
    if samples < MIN_SAMPLES:
        return _unknown(f"{samples} samples are too few to tell the phases apart; give at least {MIN_SAMPLES}.")
    inner = curves[:, :-1]
    if inner.shape[1] < 2 * MIN_PHASE:
        return _unknown(f"{layers} layers are too few to tell two phases apart; there must be {2 * MIN_PHASE + 1}.")

    mean = inner.mean(axis=0, keepdims=True)
    layer = int(breaks(mean)[0])
    draws = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=resamples)
    resampled = breaks(draws @ inner / samples)
    low, high = (int(value) for value in np.percentile(resampled, [2.5, 97.5], method="inverted_cdf"))
    gain = explained(mean[0], layer)

    least = max(MIN_EXPLAINED, 30 / (layers + 24))
    spread = np.subtract(*np.percentile(inner, [75, 25], axis=0))
    if gain < least:
        reason = f"a second phase explains only {gain:.0%} of what one line leaves of the mean curve, not {least:.0%}."
    elif mean[0, layer:].mean() >= mean[0, :layer].mean():
        reason = f"the mean curve does not fall behind layer {layer}."
    elif spread[layer:].mean() >= spread[:layer].mean():
        reason = f"the curves do not draw together behind layer {layer}."
    elif high - low > layers / 3:
        reason = f"over samples it lies anywhere from layer {low} to {high} of {layers}; give more samples."
    else:
        reason = f"a second phase explains {gain:.0%} of what one line leaves of the mean curve."
        return Transition(layer, low, high, "clear", reason, gain)
    return Transition(layer, low, high, "uncertain", reason, gain)


def breaks(curves: Floats) -> NDArray[np.int64]:
    """First layer of the second of two lines fitted to each curve: (curves, layers) -> (curves,)."""
    layers = curves.shape[1]
    shortest = max(MIN_PHASE, layers // 8)
    candidates = range(shortest, layers - shortest + 1)
    left = np.stack([line_residual(curves[:, :k]) + line_residual(curves[:, k:]) for k in candidates])
    # A break where two lines meet may stand on either side of the corner: within rounding the earlier one is taken.
    best = left.min(axis=0) + 1e-9 * curves.var(axis=1) * layers
    return cast(NDArray[np.int64], np.argmax(left <= best, axis=0) + shortest)


def explained(curve: Floats, layer: int) -> float:
    """1 - (what two lines that break at `layer` leave) / (what one line leaves); 0 where one line leaves nothing."""
    row = curve[None]
    one = float(line_residual(row)[0])
    two = float(line_residual(row[:, :layer])[0] + line_residual(row[:, layer:])[0])
    return 1 - two / one if one > 1e-9 * float((curve**2).sum()) else 0.0


def line_residual(values: Floats) -> Floats:
    """Sum of squares that the least-squares straight line leaves of each row: (rows, layers) -> (rows,)."""
    centred = values - values.mean(axis=1, keepdims=True)
    x = np.arange(values.shape[1]) - (values.shape[1] - 1) / 2
    slope = centred @ x / (x @ x)
    return cast(Floats, ((centred - slope[:, None] * x) ** 2).sum(axis=1))


def _unknown(reason: str) -> Transition:
    return Transition(None, None, None, "uncertain", reason, None)
