"""Measures how time and memory of a step grow with ranks, layers and sequence length, and fits the trends.

    python tools/bench/scaling.py --runs runs --out scaling.json

Ranks and layers: the encoder stage of the recipe on the demo's data, with a group of ranks for each number of ranks and
each cut, in turns. Length: the decoder's part of a step in one process, on random weights, with the same number of
tokens in every step. Trends are fitted by least squares: a line over layers, and a + b x length for the seconds per
token.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import report
import step
import surrogate
import trainers
import typer
from turns import Group


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """Fits y = at_zero + slope x by least squares; r2 is the share of y's variance that the line explains."""
    import numpy as np

    slope, at_zero = np.polyfit(x, y, 1)
    left = np.asarray(y) - (at_zero + slope * np.asarray(x))
    whole = float(np.var(y))
    return {"at_zero": float(at_zero), "slope": float(slope), "r2": 1 - float(np.var(left)) / whole if whole else 1.0}


def over_lengths(target: Path, lengths: list[int], tokens: int, rounds: int, attention: str) -> list[dict[str, Any]]:
    """Measures seconds per token of the decoder's step for each length, with equally many tokens in every step."""
    import torch

    decoder = surrogate.Decoder(target, None, torch.bfloat16, attention)
    seconds: dict[int, list[float]] = {length: [] for length in lengths}
    for number in range(rounds + 1):
        for length in lengths:
            started = time.perf_counter()
            decoder.step(max(1, tokens // length), length, max(1, length // 3))
            if number:  # the first round does not count
                seconds[length].append((time.perf_counter() - started) / (max(1, tokens // length) * length))
    return [{"length": length, "seconds_a_token": times} for length, times in seconds.items()]


def main(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    model: Annotated[str, typer.Option(help="Folder of recipes.")] = "smollm2-135m",
    cut: Annotated[list[str] | None, typer.Option(help="Layers that one translator replaces, first:last.")] = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a sequence; repeatable.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of a step in the series over lengths.")] = 1024,
    zero: Annotated[str, typer.Option(help="DeepSpeed config.")] = "zero3_resident",
    setting: Annotated[list[str] | None, typer.Option(help="key=value of the recipe; repeatable.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of a turn.")] = 8,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Measure steps over ranks, layers and lengths."""
    from zero_ds.config.loading import load_run
    from zero_ds.model.layer_plan import LayerPlan, Replaced

    runs, cuts = runs.resolve(), cut or ["24:28", "16:28", "8:28"]
    target = Path(load_run(f"{model}/encoder", setting).target).expanduser()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        groups: list[tuple[int, int, Group]] = []
        full = surrogate.depth(target)
        for ranks, layers in [(1, None), (2, None), *((2, layers) for layers in cuts)]:
            common, _ = step.settings(runs, zero, "bf16", 8, 4, ranks)
            settings = ["decoder=target"]
            kept = full
            if layers is not None:
                small = folder / layers.replace(":", "-")
                step.build(target, layers, small)
                settings, kept = [f"surrogate={small}"], LayerPlan(full, (Replaced.parse(layers),)).surrogate_depth
            overrides = [*common, *(setting or []), *settings, "init_from=[]", f"out={folder / f'run-{len(groups)}'}"]
            called = f"{ranks} ranks, {kept} layers"
            given = {"recipe": f"{model}/encoder", "overrides": overrides}
            group = stack.enter_context(Group(called, trainers.ours, ranks, folder, **given))
            group.turn(steps)
            groups.append((ranks, kept, group))
        for _ in range(rounds):
            for _, _, group in groups:
                group.turn(steps)
        rows: list[dict[str, Any]] = [
            {
                "ranks": ranks,
                "layers": kept,
                "seconds": [turn["seconds"] / steps for turn in group.found[1:]],
                "peak_gib": group.found[-1]["peak_gib"],
            }
            for ranks, kept, group in groups
        ]
    two = [row for row in rows if row["ranks"] == 2]
    layers_of = [float(row["layers"]) for row in two]
    trends = {
        "seconds over layers": line(layers_of, [report.median(row["seconds"]) for row in two]),
        "peak GiB over layers": line(layers_of, [row["peak_gib"] for row in two]),
    }
    lengths = length or [32, 64, 128, 256, 512]
    series = {how: over_lengths(target, lengths, tokens, rounds, how) for how in ("eager", "sdpa")}
    for how, found in series.items():
        medians = [report.median(row["seconds_a_token"]) for row in found]
        trends[f"seconds a token over length, {how}"] = line([float(length) for length in lengths], medians)
    cells = [[r["ranks"], r["layers"], report.spread(r["seconds"]), r["peak_gib"]] for r in rows]
    print(report.table(["ranks", "layers", "s a step", "peak GiB of a rank"], cells))
    speed = [
        [length, *(1e3 * report.median(series[how][number]["seconds_a_token"]) for how in series)]
        for number, length in enumerate(lengths)
    ]
    print("\n" + report.table(["length", *(f"ms a token, {how}" for how in series)], speed))
    lines = [[name, *(found[key] for key in ("at_zero", "slope", "r2"))] for name, found in trends.items()]
    print("\n" + report.table(["trend", "at zero", "slope", "r2"], lines))
    report.write(out, {"steps": rows, "lengths": series, "trends": trends})


if __name__ == "__main__":
    typer.run(main)
