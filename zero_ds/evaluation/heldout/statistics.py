"""Confidence intervals for shares of correct words, with images as clusters: words about one image are not independent.

A share gets a Wilson interval with the effective number of words, which is the number of words divided by the design
effect: the cluster-robust variance of the share over its binomial variance (Korn & Graubard 1998). The design effect is
at least one. Where it cannot be estimated, because every word is right or every word is wrong, it is that of fully
dependent words (Kish), so that the interval never collapses to a point. A paired difference gets a cluster-robust
t-interval with two pseudo-images, one in favour of each side (Agresti & Min 2005), which prevents the same collapse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of two shares, with its interval."""

    value: float
    low: float
    high: float
    n: int
    """Number of words."""
    images: int
    """Number of images that the words are about."""

    def to_json(self) -> dict[str, Any]:
        """Returns the entry of a report; `pictures` is the number of images."""
        return {
            "value": round(self.value, 6),
            "low": round(self.low, 6),
            "high": round(self.high, 6),
            "n": self.n,
            "pictures": self.images,
        }


def share(correct: ArrayLike, clusters: ArrayLike, level: float = LEVEL) -> Estimate:
    """Returns the share of correct words with a cluster-robust Wilson interval.

    correct: (words,) of booleans; clusters: (words,) of the images' names or numbers.
    """
    right, sizes = _per_cluster(np.asarray(correct, dtype=np.float64), clusters)
    n, images = float(sizes.sum()), len(sizes)
    p = float(right.sum() / n)
    effect = float((sizes**2).sum() / n)  # Kish: all words about an image agree
    if 0 < p < 1 and images > 1:
        robust = images / (images - 1) * float(((right - p * sizes) ** 2).sum()) / n**2
        effect = max(1.0, robust / (p * (1 - p) / n))
    low, high = _wilson(p, n / effect, quantile(level, images - 1))
    return Estimate(p, min(low, p), max(high, p), int(n), images)


def difference(first: ArrayLike, second: ArrayLike, clusters: ArrayLike, level: float = LEVEL) -> Estimate:
    """Returns the paired difference of two shares over the same words, first minus second, with its interval.

    first, second, clusters: (words,), as in `share`; values between 0 and 1 are allowed as well.
    """
    values = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    net, sizes = _per_cluster(values, clusters)
    images = len(sizes)
    raw = float(net.sum() / sizes.sum())
    weights = sizes / sizes.mean()
    means = net / sizes
    total = images + 2.0
    center = float((weights * means).sum()) / total
    pseudo = 0.5 * (1 - center) ** 2 + 0.5 * (1 + center) ** 2 + center**2
    variance = (float((weights**2 * (means - center) ** 2).sum()) + pseudo) / total**2
    reach = quantile(level, images - 1) * math.sqrt(variance)
    low, high = min(raw, max(-1.0, center - reach)), max(raw, min(1.0, center + reach))
    return Estimate(raw, low, high, int(sizes.sum()), images)


def quantile(level: float, degrees: int) -> float:
    """Returns the two-sided quantile of Student's t: exact for 1 and 2 degrees of freedom, else to within 1 %.

    With no degree of freedom it is 1000, because a single image says nothing about other images.
    """
    if degrees < 1:
        return 1000.0
    if degrees == 1:
        return math.tan(math.pi * level / 2)
    if degrees == 2:
        return level * math.sqrt(2 / (1 - level**2))
    z = NormalDist().inv_cdf(0.5 + level / 2)
    d = float(degrees)
    return (  # Cornish-Fisher expansion
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, center - reach), min(1.0, center + reach)


def _per_cluster(values: NDArray[np.float64], clusters: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the sum of the values and the number of words of every cluster."""
    if not len(values):
        raise ValueError("cannot estimate a share from no words; pass at least one word")
    _, inverse = np.unique(np.asarray(clusters), return_inverse=True)
    sums, sizes = np.bincount(inverse, weights=values), np.bincount(inverse)
    return sums.astype(np.float64), sizes.astype(np.float64)
