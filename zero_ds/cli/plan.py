"""`zero-ds plan`: the memory and the hours of a run, before a GPU is paid for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.cli.options import complete_recipe
from zero_ds.runtime.errors import ConfigError

HIDDEN_COST = "CUDA's context, NCCL's buffers, fragmentation"


def plan(
    recipe: Annotated[
        str,
        typer.Argument(help="Recipe such as llama-3.1-70b/decoder, or a YAML file.", autocompletion=complete_recipe),
    ],
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
    translator: Annotated[
        str, typer.Option(help="Translators: copy (of the layer), or dense (its experts replaced by one network).")
    ] = "copy",
    translator_width: Annotated[
        int | None, typer.Option(help="With --translator dense: number of units of that network.", min=1)
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Number of samples in the data, if it is not known yet.", min=1)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Text tokens of an average sample.", min=1)] = None,
    supervised: Annotated[int | None, typer.Option(help="Of these tokens, those with loss.", min=1)] = None,
    decoder_share: Annotated[
        float, typer.Option(help="Share of the data on which the surrogate's route trains the full decoder.")
    ] = 0.2,
    price: Annotated[
        float | None, typer.Option(help="Price of an hour of a GPU, in any currency, for the cost of both routes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write the whole plan into.")] = None,
) -> None:
    """Plan a run before money is spent: memory by cause, configs that fit, the fastest one, hours, cost of both routes.

    No weights are loaded: config.json and tensors without data are enough. The config.json files of all models that
    have recipes come with zero-ds, and the surrogate need not be built yet.
    Memory is that of one rank under every file of ds_configs/. Times come from a simple model (docs/planning.md) and
    are best cases; its assumptions are printed last.

    Example: zero-ds plan llama-3.1-70b/decoder --gpus 128 --gpu-memory 80 --gpu A100 --out plan.json
    """
    import json

    from zero_ds.model.layer_plan import dense_width
    from zero_ds.runtime.files import write_atomically
    from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu
    from zero_ds.training.planning.data import DataOverrides
    from zero_ds.training.planning.plan import plan

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} cannot be written; name a file in a folder that exists.")
    width = dense_width(translator, translator_width)
    name, peak, link = find_gpu(gpu)
    inside, between = bandwidths(bandwidth, link)
    with _without_garbage_collection():
        found = plan(
            recipe,
            overrides,
            Cluster(
                gpus, gpus_per_node, gpu_memory, name, peak, mfu, inside, between, reserve, host_memory, price=price
            ),
            replace=replace,
            translators=translators,
            dense_width=width,
            data=DataOverrides(samples, tokens, supervised),
            decoder_share=decoder_share,
        )
        from zero_ds.training.planning.json_output import as_json
        from zero_ds.training.planning.tables import as_text

        print(as_text(found))
        if out is not None:
            write_atomically(out, json.dumps(as_json(found), indent=1) + "\n")


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Switches off garbage collection, because importing torch and building models on paper leave little to collect."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
