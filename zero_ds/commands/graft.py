"""`zero-ds graft`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.config import ConfigError

Weights = Annotated[Path, typer.Option(help="Run or commit folder with a trained encoder.")]
Target = Annotated[str, typer.Option(help="Full language model: folder or hub id.")]


def graft(weights: Weights, target: Target) -> None:
    """Check that a trained encoder belongs to a full language model; the graft itself needs no training and no copy."""
    from zero_ds.checkpoint import find_commit
    from zero_ds.graft import compatibility
    from zero_ds.hub import local_folder

    checks = compatibility(find_commit(weights), local_folder(target))
    for check in checks:
        print(
            f"{'fits' if check.fits else 'DIFFERS':8}{check.what}: {check.here}"
            + ("" if check.fits else f" (trained with {check.trained_with})")
        )
    if not all(check.fits for check in checks):
        raise ConfigError(f"{weights} was not trained for {target}; see the lines above.")
    print(f"{weights} can be grafted into {target}.")
