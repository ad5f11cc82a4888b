"""Evaluations of several models -> shares of right words with intervals, in every breakdown that the report shows.

Three modes of scoring: `free` (the greedy answer), `forced` (the most probable of the choices at the word's place) and
`forced_calibrated` (the same, less each choice's mean over other pictures; beside the plain figure, not instead of it).
A condition is a model's name, with the suffix _shuffled_image for the control.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.run import Evaluation, ItemResult, WordResult
from zero_ds.evaluation.heldout.scoring import calibrated
from zero_ds.evaluation.heldout.statistics import difference, share

MODES = ("free", "forced", "forced_calibrated")
SHUFFLED = "_shuffled_image"


@dataclass(frozen=True)
class ScoredWord:
    """A word under one condition, with whether each mode got it right."""

    item: ItemResult
    place: int
    correct: dict[str, bool]

    @property
    def word(self) -> WordResult:
        return self.item.words[self.place]

    @property
    def key(self) -> tuple[str, int]:
        return self.item.id, self.place


Words = dict[str, dict[tuple[str, int], ScoredWord]]
"""Condition -> (record, place) -> word."""


def score(evaluations: Mapping[str, Evaluation]) -> Words:
    """Scored words of every condition.

    Raises:
        DataError: two evaluations of different records, which cannot be compared word by word.
    """
    words: Words = {}
    for name, evaluation in evaluations.items():
        for condition, suffix in (("own", ""), ("shuffled", SHUFFLED)):
            words[name + suffix] = {word.key: word for word in _scored(evaluation.of(condition))}
    first_name, first = next(iter(words.items()))
    for name, other in words.items():
        asked = {key: (word.item.answer, word.item.image) for key, word in other.items()}
        if asked != {key: (word.item.answer, word.item.image) for key, word in first.items()}:
            raise DataError(f"{name} and {first_name} were not evaluated on the same records; evaluate both again")
    return words


def _scored(items: Sequence[ItemResult]) -> list[ScoredWord]:
    number = {image: i for i, image in enumerate(dict.fromkeys(item.image for item in items))}
    flat = [(item, place, word) for item in items for place, word in enumerate(item.words)]
    adjusted = calibrated(
        [word.log_probs for _, _, word in flat],
        [(item.record_kind, word.kind, word.choices) for item, _, word in flat],
        [number[item.image] % 2 for item, _, _ in flat],
    )
    return [
        ScoredWord(
            item,
            place,
            {
                "free": word.free_correct,
                "forced": word.forced_correct,
                "forced_calibrated": word.choices[int(np.argmax(values))] == word.word,
            },
        )
        for (item, place, word), values in zip(flat, adjusted, strict=True)
    ]


def summary(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Shares with 95 % intervals that take words about one picture as dependent.

    Keys: `accuracy` (free generation, all words), `accuracy_by[mode][question | caption | all]` and
    `accuracy_by_word[mode][kind of word]`, each by condition to {value, low, high, n, pictures}; `chance` and
    `chance_by_word`: what uniform guessing among the choices gets; `differences[mode]`: paired, over all words.

    Raises:
        DataError: no evaluation, or evaluations of different records.
    """
    if not evaluations:
        raise DataError("there is no evaluation to summarise")
    words = score(evaluations)
    reference = list(next(iter(words.values())).values())
    kinds: dict[str, Callable[[ScoredWord], bool]] = {"all": lambda word: True}
    for kind in dict.fromkeys(w.item.record_kind for w in reference):
        kinds[kind] = lambda word, kind=kind: word.item.record_kind == kind  # type: ignore[misc]
    word_kinds: dict[str, Callable[[ScoredWord], bool]] = {
        kind: (lambda word, kind=kind: word.word.kind == kind)  # type: ignore[misc]
        for kind in dict.fromkeys(w.word.kind for w in sorted(reference, key=lambda w: w.word.kind))
    }

    def table(wanted: Callable[[ScoredWord], bool], mode: str) -> dict[str, Any]:
        return {name: _share([w for w in scored.values() if wanted(w)], mode) for name, scored in words.items()}

    return {
        "accuracy": table(kinds["all"], "free"),
        "accuracy_by": {mode: {kind: table(wanted, mode) for kind, wanted in kinds.items()} for mode in MODES},
        "accuracy_by_word": {
            mode: {kind: table(wanted, mode) for kind, wanted in word_kinds.items()} for mode in MODES
        },
        "chance": {kind: _chance([w for w in reference if wanted(w)]) for kind, wanted in kinds.items()},
        "chance_by_word": {kind: _chance([w for w in reference if wanted(w)]) for kind, wanted in word_kinds.items()},
        "differences": {mode: _differences(words, list(evaluations), mode) for mode in MODES},
    }


def _share(words: Sequence[ScoredWord], mode: str) -> dict[str, Any]:
    return share([w.correct[mode] for w in words], [w.item.image for w in words]).to_json()


def _chance(words: Sequence[ScoredWord]) -> float:
    return round(float(np.mean([1 / len(w.word.choices) for w in words])), 6)


def _differences(words: Words, names: Sequence[str], mode: str) -> list[dict[str, Any]]:
    """Every model against its own control, every graft against its surrogate, others against the first graft."""
    grafts = [name for name in names if name.endswith("grafted")]
    pairs = [(name, name + SHUFFLED) for name in names]
    pairs += [(name, name.removesuffix("grafted") + "surrogate") for name in grafts]
    pairs += [(name, first) for first in grafts[:1] for name in names if name not in (first, "surrogate")]
    pairs = [(first, second) for first, second in pairs if second in words]
    result = []
    for first, second in pairs:
        keys = list(words[first])
        estimate = difference(
            [words[first][key].correct[mode] for key in keys],
            [words[second][key].correct[mode] for key in keys],
            [words[first][key].item.image for key in keys],
        )
        result.append({"first": first, "second": second, **estimate.to_json()})
    return result
