"""What a harness measured, as one JSON file a suite, as a table, and beside what it measured of other models."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.statistics import Estimate, difference, quantile, share
from zero_ds.runtime.files import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """One figure of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    """The harness's own standard error."""
    num_fewshot: int | None = None
    higher_is_better: bool = True
    items: dict[str, float] = field(default_factory=dict)
    """Document -> its score, where the value is their mean."""
    documents: int | None = None
    """How many were asked about."""
    targets: str | None = None
    """Hash of the documents' numbers and right answers: which documents they were."""

    @property
    def key(self) -> tuple[str, str]:
        return self.task, self.metric

    @property
    def n(self) -> int | None:
        return self.documents or len(self.items) or None

    def interval(self) -> tuple[float, float] | None:
        """95 %: Wilson's for shares, else from the standard error."""
        if self.items and set(self.items.values()) <= {0.0, 1.0}:
            estimate = share(np.array(list(self.items.values())), np.arange(len(self.items)))
            return estimate.low, estimate.high
        if self.stderr is None:
            return None
        reach = quantile(0.95, 10**6) * self.stderr
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Measured:
    """What a harness found."""

    scores: tuple[Score, ...]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One suite on one model."""

    name: str
    """What tables call the model."""
    suite: str
    harness: dict[str, str]
    """name, version."""
    model: dict[str, Any]
    """Kind, folders and hashes."""
    setting: dict[str, Any]
    versions: dict[str, str]
    scores: tuple[Score, ...]
    samples: dict[str, Any] = field(default_factory=dict)
    """Task -> prompts and answers, on request."""

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        content = {"format": FORMAT, **asdict(self)}
        if not self.samples:
            content.pop("samples")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n")


def read_result(path: Path) -> Result:
    """Reads what `Result.write` wrote.

    Raises:
        DataError: missing, damaged, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (found := content.pop("format")) != FORMAT:
            raise DataError(f"{path} has format {found!r}, this version reads {FORMAT}; evaluate again")
        scores = tuple(Score(**score) for score in content.pop("scores"))
        return Result(**content, scores=scores)
    except FileNotFoundError:
        raise DataError(f"there is no result {path}; write one with zero-ds eval MODEL --suite ...") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no result of zero-ds eval ({error}); evaluate again") from None


def read_results(path: Path) -> list[Result]:
    """A result file, or all of them in a folder.

    Raises:
        DataError: as `read_result`; a folder without one.
    """
    if not path.is_dir():
        return [read_result(path)]
    files = sorted(path.glob("*.json"))
    if not files:
        raise DataError(f"{path} holds no result (*.json); write one with zero-ds eval MODEL --suite ... --out {path}")
    return [read_result(file) for file in files]


def table(result: Result) -> str:
    """The scores as a Markdown table."""
    lines = [
        f"{result.name}, {result.suite}, {result.harness['name']} {result.harness['version']}",
        "",
        "| task | metric | few-shot | value | 95 % interval | n |",
        "|---|---|---|---|---|---|",
    ]
    for score in result.scores:
        interval = score.interval()
        span = f"[{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
        shots = "" if score.num_fewshot is None else str(score.num_fewshot)
        lines.append(f"| {score.task} | {score.metric} | {shots} | {score.value:.4g} | {span} | {score.n or ''} |")
    return "\n".join(lines) + "\n"


# -- several models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Another model's figure less the reference's."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        span = f" [{self.low:+.4g}, {self.high:+.4g}]" if self.low is not None else ""
        return f"{self.value:+.4g}{span}"


def subtract(score: Score, reference: Score) -> Difference:
    """`score` less `reference`, with a 95 % interval.

    Paired, where both have the scores of the same documents (for shares Agresti and Min's, which does not collapse);
    else from both standard errors, as of independent samples; without either there is no interval.
    """
    value = score.value - reference.value
    if score.items and set(score.items) == set(reference.items) and score.targets == reference.targets:
        keys = sorted(score.items)
        first = np.array([score.items[key] for key in keys])
        second = np.array([reference.items[key] for key in keys])
        if min(first.min(), second.min()) >= 0 and max(first.max(), second.max()) <= 1:
            estimate: Estimate = difference(first, second, np.arange(len(keys)))
            return Difference(value, estimate.low, estimate.high)
        gaps = first - second
        if len(gaps) > 1:
            reach = quantile(0.95, len(gaps) - 1) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
            return Difference(value, value - reach, value + reach)
    if score.stderr is not None and reference.stderr is not None:
        reach = quantile(0.95, 10**6) * math.hypot(score.stderr, reference.stderr)
        return Difference(value, value - reach, value + reach)
    return Difference(value, None, None)


Models = Mapping[str, Sequence[Result]]
"""Name -> its results; the first is the reference."""


def compare(models: Models) -> str:
    """Markdown: the models side by side, differences to the first one, and whether language ability is kept.

    Raises:
        DataError: fewer than two models, or no task that the first shares with another.
    """
    if len(models) < 2:
        raise DataError("a comparison wants at least two results of different models")
    scores = {
        name: {score.key: score for result in results for score in result.scores} for name, results in models.items()
    }
    reference, *others = scores
    for name, results in models.items():
        _check_once(name, results)
    keys = [key for key in scores[reference] if any(key in scores[name] for name in others)]
    if not keys:
        raise DataError(f"{reference} and {others[0]} share no task; evaluate both on the same suite")
    for key in keys:
        _check_alike(key, {name: found[key] for name, found in scores.items() if key in found})
    lines = [
        "| task | metric | " + " | ".join([reference, *(f"{name} | {name} - {reference}" for name in others)]) + " |"
    ]
    lines.append("|---" * (3 + 2 * len(others)) + "|")
    for key in keys:
        cells = [f"{scores[reference][key].value:.4g}"]
        for name in others:
            score = scores[name].get(key)
            cells += [f"{score.value:.4g}", str(subtract(score, scores[reference][key]))] if score else ["", ""]
        lines.append(f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |")
    notes = [note for name in others if (note := _unlike(models, reference, name))]
    notes += [sentence for name in others if (sentence := _language(models, reference, name))]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def _check_once(name: str, results: Sequence[Result]) -> None:
    """Raises DataError where two results of one name hold the same figure: one would hide the other."""
    for key, count in Counter(score.key for result in results for score in result.scores).items():
        if count > 1:
            raise DataError(
                f"{count} results are called {name!r} and hold {key[0]} {key[1]}; name models apart with zero-ds eval "
                "--name, or leave one out"
            )


SETTINGS = ("chat_template", "max_new_tokens")
"""Settings that a figure depends on; batch size, ranks and engine are none."""


def _unlike(models: Models, reference: str, name: str) -> str | None:
    """A sentence on what a model was measured with that the reference was not; None: nothing."""
    mine, theirs = (
        {score.key: (result, score) for result in models[owner] for score in result.scores}
        for owner in (name, reference)
    )
    told: dict[str, None] = {}
    for result, score in (found for key, found in mine.items() if key in theirs):
        other, its = theirs[score.key]
        versions = result.harness["version"], other.harness["version"]
        pairs = [(what, result.setting.get(what), other.setting.get(what)) for what in SETTINGS]
        pairs.append((result.harness["name"], *versions))
        told |= {f"{what} {here} against {there}": None for what, here, there in pairs if here != there}
        if score.targets and its.targets and score.targets != its.targets:
            told[f"other documents in {score.task}"] = None
    return f"{name} was measured otherwise than {reference}: {'; '.join(told)}." if told else None


def _check_alike(key: tuple[str, str], scores: Mapping[str, Score]) -> None:
    """Raises DataError where the figures were measured with different numbers of examples or documents."""
    for what in ("num_fewshot", "n"):
        values = {getattr(score, what) for score in scores.values()} - ({None} if what == "n" else set())
        if len(values) > 1:
            found = ", ".join(f"{name}: {getattr(score, what)}" for name, score in scores.items())
            raise DataError(f"{key[0]} was measured with different settings ({what}: {found}); evaluate it alike")


def _language(models: Models, reference: str, name: str) -> str | None:
    """The check of Table A.1: whether a model reads text as well as the reference, on the text tasks of both.

    A task counts as lost where the whole interval of the difference lies below zero.
    """
    text = {
        owner: {
            score.key: score
            for result in models[owner]
            if result.harness["name"] == "lm-eval"
            for score in result.scores
            if score.higher_is_better  # accuracies, as in the table
        }
        for owner in (reference, name)
    }
    keys = [key for key in text[reference] if key in text[name]]
    gaps = {key: subtract(text[name][key], text[reference][key]) for key in keys}
    gaps = {key: gap for key, gap in gaps.items() if gap.high is not None}
    if not gaps:
        return None
    mean = sum(gap.value for gap in gaps.values()) / len(gaps)
    lost = [f"{key[0]} {key[1]} {gap}" for key, gap in gaps.items() if gap.high is not None and gap.high < 0]
    verdict = f"DEGRADED: {', '.join(lost)}" if lost else "kept: no task is lower beyond its 95 % interval"
    return (
        f"Language ability of {name} against {reference} ({len(gaps)} figures, mean difference {mean:+.4g}): {verdict}."
    )
