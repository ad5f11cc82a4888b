"""The facts of a report: the content of report.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zero_ds.evaluation.heldout.results import Evaluation
from zero_ds.evaluation.heldout.summary import summary
from zero_ds.evaluation.report.findings import findings
from zero_ds.evaluation.report.inputs import ReportInputs
from zero_ds.model.layer_plan import SurrogateInfo, read_surrogate
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import Checkpoint, find_checkpoint
from zero_ds.training.checkpoint.manifest import versions
from zero_ds.training.monitor import read_metrics


def facts(inputs: ReportInputs, evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Returns the content of report.json: every figure of the report, with its models, data and settings.

    Raises:
        ConfigError, DataError, CheckpointError: an input is missing or damaged.
    """
    scores = summary(evaluations)
    sentences = findings(scores)
    checkpoints = {stage: find_checkpoint(run) for stage, run in inputs.stages.items()}
    surrogate = read_surrogate(inputs.surrogate) if inputs.surrogate else None
    transition = _transition(inputs.trajectory) if inputs.trajectory else None
    return {
        "title": inputs.title,
        "headline": " ".join(sentences),
        "findings": sentences,
        **scores,
        "transition_layer": transition.get("layer") if transition else None,
        "transition": transition or None,
        "layer_plan": {"name": str(surrogate.plan), **surrogate.plan.to_json()} if surrogate else None,
        "step_seconds": _step_times(inputs),
        "flops_ratio": inputs.flops_ratio,
        "checkpoint_bytes": {stage: _checkpoint_bytes(checkpoint) for stage, checkpoint in checkpoints.items()},
        "parameters": _parameters(surrogate, checkpoints),
        "steps": {stage: checkpoint.step for stage, checkpoint in checkpoints.items()},
        "seeds": _seeds(inputs, checkpoints, evaluations["grafted"]),
        "evaluation": {name: evaluation.setting for name, evaluation in evaluations.items()},
        "versions": versions(),
        "notes": list(inputs.notes),
    }


def _transition(folder: Path) -> dict[str, Any]:
    """Reads the transition point out of a trajectory's folder."""
    path = folder / "trajectory.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["transition"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({type(error).__name__}); measure the trajectory again.") from None


def _step_times(inputs: ReportInputs) -> dict[str, Any]:
    """Returns the stage that step times were taken from, and its seconds per step on the surrogate and full model."""
    stage = inputs.cost_stage
    if stage is None and inputs.stages:
        stage = list(inputs.stages)[-1]
    if stage is not None and stage not in inputs.stages:
        raise ConfigError(f"cost_stage={stage} is not one of the stages {', '.join(inputs.stages)}.")
    return {
        "stage": stage,
        "surrogate": step_seconds(inputs.stages[stage]) if stage else None,
        "full": step_seconds(inputs.full_run) if inputs.full_run else None,
    }


def step_seconds(run: Path) -> float | None:
    """Returns the median seconds per step of a run, or None if it recorded no step.

    The first step, which sets up caches and kernels, counts only if it is the only one.
    """
    seconds = [record["seconds"] for record in read_metrics(run)]
    if not seconds:
        return None
    return round(statistics.median(seconds[1:] or seconds), 4)


def _checkpoint_bytes(checkpoint: Checkpoint) -> dict[str, int | None]:
    return {
        "weights": sum(size for path in checkpoint.weights_files() if (size := _size(path))) or None,
        "resume": _size(checkpoint.folder / "resume"),
    }


def _size(path: Path) -> int | None:
    """Returns the bytes of a file, or of the files directly in a folder; None if the path does not exist."""
    if path.is_dir():
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return path.stat().st_size if path.is_file() else None


def _parameters(surrogate: SurrogateInfo | None, checkpoints: Mapping[str, Checkpoint]) -> dict[str, Any]:
    """Returns numbers of parameters: of the full model, of the surrogate, and trained in each stage."""
    return {
        "full": surrogate.target_parameters if surrogate else None,
        "surrogate": surrogate.kept_parameters if surrogate else None,
        "trained": {
            stage: sum(span.parameters for span in checkpoint.weight_spans().values())
            for stage, checkpoint in checkpoints.items()
        },
    }


def _seeds(inputs: ReportInputs, checkpoints: Mapping[str, Checkpoint], grafted: Evaluation) -> dict[str, Any]:
    return {
        **{stage: checkpoint.manifest["config"]["seed"] for stage, checkpoint in checkpoints.items()},
        "shuffled pictures": grafted.setting.get("seed"),
        "samples in the report": inputs.sample_seed,
        **inputs.seeds,
    }
