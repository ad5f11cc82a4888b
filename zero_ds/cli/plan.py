"""`zero-ds plan`: what a run needs, and how long it takes, before a GPU is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.training.planning.speed import Cluster


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe such as llama-3.1-70b/decoder, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. micro_batch=2 data.max_length=4096.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, one rank each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GiB.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="A100, H100, ..., or the peak in TFLOP/s.")] = "A100",
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that computing reaches, recomputed passes counted as work.")
    ] = 0.4,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="INSIDE/BETWEEN",
            help="GB/s that collectives reach, one direction: of a GPU inside a node / of a node to other nodes. "
            "Without it 80 % of NVLink's nominal rate, and of 4 x 100 Gb/s.",
        ),
    ] = None,
    host_memory: Annotated[float, typer.Option(help="Host memory of a machine, in GiB.")] = 1000.0,
    reserve: Annotated[float, typer.Option(help="GiB of a GPU that stay free: CUDA's context, NCCL, holes.")] = 3.0,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Plan the surrogate with these layers replaced, first:last; may be given several times."),
    ] = None,
    translators: Annotated[int, typer.Option(help="With --replace: translators for each range.", min=1)] = 1,
    samples: Annotated[
        int | None, typer.Option(help="Samples of the data, where their number is not known.", min=1)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Text tokens of an average sample.", min=1)] = None,
    supervised: Annotated[int | None, typer.Option(help="Of these, tokens with loss.", min=1)] = None,
    decoder_share: Annotated[
        float, typer.Option(help="Share of the data that the surrogate's route trains the full decoder on.")
    ] = 0.2,
    out: Annotated[Path | None, typer.Option(help="Also write the whole plan to this JSON file.")] = None,
) -> None:
    """Plan a run before the money is spent: memory by cause, what fits, what is fastest, the hours, both routes.

    Nothing is loaded: config.json and meta tensors are enough. For Llama-3.2-3B, 3.1-8B, 3.1-70B and CLIP ViT-L/14 of
    336 pixels config.json comes with zero-ds, and a surrogate need not be built yet. Memory is that of one rank under
    every file of ds_configs/; times come from a plain model (docs/planning.md) whose assumptions are printed last, and
    are best cases.

    zero-ds plan llama-3.1-70b/decoder --gpus 128 --gpu-memory 80 --gpu A100 --out plan.json
    """
    import json

    from zero_ds.config.loading import load_run
    from zero_ds.runtime.files import write_atomically

    config = load_run(recipe, overrides)
    cluster = _cluster(gpus, gpu_memory, gpus_per_node, gpu, mfu, bandwidth, host_memory, reserve)
    if not 0 < decoder_share <= 1:
        raise ConfigError(f"--decoder-share {decoder_share:g} is no share; give more than 0 and at most 1.")
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} cannot be written; name a file in a folder that exists.")
    from zero_ds.training.planning import tables
    from zero_ds.training.planning.recipe import Words, plan_run
    from zero_ds.training.planning.route import routes

    words = Words(samples, tokens, supervised)
    planned = plan_run(config, cluster, replace=replace, translators=translators, words=words)
    if not planned.fitting:
        smallest = planned.smallest
        need = smallest.least.peak["gpu"] / 2**30 + cluster.reserve_gib
        raise ConfigError(
            f"no config of ds_configs/ fits {cluster.gpus} GPUs of {gpu_memory:g} GiB; the smallest, {smallest.zero}, "
            f"needs {need:.1f} GiB a GPU at micro_batch=1 and "
            f"{cluster.ranks_per_node * (smallest.least.peak['host'] / 2**30 + cluster.process_gib):.0f} GiB of host "
            "memory a node."
        )
    found = routes(
        recipe,
        overrides or [],
        cluster,
        replace=replace,
        translators=translators,
        words=words,
        decoder_share=decoder_share,
    )
    sections = [
        tables.heading(recipe, planned),
        tables.gpu_table(planned),
        tables.host_table(planned),
        tables.speed_table(planned),
        tables.group_table(planned),
        tables.route_table(found, cluster, tables.plan_target(planned)),
        "Assumed:\n" + "\n".join(f"  {sentence}" for sentence in tables.assumptions(planned, decoder_share)),
    ]
    print("\n\n".join(section for section in sections if section))
    if out is not None:
        write_atomically(out, json.dumps(tables.as_json(recipe, planned, found), indent=1) + "\n")


def _cluster(
    gpus: int,
    gpu_memory: float,
    gpus_per_node: int,
    name: str,
    mfu: float,
    bandwidth: str | None,
    host_memory: float,
    reserve: float,
) -> Cluster:
    """The machines that the options describe.

    Raises:
        ConfigError: an option that describes none.
    """
    for option, value in (
        ("--gpus", gpus),
        ("--gpu-memory", gpu_memory),
        ("--gpus-per-node", gpus_per_node),
        ("--host-memory", host_memory),
    ):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{option} {value:g} is no size; give more than 0.")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g} is no share; give more than 0 and at most 1, such as 0.4.")
    if not 0 <= reserve < gpu_memory:
        raise ConfigError(f"--reserve {reserve:g} is no part of {gpu_memory:g} GiB; give less.")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(f"{gpus} GPUs are no whole number of nodes of {gpus_per_node}; set --gpus-per-node.")
    from zero_ds.training.planning.speed import ASSUMED, REACHED, Cluster, gpu

    called, peak, link = gpu(name)
    inside, between = REACHED * link, REACHED * ASSUMED["between"]
    if bandwidth is not None:
        try:
            inside, between = (float(part) for part in bandwidth.split("/"))
        except ValueError:
            raise ConfigError(f"--bandwidth {bandwidth} cannot be read; write INSIDE/BETWEEN, e.g. 240/40.") from None
        if not 0 < min(inside, between) <= max(inside, between) < float("inf"):
            raise ConfigError(f"--bandwidth {bandwidth} must be two rates above 0, in GB/s.")
    return Cluster(gpus, gpus_per_node, gpu_memory, called, peak, mfu, inside, between, reserve, host_memory)
