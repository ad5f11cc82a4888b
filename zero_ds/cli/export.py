"""`zero-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError


def export(
    out: Annotated[Path, typer.Option(help="New folder.")],
    run: Annotated[Path | None, typer.Argument(help="Run or checkpoint folder with a trained encoder.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The run or checkpoint folder, as an option.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Language model: folder or hub id; by default the run's full model.")
    ] = None,
    form: Annotated[
        str,
        typer.Option("--format", help="llava: transformers' own class; remote-code: with code next to the weights."),
    ] = "llava",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as the language model is stored.")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of a weights file.")] = "2GiB",
    proof: Annotated[
        str, typer.Option(help="full: load the folder afresh and compare its answers; tensors: compare files only.")
    ] = "full",
    evaluation: Annotated[list[Path] | None, typer.Option(help="Result of `zero-ds eval` for the model card.")] = None,
) -> None:
    """Write encoder, adapter and language model as one Hugging Face folder, proved by loading it without zero_ds."""
    source = run or weights
    if source is None or (run is not None and weights is not None):
        raise ConfigError("name one run: zero-ds export RUN --out FOLDER.")
    from zero_ds.export import export_model, shard_bytes
    from zero_ds.export.card import proof_sentence

    result = export_model(
        source,
        target,
        out,
        form=form,
        dtype=dtype,
        shard_bytes=shard_bytes(shard_size),
        proof=proof,
        evaluations=evaluation,
    )
    print(f"{out}: {proof_sentence(result).replace('`', '')}")
