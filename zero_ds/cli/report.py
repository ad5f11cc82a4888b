"""`zero-ds report`: the results of a quickstart run on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Option(help="Folder of `zero-ds quickstart`.")],
    controls: Annotated[bool, typer.Option("--controls", help="Include the control runs.")] = False,
) -> None:
    """Write report.json, report.md and a self-contained report.html of a quickstart run."""
    from zero_ds.evaluation.report.quickstart import write_quickstart_report

    print(write_quickstart_report(run, controls=controls)["headline"])
