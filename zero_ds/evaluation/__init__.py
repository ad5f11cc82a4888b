"""Evaluation of models, and the report on a run.

`heldout` asks questions about held-out images, with a control (`zero_ds.evaluation.heldout.evaluate.evaluate_records`);
`suites` runs the tasks of lm-evaluation-harness and lmms-eval (`zero_ds.evaluation.suites.evaluate.evaluate_suites`);
`report` puts the results of a run on one page.
"""

from __future__ import annotations

from typing import Any


def lmms_manifest() -> Any:
    """Returns the entry of the model `zero_ds` in lmms-eval's registry; the entry point `lmms_eval.models` calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="zero_ds", simple_class_path="zero_ds.evaluation.suites.lmms_model.ZeroDs")
