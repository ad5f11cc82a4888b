"""The report's pictures, drawn with matplotlib into PNG bytes: accuracy with intervals, and loss curves."""

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
"""One a model: surrogate, grafted, and the controls in their order."""
DPI = 160


Drawing = Callable[..., bytes]


def styled(draw: Drawing) -> Drawing:
    """Draws in this module's style, and leaves matplotlib's global settings as they were."""

    @functools.wraps(draw)
    def run(*arguments: Any) -> bytes:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*arguments)

    return run


@styled
def accuracy_chart(
    groups: Sequence[tuple[str, Mapping[str, Mapping[str, float]], float]], models: Sequence[str], suffix: str
) -> bytes:
    """Shares of right words as bars with their intervals, each model beside its own control, with a line at chance.

    groups: (name, condition -> value, low, high; chance); a condition is a model's name, with `suffix` for its control.
    """
    from matplotlib.patches import Patch

    count = 2 * len(models)
    width = 0.84 / count
    figure, (axes,) = _figure(9.2, 3.9, 1)
    for place, (_, shares, chance) in enumerate(groups):
        for number, model in enumerate(models):
            for control in (0, 1):
                entry = shares[model + suffix * control]
                left = place - 0.42 + width * (2 * number + control + 0.5)
                axes.bar(
                    left,
                    100 * entry["value"],
                    width * 0.9,
                    color="white" if control else COLORS[number % len(COLORS)],
                    edgecolor=COLORS[number % len(COLORS)],
                    hatch="////" if control else None,
                    linewidth=0.9,
                )
                axes.vlines(left, 100 * entry["low"], 100 * entry["high"], color=INK, linewidth=1.3, zorder=3)
                axes.text(
                    left,
                    100 * entry["high"] + 1.5,
                    f"{100 * entry['value']:.0f}",
                    ha="center",
                    va="bottom",
                    fontsize=8.5 if count <= 4 else 6.5,
                )
        axes.hlines(100 * chance, place - 0.45, place + 0.45, color=INK, linewidth=1.1, linestyle=(0, (3, 2)), zorder=4)
    axes.set_xticks(range(len(groups)), [name for name, _, _ in groups], color=INK)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 112)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("words right, %")
    axes.grid(axis="y")
    handles: list[Any] = [Patch(facecolor=COLORS[i % len(COLORS)], label=readable(m)) for i, m in enumerate(models)]
    handles.append(Patch(facecolor="white", edgecolor=MUTED, hatch="////", label="same, with another picture"))
    handles.append(axes.plot([], [], color=INK, linewidth=1.1, linestyle=(0, (3, 2)), label="chance")[0])
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), fontsize=9)
    return _png(figure)


@styled
def loss_chart(panels: Sequence[tuple[str, Mapping[str, Sequence[Mapping[str, float]]]]]) -> bytes:
    """Training loss over steps, one panel a stage; faint: every step, strong: its running mean.

    panels: (title, {label: step records}); a panel of one run needs no legend.
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
    """Mean over a window of a twentieth of the run around each step, cut off at the ends."""
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    first, last = np.maximum(0, places - reach), np.minimum(len(values), places + reach + 1)
    return (sums[last] - sums[first]) / (last - first)


def readable(name: str) -> str:
    return name.replace("_", " ")


def _figure(width: float, height: float, panels: int) -> tuple[Any, list[Any]]:
    """A figure outside pyplot's global state, with panels in rows of three."""
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
