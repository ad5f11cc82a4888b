"""Compares the plan of a finished run with the measurements in its metrics.jsonl.

    python tools/compare_plan.py RUN --gpus 2

It reads RUN's config.yaml, metrics.jsonl and last checkpoint. Memory is the peak of the rank that needs most, from
metrics.jsonl: that of the accelerator or, on CPU ranks, that of the whole process, libraries included. Times are
medians without the first step; the plan gets the run's own number of tokens per step. On CPU ranks the peak FLOP/s are
measured now with a matrix product, so the machine should be in the same state as during the run. Without `--gpu-memory`
a run with `activation_checkpointing: auto` is planned as if it had recomputed nothing; its log has the actual choice.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
import yaml

from zero_ds.config.loading import validate
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint.checkpoint import find_checkpoint
from zero_ds.training.deepspeed import resolve_precision
from zero_ds.training.monitor import read_metrics
from zero_ds.training.planning.cluster import Cluster, find_gpu
from zero_ds.training.planning.data import DataOverrides
from zero_ds.training.planning.flops import peak_flops
from zero_ds.training.planning.memory import CAUSES, GIB
from zero_ds.training.planning.recipe import RunPlan, plan_run
from zero_ds.training.planning.tables import number, table

MIB = 2.0**20


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    gpus: Annotated[int, typer.Option(help="Number of ranks of the run.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(help="Number of ranks on a machine.")] = 8,
    name: Annotated[str | None, typer.Option("--gpu", help="Accelerator of the run; CPU ranks if not given.")] = None,
    gpu_memory: Annotated[
        float, typer.Option(help="GiB of each rank, with which activation_checkpointing=auto is planned.")
    ] = 1e6,
    mfu: Annotated[float, typer.Option(help="Share of peak FLOP/s, as for `zero-ds plan`.")] = 0.4,
) -> None:
    """Print a table of planned and measured figures and their differences."""
    config, metrics = read(run)
    config = config.model_copy(update={"precision": str(resolve_precision(config)).removeprefix("torch.")})
    config = config.model_copy(
        update={"precision": {"bfloat16": "bf16", "float16": "fp16"}.get(config.precision, "fp32")}
    )
    tail = metrics[1:] or metrics
    tokens = median(m["tokens_per_second"] * m["seconds"] for m in tail) / config.global_batch
    labels = median(m["supervised_tokens"] for m in tail) / config.global_batch
    cluster = Cluster(gpus, gpus_per_node, memory_gib=gpu_memory, mfu=mfu, host_gib=1e6)
    if name is None:
        peak = peak_flops(torch.device("cpu"), resolve_precision(config))
        cluster = replace(cluster, name="CPU", peak=peak, inside=5.0, between=5.0)
    else:
        called, peak, link = find_gpu(name)
        cluster = replace(cluster, name=called, peak=peak, inside=0.8 * link)
    plan = plan_run(config, cluster)
    words = max(1, round(tokens - plan.sample.images * plan.size.image_tokens))
    plan = plan_run(config, cluster, data=DataOverrides(tokens=words, supervised=max(1, round(labels))))
    print(heading(plan, run, tokens))
    print(table(["", "planned", "measured", "difference"], rows(plan, run, tail)))


def read(run: Path) -> tuple[RunConfig, list[dict[str, float]]]:
    """Returns the configuration and the step records of a run.

    Raises:
        ConfigError: the folder is not a run, or the run has not made a step.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run} is not a run, because it has no config.yaml; name the folder of a run.")
    config = validate(RunConfig, yaml.safe_load(path.read_text(encoding="utf-8")), what=str(path))
    metrics = read_metrics(run)
    if not metrics:
        raise ConfigError(f"{run} has no metrics.jsonl, or an empty one; let the run make a step.")
    return config, metrics


def heading(plan: RunPlan, run: Path, tokens: float) -> str:
    return (
        f"{run} under {plan.config.zero} on {plan.cluster.gpus} ranks ({plan.cluster.name}, "
        f"{plan.cluster.peak / 1e12:.3g} TFLOP/s), micro_batch={plan.config.micro_batch}, {tokens:.0f} tokens a sample"
    )


def rows(plan: RunPlan, run: Path, metrics: list[dict[str, float]]) -> list[list[str]]:
    """Returns rows of figures that can be compared, and the planned memory by cause, which is not measured."""
    (option,) = (o for o in plan.options if o.zero == Path(plan.config.zero).stem)
    on_cpu = plan.cluster.name == "CPU"
    seconds = median(m["seconds"] - m.get("data_wait_seconds", 0.0) for m in metrics)
    mfu = median(m["mfu"] for m in metrics)
    found = [
        ("seconds of a step", option.step.seconds, seconds),
        ("MFU", option.step.mfu, mfu),
    ]
    peak = option.memory.peak["gpu"] + (option.memory.peak["host"] if on_cpu else 0.0)
    place = "memory_gib/host" if on_cpu else "memory_gib/accelerator"
    seen = [m[place] for m in metrics if place in m]
    found += [(f"{place}, peak", peak / GIB, max(seen) if seen else None)]
    for label, planned, paths in checkpoint_sizes(plan, run):
        size = sum(path.stat().st_size for path in paths) / MIB if all(path.is_file() for path in paths) else None
        found.append((label, planned / MIB, size))
    lines = [[name, number(planned), number(value), difference(planned, value)] for name, planned, value in found]
    causes = [(cause, option.memory.total(cause)) for cause in CAUSES]
    return [*lines, *([f"GiB of a rank: {cause}", number(size / GIB), "", ""] for cause, size in causes if size)]


def checkpoint_sizes(plan: RunPlan, run: Path) -> list[tuple[str, float, list[Path]]]:
    """Returns label, planned bytes and paths of a checkpoint's files: weights, and 12 bytes per parameter to resume."""
    try:
        checkpoint = find_checkpoint(run)
        files = checkpoint.weights_files(), checkpoint.state_files()
    except (ConfigError, ValueError, OSError):
        return []
    trained = sum(plan.size.trained)
    return [
        ("checkpoint, weights, MiB", float(plan.size.itemsize * trained), list(files[0])),
        ("checkpoint, optimizer, MiB", 12.0 * trained, list(files[1])),
    ]


def difference(planned: float, measured: Any) -> str:
    return f"{100 * (planned / measured - 1):+.0f} %" if measured else ""


if __name__ == "__main__":
    import sys

    try:
        typer.run(main)
    except ConfigError as error:
        print(f"compare_plan: {error}", file=sys.stderr)
        raise SystemExit(2) from None
