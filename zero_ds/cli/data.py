"""`zero-ds data`: look at a data set, or at single samples of it, before training on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zero_ds.cli.options import ChatTemplateOption, complete_recipe
from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from zero_ds.config.schema import RunConfig, SourceConfig
    from zero_ds.data.samples import SampleEncoder
    from zero_ds.data.sources import Records

data = typer.Typer(
    no_args_is_help=True,
    help="Look at a data set before training on it: zero-ds data check PATH, zero-ds data show RECIPE 0 1 2.",
)

RootOption = Annotated[
    str | None,
    typer.Option(help="Folder of the images, or zip or tar file with them. Default: the folder of the data file."),
]
FilesOption = Annotated[
    str | None, typer.Option(help="Pattern that chooses files of a folder or hub id, such as data/math-*.")
]
SubsetOption = Annotated[str | None, typer.Option(help="Subset of a folder or hub id, which the hub calls its config.")]
SplitOption = Annotated[str | None, typer.Option(help="Split of a folder or hub id, such as train.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or hash of a hub id.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(metavar="WHAT=COLUMN", help="Column that holds the image, question, answer or caption; repeatable."),
]

LOOKS = ("decode", "headers", "none")
"""Ways to look at images: decode each, read its header alone, or do not open it."""


@data.command()
def check(
    path: Annotated[
        str, typer.Argument(help="Data file, folder of files, hub id, or name of a data set in datasets.yaml.")
    ],
    root: RootOption = None,
    files: FilesOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    column: ColumnOption = None,
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
    chat_template: ChatTemplateOption = None,
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
    from zero_ds.data.sources import Records
    from zero_ds.data.survey import survey, write

    if images not in LOOKS:
        raise ConfigError(f"--pictures {images} is unknown{did_you_mean(images, list(LOOKS))}")
    options: dict[str, Any] = {"root": root, "files": files, "full_path": full_path or None}
    options |= {"subset": subset, "split": split, "revision": revision, "columns": _columns(column)}
    options["allowed_roots"] = tuple(allow_root) if allow_root else None
    source = _source(path, options)
    encoder = None if model is None else _sample_encoder(model, chat_template, tokens_per_image, max_length)
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


@data.command()
def show(
    what: Annotated[str, typer.Argument(help="Recipe of a run, or PATH of a data set as for `check`, with --model.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NUMBER...] [KEY=VALUE...]", help="Numbers of samples from 0 on, and settings of the recipe."
        ),
    ] = None,
    root: RootOption = None,
    files: FilesOption = None,
    subset: SubsetOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    column: ColumnOption = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the language model, for a PATH.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or hub id of the vision encoder, for a PATH.")] = None,
    chat_template: ChatTemplateOption = None,
    out: Annotated[Path | None, typer.Option("--html", help="File to write a page of these samples into.")] = None,
) -> None:
    """Show samples as the model sees them: images after padding, text with the trained tokens marked, token ids.

    With a recipe, the numbers are places in the order of the run's first epoch. No weights are loaded.

    Example: zero-ds data show runs/encoder.yaml 0 1 2 --html samples.html
    """
    import sys

    from zero_ds.config.loading import load_run, recipe_names
    from zero_ds.data.show import look, page, terminal
    from zero_ds.runtime.files import write_atomically

    numbers = [int(word) for word in words or [] if word.isdigit()] or [0]
    settings = [word for word in words or [] if not word.isdigit()]
    options: dict[str, Any] = {"root": root, "files": files, "subset": subset, "split": split}
    options |= {"revision": revision}
    options |= {"columns": _columns(column)}
    if what.endswith((".yaml", ".yml")) or what in recipe_names():
        given = next((name for name, value in options.items() if value is not None), None)
        if given or model or encoder or chat_template:
            name = given or "model, --encoder or --chat-template"
            raise ConfigError(f"--{name} is for a PATH; a recipe takes settings such as data.max_length=4096.")
        config = load_run(what, ["out=.", *settings])  # nothing is written there
    else:
        config = _config_of_path(_source(what, options), settings, model, encoder, chat_template)
    records, sample_encoder = _as_trained(config)
    shown = []
    for number in numbers:
        if number >= len(records):
            raise ConfigError(f"there is no sample {number}; the data has samples 0 to {len(records) - 1}.")
        shown.append(look(number, records[number], sample_encoder))
    if out is not None:
        write_atomically(out, page(f"Samples of {what}", shown))
    print("\n".join(terminal(each, colors=sys.stdout.isatty()) for each in shown), end="")
    if out is not None:
        print(f"written: {out}")


@data.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="Recipe of the run.", autocompletion=complete_recipe)],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value, as for `train`.")] = None,
    out: Annotated[Path, typer.Option(help="Folder to write the tokens into; data.prepared of the run.")] = Path(
        "prepared"
    ),
    workers: Annotated[
        int | None, typer.Option(help="Number of worker processes. Default: one for each core.", min=0)
    ] = None,
) -> None:
    """Tokenise the data of a run once, and size its images: training with data.prepared=FOLDER then only reads tokens.

    Ids and losses are the same. A call that was interrupted goes on where it ended.

    Example: zero-ds data prepare runs/encoder.yaml --out data/prepared
    """
    from zero_ds.config.loading import load_run
    from zero_ds.data.prepared import prepare as write_tokens

    config = load_run(recipe, ["out=.", *(overrides or []), "data.prepared=null"])
    records, sample_encoder = _as_trained(config)
    count = (os.cpu_count() or 1) if workers is None else workers
    faults = write_tokens(records, sample_encoder, out, count)
    unusable = f"; {faults:,} of them cannot be used" if faults else ""
    print(f"{len(records):,} samples written to {out}{unusable}")


def _columns(column: list[str] | None) -> dict[str, str] | None:
    """Returns columns by their meaning, from options such as `image=img`."""
    pairs = [word.partition("=") for word in column or []]
    for what, separator, name in pairs:
        if not (what and separator and name):
            raise ConfigError(f"--column {what}{separator}{name} must be WHAT=COLUMN, such as --column image=img.")
    return {what: name for what, _, name in pairs} or None


def _source(path: str, options: dict[str, Any]) -> SourceConfig:
    """Returns the source that a path and options describe."""
    from zero_ds.config.loading import validate
    from zero_ds.config.schema import SourceConfig

    source = validate(SourceConfig, path, what="PATH")
    given = {key: value for key, value in options.items() if value is not None}
    return validate(SourceConfig, {**source.model_dump(exclude_defaults=True), **given}, what="PATH")


def _config_of_path(
    source: SourceConfig, settings: list[str], model: str | None, encoder: str | None, chat_template: str | None
) -> RunConfig:
    """Returns the configuration of a run on one source."""
    from zero_ds.config.loading import validate
    from zero_ds.config.schema import RunConfig

    if settings:
        raise ConfigError(f"'{settings[0]}' is neither the number of a sample nor, without a recipe, a setting.")
    if model is None:
        raise ConfigError("--model is missing: name the language model whose tokenizer reads the samples, or a recipe.")
    data = {"sources": [source.model_dump()], "chat_template": chat_template}
    tree = {"stage": "encoder" if encoder else "decoder", "target": model, "data": data, "out": "."}
    return validate(RunConfig, {**tree, "encoder": {"path": encoder} if encoder else None}, what="PATH")


def _as_trained(config: RunConfig) -> tuple[Records, SampleEncoder]:
    """Returns the samples of a run in their order, and its sample encoder. No weights are loaded."""
    from zero_ds.model.build import ModelSpec, build_model
    from zero_ds.training.folders import ModelFolders
    from zero_ds.training.setup import make_loader

    folders = ModelFolders.of(config)
    spec = ModelSpec(folders.decoder, folders.encoder, config.encoder, config.adapter, on_meta=True, attention="eager")
    loader = make_loader(config, build_model(spec), 1, folders)
    return loader.records, loader.sample_encoder


def _sample_encoder(model: str, chat_template: str | None, tokens_per_image: int, max_length: int) -> SampleEncoder:
    """Returns an encoder that counts tokens as a model's tokenizer and chat template give them."""
    from zero_ds.config.schema import DataConfig
    from zero_ds.data.samples import SampleEncoder
    from zero_ds.model.decoders.folder import DecoderFolder
    from zero_ds.model.templates import load_template
    from zero_ds.runtime.hub import local_folder

    folder = DecoderFolder(local_folder(model))
    template = load_template(folder, DataConfig(chat_template=chat_template), config=folder.text_config())
    return SampleEncoder(template, "response", tokens_per_image=tokens_per_image, max_length=max_length)
