"""Bytes that DeepSpeed's engines hold on this rank, by cause, beside what `zero-ds plan` says of them.

torchrun --nproc-per-node 2 tools/bench/held_memory.py RECIPE key=value ... --zero zero1 --zero zero2 --zero zero3

Makes the model and two optimizer steps of the run for every DeepSpeed config in turn; models and data must be at hand.
The bytes are those of real tensors, each storage counted once, behind every backward pass.
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
    """What this rank holds in the run's first two steps, the most of every cause. A collective.

    rest: also what lies beside these causes, which takes long to look for.
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
    seen: dict[str, int] = {}
    update = engine.engine.step

    def step() -> None:
        for cause, size in held(engine, rest).items():
            seen[cause] = max(size, seen.get(cause, 0))
        update()

    engine.engine.step = step
    for number, micro in enumerate(loader.steps(0, 2)):  # ZeRO-3 gathers persistent parameters behind the first update
        engine.step(micro, number, 10)
    return seen


def held(engine: Any, rest: bool) -> dict[str, int]:
    """Bytes that an `Engine` holds between backward pass and update: frozen, trained, gradients, optimizer, buckets.

    With `rest`, `other` is what the garbage collector finds beside them in tensors of more than 64 KiB; also what
    engines made before in this process have left, so that it means something for the first config alone.
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
    """The parameter's own data, and its shards under ZeRO-3."""
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
    """Bytes of a tensor's storage, if it was not counted before."""
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
    zero: Annotated[list[str] | None, typer.Option(help="DeepSpeed config; give several.")] = None,
) -> None:
    """Prints, for every config and cause, MiB held by the rank that holds most, MiB planned, and their difference."""
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
            apart = f"{100 * (planned / size - 1):+.2f} %" if size else ""
            if distributed.is_rank_zero():
                print(f"{option.zero:22} {cause:10} {size / 2**20:10.2f} {planned / 2**20:10.2f} {apart}", flush=True)
        if distributed.is_rank_zero():
            print(f"{option.zero:22} {'other':10} {most[-1] / 2**20:10.2f}", flush=True)
    distributed.shutdown()


if __name__ == "__main__":
    typer.run(main)
