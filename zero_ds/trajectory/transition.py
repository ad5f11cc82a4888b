"""The transition layer: the layer where the early phase ends, found in the curves of a trajectory by a rule.

The paper reads it off Figure 3 by eye: the layer where curves that spread out come together abruptly and then fall.
Here it is the change-point of the mean curve: two constant levels, one for each phase, are fitted by least squares, and
of all breaks the one with the smallest sum of squares is taken. k, the first layer of the late phase, is the k of T(k,
e).

Why this rule. Rules were compared on SmolLM2-135M-Instruct (30 layers; by eye the drop goes from layer 18 to 20) with
seven kinds of text (short answers, greedy ones, several turns, docstrings, code, a paper, worked sums; 46 to 300
samples, bfloat16):

* This rule, `sequence` metric: 19 with five kinds of text, 20 with two; 8 samples drawn at random nearly always give 19
  or 20 as well (sums: 15 to 20). `vocabulary`: 20 with six kinds, 22 with one (sums).
* Two straight lines instead of levels: 19 on short answers as well, and exact where a plateau turns into a slope, but
  10
  on docstrings and 5 on sums, where they mistake a step inside the early phase for the transition. Lines through the
  logarithm: 17 to 20. Levels of the spread: 9 to 20, of mean and spread together: 14 to 20.
* The errors are on the safe side. An abrupt drop is found exactly. Where a plateau turns into a straight fall without
  any drop, levels break too late, by a sixth of the depth if it turns in the middle. Late means that more early layers
  are kept, which costs size but does not harm grafting (Tables 3 and 4); a rule that errs early destroys grafting.
* The spread is a second moment: with 16 samples its change-point can be anywhere, and with `vocabulary` it hardly
  narrows. It serves as a condition instead: curves that do not come together have no transition in the paper's sense.
* The last layer is excluded. Its divergence is zero by definition, so the jump to it says nothing.
* Both phases have at least an eighth of the layers, and at least three, so that no end effect passes for a phase. The
  paper's own readings are between 0.50 and 0.62 of the depth.

How sure it is: the samples are drawn again with replacement 1000 times; the middle 95 % of the breaks are the interval.
That covers the choice of samples, not the kind of text: measure on text similar to the answers the model will give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METHOD = "two levels, least squares on the mean curve without its last layer; 1000 bootstrap draws of the samples"
MIN_SAMPLES = 8
MIN_PHASE = 3
"""Smallest number of layers of a phase."""
MIN_EXPLAINED = 0.8
"""Smallest share of the variance that two levels must explain. They explain 0.75 of a straight fall, 0.76 to 0.78 of
smooth curves without phases (exp(-3x), 1 - x^2), and 0.82 to 0.88 of the mean curves named above (worked sums, where
the eye finds no drop either: 0.72 and 0.80)."""
RESAMPLES = 1000


@dataclass(frozen=True)
class Transition:
    """The first layer of the late phase, and how sure it is. The fields are keys of trajectory.json."""

    layer: int | None
    """First layer of the late phase; None if there are too few samples or layers to look for it."""
    low: int | None
    """Lower end of the 95 % interval of `layer` over samples."""
    high: int | None
    """Upper end of that interval."""
    verdict: Literal["clear", "uncertain"]
    reason: str
    """Reason for the verdict, in one sentence."""
    explained: float | None
    """Share of the mean curve's variance over the layers that is explained by two levels."""
    method: str = METHOD


def find_transition(curves: Floats, *, seed: int = 0, resamples: int = RESAMPLES) -> Transition:
    """Finds the transition layer of curves (samples, layers), in which the last layer's value is zero by definition.

    The result is uncertain, with the reason, if there are fewer than 8 samples or 7 layers (then `layer` is None), if
    two levels explain too little, if the late phase is not lower and narrower than the early one, or if the interval is
    wider than a third of the layers.
    """
    samples, layers = curves.shape
    if samples < MIN_SAMPLES:
        return _unknown(f"{samples} samples are too few to tell the phases apart; give at least {MIN_SAMPLES}.")
    inner = curves[:, :-1]
    if inner.shape[1] < 2 * MIN_PHASE:
        return _unknown(f"{layers} layers are too few to tell two phases apart; there must be {2 * MIN_PHASE + 1}.")

    mean = inner.mean(axis=0, keepdims=True)
    found, shares = change_points(mean)
    layer, explained = int(found[0]), float(shares[0])
    draws = np.random.default_rng(seed).multinomial(samples, np.full(samples, 1 / samples), size=resamples)
    again, _ = change_points(draws @ inner / samples)
    low, high = (int(value) for value in np.percentile(again, [2.5, 97.5], method="inverted_cdf"))

    share = f"two levels explain {explained:.0%} of the mean curve"
    spread = np.subtract(*np.percentile(inner, [75, 25], axis=0))
    if explained < MIN_EXPLAINED:
        reason = f"{share}, hardly more than of a steady fall (75%); nothing drops between two phases."
    elif mean[0, layer:].mean() >= mean[0, :layer].mean():
        reason = f"the mean curve rises at layer {layer}."
    elif spread[layer:].mean() >= spread[:layer].mean():
        reason = f"the curves do not draw together after layer {layer}."
    elif high - low > layers / 3:
        reason = f"over samples it ranges from layer {low} to {high} of {layers}; give more samples."
    else:
        return Transition(layer, low, high, "clear", f"{share}.", explained)
    return Transition(layer, low, high, "uncertain", reason, explained)


def change_points(curves: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Fits two levels to each curve, (curves, layers); returns the first layer of the second level and the share
    explained.

    The sum of squares explained by a break at k is k (L - k) / L times the squared difference of the two means.
    """
    layers = curves.shape[1]
    shortest = max(MIN_PHASE, layers // 8)
    k = np.arange(shortest, layers - shortest + 1)
    centred = curves - curves.mean(axis=1, keepdims=True)
    left = centred.cumsum(axis=1)[:, k - 1]  # the right part sums to its negative
    gains = left**2 * layers / (k * (layers - k))
    total = (centred**2).sum(axis=1)
    level = total > 1e-18 * (curves**2).sum(axis=1)  # constant but for rounding: nothing to explain
    shares = np.divide(gains.max(axis=1), total, out=np.zeros_like(total), where=level)
    return cast(NDArray[np.int64], k[gains.argmax(axis=1)]), shares


def _unknown(reason: str) -> Transition:
    return Transition(None, None, None, "uncertain", reason, None)
