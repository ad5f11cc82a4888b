"""`zero-ds export`: a trained model as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import ChatTemplateOption
from zero_ds.runtime.errors import ConfigError


def export(
    out: Annotated[Path, typer.Option(help="New folder for the export.")],
    run: Annotated[
        Path | None,
        typer.Argument(help="Run or checkpoint folder with a trained vision encoder, or of a language model."),
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="The same as RUN, given as an option.")] = None,
    target: Annotated[
        str | None, typer.Option(help="Folder or hub id of the language model. Default: the run's full model.")
    ] = None,
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="llava: a class of transformers; remote-code: Python code next to the weights; "
            "causal-lm: a language model alone; auto: the first of these that can express the model.",
        ),
    ] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; or auto: the type in which the language model is stored.")
    ] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of a weights file.")] = "2GiB",
    proof: Annotated[
        str,
        typer.Option(
            help="full: load the folder in a new process and compare its answers; tensors: compare only the files."
        ),
    ] = "full",
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="Result of `zero-ds eval` to show on the model card; repeatable.")
    ] = None,
    chat_template: ChatTemplateOption = None,
) -> None:
    """Write vision encoder, adapter and language model as one Hugging Face folder that works without zero_ds.

    The folder is then loaded in a new process without zero_ds, and its answers are compared with the run's.

    Example: zero-ds export runs/quickstart/encoder --out runs/export
    """
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
        chat_template=chat_template,
    )
    print(f"{out}: {proof_sentence(result).replace('`', '')}")
