"""`zero-ds plan`: the memory and the hours of a run, before a GPU is paid for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.training.planning.recipe import RunPlan
    from zero_ds.training.planning.speed import Cluster

HIDDEN_COST = "CUDA's context, NCCL's buffers, fragmentation"


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe such as llama-3.1-70b/decoder, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, such as micro_batch=2 data.max_length=4096.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, one rank each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU, in GiB.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs in a machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as A100 or H100; or its peak in TFLOP/s.")] = "A100",
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that computation reaches, counting recomputed passes as work.")
    ] = 0.4,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="INSIDE/BETWEEN",
            help="GB/s that collectives reach in one direction: per GPU inside a machine / per machine between "
            "machines. Default: 80 % of NVLink's nominal rate, and of 4 x 100 Gb/s.",
        ),
    ] = None,
    host_memory: Annotated[float, typer.Option(help="Host memory of a machine, in GiB.")] = 1000.0,
    reserve: Annotated[float, typer.Option(help=f"GiB of a GPU that stay free: {HIDDEN_COST}.")] = 3.0,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Plan for a surrogate with these layers replaced, first:last; repeatable."),
    ] = None,
    translators: Annotated[int, typer.Option(help="With --replace: number of translators per range.", min=1)] = 1,
    samples: Annotated[
        int | None, typer.Option(help="Number of samples in the data, if it is not known yet.", min=1)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Text tokens of an average sample.", min=1)] = None,
    supervised: Annotated[int | None, typer.Option(help="Of these tokens, those with loss.", min=1)] = None,
    decoder_share: Annotated[
        float, typer.Option(help="Share of the data on which the surrogate's route trains the full decoder.")
    ] = 0.2,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole plan into.")] = None,
) -> None:
    """Plan a run before money is spent: memory by cause, what fits, the fastest config, hours, cost of both routes.

    No weights are loaded: config.json and tensors without data are enough. The config.json files of Llama-3.2-3B,
    3.1-8B and 3.1-70B and of CLIP ViT-L/14 with 336 pixels come with zero-ds, and the surrogate need not be built yet.
    Memory is that of one rank under every file of ds_configs/. Times come from a simple model (docs/planning.md) and
    are best cases; its assumptions are printed last.

    Example: zero-ds plan llama-3.1-70b/decoder --gpus 128 --gpu-memory 80 --gpu A100 --out plan.json
    """
    import json

    from zero_ds.config.loading import load_run
    from zero_ds.runtime.files import write_atomically

    config = load_run(recipe, overrides)
    _check_cluster(gpus, gpu_memory, gpus_per_node, mfu, host_memory, reserve)
    with _without_garbage_collection():
        cluster = _cluster(gpus, gpu_memory, gpus_per_node, gpu, mfu, bandwidth, host_memory, reserve)
        if not 0 < decoder_share <= 1:
            raise ConfigError(f"--decoder-share {decoder_share:g} is not a share; give more than 0 and at most 1.")
        if out is not None and (out.is_dir() or not out.parent.is_dir()):
            raise ConfigError(f"--out {out} cannot be written; name a file in a folder that exists.")
        from zero_ds.training.planning import tables
        from zero_ds.training.planning.recipe import Words, plan_run
        from zero_ds.training.planning.route import routes

        words = Words(samples, tokens, supervised)
        planned = plan_run(config, cluster, replace=replace, translators=translators, words=words)
        if not planned.fitting:
            raise ConfigError(_nothing_fits(planned))
        found = routes(
            recipe,
            overrides or [],
            cluster,
            replace=replace,
            translators=translators,
            words=words,
            decoder_share=decoder_share,
        )
        assumptions = [f"  {sentence}" for sentence in tables.assumptions(planned, decoder_share)]
        sections = [
            tables.heading(recipe, planned),
            tables.gpu_table(planned),
            tables.host_table(planned),
            tables.speed_table(planned),
            tables.group_table(planned),
            tables.route_table(found, cluster, tables.plan_target(planned)),
            "\n".join(["Assumed:", *assumptions]),
        ]
        print("\n\n".join(section for section in sections if section))
        if out is not None:
            write_atomically(out, json.dumps(tables.as_json(recipe, planned, found), indent=1) + "\n")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Keeps Python from searching for garbage, of which importing torch and building models on paper makes little."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _nothing_fits(planned: RunPlan) -> str:
    """Returns the message for a run that does not fit under any DeepSpeed config."""
    cluster, smallest = planned.cluster, planned.smallest
    gpu = smallest.least.peak["gpu"] / 2**30 + cluster.reserve_gib
    host = cluster.ranks_per_node * (smallest.least.peak["host"] / 2**30 + cluster.process_gib)
    return (
        f"no config of ds_configs/ fits {cluster.gpus} GPUs of {cluster.memory_gib:g} GiB; the smallest, "
        f"{smallest.zero}, needs {gpu:.1f} GiB a GPU at micro_batch=1 and {host:.0f} GiB of host memory a node."
    )


def _check_cluster(
    gpus: int, gpu_memory: float, gpus_per_node: int, mfu: float, host_memory: float, reserve: float
) -> None:
    """Raises ConfigError for options that do not describe machines, before torch is loaded."""
    sizes = {
        "--gpus": gpus,
        "--gpu-memory": gpu_memory,
        "--gpus-per-node": gpus_per_node,
        "--host-memory": host_memory,
    }
    for option, value in sizes.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{option} {value:g} is not a size; give more than 0.")
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu:g} is not a share; give more than 0 and at most 1, such as 0.4.")
    if not 0 <= reserve < gpu_memory:
        raise ConfigError(f"--reserve {reserve:g} is not a part of {gpu_memory:g} GiB; give less.")
    if gpus > gpus_per_node and gpus % gpus_per_node:
        raise ConfigError(f"{gpus} GPUs are not a whole number of nodes of {gpus_per_node}; set --gpus-per-node.")


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
    """Returns the machines that the options describe.

    Raises:
        ConfigError: the kind of GPU or the bandwidth cannot be read.
    """
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
