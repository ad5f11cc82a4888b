"""`zero-ds graft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Weights = Annotated[Path, typer.Option(help="Run or commit folder with a trained encoder.")]
Target = Annotated[str, typer.Option(help="Full language model: folder or hub id.")]


def graft(
    weights: Weights,
    target: Target,
    surrogate: Annotated[str | None, typer.Option(help="Where its surrogate lies now, if it was moved.")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="Accept a difference by its name in the report, such as tokenizer.")
    ] = None,
) -> None:
    """Check that a trained encoder belongs to a full language model; the graft itself needs no training and no copy."""
    from zero_ds.grafting.graft import compatibility, refuse_differences
    from zero_ds.runtime.hub import local_folder
    from zero_ds.training.checkpoint.checkpoint import find_checkpoint

    commit = find_checkpoint(weights)
    checks = compatibility(commit, local_folder(target), thorough=True, surrogate=surrogate)
    accepted = [check.name for check in checks if check.fits is False and check.name in (accept or ())]
    unknown = [check.name for check in checks if check.fits is None]
    for check in checks:
        verdict = {True: "fits", False: "DIFFERS", None: "unknown"}[check.fits]
        differs = check.fits is False or (check.fits is None and check.trained_with != check.here)
        print(
            f"{'accepted' if check.name in accepted else verdict:<10}{check.name:<13}{check.here}"
            + (f" (trained with: {check.trained_with})" if differs else "")
        )
    refuse_differences(commit, target, checks, accept or ())
    print(
        f"{weights} can be grafted into {target}"
        + (f", with another {', '.join(accepted)}, which was accepted" if accepted else "")
        + (f"; not compared: {', '.join(unknown)}." if unknown else ".")
    )
