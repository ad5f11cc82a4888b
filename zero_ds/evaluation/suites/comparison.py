"""Compares the results of several models: differences with intervals, and whether language ability is kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.statistics import difference, quantile
from zero_ds.evaluation.suites.results import Result, Score

Models = Mapping[str, Sequence[Result]]
"""Name of a model -> its results; the first model is the reference."""
ScoreKey = tuple[str, str]
"""Task and metric."""

SETTINGS = ("chat_template", "max_new_tokens")
"""Settings that scores depend on; batch size, ranks and engine are not among them."""


@dataclass(frozen=True)
class Difference:
    """Difference of a model's score from the reference's, with its 95 % interval if there is one."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        span = f" [{self.low:+.4g}, {self.high:+.4g}]" if self.low is not None else ""
        return f"{self.value:+.4g}{span}"


def subtract(score: Score, reference: Score) -> Difference:
    """Returns `score` minus `reference` with a 95 % interval.

    The interval is paired if both results hold the scores of the same documents (Agresti and Min's for scores between 0
    and 1, which does not collapse to a point). Otherwise it follows from both standard errors, as for independent
    samples; without both of them the difference has no interval.
    """
    value = score.value - reference.value
    if score.items and set(score.items) == set(reference.items) and score.targets == reference.targets:
        documents = sorted(score.items)
        first = np.array([score.items[document] for document in documents])
        second = np.array([reference.items[document] for document in documents])
        if min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 1:
            estimate = difference(first, second, np.arange(len(documents)))
            return Difference(value, estimate.low, estimate.high)
        gaps = first - second
        if len(gaps) > 1:
            reach = quantile(0.95, len(gaps) - 1) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
            return Difference(value, value - reach, value + reach)
    if score.stderr is not None and reference.stderr is not None:
        reach = quantile(0.95, 10**6) * math.hypot(score.stderr, reference.stderr)
        return Difference(value, value - reach, value + reach)
    return Difference(value, None, None)


def compare(models: Models) -> str:
    """Returns a Markdown table of the models next to each other, with notes on settings and language ability below it.

    Raises:
        DataError: there are fewer than two models, the first one shares no task with another, or scores cannot be
            compared.
    """
    if len(models) < 2:
        raise DataError("a comparison needs results of at least two models; name another result")
    scores: dict[str, dict[ScoreKey, Score]] = {}
    for name, results in models.items():
        scores[name] = {score.key: score for result in results for score in result.scores}
        _check_no_duplicates(name, results)
    reference, *others = scores
    keys = [key for key in scores[reference] if any(key in scores[name] for name in others)]
    if not keys:
        raise DataError(f"{reference} and {others[0]} share no task; evaluate both on the same suite")
    for key in keys:
        _check_same_settings(key, {name: found[key] for name, found in scores.items() if key in found})
    lines = _table(scores, reference, others, keys)
    notes = []
    for name in others:
        if note := _unequal_settings(models, reference, name):
            notes.append(note)
    for name in others:
        if note := _language_ability(models, reference, name):
            notes.append(note)
    if notes:
        lines += ["", *notes]
    return "\n".join(lines) + "\n"


def _table(
    scores: Mapping[str, Mapping[ScoreKey, Score]], reference: str, others: Sequence[str], keys: Sequence[ScoreKey]
) -> list[str]:
    """Returns the lines of the Markdown table."""
    columns = ["task", "metric", reference]
    for name in others:
        columns += [name, f"{name} - {reference}"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for key in keys:
        base = scores[reference][key]
        cells = [*key, f"{base.value:.4g}"]
        for name in others:
            score = scores[name].get(key)
            cells += ["", ""] if score is None else [f"{score.value:.4g}", str(subtract(score, base))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _check_no_duplicates(name: str, results: Sequence[Result]) -> None:
    """Raises DataError if two results of one name hold the same score, because one would hide the other."""
    counts = Counter(score.key for result in results for score in result.scores)
    for (task, metric), count in counts.items():
        if count > 1:
            raise DataError(
                f"{count} results with the name {name!r} hold {task} {metric}; give each model its own name with "
                "zero-ds eval --name, or leave out one result"
            )


def _check_same_settings(key: ScoreKey, scores: Mapping[str, Score]) -> None:
    """Raises DataError if the models' scores come from different numbers of examples or documents.

    scores: Model -> its score of this task and metric.
    """
    found: dict[str, list[int | None]] = {
        "num_fewshot": [score.num_fewshot for score in scores.values()],
        "n": [score.n for score in scores.values()],
    }
    for setting, values in found.items():
        different = set(values)
        if setting == "n":
            different.discard(None)  # an unknown number agrees with any other
        if len(different) > 1:
            stated = ", ".join(f"{name}: {value}" for name, value in zip(scores, values, strict=True))
            raise DataError(
                f"{key[0]} was measured with different settings ({setting}: {stated}); evaluate all models with the "
                "same ones"
            )


def _unequal_settings(models: Models, reference: str, name: str) -> str | None:
    """Returns a sentence on settings in which a model's results differ from the reference's; None if none do."""
    own = _results_by_key(models[name])
    other = _results_by_key(models[reference])
    differences: dict[str, None] = {}  # a set that keeps its order
    for key in own:
        if key not in other:
            continue
        (result, score), (reference_result, reference_score) = own[key], other[key]
        compared = [(what, result.setting.get(what), reference_result.setting.get(what)) for what in SETTINGS]
        compared.append((result.harness["name"], result.harness["version"], reference_result.harness["version"]))
        for what, here, there in compared:
            if here != there:
                differences[f"{what} {here} instead of {there}"] = None
        if score.targets and reference_score.targets and score.targets != reference_score.targets:
            differences[f"other documents in {score.task}"] = None
    if not differences:
        return None
    return f"{name} was measured with other settings than {reference}: {'; '.join(differences)}."


def _results_by_key(results: Sequence[Result]) -> dict[ScoreKey, tuple[Result, Score]]:
    return {score.key: (result, score) for result in results for score in result.scores}


def _language_ability(models: Models, reference: str, name: str) -> str | None:
    """Returns the check of Table A.1: whether a model handles text as well as the reference, on the text tasks of both.

    A task counts as lost if the whole interval of the difference is below zero. Returns None if no difference has an
    interval.
    """
    own = _text_scores(models[name])
    differences = {}
    for key, base in _text_scores(models[reference]).items():
        if key in own:
            found = subtract(own[key], base)
            if found.high is not None:
                differences[key] = found
    if not differences:
        return None
    mean = sum(found.value for found in differences.values()) / len(differences)
    lost = []
    for (task, metric), found in differences.items():
        if found.high is not None and found.high < 0:
            lost.append(f"{task} {metric} {found}")
    verdict = f"DEGRADED: {', '.join(lost)}" if lost else "kept: no task is lower beyond its 95 % interval"
    return (
        f"Language ability of {name} against {reference} ({len(differences)} metrics, mean difference {mean:+.4g}): "
        f"{verdict}."
    )


def _text_scores(results: Sequence[Result]) -> dict[ScoreKey, Score]:
    """Returns the scores of lm-eval in which higher is better: accuracies, as in the paper's table."""
    scores = {}
    for result in results:
        if result.harness["name"] == "lm-eval":
            for score in result.scores:
                if score.higher_is_better:
                    scores[score.key] = score
    return scores
