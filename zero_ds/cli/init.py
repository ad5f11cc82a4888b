"""`zero-ds init`: recipes for a user's own model, data and GPUs."""

from __future__ import annotations

import sys
from dataclasses import replace as changed
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.config.starter import Starter
    from zero_ds.training.planning.cluster import Cluster

CLIP = "openai/clip-vit-large-patch14-336"


def init(
    name: Annotated[str, typer.Argument(help="Name of your project: recipes go to NAME/, results to runs/NAME.")],
    target: Annotated[str | None, typer.Option(help="Folder or hub id of the language model.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help=f"Folder or hub id of the vision encoder, such as {CLIP}.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data file, folder of files, hub id, or name of a data set in datasets.yaml.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder or archive of the images. Default: the folder of the data file.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="Number of GPUs; 0 for two CPU ranks.", min=0)] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as A100 or H100.")] = "A100",
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU, in GiB.")] = 80.0,
    replace: Annotated[
        str | None, typer.Option(help="Layers to replace, first:last. Default: those that the trajectory proposes.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Folder for the recipes. Default: NAME.")] = None,
    check: Annotated[
        bool,
        typer.Option("--check/--no-check", help="Whether to read the data once and to plan memory."),
    ] = True,
) -> None:
    """Write commented recipes for your own model and data, check them, and print the commands that come next.

    What is not given as an option is asked for. The data are read once, and the largest micro-batch that fits is
    planned, so a mistake shows now and not on the GPUs.

    Example: zero-ds init cats --target Qwen/Qwen3-8B --encoder google/siglip2-so400m-patch14-384 --data cats.json
    """
    from zero_ds.config.datasets import registered_datasets
    from zero_ds.config.starter import Starter, write
    from zero_ds.runtime.files import write_atomically

    target = target or _ask("Language model (folder or hub id)", "--target")
    encoder = encoder or _ask("Vision encoder (folder or hub id)", "--encoder", CLIP)
    data = data or _ask("Data (file, folder, hub id, or name in datasets.yaml)", "--data")
    if gpus is None:
        gpus = int(_ask("Number of GPUs (0: CPU)", "--gpus", "8"))
    if replace is not None:
        from zero_ds.model.layer_plan import Replaced

        Replaced.parse(replace)
    starter = Starter(
        name, target, encoder, data, registered=data in registered_datasets(), images=root, replace=replace
    )
    starter = changed(starter, ranks=gpus or 2, zero="zero3" if gpus else "zero2")
    where = folder or Path(name)
    if where.exists():
        raise ConfigError(f"{where} is there already; choose another folder, or remove it first.")
    cluster = _cluster(gpus, gpu, gpu_memory) if check and gpus else None
    if check:
        starter = _with_samples(starter)
    paths = write(starter, where)
    if cluster is not None:
        planned = _planned(starter, where, cluster)
        for path in paths:
            write_atomically(path, planned.files()[path.name])
    print(f"written: {', '.join(map(str, paths))}")
    print("\n".join(["Next:", *(f"  {line}" for line in _next(starter, where, gpus))]))


def _ask(question: str, option: str, default: str | None = None) -> str:
    """Asks for a value on a terminal.

    Raises:
        ConfigError: nobody is there to ask.
    """
    if not sys.stdin.isatty():
        raise ConfigError(f"{option} is missing; give it, or run zero-ds init on a terminal, where it asks.")
    return str(typer.prompt(question, default=default))


def _with_samples(starter: Starter) -> Starter:
    """Reads the data once, without opening images, prints a summary, and notes the number of samples.

    Raises:
        ConfigError, DataError: data that cannot be read.
    """
    from zero_ds.config.loading import validate
    from zero_ds.config.schema import RunConfig
    from zero_ds.data.sources import Records
    from zero_ds.data.survey import survey

    kind = "name" if starter.registered else "path"
    source = {kind: starter.data, **({"root": starter.images} if starter.images else {})}
    run = validate(RunConfig, {**_LEAST, "data": {"sources": [source]}}, what="data")
    found = survey(Records(list(run.data.sources), skip_bad=True), encoder=None, look="none", workers=0)
    print("\n".join(found.lines()))
    return changed(starter, samples=found.samples)


_LEAST = {"stage": "encoder", "target": "-", "encoder": {"path": "-"}, "out": "-"}
"""Values of a run that its data do not depend on."""


def _cluster(gpus: int, gpu: str, gpu_memory: float) -> Cluster:
    """Returns the GPUs to plan for.

    Raises:
        ConfigError: there are no such GPUs.
    """
    from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu

    kind, peak, link = find_gpu(gpu)
    inside, between = bandwidths(None, link)
    cluster = Cluster(gpus, min(gpus, 8), gpu_memory, kind, peak, inside=inside, between=between)
    cluster.check()
    return cluster


def _planned(starter: Starter, folder: Path, cluster: Cluster) -> Starter:
    """Returns the choices with the fastest config and micro-batch that fit all stages' memory.

    A model that is neither here nor among the architectures that come with the package cannot be planned; that is
    said, and nothing changes.
    """
    from zero_ds.config.loading import load_run
    from zero_ds.config.starter import STAGES
    from zero_ds.training.planning.data import DataOverrides
    from zero_ds.training.planning.recipe import plan_run

    # before the layers are known, the stage of the full model is planned, which needs most memory
    stages, ranges = (STAGES[-1:], None) if starter.replace is None else (STAGES, [starter.replace])
    data = DataOverrides(starter.samples, None, None)
    machines = f"{cluster.gpus} x {cluster.name} with {cluster.memory_gib:g} GiB"
    try:
        runs = [plan_run(load_run(str(folder / f"{one}.yaml")), cluster, replace=ranges, data=data) for one in stages]
    except ConfigError as error:
        print(f"memory is not planned: {error}")
        return starter
    fitting = [{option.zero: option.micro_batch for option in run.fitting} for run in runs]
    common = [zero for zero in fitting[-1] if all(zero in found for found in fitting)]
    if not common:
        print(f"no config of ds_configs/ fits all stages on {machines}; see zero-ds plan")
        return starter
    micro_batch = min(found[common[0]] for found in fitting)
    print(f"planned for {machines}: zero={common[0]} micro_batch={micro_batch}")
    return changed(starter, zero=common[0], micro_batch=micro_batch)


def _next(starter: Starter, folder: Path, gpus: int) -> list[str]:
    """Returns the commands that come next."""
    return [
        f"zero-ds data show {folder}/encoder.yaml 0 1 2    # samples as the model sees them",
        *([f"zero-ds plan {folder}/encoder.yaml --gpus {gpus}"] if gpus else []),
        f"zero-ds doctor {folder}/pretrain.yaml    # models, data and machines, before anything starts",
        f"zero-ds pipeline {folder} --out runs/{starter.name}    # the whole method; --hostfile FILE for more machines",
        f"zero-ds status runs/{starter.name}    # in another terminal, meanwhile",
    ]
