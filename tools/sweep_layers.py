"""Draws accuracy of surrogate and graft, and the cost of a step, against the first replaced layer k.

    python tools/sweep_layers.py --k 6 --k 10 --k 14 --k 18 --k 20 --k 22 --k 24 --seeds 3 --out runs/sweep

Each point is the quickstart's own chain of commands with `--replace k:last`. At the end the step of every surrogate and
of the full model is timed, one after the other, which needs an otherwise idle machine. The sweep may be interrupted at
any time, because finished steps are not repeated. Writes sweep.json and sweep.png into --out.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from zero_ds.cli.demo import LLM
from zero_ds.cluster.pipeline import Pipeline
from zero_ds.cluster.quickstart import AGAINST_TARGET, Quickstart
from zero_ds.evaluation.heldout.results import read_evaluation
from zero_ds.evaluation.heldout.summary import summary
from zero_ds.evaluation.report.facts import step_seconds
from zero_ds.grafting.compatibility import run_config
from zero_ds.runtime.console import set_up_logging
from zero_ds.runtime.files import write_atomically
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.planning.flops import encoder_step_ratio

STEPS = {"surrogate", "translator", "pretrain", "encoder", "evaluation"}
TIMED_STEPS = 10


def main(
    k: Annotated[list[int], typer.Option(help="First replaced layer; give several.")],
    last: Annotated[int, typer.Option(help="Last replaced layer.")] = 28,
    seeds: Annotated[int, typer.Option(help="Runs per k.")] = 1,
    translators: Annotated[int, typer.Option(help="Translators that take the place of the layers.")] = 1,
    steps_scale: Annotated[float, typer.Option(help="Multiplies the training steps.")] = 1.0,
    images: Annotated[int | None, typer.Option("--pictures", help="Evaluate on the first n held-out images.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="key=value for every training run.")] = None,
    demo: Annotated[Path, typer.Option(help="Folder of `zero-ds demo`.")] = Path("runs/demo"),
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs/sweep"),
) -> None:
    """Runs every k and seed, and redraws the curve after each."""
    set_up_logging()
    plans = {
        (seed, first): Quickstart(
            out / f"k{first}-seed{seed}",
            demo,
            str(LLM),
            f"{first}:{last}",
            steps_scale,
            seed,
            translators,
            images=images,
            overrides=tuple(overrides or ()),
        )
        for seed in range(seeds)
        for first in sorted(k)
    }
    points: list[dict[str, Any]] = []
    for (seed, first), plan in plans.items():
        Pipeline(plan.out, [step for step in plan.main_steps() if step.name in STEPS]).run()
        points.append({"k": first, "last": last, "seed": seed, **measured(plan.out)})
        save(points, None, out)
    timed = [plan for (seed, _), plan in plans.items() if seed == 0]
    for plan in timed:
        Pipeline(plan.out, [plan.cost("step-cost", TIMED_STEPS)]).run()
    Pipeline(timed[-1].out, [timed[-1].cost("full-cost", TIMED_STEPS, AGAINST_TARGET)]).run()
    costs = {
        "full_seconds": step_seconds(timed[-1].out / "full-cost"),
        "surrogate_seconds": {
            first: step_seconds(plan.out / "step-cost") for (seed, first), plan in plans.items() if seed == 0
        },
    }
    save(points, costs, out)


def save(points: list[dict[str, Any]], costs: dict[str, Any] | None, out: Path) -> None:
    write_atomically(out / "sweep.json", json.dumps({"points": points, "costs": costs}, indent=1) + "\n")
    draw(points, costs, out / "sweep.png")


def measured(run: Path) -> dict[str, Any]:
    """Returns accuracies with intervals, and the computed cost of an encoder step relative to the full model's."""
    evaluations = {name: read_evaluation(run / f"evaluation/{name}.json") for name in ("surrogate", "grafted")}
    result = summary(evaluations)
    distilled = run_config(find_checkpoint(run / "encoder")).distill.active
    return {
        "accuracy": result["accuracy"],
        "accuracy_by": result["accuracy_by"],
        "flops_ratio": encoder_step_ratio(run / "surrogate", distilled=distilled),
    }


def draw(points: list[dict[str, Any]], costs: dict[str, Any] | None, path: Path) -> None:
    """Draws accuracy (left) and step time (right) against k: a dot per run with its interval, a line for the means."""
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
    if costs:
        times = {first: seconds / costs["full_seconds"] for first, seconds in costs["surrogate_seconds"].items()}
        right.plot(list(times), list(times.values()), "o-", markersize=3, color="tab:green", label="time, measured")
    ratios = sorted({(p["k"], p["flops_ratio"]) for p in points})
    right.plot(*zip(*ratios, strict=True), "--", color="tab:green", label="decoder FLOPs, computed")
    right.axhline(1, color="tab:gray", linewidth=0.8)
    right.set(xlabel="first replaced layer k", ylabel="encoder step, relative to the full model", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    typer.run(main)
