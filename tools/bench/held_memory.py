"""Measures the bytes that DeepSpeed's engines hold on a rank, by cause, and compares them with `zero-ds plan`.

torchrun --nproc-per-node 2 tools/bench/held_memory.py RECIPE key=value ... --zero zero1 --zero zero2 --zero zero3

Builds the model and makes two optimizer steps of the run for every DeepSpeed config in turn; models and data must be
available. The bytes are those of real tensors after every backward pass, with each storage counted once.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.runtime import distributed
from zero_ds.training import stages
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.engine import Engine
from zero_ds.training.options.recompute import checkpoint_activations_
from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.recipe import plan_run
from zero_ds.training.setup import load_model, make_loader, seed_everything

CAUSES = ("frozen", "trained", "gradients", "optimizer")


def measure(config: RunConfig, *, rest: bool = False) -> dict[str, int]:
    """Returns the largest number of bytes of every cause that this rank holds in the run's first two steps.

    Every rank must call it. rest: also measure all other tensors, as `other`; searching for them takes long.
    """
    seed_everything(config.seed)
    world_size = distributed.world_size()
    ds = ds_config(config, world_size)
    model = load_model(config, ds)
    loader = make_loader(config, model, world_size)
    groups = stages.freeze_(model, config)
    checkpoint_activations_(model, config, ds)
    model.train()
    engine = Engine(config, model, groups, 2, ds)
    seen = watched(engine, rest)
    for number, micro in enumerate(loader.steps(0, 2)):  # ZeRO-3 gathers persistent parameters after the first update
        engine.step(micro, number, 10)
    return seen


def watched(engine: Any, rest: bool) -> dict[str, int]:
    """Returns a dictionary in which each update of an `Engine` notes the most bytes so far, by cause (`held`)."""
    seen: dict[str, int] = {}
    update = engine.engine.step

    def step() -> None:
        for cause, size in held(engine, rest).items():
            seen[cause] = max(size, seen.get(cause, 0))
        update()

    engine.engine.step = step
    return seen


def held(engine: Any, rest: bool) -> dict[str, int]:
    """Returns the bytes that an `Engine` holds between backward pass and update, by cause.

    The causes are frozen, trained, gradients, optimizer and buckets. With `rest`, `other` counts the remaining tensors
    of more than 64 KiB that the garbage collector finds. These include tensors left by earlier engines of this process,
    so `other` is meaningful for the first config only.
    """
    optimizer = engine.optimizer
    model = list(engine.model.named_parameters())
    trained = [p for _, p in model if p.requires_grad]
    groups: dict[str, list[Any]] = {
        "trained": [t for p in trained for t in _of(p)],
        "frozen": [t for _, p in model if not p.requires_grad for t in _of(p)],
        "optimizer": [*_masters(optimizer), *_moments(optimizer)],
        "gradients": [*(p.grad for p in trained), *_gradients(optimizer)],
        "buckets": [
            t
            for bucket in getattr(optimizer, "ipg_buckets", {}).values()
            for t in _tensors(getattr(bucket, "buffer", None))
        ],
    }
    groups["buckets"] += [
        t
        for name in ("temp_grad_buffer_for_cpu_offload", "temp_grad_buffer_for_gpu_offload")
        for t in _tensors(getattr(optimizer, name, None))
    ]
    groups["buckets"] += _tensors(getattr(optimizer, "param_buffer_of_bit16_for_cpu_offload_groups", None))
    seen: set[int] = set()
    result = {cause: sum(_new(t, seen) for t in tensors) for cause, tensors in groups.items()}
    if not rest:
        return result
    everything = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    result["other"] = sum(size for t in everything if (size := _new(t, seen)) > 65536)
    return result


def _of(parameter: Any) -> list[Any]:
    """Returns the parameter's own data, and its shards under ZeRO-3."""
    return [
        parameter.data,
        *(getattr(parameter, name, None) for name in ("ds_tensor", "ds_secondary_tensor")),
    ]


def _masters(optimizer: Any) -> list[Any]:
    return [
        t
        for name in ("fp32_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
        for t in _tensors(getattr(optimizer, name, None))
    ]


def _moments(optimizer: Any) -> list[Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return [t for state in inner.state.values() for t in _tensors(state)]


def _gradients(optimizer: Any) -> list[Any]:
    names = ("averaged_gradients", "all_grad_tensors", "grad_partitions_flat_buffer", "accumulated_grads_in_cpu")
    found = [t for name in names for t in _tensors(getattr(optimizer, name, None))]
    return [*found, *(t.grad for t in _masters(optimizer) if t is not None)]


def _tensors(value: Any) -> list[torch.Tensor]:
    return list(_walk(value))


def _walk(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner)


def _new(tensor: torch.Tensor | None, seen: set[int]) -> int:
    """Returns the bytes of a tensor's storage, or 0 if it was counted before."""
    if tensor is None or tensor.device.type == "meta":
        return 0
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen or not storage.nbytes():
        return 0
    seen.add(storage.data_ptr())
    return int(storage.nbytes())


def main(
    recipe: Annotated[str, typer.Argument(help="Recipe or YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    zero: Annotated[list[str] | None, typer.Option(help="DeepSpeed config; repeatable.")] = None,
) -> None:
    """Print, for every config and cause, the MiB of the rank that holds most, the planned MiB and the difference."""
    distributed.initialize()
    for name in zero or ["zero3"]:
        config = load_run(recipe, [*(overrides or []), f"zero={Path(name)}"])
        seen = measure(config, rest=True)
        gc.collect()
        most = distributed.max_over_ranks(*(seen[cause] for cause in (*CAUSES, "other")))
        plan = plan_run(config, Cluster(distributed.world_size()))
        option = next(option for option in plan.options if option.zero == Path(name).stem)
        for cause, size in zip(CAUSES, most, strict=False):
            planned = option.memory.total(cause)
            difference = f"{100 * (planned / size - 1):+.2f} %" if size else ""
            if distributed.is_rank_zero():
                figures = f"{size / 2**20:10.2f} {planned / 2**20:10.2f} {difference}"
                print(f"{option.zero:22} {cause:10} {figures}", flush=True)
        if distributed.is_rank_zero():
            print(f"{option.zero:22} {'other':10} {most[-1] / 2**20:10.2f}", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    typer.run(main)
