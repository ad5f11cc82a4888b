"""Converts the results that lm-eval returns, and lmms-eval in the same layout, to scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zero_ds.evaluation.suites.results import Score
from zero_ds.evaluation.suites.tasks import Task


def task_scores(found: Mapping[str, Any], task: Task, name: str) -> list[Score]:
    """Returns the scores of a task or group: its metric, or every metric that the harness computed.

    found: Results of a harness. name: Name of the task in them.
    """
    metrics = found["results"].get(name) or found.get("groups", {})[name]
    members = _members(found, name)
    targets = {document: sample.get("target") for document, sample in _documents(found, members)}
    scores = []
    for key, value in metrics.items():
        metric, _, selection = key.partition(",")
        if not selection or "_stderr" in metric or not isinstance(value, int | float):
            continue
        if task.metric is not None and metric != task.metric:
            continue
        stderr = metrics.get(f"{metric}_stderr,{selection}")
        higher_is_better = found["higher_is_better"].get(members[0], {}).get(metric)
        scores.append(
            Score(
                task=task.label,
                metric=metric if selection == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
                num_fewshot=found["n-shot"].get(members[0]),
                higher_is_better=higher_is_better is not False,
                items=_document_scores(found, members, metric, selection, value),
                documents=len(targets) or None,
                targets=_hash(targets) if targets else None,
            )
        )
    return scores


def _documents(found: Mapping[str, Any], members: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the documents of tasks as (`TASK/NUMBER`, sample); empty if the harness kept no samples."""
    for member in members:
        for sample in found["samples"].get(member, ()):
            yield f"{member}/{sample['doc_id']}", sample


def _document_scores(
    found: Mapping[str, Any], members: Sequence[str], metric: str, selection: str, value: float
) -> dict[str, float]:
    """Returns the score of each document if their mean is the metric's value; otherwise nothing."""
    scores = {}
    for document, sample in _documents(found, members):
        if sample.get("filter", selection) == selection and isinstance(sample.get(metric), int | float):
            scores[document] = float(sample[metric])
    if scores and math.isclose(sum(scores.values()) / len(scores), value, abs_tol=1e-9):
        return scores
    return {}


def _hash(targets: Mapping[str, Any]) -> str:
    content = json.dumps(sorted(targets.items()), default=lambda other: type(other).__name__)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _members(found: Mapping[str, Any], name: str) -> list[str]:
    """Returns all tasks in a group and its subgroups. For a task, returns the task itself."""
    children = found.get("group_subtasks", {}).get(name)
    if not children:
        return [name]
    return [member for child in children for member in _members(found, child)]
