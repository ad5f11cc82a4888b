"""Bytes of a rank, by cause, under a DeepSpeed config: what DeepSpeed 0.19 allocates, as read from its source.

N ranks; F and T: frozen and trained parameters; b: bytes of the type that is computed in; g: bytes of the type in which
gradients add up (4 under ZeRO-2 and 3 here, b under 0 and 1).

    stage         frozen   trained      gradients   optimizer (fp32 master, two moments)
    0             b F      b T          b T         12 T (fp32: 8 T, parameters are their own master)
    1             b F      b T          b T         12 T / N
    2             b F      b T          g T / N     12 T / N
    3             b F / N  b T / N      g T / N     12 T / N

With `frozen_weights=int8` (stages 0 to 2) a linear weight of a frozen decoder layer has one byte instead of b.
Stage 1 without accumulation, and stage 2 where g = b, keep the gradients of all parameters that a rank's share touches,
whole. ZeRO-3 keeps parameters up to `stage3_param_persistence_threshold` whole as well, and with hpZ a second shard of
every other parameter within its group of ranks. An offloaded optimizer has 4 T / N bytes of float32 gradients with it.
Beside these states a rank needs communication buckets, what ZeRO-3 gathers, what the passes keep (activations.py), a
float32 copy of the gradient in the update, and 16 MiB pieces in a commit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch

from zero_ds.training.checkpoint.optimizer_state import PIECE
from zero_ds.training.planning.activations import Kept
from zero_ds.training.planning.architecture import Architecture

GIB = 2.0**30
RESERVE_GIB = 3.0
"""Of a GPU, for what is not planned: CUDA's context, NCCL's buffers, holes between blocks of memory."""
PROCESS_GIB = 3.0
"""Of a machine's memory, for each rank: Python, the libraries, workers of the loader."""
CAUSES = ("frozen", "trained", "gradients", "optimizer", "buckets", "gather", "activations", "logits", "update", "save")
"""In the order of the tables. `update` and `save` are needed when activations, logits and what is gathered are not."""
PLACES = ("gpu", "host", "disk")

Bytes = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank by place and cause."""

    by_cause: Bytes
    peak: dict[str, float] = field(default_factory=dict)
    """The largest sum of a phase, by place."""

    def total(self, cause: str) -> float:
        """Wherever it lies."""
        return sum(self.by_cause[place].get(cause, 0.0) for place in PLACES)

    def keeping(self, activations: float) -> Memory:
        """The same with so many bytes of activations."""
        gpu = {**self.by_cause["gpu"], "activations": activations}
        return Memory({**self.by_cause, "gpu": gpu}, {**self.peak, "gpu": _peak(gpu)})


def memory(parts: Architecture, ds: dict[str, Any], world_size: int, kept: Kept, *, accumulation: int = 1) -> Memory:
    """What a rank of `world_size` needs under the resolved DeepSpeed configuration `ds`, with nothing recomputed.

    kept: of one micro-batch.
    """
    states = (
        _sharded(parts, ds, world_size)
        if ds["zero_optimization"]["stage"] == 3
        else _whole(parts, ds, world_size, accumulation)
    )
    gpu = states["gpu"]
    gpu["activations"] = kept.whole
    gpu["logits"] = kept.logits
    gpu["save"] = 2.0 * 4 * PIECE
    states["host"]["save"] = 3.0 * 4 * PIECE
    return Memory(states, {place: _peak(states[place]) for place in PLACES})


def recomputed(
    whole: Memory, kept: Kept, fits: Callable[[Memory], bool], checkpointing: Literal["auto", True, False]
) -> tuple[int, Memory]:
    """How many decoder layers are recomputed (the first that keep something), and what a rank then needs.

    whole, kept: a micro-batch's, as for `memory`; fits: whether there is room for so much; checkpointing: the recipe's
    `activation_checkpointing`. `auto` takes the fewest that fit, and all where not even that fits.
    """
    counts = kept.counts
    if checkpointing != "auto":
        counts = counts[-1:] if checkpointing else counts[:1]
    for count in counts:
        need = whole.keeping(kept.recomputing(count))
        if fits(need):
            break
    return count, need


def _peak(by_cause: dict[str, float]) -> float:
    """Passes, update and commit follow each other; what one of them alone needs is not there in the others."""
    of = {cause: by_cause.get(cause, 0.0) for cause in CAUSES}
    states = sum(of[cause] for cause in ("frozen", "trained", "gradients", "optimizer"))
    passes = of["buckets"] + of["gather"] + of["activations"] + of["logits"]
    return states + max(passes, of["update"], of["save"])


def _bytes(ds: dict[str, Any], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of an element that is computed with, and of one in which gradients add up."""
    accumulated = ds.get("data_types", {}).get("grad_accum_dtype")
    return dtype.itemsize, {"fp32": 4, "fp16": 2, "bf16": 2}.get(accumulated, dtype.itemsize)


def _device(section: Any) -> str:
    device = str(section.get("device", "none")) if isinstance(section, dict) else "none"
    return {"none": "gpu", "cpu": "host", "nvme": "disk"}[device]


def _whole(parts: Architecture, ds: dict[str, Any], world_size: int, accumulation: int) -> Bytes:
    """ZeRO stages 0, 1 and 2: parameters whole on every rank."""
    zero = ds["zero_optimization"]
    b, g = _bytes(ds, parts.dtype)
    trained = sum(parts.trained)
    largest = max(parts.trained)
    gpu: dict[str, float] = {"frozen": parts.frozen_bytes, "trained": b * trained}
    host: dict[str, float] = {}
    if zero["stage"] == 0:
        master = 0 if parts.dtype == torch.float32 else 4
        gpu |= {"gradients": b * trained, "optimizer": (8 + master) * trained, "update": master * trained}
        return {"gpu": gpu, "host": host, "disk": {}}
    # every group is padded so that ranks share it evenly
    shards = [ceil(sum(p.numel() for _, p in group) / (2 * world_size)) * 2 for group in parts.groups.values()]
    shard = sum(shards)
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    gpu["buckets"] = (2 if zero.get("overlap_comm") else 1) * b * bucket + (b * largest if largest > bucket else 0)
    compact = zero["stage"] == 2 and g != b
    touched = g * shard if compact else b * _touched(parts, shards, world_size)
    if _device(zero.get("offload_optimizer")) == "gpu":
        adding_up = zero["stage"] == 1 and accumulation > 1
        gpu |= {"gradients": b * trained if adding_up else touched, "optimizer": 12 * shard}
        gpu["update"] = 4 * max(shards)
    else:
        gpu["buckets"] += b * largest
        if compact:
            gpu["gradients"] = touched
        added_up = touched if accumulation > 1 and not compact else 0
        host |= {"gradients": 4 * shard + added_up, "optimizer": 12 * shard, "buckets": b * (shard + largest)}
    return {"gpu": gpu, "host": host, "disk": {}}


def _touched(parts: Architecture, shards: list[int], world_size: int) -> int:
    """Elements of the parameters that a rank's share of the flattened groups touches; of the rank with most."""
    most = 0
    for rank in range(world_size):
        touched = 0
        for group, shard in zip(parts.groups.values(), shards, strict=True):
            begin, end, offset = rank * shard, (rank + 1) * shard, 0
            for _, parameter in group:
                size = parameter.numel()
                touched += size if offset < end and begin < offset + size else 0
                offset += size
        most = max(most, touched)
    return most


def _sharded(parts: Architecture, ds: dict[str, Any], world_size: int) -> Bytes:
    """ZeRO stage 3: everything in shards; parameters are gathered when they are used."""
    zero = ds["zero_optimization"]
    b, g = _bytes(ds, parts.dtype)
    threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
    group = int(zero.get("zero_hpz_partition_size", 1))
    shard = {"frozen": _shards(parts.frozen, world_size), "trained": _shards(parts.trained, world_size)}
    result: Bytes = {place: {} for place in PLACES}
    parameters = _device(zero.get("offload_param"))
    for cause, sizes in (("frozen", parts.frozen), ("trained", parts.trained)):
        result[parameters][cause] = b * shard[cause]
        result["gpu"][cause] = result["gpu"].get(cause, 0.0) + b * sum(size for size in sizes if size <= threshold)
        if group > 1:
            result["gpu"][cause] += b * sum(size // group for size in sizes if size > threshold)
    optimizer = _device(zero.get("offload_optimizer"))
    trained = shard["trained"]
    at_a_time = min(trained, int(zero.get("sub_group_size", 1e9)))
    if optimizer == "gpu":
        result["gpu"] |= {"gradients": g * trained, "optimizer": 12 * trained, "update": 4 * at_a_time}
    else:
        result["host"] |= {"gradients": g * trained + (4 * trained if optimizer == "host" else 0)}
        result[optimizer]["optimizer"] = 12 * trained
    if optimizer == "disk":
        count = int(zero["offload_optimizer"].get("buffer_count", 4))
        result["host"]["buckets"] = 4.0 * count * at_a_time
        result["disk"]["gradients"] = 4.0 * trained
    if parameters == "disk":
        section = zero["offload_param"]
        pool = int(section.get("buffer_count", 5)) * float(section.get("buffer_size", 1e8))
        inside = min(trained, float(section.get("max_in_cpu", 1e9)))
        result["host"]["buckets"] = result["host"].get("buckets", 0.0) + b * (pool + inside)
    bucket, largest = int(zero.get("reduce_bucket_size", 5e8)), max(parts.trained)
    # the bucket, its copy in the order of the ranks, and the whole gradient of a parameter that no bucket holds
    result["gpu"]["buckets"] = float(b * (2 * bucket + (largest if largest > bucket else 0)))
    result["gpu"]["gather"] = b * _gathered(parts, zero, threshold)
    return result


def _shards(sizes: Sequence[int], world_size: int) -> int:
    return sum(ceil(size / world_size) for size in sizes)


def _gathered(parts: Architecture, zero: dict[str, Any], threshold: int) -> float:
    """Most elements that ZeRO-3 holds whole at a time beside persistent ones: as many as the config allows."""
    gatherable = sum(size for size in (*parts.frozen, *parts.trained) if size > threshold)
    prefetched = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    allowed = max(int(zero.get("stage3_max_live_parameters", 1e9)), parts.largest_unit + prefetched)
    return min(gatherable, allowed)
