"""`zero-ds report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

NOTES = (
    "The language model is SmolLM2-135M-Instruct, dequantised from a 4-bit file; pictures and questions are generated.",
    "The vision encoder was warmed up by classifying generated training pictures (colour, shape, count, ...), a "
    "stand-in for CLIP's pre-training: it has seen the attributes, but no language, before the stages shown here.",
    "Intervals are over held-out pictures of one run; they say nothing about other seeds.",
)


def report(
    run: Annotated[Path, typer.Option(help="Folder of `zero-ds quickstart`.")],
    controls: Annotated[bool, typer.Option("--controls", help="Show the controls, too.")] = False,
) -> None:
    """Write report.json, report.md and a self-contained report.html of a quickstart run."""
    from zero_ds.evaluation.report.report import ReportInputs, write_report
    from zero_ds.training.planning.cost import encoder_step_ratio

    stages = {s: run / s for s in ("translator", "pretrain", "encoder") if (run / s / "latest").is_file()}
    distilled = _distilled(stages)
    others: dict[str, Any] = {}
    if controls:
        others["controls"] = {
            name: run / f"evaluation/{name}.json" for name in ("full", "early_surrogate", "early_grafted")
        }
        others["comparisons"] = {
            "full decoder: warm against cold start": {
                "from the grafted encoder": run / "controls/warm-start",
                "from the untrained encoder": run / "controls/cold-start",
            }
        }
    content = write_report(
        ReportInputs(
            out=run,
            evaluations={name: run / f"evaluation/{name}.json" for name in ("surrogate", "grafted")},
            trajectory=run / "trajectory" if (run / "trajectory").is_dir() else None,
            surrogate=run / "surrogate",
            stages=stages,
            cost_stage="encoder",
            full_run=run / "full-cost",
            flops_ratio=encoder_step_ratio(run / "surrogate", distilled="encoder" in distilled),
            notes=(*NOTES, *_plan_note(run), *_distillation_note(distilled)),
            title="zero_ds quickstart",
            **others,
        )
    )
    print(content["headline"])


def _plan_note(run: Path) -> tuple[str, ...]:
    """Says so where the surrogate was not cut at the transition point."""
    from zero_ds.model.layer_plan import read_surrogate

    plan = read_surrogate(run / "surrogate").plan
    try:
        transition = json.loads((run / "trajectory/trajectory.json").read_text(encoding="utf-8"))["transition"]["layer"]
    except (OSError, ValueError, KeyError):
        return ()
    first = plan.replaced[0].first
    if transition is None or transition == first:
        return ()
    return (
        f"The surrogate {plan} was not cut at the transition point, layer {transition}, that the trajectory shows; "
        "docs/method.md says what was tried there.",
    )


def _distilled(stages: dict[str, Path]) -> list[str]:
    """Stages in which translators learned from the target's late layers, which the paper's do not."""
    from zero_ds.grafting.compatibility import run_config
    from zero_ds.training.checkpoint.checkpoint import find_commit

    return [name for name, folder in stages.items() if run_config(find_commit(folder)).distill.active]


def _distillation_note(stages: list[str]) -> tuple[str, ...]:
    if not stages:
        return ()
    return (
        f"In the stages {', '.join(stages)} the translator learned from the target's own late layers, an option beyond "
        "the paper (distill.*, see docs/method.md).",
    )
