"""`zero-ds eval records` and `zero-ds eval loss`: questions about held-out images, and the loss on held-out samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def records(
    weights: Annotated[Path, typer.Option(help="Folder of a run or checkpoint with a trained vision encoder.")],
    decoder: Annotated[
        str, typer.Option(help="Language model to plug the encoder into: its surrogate, or its target (the graft).")
    ],
    records: Annotated[Path, typer.Option(help="Evaluation records: a JSON list of questions about images.")],
    out: Annotated[Path, typer.Option(help="Result file (JSON).")],
    name: Annotated[
        str | None, typer.Option(help="Name in tables and plots; default: that of the result file.")
    ] = None,
    images: Annotated[int | None, typer.Option("--pictures", help="Use only the first n images.", min=2)] = None,
    batch: Annotated[int, typer.Option(help="Records per forward pass.", min=1)] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Length limit of an answer, in tokens.", min=1)] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the assignment of other images in the control.", min=0)] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    accept: Annotated[
        list[str] | None, typer.Option(help="Accept a difference that `zero-ds graft` names; repeatable.")
    ] = None,
) -> None:
    """Ask about held-out images, with the correct image and with another one: free answers and forced choice."""
    from zero_ds.cli.options import precision
    from zero_ds.evaluation.heldout.evaluate import RecordOptions, evaluate_records
    from zero_ds.evaluation.heldout.results import CONDITIONS

    options = RecordOptions(
        limit_images=images,
        batch_size=batch,
        max_new_tokens=max_new_tokens,
        seed=seed,
        dtype=precision(dtype),
        accept=tuple(accept or ()),
    )
    result = evaluate_records(weights, decoder, records, name or out.stem, options)
    result.write(out)
    for condition in CONDITIONS:
        words = [word for item in result.of(condition) for word in item.words]
        free = sum(word.free_correct for word in words) / max(1, len(words))
        forced = sum(word.forced_correct for word in words) / max(1, len(words))
        print(f"{result.name}, {condition} images: {free:.1%} of {len(words)} words free, {forced:.1%} forced choice")


def loss(
    weights: Annotated[Path, typer.Argument(help="Folder of a run or checkpoint, such as RUN/best.")],
    data: Annotated[
        str | None, typer.Option(help="Data file, folder or hub id. Default: the samples that the run holds out.")
    ] = None,
    root: Annotated[str | None, typer.Option(help="Folder or archive of the images, with --data.")] = None,
    decoder: Annotated[
        str | None, typer.Option(help="Language model to plug the encoder into. Default: the one of the run.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Samples per forward pass.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Result file (JSON).")] = None,
) -> None:
    """Measure the mean next-token loss on held-out samples, on as many ranks as the launcher started."""
    from zero_ds.cli.options import precision
    from zero_ds.config.schema import SourceConfig
    from zero_ds.evaluation.heldout.loss import heldout_loss
    from zero_ds.runtime import distributed
    from zero_ds.runtime.errors import ConfigError
    from zero_ds.runtime.files import write_atomically

    if root is not None and data is None:
        raise ConfigError("--root belongs to --data; name the data as well.")
    sources = [] if data is None else [SourceConfig(path=data, root=root)]
    found = heldout_loss(weights, sources, decoder=decoder, batch=batch, dtype=precision(dtype))
    if not distributed.is_rank_zero():
        return
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}.") from None
    skipped = f", {found['skipped_samples']:.0f} skipped" if found["skipped_samples"] else ""
    print(f"loss {found['loss']:.6f} on {found['tokens']:.0f} tokens of {found['samples']:.0f} samples{skipped}")
