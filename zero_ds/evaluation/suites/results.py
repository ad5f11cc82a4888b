"""The result of one suite on one model: its scores, its JSON file and its table."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.statistics import quantile, share
from zero_ds.runtime.files import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    stderr: float | None = None
    """The harness's own standard error."""
    num_fewshot: int | None = None
    higher_is_better: bool = True
    items: dict[str, float] = field(default_factory=dict)
    """Document -> its score; empty if the value is not the mean of such scores."""
    documents: int | None = None
    """Number of documents that were asked about."""
    targets: str | None = None
    """Hash of the documents' numbers and true answers, which tells whether two results are of the same documents."""

    @property
    def key(self) -> tuple[str, str]:
        """Task and metric."""
        return self.task, self.metric

    @property
    def n(self) -> int | None:
        """Number of documents, if known."""
        return self.documents or len(self.items) or None

    def interval(self) -> tuple[float, float] | None:
        """Returns a 95 % interval: Wilson's for shares, else from the standard error; None if there is none."""
        if self.items and set(self.items.values()) <= {0.0, 1.0}:
            estimate = share(np.array(list(self.items.values())), np.arange(len(self.items)))
            return estimate.low, estimate.high
        if self.stderr is None:
            return None
        reach = quantile(0.95, 10**6) * self.stderr
        return self.value - reach, self.value + reach


@dataclass(frozen=True)
class Measured:
    """Scores and samples that a harness returned."""

    scores: tuple[Score, ...]
    samples: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """Result of one suite on one model."""

    name: str
    """Name of the model in tables."""
    suite: str
    harness: dict[str, str]
    """Name and version of the harness."""
    model: dict[str, Any]
    """Kind, folders and hashes of the model."""
    setting: dict[str, Any]
    versions: dict[str, str]
    scores: tuple[Score, ...]
    samples: dict[str, Any] = field(default_factory=dict)
    """Task -> prompts and answers; empty unless they were asked for."""

    def write(self, path: Path) -> None:
        """Writes the result file atomically, and makes its folder if needed."""
        content = {"format": FORMAT, **asdict(self)}
        if not self.samples:
            content.pop("samples")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1, default=str) + "\n")


def read_result(path: Path) -> Result:
    """Reads a file that `Result.write` wrote.

    Raises:
        DataError: the file is missing or damaged, or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise DataError(f"{path} has format {found!r}, but this version reads format {FORMAT}; evaluate again")
        scores = tuple(Score(**score) for score in content.pop("scores"))
        return Result(**content, scores=scores)
    except FileNotFoundError:
        raise DataError(f"result {path} does not exist; make it with zero-ds eval MODEL --suite ...") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a result of zero-ds eval ({error}); evaluate again") from None


def read_results(path: Path) -> list[Result]:
    """Reads a result file, or all result files of a folder.

    Raises:
        DataError: as `read_result`, or the folder holds none.
    """
    if not path.is_dir():
        return [read_result(path)]
    files = sorted(path.glob("*.json"))
    if not files:
        raise DataError(f"{path} holds no result (*.json); make one with zero-ds eval MODEL --suite ... --out {path}")
    return [read_result(file) for file in files]


def table(result: Result) -> str:
    """Returns the scores as a Markdown table."""
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
