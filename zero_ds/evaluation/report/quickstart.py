"""The report of a `zero-ds quickstart` run: which of its folders go into the report, and the notes to print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero_ds.evaluation.report.inputs import ReportInputs
from zero_ds.evaluation.report.report import write_report
from zero_ds.grafting.compatibility import run_config
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.planning.flops import encoder_step_ratio

STAGES = ("translator", "pretrain", "encoder")
NOTES = (
    "The language model is SmolLM2-135M-Instruct, dequantised from a 4-bit file; images and questions are generated.",
    "The vision encoder was warmed up by classifying generated training images (colour, shape, count, ...) instead of "
    "CLIP's pre-training: it has seen the attributes, but no language, before the stages shown here.",
    "The intervals are over held-out images of one run; they say nothing about other seeds.",
)


def write_quickstart_report(run: Path, *, controls: bool = False) -> dict[str, Any]:
    """Writes the report of a quickstart run into its folder and returns the content of report.json.

    controls: Whether to include the control runs of `zero-ds quickstart --controls`.

    Raises:
        ConfigError, DataError, CheckpointError, ImageError: see `write_report`.
    """
    stages = {stage: run / stage for stage in STAGES if (run / stage / "latest").is_file()}
    distilled = _distilled_stages(stages)
    control_evaluations: dict[str, Path] = {}
    comparisons: dict[str, dict[str, Path]] = {}
    if controls:
        for name in ("full", "early_surrogate", "early_grafted"):
            control_evaluations[name] = run / f"evaluation/{name}.json"
        comparisons["full decoder: warm start and cold start"] = {
            "from the grafted encoder": run / "controls/warm-start",
            "from the untrained encoder": run / "controls/cold-start",
        }
    return write_report(
        ReportInputs(
            out=run,
            evaluations={name: run / f"evaluation/{name}.json" for name in ("surrogate", "grafted")},
            controls=control_evaluations,
            trajectory=run / "trajectory" if (run / "trajectory").is_dir() else None,
            surrogate=run / "surrogate",
            stages=stages,
            comparisons=comparisons,
            cost_stage="encoder",
            full_run=run / "full-cost",
            flops_ratio=encoder_step_ratio(run / "surrogate", distilled="encoder" in distilled),
            notes=(*NOTES, *_cut_note(run), *_distillation_note(distilled)),
            title="zero_ds quickstart",
        )
    )


def _cut_note(run: Path) -> tuple[str, ...]:
    """Returns a note if the surrogate was not cut at the transition point."""
    plan = read_surrogate(run / "surrogate").plan
    try:
        transition = json.loads((run / "trajectory/trajectory.json").read_text(encoding="utf-8"))["transition"]["layer"]
    except (OSError, ValueError, KeyError):
        return ()
    if transition is None or transition == plan.first_replaced:
        return ()
    return (
        f"The surrogate {plan} was not cut at layer {transition}, the transition point that the trajectory shows; "
        "docs/method.md describes the attempts at that cut.",
    )


def _distilled_stages(stages: Mapping[str, Path]) -> list[str]:
    """Returns the stages in which translators learned from the target's late layers, an option beyond the paper."""
    return [stage for stage, folder in stages.items() if run_config(find_checkpoint(folder)).distill.active]


def _distillation_note(stages: list[str]) -> tuple[str, ...]:
    if not stages:
        return ()
    return (
        f"In the stages {', '.join(stages)} the translator also learned from the target's own late layers, an option "
        "that the paper does not have (distill.*, see docs/method.md).",
    )
