"""Draws samples from a source by its share of an epoch: by weight, by count, or several times over."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from zero_ds.config.schema import SourceConfig


def counts_of(sources: Sequence[SourceConfig], lengths: Sequence[int]) -> list[int]:
    """Returns the number of samples that an epoch takes from each source of the given lengths.

    With weights, an epoch has as many samples as the sources together.
    """
    weights = [source.weight or 0.0 for source in sources]
    total = sum(weights)
    counts = []
    for source, weight, length in zip(sources, weights, lengths, strict=True):
        if source.count is not None:
            count = source.count
        elif total:
            count = round(sum(lengths) * weight / total)
        else:
            count = length if source.repeat == 1 else round(length * source.repeat)
        counts.append(max(1, count))
    return counts


class Draws:
    """Rows of a source in the order in which epochs draw them: pass after pass over the source, without a gap.

    The first pass keeps the source's order; later ones are permuted by their number. A source with an `order` of its
    own has it in every pass.
    """

    def __init__(self, length: int, count: int, order: Callable[[int], Any] | None = None) -> None:
        self.length, self.count = length, count
        self._has_order = order is not None
        self._order = functools.lru_cache(maxsize=2)(order or self._permuted)

    def row(self, epoch: int, draw: int) -> int:
        """Returns the row of a draw of an epoch, both counted from 0."""
        number, place = divmod(epoch * self.count + draw, self.length)
        return place if number == 0 and not self._has_order else int(self._order(number)[place])

    def _permuted(self, number: int) -> Any:
        return np.random.default_rng([number, self.length]).permutation(self.length)
