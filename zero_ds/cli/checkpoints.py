"""`zero-ds import-released`, `zero-ds consolidate` and `zero-ds export-lora`: weights in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError

Out = Annotated[Path, typer.Option(help="New folder for the result.")]


def import_released(
    file: Annotated[
        str,
        typer.Argument(
            help="Checkpoint of the paper's authors: a file (.pth), or MODEL/translator or MODEL/encoder from the hub, "
            "with the models llama-3.2-3b, llama-3.1-8b and llama-3.1-70b."
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the full language model that it belongs to. Default for a name: that model's."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the result. Default for a name: runs/MODEL/released-*.")
    ] = None,
    surrogate: Annotated[
        str | None,
        typer.Option(
            help="Folder of its surrogate. Not needed for targets of 28, 32 or 80 layers, whose cut the paper gives."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub id of the vision encoder that it started from. Default: the CLIP of the recipes."
        ),
    ] = None,
    init_from: Annotated[
        list[Path] | None,
        typer.Option(
            help="Earlier result that it builds on, such as the imported translator for an encoder; repeatable."
        ),
    ] = None,
) -> None:
    """Turn a released checkpoint (adapter and translator, or surrogate-trained encoder) into a result folder.

    Example: zero-ds import-released llama-3.1-8b/encoder
    """
    from zero_ds.runtime.files import check_vacant
    from zero_ds.training.checkpoint.released import fetch, find_named
    from zero_ds.training.checkpoint.released import import_released as run

    named = find_named(file)
    if named is not None:
        target, out = target or named.target, out or named.out
    if target is None or out is None:
        raise ConfigError(f"{file} is a file: name its language model with --target, and a new folder with --out.")
    check_vacant(out)  # before anything is downloaded
    path = Path(file).expanduser() if named is None else fetch(named)
    checkpoint = run(path, target, out, surrogate=surrogate, encoder=encoder, init_from=init_from or ())
    print(f"{file} -> {checkpoint}")


def consolidate(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Run or checkpoint, also one whose weights are lost, or a folder saved by DeepSpeed's save_checkpoint."
        ),
    ],
    out: Out,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Recipe or YAML file of the run that saved it. Default: config.yaml in FOLDER or next to it."
        ),
    ] = None,
    with_state: Annotated[
        bool, typer.Option("--with-state", help="Also write the resume state of a checkpoint as one file.")
    ] = False,
) -> None:
    """Gather the sharded weights of a run into a result folder, on one machine without GPUs."""
    from zero_ds.config.loading import load_run
    from zero_ds.training.checkpoint.consolidate import consolidate_checkpoint, consolidate_shards, holds_resume_state

    if holds_resume_state(folder):
        checkpoint = consolidate_checkpoint(folder, out, with_state=with_state)
    elif with_state:
        raise ConfigError(f"--with-state needs a checkpoint of zero_ds, and {folder} is not one; leave it out.")
    else:
        saved = [path for path in (folder / "config.yaml", folder.parent / "config.yaml") if path.is_file()]
        if recipe is None and not saved:
            raise ConfigError(f"say which run saved {folder}: --recipe with its config.yaml or the recipe's name.")
        checkpoint = consolidate_shards(folder, load_run(recipe or str(saved[0])), out)
    print(f"{folder} -> {checkpoint}")


def export_lora(
    weights: Annotated[Path, typer.Option(help="Run or checkpoint folder that was trained with LoRA.")],
    out: Out,
    target: Annotated[
        str | None, typer.Option(help="Folder or hub id of the run's target, if it is not where the run found it.")
    ] = None,
) -> None:
    """Write a run's low-rank adapters as a folder that PEFT can load onto the target."""
    from zero_ds.training.checkpoint.peft_folder import write_peft_folder

    config = write_peft_folder(weights, out, target)
    print(
        f"{out}: low-rank adapters of rank {config.rank}, alpha {config.alpha:g}; PeftModel.from_pretrained loads them."
    )
