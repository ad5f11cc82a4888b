"""The curve that matters: surrogate and grafted accuracy, and the cost of a step, against the first replaced layer k.

    python tools/sweep_layers.py --k 6 --k 10 --k 14 --k 18 --k 20 --k 22 --k 24 --seeds 3 --out runs/sweep

Each point is the quickstart's own chain of commands with `--replace k:last`. Interrupt it when you like: finished steps
are not repeated. Writes sweep.json and sweep.png into --out.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from zero_ds.commands.quickstart import Plan
from zero_ds.evaluation.run import read_evaluation
from zero_ds.evaluation.summary import summary
from zero_ds.files import write_atomically
from zero_ds.monitor import read_metrics, set_up_logging
from zero_ds.pipeline import Pipeline

LEFT_OUT = {"trajectory", "graft", "export"}


def main(
    k: Annotated[list[int], typer.Option(help="First replaced layer; give several.")],
    last: Annotated[int, typer.Option(help="Last replaced layer.")] = 28,
    seeds: Annotated[int, typer.Option(help="Runs per k.")] = 1,
    steps_scale: Annotated[float, typer.Option(help="Multiplies the training steps.")] = 1.0,
    demo: Annotated[Path, typer.Option(help="Folder of `zero-ds demo`.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/sweep"),
) -> None:
    """Runs every k and seed, and draws the curve from what is finished after each."""
    set_up_logging()
    points: list[dict[str, Any]] = []
    for seed in range(seeds):
        for first in sorted(k):
            run = out / f"k{first}-seed{seed}"
            plan = Plan(run, demo, steps_scale, seed, f"{first}:{last}")
            Pipeline(run, [step for step in plan.main() if step.name not in LEFT_OUT]).run()
            points.append({"k": first, "last": last, "seed": seed, **measured(run)})
            write_atomically(out / "sweep.json", json.dumps(points, indent=1) + "\n")
            draw(points, out / "sweep.png")


def measured(run: Path) -> dict[str, Any]:
    """Accuracies with intervals and median seconds of an encoder step of one finished run."""
    evaluations = {name: read_evaluation(run / f"evaluation/{name}.json") for name in ("surrogate", "grafted")}
    result = summary(evaluations)
    seconds = [record["seconds"] - record["data_wait_seconds"] for record in read_metrics(run / "encoder")]
    return {
        "accuracy": result["accuracy"],
        "accuracy_by": result["accuracy_by"],
        "step_seconds": statistics.median(seconds),
    }


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Accuracy (left) and step time (right) against k: a dot a run with its interval, a line through the means."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), width_ratios=(2, 1), layout="constrained")
    colors = {
        "surrogate": "tab:blue",
        "grafted": "tab:orange",
        "surrogate_shuffled_image": "tab:gray",
        "grafted_shuffled_image": "tab:brown",
    }
    layers = sorted({point["k"] for point in points})
    for offset, (name, color) in enumerate(colors.items()):
        shares = [(point["k"], point["accuracy"][name]) for point in points]
        xs = [layer + 0.15 * (offset - 1.5) for layer, _ in shares]
        values = [share["value"] for _, share in shares]
        errors = [
            [share["value"] - share["low"] for _, share in shares],
            [share["high"] - share["value"] for _, share in shares],
        ]
        left.errorbar(xs, values, errors, fmt="o", markersize=3, linewidth=0.8, color=color)
        means = [statistics.mean(s["value"] for layer, s in shares if layer == wanted) for wanted in layers]
        left.plot(layers, means, color=color, label=name.replace("_", " "))
    left.set(xlabel="first replaced layer k", ylabel="accuracy, free generation", ylim=(0, 1))
    left.legend(frameon=False, fontsize=8)
    right.plot([p["k"] for p in points], [p["step_seconds"] for p in points], "o", markersize=3, color="tab:green")
    right.set(xlabel="first replaced layer k", ylabel="seconds per encoder step", ylim=(0, None))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
