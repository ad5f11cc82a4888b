"""Summarises evaluations of several models: shares of correct words with intervals, in every breakdown of the report.

Words are scored in three modes:

* `free`: the choice that the greedy answer names first.
* `forced`: the most probable choice at the word's position in the true answer.
* `forced_calibrated`: as `forced`, after the mean of each choice over other images is subtracted. It is reported next
  to the plain figure, not instead of it.

A condition is named after its model, with the suffix `_shuffled_image` for the control.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.results import Evaluation, ItemResult, WordResult
from zero_ds.evaluation.heldout.scoring import calibrated
from zero_ds.evaluation.heldout.statistics import difference, share

MODES = ("free", "forced", "forced_calibrated")
SHUFFLED = "_shuffled_image"

WordKey = tuple[str, int]
"""Id of a record, and index of a word among the record's words."""


@dataclass(frozen=True)
class ScoredWord:
    """A word under one condition."""

    item: ItemResult
    index: int
    """Index of the word among the record's words."""
    correct: dict[str, bool]
    """Mode of scoring -> whether the word is correct."""

    @property
    def word(self) -> WordResult:
        return self.item.words[self.index]

    @property
    def key(self) -> WordKey:
        return self.item.id, self.index


ScoredWords = dict[str, dict[WordKey, ScoredWord]]
"""Condition -> key of a word -> the word as it was scored."""


def summary(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns shares of correct words and their differences, with 95 % intervals over images.

    Keys: `accuracy` (free answers, all words), `accuracy_by[mode][question | caption | all]` and
    `accuracy_by_word[mode][kind of word]`, each mapping a condition to {value, low, high, n, pictures}; `chance` and
    `chance_by_word`, the share that uniform guessing among the choices gets; `differences[mode]`, a list of paired
    differences over all words.

    Raises:
        DataError: `evaluations` is empty, or they are of different records.
    """
    if not evaluations:
        raise DataError("no evaluation was given to summarise")
    words = score(evaluations)
    reference = next(iter(words.values()))
    by_kind = _keys_by_record_kind(reference)
    by_word = _keys_by_word_kind(reference)
    names = list(evaluations)
    return {
        "accuracy": _shares(words, by_kind["all"], "free"),
        "accuracy_by": {mode: _breakdown(words, by_kind, mode) for mode in MODES},
        "accuracy_by_word": {mode: _breakdown(words, by_word, mode) for mode in MODES},
        "chance": _chances(reference, by_kind),
        "chance_by_word": _chances(reference, by_word),
        "differences": {mode: _differences(words, names, mode) for mode in MODES},
    }


def score(evaluations: Mapping[str, Evaluation]) -> ScoredWords:
    """Scores the words of every condition in all modes.

    Raises:
        DataError: two evaluations are of different records, so that they cannot be compared word by word.
    """
    words: ScoredWords = {}
    for name, evaluation in evaluations.items():
        for condition, suffix in (("own", ""), ("shuffled", SHUFFLED)):
            words[name + suffix] = {word.key: word for word in _score_items(evaluation.of(condition))}
    first_name, first = next(iter(words.items()))
    for name, scored in words.items():
        if _records_of(scored) != _records_of(first):
            raise DataError(f"{name} and {first_name} were not evaluated on the same records; evaluate both again")
    return words


def _records_of(words: Mapping[WordKey, ScoredWord]) -> dict[WordKey, tuple[str, str]]:
    """Returns the answer and the image that every word belongs to."""
    return {key: (word.item.answer, word.item.image) for key, word in words.items()}


def _score_items(items: Sequence[ItemResult]) -> list[ScoredWord]:
    """Scores the words of one condition. Images with even and odd numbers are the two halves of the calibration."""
    number = {image: i for i, image in enumerate(dict.fromkeys(item.image for item in items))}
    log_probs, groups, halves = [], [], []
    for item in items:
        for word in item.words:
            log_probs.append(word.log_probs)
            groups.append((item.record_kind, word.kind, word.choices))
            halves.append(number[item.image] % 2)
    adjusted = iter(calibrated(log_probs, groups, halves))
    scored = []
    for item in items:
        for index, word in enumerate(item.words):
            most_probable = word.choices[int(np.argmax(next(adjusted)))]
            correct = {
                "free": word.free_correct,
                "forced": word.forced_correct,
                "forced_calibrated": most_probable == word.word,
            }
            scored.append(ScoredWord(item, index, correct))
    return scored


# -- breakdowns --------------------------------------------------------------------------------------------------------

KeyGroups = dict[str, list[WordKey]]
"""Name of a row in the report -> keys of the words that it counts."""


def _keys_by_record_kind(words: Mapping[WordKey, ScoredWord]) -> KeyGroups:
    """Groups words by kind of record, after a group `all` of all words."""
    groups: KeyGroups = {"all": list(words)}
    for key, word in words.items():
        groups.setdefault(word.item.record_kind, []).append(key)
    return groups


def _keys_by_word_kind(words: Mapping[WordKey, ScoredWord]) -> KeyGroups:
    """Groups words by kind of word, in alphabetical order."""
    groups: KeyGroups = defaultdict(list)
    for key, word in words.items():
        groups[word.word.kind].append(key)
    return dict(sorted(groups.items()))


def _breakdown(words: ScoredWords, groups: KeyGroups, mode: str) -> dict[str, Any]:
    return {name: _shares(words, keys, mode) for name, keys in groups.items()}


def _shares(words: ScoredWords, keys: Sequence[WordKey], mode: str) -> dict[str, Any]:
    """Returns the share of correct words under every condition, over the words with these keys."""
    shares = {}
    for condition, scored in words.items():
        correct = [scored[key].correct[mode] for key in keys]
        images = [scored[key].item.image for key in keys]
        shares[condition] = share(correct, images).to_json()
    return shares


def _chances(words: Mapping[WordKey, ScoredWord], groups: KeyGroups) -> dict[str, float]:
    """Returns the share of words that uniform guessing among the choices gets right, for every group."""
    chances = {}
    for name, keys in groups.items():
        guessed = [1 / len(words[key].word.choices) for key in keys]
        chances[name] = round(float(np.mean(guessed)), 6)
    return chances


# -- differences -------------------------------------------------------------------------------------------------------


def _differences(words: ScoredWords, names: Sequence[str], mode: str) -> list[dict[str, Any]]:
    """Returns the paired differences over all words, as {first, second, value, low, high, n, pictures}."""
    result = []
    for first, second in _pairs(names):
        if second not in words:
            continue
        keys = list(words[first])
        estimate = difference(
            [words[first][key].correct[mode] for key in keys],
            [words[second][key].correct[mode] for key in keys],
            [words[first][key].item.image for key in keys],
        )
        result.append({"first": first, "second": second, **estimate.to_json()})
    return result


def _pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the conditions to compare: models with their controls, grafts with their surrogates, and other models
    with the first graft."""
    grafts = [name for name in names if name.endswith("grafted")]
    pairs = [(name, name + SHUFFLED) for name in names]
    pairs += [(graft, graft.removesuffix("grafted") + "surrogate") for graft in grafts]
    if grafts:
        pairs += [(name, grafts[0]) for name in names if name not in (grafts[0], "surrogate")]
    return pairs
