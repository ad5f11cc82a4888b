"""`zero-ds data`: look at a data set before training on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from zero_ds.data.samples import SampleEncoder

data = typer.Typer(no_args_is_help=True, help="Check a data set before training on it: zero-ds data check PATH.")

LOOKS = ("decode", "headers", "none")
"""Ways to look at images: decode each, read its header alone, or do not open it."""


@data.callback()
def _group() -> None:
    """Makes Typer treat `check` as a subcommand, although it is the only one."""


@data.command()
def check(
    path: Annotated[
        str, typer.Argument(help="Data file, folder of files, hub id, or name of a data set in datasets.yaml.")
    ],
    root: Annotated[
        str | None, typer.Option(help="Folder of the images. Default: the folder of the data file.")
    ] = None,
    files: Annotated[
        str | None, typer.Option(help="Pattern that chooses files of a folder or hub id, such as data/math-*.")
    ] = None,
    full_path: Annotated[
        bool, typer.Option("--full-path", help="Follow absolute image paths in records that give a full_path.")
    ] = False,
    allow_root: Annotated[
        list[str] | None,
        typer.Option(help="Further folder into which image paths may lead, through links as well; repeatable."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub id of a model: also count tokens as its tokenizer gives them.")
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="Longest sequence in tokens, as data.max_length of the planned run.", min=8)
    ] = 2048,
    tokens_per_image: Annotated[int, typer.Option(help="Tokens of an image, with --model.", min=0)] = 576,
    images: Annotated[
        str,
        typer.Option(
            "--pictures", help="How images are checked: decode (whole), headers (fast), or none (not at all)."
        ),
    ] = "decode",
    workers: Annotated[
        int | None, typer.Option(help="Number of worker processes. Default: one for each core.", min=0)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write check.json and lengths.png into.")] = None,
) -> None:
    """Read a whole data set and report every fault: records, image paths, images, chat templates, lengths.

    The exit status is 1 if there is a fault.

    Example: zero-ds data check llava_665k.json --model meta-llama/Llama-3.1-8B-Instruct --out runs/check
    """
    from zero_ds.config.loading import validate
    from zero_ds.config.schema import SourceConfig
    from zero_ds.data.sources import Records
    from zero_ds.data.survey import survey, write

    if images not in LOOKS:
        raise ConfigError(f"--pictures {images} is unknown{did_you_mean(images, list(LOOKS))}")
    source = validate(SourceConfig, path, what="PATH")
    options: dict[str, Any] = {"root": root, "files": files, "full_path": full_path or None}
    options["allowed_roots"] = tuple(allow_root) if allow_root else None
    source = source.model_copy(update={key: value for key, value in options.items() if value is not None})
    encoder = None if model is None else _sample_encoder(model, tokens_per_image, max_length)
    found = survey(
        Records([source], skip_bad=True),
        encoder=encoder,
        look=images,  # type: ignore[arg-type]
        workers=(os.cpu_count() or 1) if workers is None else workers,
    )
    print("\n".join(found.lines()))
    if out is not None:
        write(found, out, max_length)
        print(f"written: {out / 'check.json'}, {out / 'lengths.png'}")
    if found.faults:
        raise typer.Exit(1)


def _sample_encoder(model: str, tokens_per_image: int, max_length: int) -> SampleEncoder:
    """Returns an encoder that counts tokens as a model's tokenizer and chat template give them."""
    from zero_ds.data.conversations import ChatTemplate
    from zero_ds.data.samples import SampleEncoder
    from zero_ds.model.loading import load_tokenizer
    from zero_ds.runtime.hub import local_folder

    template = ChatTemplate(load_tokenizer(local_folder(model)))
    return SampleEncoder(template, "response", tokens_per_image=tokens_per_image, max_length=max_length)
