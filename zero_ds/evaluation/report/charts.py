"""The report's charts, drawn with matplotlib as PNG files: accuracy with intervals, and loss curves."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

INK, MUTED, RULE = "#1f2933", "#5f6c7b", "#d9dee4"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": "#eceff2",
    "legend.frameon": False,
    "figure.facecolor": "white",
}
COLORS = ("#4c78a8", "#d1742f", "#5b8c5a", "#8a6bb0", "#b05b6f", "#6b7785")
"""Colours of the models: surrogate, graft, and the controls in their order."""
DASHED: Any = (0, (3, 2))
DPI = 160

Drawing = Callable[..., bytes]

AccuracyGroup = tuple[str, Mapping[str, Mapping[str, float]], float]
"""(name, condition -> value, low and high, chance)."""
LossPanel = tuple[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""(title, label of a run -> its step records)."""


def styled(draw: Drawing) -> Drawing:
    """Decorates a function to draw in this module's style, leaving matplotlib's global settings unchanged."""

    @functools.wraps(draw)
    def run(*arguments: Any) -> bytes:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return run


@styled
def accuracy_chart(groups: Sequence[AccuracyGroup], models: Sequence[str], suffix: str) -> bytes:
    """Draws shares of correct words as bars with intervals, each model next to its control, with a line at chance.

    A condition is the name of a model, with `suffix` appended for its control.
    """
    bars = 2 * len(models)
    width = 0.84 / bars
    figure, (axes,) = _figure(9.2, 3.9, 1)
    for place, (_, shares, chance) in enumerate(groups):
        for number, model in enumerate(models):
            color = COLORS[number % len(COLORS)]
            left = place - 0.42 + width * (2 * number + 0.5)
            _accuracy_bar(axes, left, width, shares[model], color, bars, is_control=False)
            left = place - 0.42 + width * (2 * number + 1 + 0.5)
            _accuracy_bar(axes, left, width, shares[model + suffix], color, bars, is_control=True)
        axes.hlines(100 * chance, place - 0.45, place + 0.45, color=INK, linewidth=1.1, linestyle=DASHED, zorder=4)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups], color=INK)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("words right, %")
    axes.grid(axis="y")
    _accuracy_legend(figure, axes, models)
    return _png(figure)


def _accuracy_bar(
    axes: Any,
    center: float,
    width: float,
    entry: Mapping[str, float],
    color: str,
    bars: int,
    *,
    is_control: bool,
) -> None:
    """Draws one bar with its interval and its value. bars: number of bars in a group, which decides the font size."""
    axes.bar(
        center,
        100 * entry["value"],
        width * 0.9,
        color="white" if is_control else color,
        edgecolor=color,
        hatch="////" if is_control else None,
        linewidth=0.9,
    )
    axes.vlines(center, 100 * entry["low"], 100 * entry["high"], color=INK, linewidth=1.3, zorder=3)
    axes.text(
        center,
        100 * entry["high"] + 1.5,
        f"{100 * entry['value']:.0f}",
        ha="center",
        va="bottom",
        fontsize=8.5 if bars <= 4 else 6.5,
    )


def _accuracy_legend(figure: Any, axes: Any, models: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for number, model in enumerate(models):
        handles.append(Patch(facecolor=COLORS[number % len(COLORS)], label=readable(model)))
    handles.append(Patch(facecolor="white", edgecolor=MUTED, hatch="////", label="same, with another image"))
    handles += axes.plot([], [], color=INK, linewidth=1.1, linestyle=DASHED, label="chance")
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), fontsize=9)


@styled
def loss_chart(panels: Sequence[LossPanel]) -> bytes:
    """Draws the training loss over steps, one panel per stage: every step faintly, and the running mean strongly.

    A panel with one run has no legend.
    """
    figure, axes = _figure(9.2, 2.7 * ((len(panels) + 2) // 3), len(panels))
    for ax, (title, runs) in zip(axes, panels, strict=True):
        for number, (label, records) in enumerate(runs.items()):
            color = COLORS[number % len(COLORS)]
            steps = np.array([record["step"] for record in records])
            losses = np.array([record["loss"] for record in records])
            ax.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            ax.plot(steps, running_mean(losses), color=color, linewidth=1.8, label=readable(label))
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(axis="y")
        ax.set_ylim(bottom=0)
        if len(runs) > 1:
            ax.legend(fontsize=8.5)
    axes[0].set_ylabel("training loss")
    return _png(figure)


def running_mean(values: Any) -> Any:
    """Returns the mean over a window of a twentieth of the run around each step; the window is cut off at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    steps = np.arange(len(values))
    first, last = np.maximum(0, steps - reach), np.minimum(len(values), steps + reach + 1)
    return (sums[last] - sums[first]) / (last - first)


def readable(name: str) -> str:
    """Returns a name with spaces instead of underscores."""
    return name.replace("_", " ")


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    """Makes a figure outside pyplot's global state, with panels in rows of three. Sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    columns = min(3, panels)
    rows = (panels + columns - 1) // columns
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(panels)]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
