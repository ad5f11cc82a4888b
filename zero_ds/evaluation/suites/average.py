"""The paper's average score: the mean over the columns of its Table 8, each divided by the score of a perfect model.

The paper does not say how it averages. This rule gives the published averages from the published columns to three
digits (0.6538 for the baseline with all data, 0.6612 for ours with 10 %): MME's cognition counts in parts of 800, its
perception in parts of 2000, percentages in parts of 100.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from zero_ds.data.formats import DataError
from zero_ds.evaluation.suites.results import Result

Scores = Mapping[tuple[str, str], float]
"""(task, metric) -> value."""


@dataclass(frozen=True)
class Average:
    """The average score of one model."""

    value: float
    """Mean of the columns, from 0 to 1."""
    columns: dict[str, float]
    """Share of a perfect score by column; only columns that were evaluated."""

    @property
    def missing(self) -> list[str]:
        """Names of the columns of Table 8 that were not evaluated."""
        return [name for name in COLUMNS if name not in self.columns]


def _of(task: str, metric: str, perfect: float = 1.0) -> Callable[[Scores], float | None]:
    """Returns a function that reads a column from scores; None where the task was not evaluated."""

    def read(scores: Scores) -> float | None:
        value = scores.get((task, metric))
        return None if value is None else value / perfect

    return read


def _mmbench(scores: Scores) -> float | None:
    """Reads MMBench's score, of the task that asks a judge or of the one that does not."""
    for task in ("mmbench_en_dev_static", "mmbench_en_dev"):
        if (value := scores.get((task, "gpt_eval_score"))) is not None:
            return value / 100
    return None


def _cv_bench(scores: Scores) -> float | None:
    """Reads CV-Bench's average: of its two parts as in the paper, or else of all its questions."""
    parts = [scores.get((f"cv_bench_{part}", "cv_bench_acc")) for part in ("2d", "3d")]
    known = [part for part in parts if part is not None]
    return sum(known) / 2 if len(known) == 2 else scores.get(("cv_bench", "cv_bench_acc"))


COLUMNS: dict[str, Callable[[Scores], float | None]] = {
    "MME binary, cognition": _of("mme:binary", "mme_cognition_score", 800),
    "MME binary, perception": _of("mme:binary", "mme_perception_score", 2000),
    "MME, cognition": _of("mme", "mme_cognition_score", 800),
    "MME, perception": _of("mme", "mme_perception_score", 2000),
    "POPE binary, accuracy": _of("pope:binary", "pope_accuracy"),
    "POPE binary, F1": _of("pope:binary", "pope_f1_score"),
    "POPE, accuracy": _of("pope", "pope_accuracy"),
    "POPE, F1": _of("pope", "pope_f1_score"),
    "SEED-Bench, all": _of("seedbench", "seed_all"),
    "SEED-Bench, image": _of("seedbench", "seed_image"),
    "SEED-Bench, video": _of("seedbench", "seed_video"),
    "MM-Vet": _of("mmvet", "gpt_eval_score", 100),
    "LLaVA-Wild": _of("llava_in_the_wild", "gpt_eval_llava_all", 100),
    "MMBench": _mmbench,
    "CV-Bench, 2D": _of("cv_bench_2d", "cv_bench_acc"),
    "CV-Bench, 3D": _of("cv_bench_3d", "cv_bench_acc"),
    "CV-Bench, average": _cv_bench,
    "GQA": _of("gqa", "exact_match"),
    "VizWiz": _of("vizwiz_vqa_val", "exact_match"),
}
"""Columns of Table 8, in its order, with the function that reads each from scores as a share of a perfect one."""


def average(results: Sequence[Result]) -> Average:
    """Returns the average score of a model's results, over the columns that were evaluated.

    Raises:
        DataError: none of them was.
    """
    scores = {
        (score.task, score.metric.partition(",")[0]): score.value for result in results for score in result.scores
    }
    columns = {name: value for name, read in COLUMNS.items() if (value := read(scores)) is not None}
    if not columns:
        names = ", ".join(result.name for result in results)
        raise DataError(f"{names}: none of the paper's vision tasks was evaluated; use --suite paper-vision")
    return Average(sum(columns.values()) / len(columns), columns)
