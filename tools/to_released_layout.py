"""Writes trained weights of this package in the layout of the released checkpoints.

python tools/to_released_layout.py --weights runs/llama-3.2-3b/pretrain --out adapter_translator.pth
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import CheckpointError
from zero_ds.training.checkpoint.released import to_released


def main(
    weights: Annotated[Path, typer.Option(help="Folder of a run or checkpoint.")],
    out: Annotated[Path, typer.Option(help="New file (.pth).")],
) -> None:
    """Write vision encoder, adapter and translator under the names of the released checkpoints."""
    try:
        count = to_released(weights, out)
    except (ConfigError, CheckpointError) as error:
        print(f"to_released_layout: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    print(f"{out}: {count} tensors")


if __name__ == "__main__":
    typer.run(main)
