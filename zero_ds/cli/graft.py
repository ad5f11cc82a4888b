"""`zero-ds graft`: whether a trained vision encoder fits a full language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Weights = Annotated[Path, typer.Option(help="Run or checkpoint folder with a trained vision encoder.")]
Target = Annotated[str, typer.Option(help="Folder or hub id of the full language model.")]


def graft(
    weights: Weights,
    target: Target,
    surrogate: Annotated[str | None, typer.Option(help="Folder of its surrogate, if that was moved.")] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(help="Name of a difference in the report to accept, such as tokenizer; repeatable."),
    ] = None,
) -> None:
    """Check that a trained vision encoder fits a full language model. The graft itself needs no training and no copy.

    Prints every property that is compared; the exit status is 2 if one differs and is not accepted.
    """
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
