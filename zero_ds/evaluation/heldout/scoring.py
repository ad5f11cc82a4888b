"""From what a model said to right and wrong: pure functions of texts and log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def first_choice(text: str, choices: Sequence[str]) -> str | None:
    """The choice that comes first in a generated answer, or None if there is none in it.

    Case and punctuation do not count, and a plural s may follow a choice. Where two choices begin at the same word, the
    one of more words counts.
    """
    words = _words(text)
    patterns = sorted(((_words(choice), choice) for choice in choices), key=lambda pair: -len(pair[0]))
    for place in range(len(words)):
        for pattern, choice in patterns:
            found = words[place : place + len(pattern)]
            if found and (found == pattern or found == [*pattern[:-1], pattern[-1] + "s"]):
                return choice
    return None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def calibrated(log_probs: Sequence[Sequence[float]], groups: Sequence[Hashable], halves: Sequence[int]) -> list[Floats]:
    """Contextual calibration: each choice's log-probability minus its mean over the other half's pictures.

    A model that prefers some word whatever the picture loses that preference. `groups` say which words are asked for
    alike (same kind and same choices); `halves` (0 or 1) which half a word's picture is in. The mean over half 0 is
    subtracted from half 1 and the other way round, so that no picture helps to calibrate itself. A group that is absent
    from the other half stays as it is.
    """
    means: dict[tuple[Hashable, int], Floats] = {}
    members: dict[tuple[Hashable, int], list[Sequence[float]]] = {}
    for values, group, half in zip(log_probs, groups, halves, strict=True):
        members.setdefault((group, half), []).append(values)
    for key, rows in members.items():
        means[key] = np.mean(np.asarray(rows, dtype=np.float64), axis=0)
    result = []
    for values, group, half in zip(log_probs, groups, halves, strict=True):
        own = np.asarray(values, dtype=np.float64)
        result.append(own - means.get((group, 1 - half), np.zeros_like(own)))
    return result
