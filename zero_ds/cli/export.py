"""`zero-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError


def export(
    out: Annotated[Path, typer.Option(help="New folder.")],
    run: Annotated[Path | None, typer.Argument(help="Run or commit folder with a trained encoder.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The same, by name.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Language model: folder or hub id; the run's full model if empty.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="llava: transformers' own class; remote-code: with code beside the weights.")
    ] = "llava",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16, or auto: as the language model is stored.")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of a file of weights.")] = "2GiB",
    proof: Annotated[
        str, typer.Option(help="full: load the folder afresh and compare its answers; tensors: compare files only.")
    ] = "full",
    evaluation: Annotated[list[Path] | None, typer.Option(help="Result of `zero-ds eval` for the model card.")] = None,
) -> None:
    """Write encoder, adapter and language model as one Hugging Face folder, proved by loading it without zero_ds."""
    if (run is None) == (weights is None):
        raise ConfigError("name one run: zero-ds export RUN --out FOLDER.")
    from typing import cast

    from zero_ds.export import export_model, shard_bytes
    from zero_ds.export.card import proof_sentence

    size = shard_bytes(shard_size)
    result = export_model(
        cast(Path, run or weights),
        target,
        out,
        form=form,
        dtype=dtype,
        shard_bytes=size,
        proof=proof,
        evaluations=evaluation,
    )
    print(f"{out}: {proof_sentence(result).replace('`', '')}")
