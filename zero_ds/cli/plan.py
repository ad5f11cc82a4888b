"""`zero-ds plan`: memory and time of a run, before a GPU is paid for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe such as llama-3.1-70b/decoder, or a YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value, e.g. micro_batch=2 data.max_length=4096.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs, one rank each.")] = 8,
    gpu_memory: Annotated[float, typer.Option(help="Memory of a GPU, in GiB.")] = 80.0,
    gpus_per_node: Annotated[int, typer.Option(help="Number of GPUs of a machine.")] = 8,
    gpu: Annotated[str, typer.Option(help="A100, H100, ..., or the peak in TFLOP/s.")] = "A100",
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that computing reaches, with recomputed passes counted as work.")
    ] = 0.4,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="INSIDE/BETWEEN",
            help="GB/s that collectives reach, one direction: of a GPU inside a node / of a node to other nodes. "
            "By default 80 % of NVLink's nominal rate and of 4 x 100 Gb/s.",
        ),
    ] = None,
    host_memory: Annotated[float, typer.Option(help="Host memory of a machine, in GiB.")] = 1000.0,
    reserve: Annotated[
        float, typer.Option(help="GiB of a GPU that stay free for CUDA's context, NCCL and holes.")
    ] = 3.0,
    replace: Annotated[
        list[str] | None,
        typer.Option(help="Plan the surrogate with these layers replaced, first:last; may be given several times."),
    ] = None,
    translators: Annotated[int, typer.Option(help="With --replace: number of translators for each range.", min=1)] = 1,
    samples: Annotated[
        int | None, typer.Option(help="Number of samples of the data, where it is not known.", min=1)
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Number of text tokens of an average sample.", min=1)] = None,
    supervised: Annotated[int | None, typer.Option(help="Number of these tokens that carry loss.", min=1)] = None,
    decoder_share: Annotated[
        float, typer.Option(help="Share of the data that the surrogate's route trains the full decoder on.")
    ] = 0.2,
    out: Annotated[Path | None, typer.Option(help="Also write the whole plan to this JSON file.")] = None,
) -> None:
    """Plan a run before the money is spent: memory by cause, what fits, what is fastest, the hours, both routes.

    Nothing is loaded: config.json files and meta tensors are enough. For Llama-3.2-3B, 3.1-8B, 3.1-70B and CLIP
    ViT-L/14 of 336 pixels config.json comes with zero-ds, and a surrogate need not be built yet. Memory is that of one
    rank under every file of ds_configs/. Times come from a simple model (docs/planning.md) and are best cases; its
    assumptions are printed last.

    zero-ds plan llama-3.1-70b/decoder --gpus 128 --gpu-memory 80 --gpu A100 --out plan.json
    """
    import json

    from zero_ds.runtime.files import write_atomically
    from zero_ds.training.planning.cluster import Cluster, bandwidths, find_gpu
    from zero_ds.training.planning.data import DataOverrides
    from zero_ds.training.planning.json_output import as_json
    from zero_ds.training.planning.plan import plan_recipe
    from zero_ds.training.planning.tables import as_text

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"--out {out} cannot be written; name a file in a folder that exists.")
    name, peak, link = find_gpu(gpu)
    inside, between = bandwidths(bandwidth, link)
    found = plan_recipe(
        recipe,
        overrides,
        Cluster(gpus, gpus_per_node, gpu_memory, name, peak, mfu, inside, between, reserve, host_memory),
        replace=replace,
        translators=translators,
        data=DataOverrides(samples, tokens, supervised),
        decoder_share=decoder_share,
    )
    print(as_text(found))
    if out is not None:
        write_atomically(out, json.dumps(as_json(found), indent=1) + "\n")
