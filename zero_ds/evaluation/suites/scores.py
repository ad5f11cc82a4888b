"""From what lm-eval returns, and lmms-eval in the same shape, to scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from zero_ds.evaluation.suites.results import Score
from zero_ds.evaluation.suites.suites import Task


def task_scores(found: Mapping[str, Any], task: Task, name: str) -> list[Score]:
    """A task's or group's figures in a harness's results, where it is called `name`: its metric, or all it has."""
    figures = found["results"].get(name) or found.get("groups", {})[name]
    members = _members(found, name)
    targets = {
        f"{member}/{sample['doc_id']}": sample.get("target")
        for member in members
        for sample in found["samples"].get(member, ())
    }
    scores = []
    for key, value in figures.items():
        metric, _, selection = key.partition(",")
        if not selection or "_stderr" in metric or not isinstance(value, int | float):
            continue
        if task.metric is not None and metric != task.metric:
            continue
        error = figures.get(f"{metric}_stderr,{selection}")
        items = {
            f"{member}/{sample['doc_id']}": float(sample[metric])
            for member in members
            for sample in found["samples"].get(member, ())
            if sample.get("filter", selection) == selection and isinstance(sample.get(metric), int | float)
        }
        whole = items and math.isclose(sum(items.values()) / len(items), value, abs_tol=1e-9)
        better = found["higher_is_better"].get(members[0], {}).get(metric)
        scores.append(
            Score(
                task=task.label,
                metric=metric if selection == "none" else key,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) else None,
                num_fewshot=found["n-shot"].get(members[0]),
                higher_is_better=better is not False,
                items=items if whole else {},
                documents=len(targets) or None,
                targets=_hash(targets) if targets else None,
            )
        )
    return scores


def _hash(targets: Mapping[str, Any]) -> str:
    content = json.dumps(sorted(targets.items()), default=lambda other: type(other).__name__)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _members(found: Mapping[str, Any], name: str) -> list[str]:
    """The tasks of a group at any depth; a task itself."""
    inside = found.get("group_subtasks", {}).get(name)
    if not inside:
        return [name]
    return [member for child in inside for member in _members(found, child)]
