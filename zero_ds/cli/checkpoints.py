"""`zero-ds import-released`, `zero-ds consolidate` and `zero-ds export-lora`: weights from and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError

Out = Annotated[Path, typer.Option(help="New folder.")]


def import_released(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the paper's authors (.pth).")],
    target: Annotated[str, typer.Option(help="Full language model that it was trained for: folder or hub id.")],
    out: Out,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="Folder of its surrogate; not needed for targets of 28, 32 or 80 layers, cut as in the paper."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Vision encoder that it started from: folder or hub id; without it, the CLIP of the recipes."
        ),
    ] = None,
    init_from: Annotated[
        list[Path] | None, typer.Option(help="Earlier results, such as the imported translator of an encoder.")
    ] = None,
) -> None:
    """Turn a released checkpoint (adapter and translator, or surrogate-trained encoder) into a result folder."""
    from zero_ds.training.checkpoint.released import import_released as run

    checkpoint = run(file, target, out, surrogate=surrogate, encoder=encoder, init_from=init_from or ())
    print(f"{file} -> {checkpoint}")


def consolidate(
    folder: Annotated[
        Path, typer.Argument(help="Folder saved by DeepSpeed's save_checkpoint, or a checkpoint that lost its weights.")
    ],
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(help="Recipe or YAML file of the run that saved it; without it, config.yaml in or above FOLDER."),
    ] = None,
) -> None:
    """Gather the weights of a run whose machines are gone, on one CPU machine, into a result folder."""
    from zero_ds.config.loading import load_run
    from zero_ds.training.checkpoint.consolidate import consolidate_shards, consolidate_state, holds_resume_state

    if holds_resume_state(folder):
        checkpoint = consolidate_state(folder, out)
    else:
        saved = [path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.is_file()]
        if recipe is None and not saved:
            raise ConfigError(f"say which run saved {folder}: --recipe with its config.yaml or the recipe's name.")
        checkpoint = consolidate_shards(folder, load_run(recipe or str(saved[0])), out)
    print(f"{folder} -> {checkpoint}")


def export_lora(
    weights: Annotated[Path, typer.Option(help="Folder of a run or checkpoint that was trained with LoRA.")], out: Out
) -> None:
    """Write a run's low-rank adapters as a folder that PEFT loads onto the target."""
    from zero_ds.training.checkpoint.peft_folder import write_peft_folder

    config = write_peft_folder(weights, out)
    print(
        f"{out}: low-rank adapters of rank {config.rank}, alpha {config.alpha:g}; PeftModel.from_pretrained loads them."
    )
