"""`zero-ds why`: the reason for which a run failed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import complete_recipe


def why(
    recipe: Annotated[str, typer.Argument(help="Recipe or YAML file of the run.", autocompletion=complete_recipe)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that the run was started with, such as out=FOLDER.")
    ] = None,
) -> None:
    """Say why the last attempt at a run failed, whichever rank failed first.

    The reason is read from failure.txt in the run folder. Reasons of earlier attempts follow it, the last one first.
    """
    from zero_ds.config.loading import load_run
    from zero_ds.runtime import failure

    out = Path(load_run(recipe, overrides).out)
    print(failure.read(out) or f"{out} has not failed.")
    for line in failure.earlier(out):
        print(f"earlier: {line}")
