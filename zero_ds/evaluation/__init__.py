"""Evaluation: held-out questions with their control, and the suites of the field's own harnesses."""

from __future__ import annotations

from typing import Any


def lmms_manifest() -> Any:
    """What the entry point `lmms_eval.models` names: how lmms-eval finds the model `zero_ds`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="zero_ds", simple_class_path="zero_ds.evaluation.suites.lmms_model.ZeroDs")
