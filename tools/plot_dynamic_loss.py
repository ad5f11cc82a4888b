"""Draws the paper's Figure A.1: dynamic loss weights over the length of a response, for several longest responses.

    python tools/plot_dynamic_loss.py --out figure-a1.png

Each curve is a global batch with one response of every length from 2 up to its longest; `--order` and `--normalize` are
the recipe's `dynamic_loss`. `--normalize none` shows the weights before their second step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def curve(longest: int, order: float, normalize: str) -> tuple[list[int], list[float]]:
    """Returns the lengths of the responses of a batch, and the weight of each.

    normalize: paper, mean or none.
    """
    import torch

    from zero_ds.model.losses import ResponseWeights

    lengths = torch.arange(2, longest + 1)
    weights = ResponseWeights(order, float(longest))
    if normalize != "none":
        weights = weights.normalized(normalize, *weights.sums(lengths))
    return lengths.tolist(), weights.of(lengths).tolist()


def main(
    out: Annotated[Path, typer.Option(help="Image file to write (.png, .pdf or .svg).")],
    order: Annotated[float, typer.Option(help="Exponent of the weights; 0.5 in the paper.", min=0)] = 0.5,
    normalize: Annotated[str, typer.Option(help="paper, mean or none.")] = "paper",
    longest: Annotated[list[int] | None, typer.Option(help="Longest response of a batch; repeatable.", min=3)] = None,
) -> None:
    """Draw the weights."""
    if normalize not in ("paper", "mean", "none"):
        raise typer.BadParameter(f"unknown --normalize {normalize}; use paper, mean or none")
    import matplotlib
    from matplotlib.figure import Figure

    from zero_ds.evaluation.report.charts import DPI, STYLE

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.8), layout="constrained")
        axes: Any = figure.add_subplot()
        lengths = longest or list(range(30, 301, 30))
        for number, length in enumerate(lengths):
            shade = matplotlib.colormaps["viridis"](number / max(1, len(lengths) - 1))
            axes.plot(*curve(length, order, normalize), color=shade, label=str(length))
        axes.set_xlabel("length of the response, tokens")
        axes.set_ylabel("weight of its tokens")
        axes.grid(axis="y")
        axes.legend(title="longest response", ncols=2, fontsize=8)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=DPI)
    print(out)


if __name__ == "__main__":
    typer.run(main)
