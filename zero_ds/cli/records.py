"""`zero-ds eval records`: questions about held-out images."""

from __future__ import annotations

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
