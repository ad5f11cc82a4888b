"""`zero-ds profile`: where the time of a training step goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import complete_recipe


def profile(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a recipe (see `zero-ds recipes`); or a YAML file.", autocompletion=complete_recipe
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings that replace the recipe's, such as zero=zero2 compile=true.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of steps to record.")] = 3,
    skip: Annotated[int, typer.Option(min=1, help="Number of steps before the first recorded one.")] = 5,
) -> None:
    """Make a few steps under torch's profiler, and show where their time goes.

    Prints the phases of a step (data, forward, backward, update) and the kinds of operations (matrix products,
    attention, communication, ...), and writes a trace for the browser. No checkpoint is saved. The folder is that of
    the recipe with `-profile` added.

    On several ranks: launch/train.sh RECIPE profile.steps=3 profile.stop=true out=runs/profile

    Example: zero-ds profile smollm2-135m/encoder zero=zero2
    """
    from zero_ds.config.loading import load_run

    out = Path(load_run(recipe, overrides).out)
    out = out.with_name(out.name + "-profile")
    settings = [f"profile.steps={steps}", f"profile.skip={skip}", "profile.stop=true", f"out={out}"]
    config = load_run(recipe, [*(overrides or []), *settings])
    from zero_ds.training.profile import FOLDER, TRACE, read_profile
    from zero_ds.training.train import train

    train(config)
    print(read_profile(out).table())
    print(f"\nOpen {out / FOLDER / TRACE} in https://ui.perfetto.dev or chrome://tracing.")
