"""`zero-ds data`: look at a data set before training on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError, did_you_mean

data = typer.Typer(no_args_is_help=True, help="Look at a data set before training on it.")
LOOKS = ("decode", "headers", "none")


@data.callback()
def _group() -> None:
    """Keeps `check` a word of its own while it is the only one."""


@data.command()
def check(
    path: Annotated[str, typer.Argument(help="Data file, folder of files, hub id, or name of a registered data set.")],
    root: Annotated[str | None, typer.Option(help="Folder of the images; the data file's own if empty.")] = None,
    files: Annotated[str | None, typer.Option(help="Which files of a folder or hub id, such as data/math-*.")] = None,
    full_path: Annotated[bool, typer.Option("--full-path", help="Follow absolute paths given as full_path.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Count tokens as this model's tokenizer and chat template give them.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="data.max_length of the run that is planned.", min=8)] = 2048,
    tokens_per_image: Annotated[int, typer.Option(help="Image tokens a picture, with --model.", min=0)] = 576,
    pictures: Annotated[str, typer.Option(help="What is read of pictures: decode, headers (fast) or none.")] = "decode",
    workers: Annotated[int | None, typer.Option(help="Processes; as many as cores if empty.", min=0)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for check.json and lengths.png.")] = None,
) -> None:
    """Read a whole data set and report what is wrong: records, paths, pictures, templates, lengths.

    Ends with exit status 1 if something is.
    """
    from zero_ds.config.loading import validate
    from zero_ds.config.schema import SourceConfig
    from zero_ds.data.conversations import ChatTemplate
    from zero_ds.data.samples import SampleEncoder
    from zero_ds.data.sources import Records
    from zero_ds.data.survey import survey, write
    from zero_ds.model.loading import load_tokenizer
    from zero_ds.runtime.hub import local_folder

    if pictures not in LOOKS:
        raise ConfigError(f"--pictures {pictures} is unknown{did_you_mean(pictures, list(LOOKS))}")
    source = validate(SourceConfig, path, what="PATH")
    given = {"root": root, "files": files, "full_path": full_path or None}
    source = source.model_copy(update={key: value for key, value in given.items() if value is not None})
    encoder = None
    if model is not None:
        template = ChatTemplate(load_tokenizer(local_folder(model)))
        encoder = SampleEncoder(template, "response", tokens_per_image=tokens_per_image, max_length=max_length)
    found = survey(
        Records([source], skip_bad=True),
        encoder=encoder,
        look=pictures,  # type: ignore[arg-type]
        workers=(os.cpu_count() or 1) if workers is None else workers,
    )
    print("\n".join(found.lines()))
    if out is not None:
        write(found, out, max_length)
        print(f"written: {out / 'check.json'}, {out / 'lengths.png'}")
    if found.faults:
        raise typer.Exit(1)
