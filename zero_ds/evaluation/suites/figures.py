"""Draws the paper's Figures 2 and A.2: average scores by the share of the data, and hours of training by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.data.formats import DataError
from zero_ds.evaluation.suites.average import Average, average
from zero_ds.evaluation.suites.results import read_results
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.monitor import read_metrics


@dataclass(frozen=True)
class Point:
    """The average score of a method after a share of the data."""

    method: str
    share: float
    """Percentage of the data that the full decoder has seen; 0 for a graft."""
    score: Average


@dataclass(frozen=True)
class Bar:
    """Hours of a method's runs."""

    method: str
    hours: dict[str, float]
    """Hours by stage, in the order of the runs."""

    @property
    def total(self) -> float:
        """Hours of all runs together."""
        return sum(self.hours.values())


def read_point(text: str) -> Point:
    """Reads `METHOD:PERCENT=RESULTS`, where RESULTS is a result file of `zero-ds eval` or a folder of such files.

    Raises:
        ConfigError: the text has another form. DataError: no result of the paper's vision tasks is there.
    """
    left, equals, path = text.partition("=")
    method, colon, share = left.rpartition(":")
    try:
        percent = float(share)
    except ValueError:
        percent = -1.0
    if not (equals and colon and method and path and 0 <= percent <= 100):
        raise ConfigError(f"--score {text} is not METHOD:PERCENT=RESULTS, such as ours:10=results/ours-10.")
    return Point(method, percent, average(read_results(Path(path).expanduser())))


def read_bar(text: str) -> Bar:
    """Reads `METHOD=RUN[,RUN ...]`, where the hours of each run folder are those of all its steps.

    Raises:
        ConfigError: the text has another form, or a folder is not one of a run.
    """
    method, equals, paths = text.partition("=")
    folders = [Path(path).expanduser() for path in paths.split(",") if path]
    if not (equals and method and folders):
        raise ConfigError(f"--hours {text} is not METHOD=RUN,RUN; name the run folders of the method.")
    hours: dict[str, float] = {}
    for folder in folders:
        stage, spent = _hours(folder)
        hours[stage] = hours.get(stage, 0.0) + spent
    return Bar(method, hours)


def _hours(run: Path) -> tuple[str, float]:
    """Returns the stage of a run and the hours of its steps, without loading and saving."""
    import yaml

    try:
        stage = str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["stage"])
        steps = read_metrics(run)
        if not steps:
            raise ValueError("metrics.jsonl has no steps")
        return stage, sum(float(step["seconds"]) for step in steps) / 3600
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"{run} is not the folder of a run ({error}); name a folder that a training wrote.") from None


def check_columns(points: Sequence[Point]) -> None:
    """Checks that all points are averages over the same columns, because others could not be compared.

    Raises:
        DataError: two points differ; names the first column.
    """
    for point in points[1:]:
        if unlike := sorted(point.score.columns.keys() ^ points[0].score.columns.keys()):
            raise DataError(
                f"{point.method} at {point.share:g} % and {points[0].method} at {points[0].share:g} % were evaluated "
                f"on other tasks (first: {unlike[0]}); evaluate both on the same suite"
            )


def table(points: Sequence[Point], bars: Sequence[Bar]) -> str:
    """Returns the numbers of the figure as Markdown."""
    lines = []
    if points:
        lines += ["| method | data, % | average score |", "|---|---|---|"]
        lines += [f"| {point.method} | {point.share:g} | {point.score.value:.4f} |" for point in points]
        if missing := points[0].score.missing:
            lines += ["", f"Without {', '.join(missing)}, which the paper's average has as well."]
        lines.append("")
    if bars:
        stages = list(dict.fromkeys(stage for bar in bars for stage in bar.hours))
        lines += [f"| method | {' | '.join(f'{stage}, h' for stage in stages)} | total, h |"]
        lines += ["|---" * (len(stages) + 2) + "|"]
        for bar in bars:
            cells = [f"{bar.hours[stage]:.2f}" if stage in bar.hours else "" for stage in stages]
            lines.append(f"| {bar.method} | {' | '.join(cells)} | {bar.total:.2f} |")
    return "\n".join(lines).rstrip("\n") + "\n"


def draw(points: Sequence[Point], bars: Sequence[Bar], out: Path) -> list[Path]:
    """Writes the figure as `out` with the endings .png and .pdf; returns both paths.

    A hollow circle marks a graft, which has seen no data together with the full decoder.
    """
    import matplotlib
    from matplotlib.figure import Figure

    from zero_ds.evaluation.report.charts import COLORS, DPI, STYLE

    with matplotlib.rc_context(STYLE):
        panels = bool(points) + bool(bars)
        figure = Figure(figsize=(4.8 * panels, 3.6), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        if points:
            _draw_scores(axes.pop(0), points, COLORS)
        if bars:
            _draw_hours(axes.pop(0), bars, COLORS)
        paths = [out.with_name(f"{out.name}{ending}") for ending in (".png", ".pdf")]
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in paths:
            figure.savefig(path, dpi=DPI)
    return paths


def _draw_scores(axes: Any, points: Sequence[Point], colors: tuple[str, ...]) -> None:
    """Draws one line per method over the share of the data."""
    by_method: dict[str, list[Point]] = {}
    for point in points:
        by_method.setdefault(point.method, []).append(point)
    for (method, own), color in zip(by_method.items(), colors * len(by_method), strict=False):
        own = sorted(own, key=lambda point: point.share)
        axes.plot([p.share for p in own], [p.score.value for p in own], color=color, label=method, zorder=2)
        for point in own:
            face = "white" if point.share == 0 else color
            axes.plot(point.share, point.score.value, "o", color=color, markerfacecolor=face, zorder=3)
    axes.set_xlabel("data for the full decoder, %")
    axes.set_ylabel("average score")
    axes.grid(axis="y")
    axes.legend()


def _draw_hours(axes: Any, bars: Sequence[Bar], colors: tuple[str, ...]) -> None:
    """Draws one bar per method, its stages on top of each other."""
    stages = list(dict.fromkeys(stage for bar in bars for stage in bar.hours))
    lower = [0.0] * len(bars)
    for stage, color in zip(stages, colors * len(stages), strict=False):
        heights = [bar.hours.get(stage, 0.0) for bar in bars]
        axes.bar(range(len(bars)), heights, 0.6, bottom=lower, color=color, label=stage)
        lower = [low + height for low, height in zip(lower, heights, strict=True)]
    for number, bar in enumerate(bars):
        axes.text(number, bar.total, f"{bar.total:.3g} h", ha="center", va="bottom")
    axes.set_xticks(range(len(bars)), [bar.method for bar in bars])
    axes.set_ylabel("hours of training")
    axes.margins(y=0.12)
    axes.legend()
