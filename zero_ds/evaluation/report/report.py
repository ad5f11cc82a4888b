"""Writes the report of a run as JSON, Markdown and one HTML file: findings, how certain they are, and their cost."""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zero_ds.evaluation.heldout.results import Evaluation, read_evaluation
from zero_ds.evaluation.heldout.summary import SHUFFLED
from zero_ds.evaluation.report import charts
from zero_ds.evaluation.report.facts import facts
from zero_ds.evaluation.report.inputs import ReportInputs
from zero_ds.evaluation.report.rendering import render, view
from zero_ds.evaluation.report.samples import draw_samples
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically
from zero_ds.training.monitor import read_metrics

logger = logging.getLogger(__name__)

FILES = "report_files"
"""Folder of the images that report.md shows; report.html holds them itself."""


def write_report(inputs: ReportInputs) -> dict[str, Any]:
    """Writes the report and returns the content of report.json.

    Raises:
        ConfigError, DataError, CheckpointError, ImageError: an input is missing or damaged.
    """
    for name in ("surrogate", "grafted"):
        if name not in inputs.evaluations:
            raise ConfigError(f"the report needs an evaluation named '{name}'; it has {', '.join(inputs.evaluations)}.")
    files = {**inputs.evaluations, **inputs.controls}
    evaluations = {name: read_evaluation(path) for name, path in files.items()}
    content = facts(inputs, evaluations)
    images = _charts(inputs, content, evaluations)
    samples = draw_samples(inputs, evaluations)
    images |= {sample.image: sample.thumbnail for sample in samples}

    variables = view(inputs, content, samples)
    paths = {name: f"{FILES}/{name}.png" for name in images}
    embedded = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in images.items()}
    texts = {
        "report.json": json.dumps(content, indent=2, ensure_ascii=False) + "\n",
        "report.md": render("report.md.jinja", variables, paths),
        "report.html": render("report.html.jinja", variables, embedded),
    }
    _write_images(inputs.out / FILES, images)
    for name, text in texts.items():
        write_atomically(inputs.out / name, text)
    _remove_other_images(inputs.out / FILES, images)
    logger.info("wrote %s", inputs.out / "report.html")
    return content


def _charts(
    inputs: ReportInputs, content: Mapping[str, Any], evaluations: Mapping[str, Evaluation]
) -> dict[str, bytes]:
    """Draws the charts; name -> PNG file."""
    images = {"accuracy": _accuracy_chart(content, list(inputs.evaluations))}
    if inputs.controls:
        images["controls"] = _accuracy_chart(content, list(evaluations))
    panels = _loss_panels(inputs)
    if panels:
        images["loss"] = charts.loss_chart(panels)
    plot = inputs.trajectory / "trajectory.png" if inputs.trajectory else None
    if plot is not None and plot.is_file():
        images["trajectory"] = plot.read_bytes()
    return images


def _accuracy_chart(content: Mapping[str, Any], models: Sequence[str]) -> bytes:
    groups = []
    for mode, label in (("free", "free answer"), ("forced", "forced choice")):
        for kind, shares in content["accuracy_by"][mode].items():
            if kind != "all":
                groups.append((f"{label},\n{kind}s", shares, content["chance"][kind]))
    return charts.accuracy_chart(groups, models, SHUFFLED)


def _loss_panels(inputs: ReportInputs) -> list[charts.LossPanel]:
    """Returns a panel for each stage and each comparison, without runs that recorded no step."""
    panels: list[tuple[str, Mapping[str, Path]]] = [(stage, {stage: run}) for stage, run in inputs.stages.items()]
    panels += inputs.comparisons.items()
    drawn: list[charts.LossPanel] = []
    for title, runs in panels:
        records = {label: read_metrics(run) for label, run in runs.items()}
        records = {label: steps for label, steps in records.items() if steps}
        if records:
            drawn.append((title, records))
    return drawn


def _write_images(folder: Path, images: Mapping[str, bytes]) -> None:
    """Writes every image atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        temporary = folder / f".{name}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / f"{name}.png")


def _remove_other_images(folder: Path, images: Mapping[str, bytes]) -> None:
    """Removes the images of an earlier report."""
    for file in folder.iterdir():
        if file.stem not in images:
            file.unlink()
