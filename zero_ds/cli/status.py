"""`zero-ds status`: where runs are: step, loss, time left, last checkpoint, reason of the last failure."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from zero_ds.training.status import Status


def status(
    folders: Annotated[
        list[Path] | None, typer.Argument(help="Folders of runs, or folders above them.", show_default="runs")
    ] = None,
    watch: Annotated[
        float | None, typer.Option(help="Print the table again after this many seconds, until Ctrl-C.", min=1)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per run, for other programs.")] = False,
) -> None:
    """List runs with their step, loss, time left, last checkpoint and the reason of the last failure.

    It reads small files of the run folders, so it may be used while a run trains, on any machine that sees them.

    Example: zero-ds status runs
    """
    from zero_ds.training.status import statuses

    while True:
        found = statuses(folders or [Path("runs")])
        if as_json:
            for one in found:
                print(json.dumps(one.to_json()))
        else:
            _print_table(found)
        if watch is None:
            return
        time.sleep(watch)


def _print_table(found: list[Status]) -> None:
    rows: list[tuple[str, ...]] = [("run", "state", "step", "loss", "held-out", "time left", "checkpoint")]
    rows += [_row(one) for one in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number and (reason := found[number - 1].reason):
            print(f"  reason: {reason}")


def _row(one: Status) -> tuple[str, ...]:
    from zero_ds.runtime.console import duration

    checkpoint = one.checkpoint or "-"
    if one.checkpoint_age is not None:
        checkpoint += f", {duration(one.checkpoint_age)} ago"
    if one.best is not None and one.best != one.checkpoint:
        checkpoint += f"; best {one.best}"
    return (
        one.run,
        one.state,
        f"{one.step}/{'?' if one.steps is None else one.steps}",
        "-" if one.loss is None else f"{one.loss:.4g}",
        "-" if one.validation_loss is None else f"{one.validation_loss:.4g}",
        "-" if one.seconds_left is None else duration(one.seconds_left),
        checkpoint,
    )
