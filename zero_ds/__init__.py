"""zero_ds: train vision encoders against small surrogates of large language models, and graft them.

The commands can also be called as functions: `from zero_ds import train`.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero_ds.evaluation.suites.evaluate import evaluate as evaluate
    from zero_ds.export import export_model as export_model
    from zero_ds.grafting.compatibility import graft as graft
    from zero_ds.surrogate.build import build_surrogate as build_surrogate
    from zero_ds.training.planning.plan import plan as plan
    from zero_ds.training.train import train as train
    from zero_ds.trajectory.measure import measure_trajectory as measure_trajectory

__version__ = "0.1.0"

# when a rank dies, the C++ stack traces of the others are of no use; torch reads this variable when it is imported
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

PUBLIC = {
    "measure_trajectory": "zero_ds.trajectory.measure:measure_trajectory",
    "build_surrogate": "zero_ds.surrogate.build:build_surrogate",
    "train": "zero_ds.training.train:train",
    "graft": "zero_ds.grafting.compatibility:graft",
    "evaluate": "zero_ds.evaluation.suites.evaluate:evaluate",
    "export_model": "zero_ds.export:export_model",
    "plan": "zero_ds.training.planning.plan:plan",
}
"""Public functions, as `module:function`. A module, and with it torch, is imported on the first use of its function."""


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'zero_ds' has no attribute '{name}'")
    module, _, function = PUBLIC[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(module), function)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
