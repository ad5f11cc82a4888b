"""Bytes of the tensors that a DeepSpeed engine holds, by cause, on this rank: each storage counted once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch


def held(engine: Any) -> dict[str, int]:
    """Of a `zero_ds.engine.Engine` between backward pass and update: frozen, trained, gradients, optimizer, buckets.

    `other` is what the garbage collector finds beside them in tensors of more than 64 KiB.
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
