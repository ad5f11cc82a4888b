"""Plans both routes for the models that have recipes and are not in the paper; prints the table in docs/planning.md.

python tools/plan_models.py [--gpus 128] [--gpu H100] [--price 2.5]
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu  # noqa: E402
from zero_ds.training.planning.plan import plan  # noqa: E402
from zero_ds.training.planning.route import total  # noqa: E402
from zero_ds.training.planning.tables import count, number  # noqa: E402

MODELS = ("qwen3-8b", "mistral-small", "qwen3-32b", "llama-3.3-70b", "gpt-oss-120b", "qwen3-235b-a22b")
DENSE = {"qwen3-235b-a22b": 12288}
"""Width of dense translators that are planned besides copied ones: as many units as the chosen experts have."""


@dataclass(frozen=True)
class Line:
    """A row of the table."""

    model: str
    decoder: float
    """Parameters of the full decoder."""
    surrogate: float
    """Parameters of the surrogate."""
    translator: float
    active: tuple[float, float] | None
    """Parameters that compute a token, of decoder and surrogate; None for a dense decoder."""
    hours: tuple[float, float]
    """Hours of the surrogate's route and of the baseline's."""
    cost: tuple[float, float]
    """Cost at the price."""

    def cells(self) -> list[str]:
        """Returns the cells of the row."""
        ours, full = self.hours
        decoder, surrogate = count(self.decoder), count(self.surrogate)
        if self.active is not None:
            decoder, surrogate = f"{decoder} ({count(self.active[0])})", f"{surrogate} ({count(self.active[1])})"
        saved = self.cost[1] - self.cost[0]
        return [
            *(self.model, decoder, surrogate, count(self.translator), number(ours), number(full)),
            *(f"{100 * (1 - ours / full):.0f} %", f"{saved:,.0f}"),
        ]


def line(model: str, cluster: Cluster, width: int | None = None) -> Line:
    """Plans a model's routes."""
    found = plan(f"{model}/decoder", None, cluster, dense_width=width)
    ours, full = found.routes
    sums = [total([leg.hours() for leg in route.legs]) for route in (ours, full)]
    hours = (sums[0] or 0.0, sums[1] or 0.0)
    pretrain, decoder = ours.legs[0], full.legs[-1]
    sizes = decoder.plan.size.decoder, pretrain.plan.size.decoder
    return Line(
        model + (f", dense translator of {width}" if width else ""),
        sizes[0].parameters,
        sizes[1].parameters,
        sum(pretrain.plan.size.groups["translator"]),
        (sizes[0].active, sizes[1].active) if sizes[0].active and sizes[1].active else None,
        hours,
        (cluster.cost(hours[0]) or 0.0, cluster.cost(hours[1]) or 0.0),
    )


def main(
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 128,
    gpu: Annotated[str, typer.Option(help="Kind of GPU.")] = "H100",
    price: Annotated[float, typer.Option(help="Price of a GPU-hour.")] = 2.5,
) -> None:
    name, peak, link = find_gpu(gpu)
    inside, between = bandwidths(None, link)
    cluster = Cluster(gpus, name=name, peak=peak, inside=inside, between=between, price=price)
    print("| model | decoder (active) | surrogate (active) | translator | surrogate's route, h | baseline, h ", end="")
    print(f"| saved | at {price:g} a GPU-hour |")
    print("|---|---|---|---|---|---|---|---|")
    for model in MODELS:
        for width in (None, DENSE[model]) if model in DENSE else (None,):
            print("| " + " | ".join(line(model, cluster, width).cells()) + " |")


if __name__ == "__main__":
    typer.run(main)
