"""Measures what can be looked up at each layer, and finds the first layer that look-ups do not need.

The divergence says from which layer on the model's prediction of ordinary text settles. Whether it can answer from the
context is another matter: a translator takes the place of the late layers, and what these layers look up, it would have
to look up itself. So a second curve is measured on questions whose answer is a word of the text before it (lookup.py).
A linear probe reads the word from the hidden state at the last token before it: ridge regression onto the words,
trained on four fifths of the questions and tested on the others, the best of each question's own choices counts. The
probe, and not the lens, because a word may be there long before the head could read it, and a translator can read it.

The rule: look-ups end at the first layer whose output gives REACHED of the best layer's gain over chance. k, the first
layer that may be replaced, is the layer after it. It is uncertain if the best layer is not above chance, or if the
interval over questions, drawn again with replacement, is wider than a third of the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from zero_ds.trajectory.lookup import Lookup, chance
from zero_ds.trajectory.transition import Floats

REACHED = 0.9
"""Share of the best layer's gain over chance at which look-ups count as done."""
MIN_QUESTIONS = 40
FOLDS = 5
RIDGE = 0.1
"""Penalty of the regression, relative to the mean square of a hidden state."""
RESAMPLES = 1000

States = Callable[[], Iterator[torch.Tensor]]
"""Function that yields the hidden states of every layer at the last tokens of all questions: (questions, hidden)."""


@dataclass(frozen=True)
class LookupCurve:
    """Look-up accuracy at each layer. The fields are keys of `lookup` in trajectory.json."""

    layer: int | None
    """First layer that look-ups do not need; None if that cannot be said."""
    low: int | None
    """Lower end of the 95 % interval of `layer` over questions."""
    high: int | None
    """Upper end of that interval."""
    verdict: Literal["clear", "uncertain"]
    reason: str
    """Reason for the verdict, in one sentence."""
    model: float
    """Share of the words that the model itself finds."""
    chance: float
    """Share of the words that guessing finds."""
    questions: int
    data_hash: str
    """First 32 digits of the SHA-256 of the file of questions."""
    curve: tuple[float, ...]
    """Share of the words that the probe finds at each layer."""


def probe(states: torch.Tensor, lookups: Sequence[Lookup], *, seed: int = 0) -> NDArray[np.bool_]:
    """Returns which words a linear probe finds in hidden states: (questions, hidden) -> (questions,).

    Every question is answered by a probe that was trained on others.
    """
    words = sorted({token for lookup in lookups for token in lookup.choices})
    column = {token: place for place, token in enumerate(words)}
    x = states.double()
    goals = torch.zeros(len(lookups), len(words), dtype=torch.float64)
    for row, lookup in enumerate(lookups):
        goals[row, column[lookup.choices[lookup.answer]]] = 1.0
    folds = np.random.default_rng(seed).permutation(len(lookups)) % FOLDS
    found = np.zeros(len(lookups), dtype=np.bool_)
    for fold in range(FOLDS):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(test) or not len(train):
            continue
        mean, scale = x[train].mean(0), x[train].std(0).clamp_min(1e-9)
        inputs, asked = (x[train] - mean) / scale, (x[test] - mean) / scale
        level = goals[train].mean(0)
        products = inputs @ inputs.T
        penalty = RIDGE * products.diagonal().mean() * torch.eye(len(train), dtype=torch.float64)
        scores = asked @ inputs.T @ torch.linalg.solve(products + penalty, goals[train] - level) + level
        for row, number in enumerate(test.tolist()):
            lookup = lookups[number]
            own = scores[row, [column[token] for token in lookup.choices]]
            found[number] = int(own.argmax()) == lookup.answer
    return found


def find_lookup(
    found: NDArray[np.bool_], guessing: float, *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[int | None, int | None, int | None, Literal["clear", "uncertain"], str]:
    """Finds the first layer that look-ups do not need; found: (questions, layers), guessing: the share by chance.

    Returns that layer, its interval, the verdict and the reason, as in `LookupCurve`.
    """
    questions, layers = found.shape
    if questions < MIN_QUESTIONS:
        return None, None, None, "uncertain", f"{questions} questions are too few; give at least {MIN_QUESTIONS}."
    mean = found.mean(axis=0)
    best = float(mean.max())
    error = float(np.sqrt(best * (1 - best) / questions))
    if best - 3 * error <= guessing:
        reason = f"nothing is looked up: at most {best:.0%} of the words are found, and {guessing:.0%} by chance."
        return None, None, None, "uncertain", reason
    layer = int(_reached(mean[None], guessing)[0])
    draws = np.random.default_rng(seed).multinomial(questions, np.full(questions, 1 / questions), size=resamples)
    again = _reached(draws @ found / questions, guessing)
    low, high = (int(value) for value in np.percentile(again, [2.5, 97.5], method="inverted_cdf"))
    if high - low > layers / 3:
        reason = f"over questions it ranges from layer {low} to {high} of {layers}; give more questions."
        return layer, low, high, "uncertain", reason
    reason = f"{mean[layer - 1]:.0%} of the words are found after layer {layer - 1}, and {best:.0%} at best."
    return layer, low, high, "clear", reason


def _reached(means: Floats, guessing: float) -> NDArray[np.int64]:
    """Returns the layer after the first one that reaches the level: (curves, layers) -> (curves,)."""
    level = guessing + REACHED * (means.max(axis=1, keepdims=True) - guessing)
    return np.asarray((means >= level - 1e-12).argmax(axis=1) + 1)


def measure_lookups(
    states: States, lookups: Sequence[Lookup], scores: Callable[[torch.Tensor], torch.Tensor], data_hash: str, seed: int
) -> LookupCurve:
    """Measures the curve of what can be looked up at each layer.

    scores: logits of the last layer's hidden states, (questions, hidden) -> (questions, vocabulary).
    """
    columns: list[NDArray[np.bool_]] = []
    last: Any = None
    for last in states():
        columns.append(probe(last.float().cpu(), lookups, seed=seed))
    answered = scores(last).float().cpu()
    model = float(np.mean([lookup.is_found(row) for lookup, row in zip(lookups, answered, strict=True)]))
    found = np.stack(columns, axis=1)
    guessing = chance(lookups)
    layer, low, high, verdict, reason = find_lookup(found, guessing, seed=seed)
    curve = tuple(round(float(value), 6) for value in found.mean(axis=0))
    return LookupCurve(layer, low, high, verdict, reason, model, guessing, len(lookups), data_hash, curve)
