"""The curves of a trajectory, their statistics, and trajectory.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan, Replaced
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.probe import LookupCurve
from zero_ds.trajectory.texts import TokenSample
from zero_ds.trajectory.transition import Floats, Transition


@dataclass(frozen=True)
class Setting:
    """Everything that a trajectory depends on. The fields are keys of trajectory.json."""

    model: str
    """Folder or hub id of the model, only for display."""
    target_hash: str
    """Hash of the model, which tells one model from another."""
    data: str
    """Path of the data file, only for display."""
    data_hash: str
    """First 32 digits of the data file's SHA-256."""
    metric: str
    """Name of the metric."""
    dtype: str
    """Precision of the forward passes: float32 or bfloat16."""
    greedy: bool
    """Whether the model's own greedy answers were read instead of the data's."""
    seed: int
    requested_samples: int
    """Number of samples asked for; the data may hold fewer."""
    system_prompt: str | None
    """System message of every conversation; None for the chat template's own."""
    template_hash: str | None = None
    """Hash of a chat template in place of the model's own; None for that."""
    lookups_hash: str | None = None
    """First 32 digits of the SHA-256 of the file of questions; None without, and in files of older versions."""

    def same(self, content: dict[str, Any]) -> bool:
        """Returns whether a trajectory.json was measured with this setting, wherever model and data were then."""
        compared = [field for field in fields(self) if field.name not in ("model", "data")]
        return all(content.get(field.name, field.default) == getattr(self, field.name) for field in compared)


@dataclass(frozen=True)
class Trajectory:
    """Divergence of every layer from the last one for every sample, and the transition layer found from it."""

    setting: Setting
    ids: tuple[str, ...]
    """Ids of the samples."""
    curves: Floats
    """Divergences (samples, layers), in the metric's unit; the last layer's are zero."""
    transition: Transition
    lookup: LookupCurve | None = None
    """Look-up accuracy at each layer, if questions were given."""

    @property
    def plan(self) -> LayerPlan | None:
        """The proposed surrogate: late phase replaced, last layer kept as in the paper. None if uncertain.

        With questions, the layers that look-ups need are kept as well.
        """
        depth = self.curves.shape[1]
        if self.transition.verdict == "uncertain" or self.transition.layer is None:
            return None
        first = self.transition.layer
        if self.lookup is not None:
            if self.lookup.verdict == "uncertain" or self.lookup.layer is None:
                return None
            first = max(first, self.lookup.layer)
        return LayerPlan(depth, (Replaced(first, depth - 2),)) if first <= depth - 2 else None

    @property
    def spread(self) -> Floats:
        """Interquartile range over the samples at every layer, (layers,)."""
        quarter, three_quarters = np.percentile(self.curves, [25, 75], axis=0)
        return np.asarray(three_quarters - quarter)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of trajectory.json."""
        plan = self.plan
        proposed = None
        if plan:
            replaced = plan.replaced[0]
            proposed = {"replace": f"{replaced.first}:{replaced.last}", "name": str(plan)}
        setting = asdict(self.setting)
        if setting["lookups_hash"] is None:
            del setting["lookups_hash"]
        return {
            **setting,
            "samples": len(self.curves),
            "layers": self.curves.shape[1],
            "transition": asdict(self.transition),
            **({"lookup": asdict(self.lookup)} if self.lookup else {}),
            "proposed": proposed,
            "mean": _rounded(self.curves.mean(axis=0)),
            "median": _rounded(np.median(self.curves, axis=0)),
            "spread": _rounded(self.spread),
            "versions": {name: version(name) for name in ("zero-ds", "torch", "transformers", "numpy")},
            "ids": list(self.ids),
            "curves": [_rounded(curve) for curve in self.curves],
        }


def _rounded(values: Floats) -> list[float]:
    """Returns the values with six significant digits."""
    return [float(f"{value:.6g}") for value in values]


def check_finite(curves: Floats, samples: Sequence[TokenSample], dtype: torch.dtype) -> None:
    """Checks that all curves (samples, layers) are finite.

    Raises:
        ConfigError: one is not; the message names the first such sample.
    """
    bad = np.flatnonzero(~np.isfinite(curves).all(axis=1))
    if len(bad):
        remedy = "its weights are damaged, fetch the model again"
        if dtype != torch.float32:
            remedy = "run with --dtype float32"
        raise ConfigError(f"the model's predictions for sample {samples[bad[0]].id} are not finite; {remedy}.")


def proposed_range(folder: Path, model: DecoderFolder | Path) -> str:
    """Returns the layers of `model`, as `first:last`, that the trajectory in `folder` proposes to replace.

    Raises:
        ConfigError: `folder` holds no trajectory, one of another model, or one that proposes nothing.
    """
    path = folder / "trajectory.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        measured, verdict, proposed = content["target_hash"], content["transition"]["reason"], content["proposed"]
        if content["transition"].get("verdict") == "clear" and "lookup" in content:
            verdict = content["lookup"]["reason"]
        replace = str(proposed["replace"]) if proposed else None
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} holds no readable trajectory.json; run `zero-ds trajectory` first.") from None
    if measured != DecoderFolder.of(model).hash(like=str(measured)):
        raise ConfigError(f"{path} was measured on another model ({content.get('model')}); measure this one.")
    if replace is None:
        raise ConfigError(f"{path} proposes no layers: {verdict} Give --replace.")
    return replace
