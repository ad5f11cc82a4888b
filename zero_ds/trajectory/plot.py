"""Draws a trajectory in the look of the paper's Figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.trajectory.curves import Trajectory
from zero_ds.trajectory.metrics import METRICS
from zero_ds.trajectory.probe import LookupCurve
from zero_ds.trajectory.transition import Floats


def draw_curves(axes: Any, curves: Floats, unit: str) -> None:
    """Draws one thin line per curve and their mean; curves: (number, layers), in `unit`."""
    from matplotlib.ticker import MaxNLocator

    axes.plot(curves.T, linewidth=0.5, alpha=max(0.15, min(0.8, 30 / len(curves))))
    axes.plot(curves.mean(axis=0), linewidth=1.2, color="black", label="mean")
    axes.set_xlabel("layer")
    axes.set_ylabel(f"divergence from the last layer ({unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(0, curves.shape[1] - 1)
    axes.set_ylim(0, max(1e-3, float(np.percentile(curves.max(axis=0), 95)) * 1.25))


def _draw_lookups(axes: Any, lookup: LookupCurve) -> None:
    """Adds the share of words that can be looked up at each layer, with an axis of its own on the right."""
    right = axes.twinx()
    right.plot(lookup.curve, linewidth=1.2, linestyle="--", color="tab:red")
    right.axhline(lookup.chance, linewidth=0.6, linestyle=":", color="tab:red")
    right.set_ylim(0, 1)
    right.set_ylabel("words that a probe looks up (dashed)", color="tab:red")
    if lookup.layer is not None:
        right.axvline(lookup.layer, linewidth=0.8, linestyle=":", color="tab:red")


def plot(trajectory: Trajectory, folder: Path) -> None:
    """Writes trajectory.png and trajectory.pdf: one thin line per sample, and an arrow at the transition layer."""
    from matplotlib.figure import Figure

    curves, transition = trajectory.curves, trajectory.transition
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, curves, METRICS[trajectory.setting.metric].unit)
    axes.set_title(f"{Path(trajectory.setting.model).name}, {len(curves)} samples, {trajectory.setting.metric} metric")
    if transition.layer is not None:
        sure = "" if transition.verdict == "clear" else " (uncertain)"
        text = f"transition: layer {transition.layer}{sure}\n95 %: {transition.low} to {transition.high}"
        point = (transition.layer, float(curves[:, transition.layer].max()))
        above = (transition.layer, axes.get_ylim()[1] * 0.97)
        axes.annotate(text, xy=point, xytext=above, ha="center", va="top", arrowprops={"arrowstyle": "->"})
    axes.legend(loc="lower left", frameon=False)
    if trajectory.lookup is not None:
        _draw_lookups(axes, trajectory.lookup)
    figure.savefig(folder / "trajectory.png", dpi=160)
    figure.savefig(folder / "trajectory.pdf")
