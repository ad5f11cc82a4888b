"""Scores answers: pure functions of texts and log-probabilities."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that appears first in a generated answer, or None if no choice appears.

    Case and punctuation are ignored, and a choice may be followed by a plural s. If two choices begin at the same word,
    the one with more words wins.
    """
    words = _words(text)
    patterns = [(_words(choice), choice) for choice in choices]
    patterns.sort(key=lambda pair: len(pair[0]), reverse=True)
    for start in range(len(words)):
        for pattern, choice in patterns:
            found = words[start : start + len(pattern)]
            if found and (found == pattern or found == [*pattern[:-1], pattern[-1] + "s"]):
                return choice
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def calibrated(log_probs: Sequence[Sequence[float]], groups: Sequence[Hashable], halves: Sequence[int]) -> list[Floats]:
    """Subtracts from each choice's log-probability its mean over the other half of the images.

    This contextual calibration removes a model's preference for some words that does not depend on the image. Two words
    are in the same group (`groups`) if they have the same kind and the same choices. `halves` (0 or 1) tells which half
    of the images a word's image belongs to: the mean over half 0 is subtracted in half 1 and vice versa, so that no
    image takes part in its own calibration. A group that does not occur in the other half is left as it is.
    """
    rows: dict[tuple[Hashable, int], list[Sequence[float]]] = defaultdict(list)
    for values, group, half in zip(log_probs, groups, halves, strict=True):
        rows[group, half].append(values)
    means = {key: np.mean(np.asarray(values, dtype=np.float64), axis=0) for key, values in rows.items()}
    result = []
    for values, group, half in zip(log_probs, groups, halves, strict=True):
        own = np.asarray(values, dtype=np.float64)
        result.append(own - means.get((group, 1 - half), np.zeros_like(own)))
    return result
