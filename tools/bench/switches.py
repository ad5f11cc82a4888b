"""Measures the effect of settings: a stage with and without them, in turns in one run, and whether losses agree.

    python tools/bench/switches.py --runs runs --stage encoder --switch attention=sdpa --switch data.packing=true
    python tools/bench/switches.py --runs runs --stage pretrain --text --switch short_backward=false

Every contestant runs the same recipe on the same samples. `difference` is the largest relative difference of a step's
loss from the first contestant's; it is 0 or rounding for a setting that should not change the numbers.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import report
import step
import trainers
import typer
from turns import Group


def losses(out: Path) -> list[float]:
    """Returns the losses of a run's steps."""
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def difference(mine: list[float], base: list[float]) -> float:
    """Returns the largest relative difference over the steps that both runs have made."""
    return max(abs(a - b) / abs(b) for a, b in zip(mine, base, strict=False))


def main(
    runs: Annotated[Path, typer.Option(help="Folder with demo/ and quickstart/, as launch/quickstart.sh leaves it.")],
    switch: Annotated[
        list[str], typer.Option(help="Settings of a contestant: key=value and env:NAME=value, separated by blanks.")
    ],
    model: Annotated[str, typer.Option(help="Folder of recipes.")] = "smollm2-135m",
    stage: str = "encoder",
    text: Annotated[bool, typer.Option("--text", help="Train on the demo's texts, without images.")] = False,
    setting: Annotated[list[str] | None, typer.Option(help="key=value for all contestants; repeatable.")] = None,
    zero: str = "zero3_resident",
    precision: str = "bf16",
    ranks: int = 2,
    steps: int = 8,
    rounds: int = 5,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Compare settings with the unmodified recipe, which is the first contestant."""
    runs = runs.resolve()
    common, _ = step.settings(runs, zero, precision, 8, 4, ranks)
    common += [f"surrogate={runs / 'quickstart/surrogate'}", "init_from=[]", *(setting or [])]
    if text:
        common += [f"data.sources=[{{path: {runs / 'demo/data/text.json'}}}]", "adapter.match_embeddings=false"]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        groups = []
        for number, text in enumerate(["", *switch]):
            own, environment = step.words(text)
            overrides = [*common, *own, f"out={folder / f'run-{number}'}"]
            given = {"recipe": f"{model}/{stage}", "overrides": overrides, "environment": environment}
            groups.append(stack.enter_context(Group(text or "as it is", trainers.ours, ranks, folder, **given)))
            groups[-1].turn(steps)
        for _ in range(rounds):
            for group in groups:
                group.turn(steps)
        curves = [losses(folder / f"run-{number}") for number in range(len(groups))]
    base = [turn["seconds"] for turn in groups[0].found[1:]]
    rows: list[dict[str, Any]] = []
    for group, curve in zip(groups, curves, strict=True):
        seconds = [turn["seconds"] for turn in group.found[1:]]
        rows.append(
            {
                "setting": group.name,
                "seconds": [value / steps for value in seconds],
                # ratios of each round, because a machine that is slow for a while slows both
                "times": report.median([value / other for value, other in zip(seconds, base, strict=True)]),
                "peak_gib": group.found[-1]["peak_gib"],
                "difference": difference(curve, curves[0]),
            }
        )
    head = [f"{stage} stage", "s a step", "time", "peak GiB", "loss differs by"]
    cells = [[r["setting"], report.spread(r["seconds"]), r["times"], r["peak_gib"], r["difference"]] for r in rows]
    print(report.table(head, cells))
    report.write(out, {"stage": stage, "zero": zero, "settings": setting, "text": text, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
