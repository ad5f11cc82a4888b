"""Lines for the console about the results of a pipeline's steps, from the small files that they leave."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zero_ds.training.status import recorded_steps

Outcome = Callable[[], str]
"""Function that returns the line once the step has ended."""

PURPOSES = {
    "trajectory": "reads texts, to find where language converges",
    "surrogate": "cuts the small model",
    "translator": "trains the translator on text",
    "pretrain": "trains adapter and translator",
    "encoder": "trains the vision encoder against the surrogate",
    "decoder": "trains the full model",
    "full-cost": "times a few steps against the full model",
    "graft": "checks that the encoder fits the full model",
    "evaluation": "asks surrogate and graft about held-out images",
    "export": "writes the model for transformers, and proves it",
    "report": "writes the report",
}
"""Purposes of the steps, by their names."""


def outcome_of_trajectory(folder: Path) -> str:
    """Returns where language converges, and the surrogate that is proposed."""
    found = _json(folder / "trajectory.json")
    transition, proposed = found.get("transition") or {}, found.get("proposed") or {}
    if transition.get("layer") is None:
        return "no transition layer was found"
    line = f"language converges from layer {transition['layer']} of {found['layers']} on"
    return f"{line}; the curve proposes {proposed['name']}" if proposed.get("name") else line


def outcome_of_surrogate(folder: Path) -> str:
    """Returns what has become of the layers and the parameters."""
    found = _json(folder / "surrogate.json")
    plan = found["plan"]
    kept = plan["depth"] - sum(last - first + 1 - translators for first, last, translators in plan["replaced"])
    small, large = (found[key] / 1e6 for key in ("kept_parameters", "target_parameters"))
    cut = ", ".join(f"layers {first} to {last} became {translators}" for first, last, translators in plan["replaced"])
    return f"{cut}: {kept} of {plan['depth']} layers, {small:,.0f} of {large:,.0f} million parameters"


def outcome_of_training(folder: Path) -> str:
    """Returns the number of steps, and the loss of the first and the last tenth of them."""
    losses = [record["loss"] for record in recorded_steps(folder) if "loss" in record]
    if not losses:
        return ""
    few = max(1, len(losses) // 10)
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    return f"{len(losses)} steps; loss {first:.2f} at first, {last:.2f} at last"


def outcome_of_evaluation(results: Mapping[str, Path]) -> str:
    """Returns the share of words that each model gets right in free answers, with the right image and another one."""
    parts = []
    for label, path in results.items():
        shares = []
        for condition in ("own", "shuffled"):
            items = [item for item in _json(path)["items"] if item["condition"] == condition]
            words = [word["free_correct"] for item in items for word in item["words"]]
            shares.append(100 * sum(words) / max(1, len(words)))
        parts.append(f"{label} {shares[0]:.0f} % of words right ({shares[1]:.0f} % with another image)")
    return "; ".join(parts)


def outcome_of_export(folder: Path) -> str:
    """Returns the result of the proof."""
    proof = _json(folder / "proof.json")
    line = f"all {proof['tensors_equal']} tensors are those of the source"
    if proof.get("loaded_by_transformers"):
        line += f", and {proof['loaded_by_transformers']} of transformers gives the same logits"
    return line


def told(outcome: Outcome | None) -> str:
    """Returns the line; empty if there is none, or if a file that another version has written says other things."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return outcome() if outcome is not None else ""
    return ""


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object")
    return content
