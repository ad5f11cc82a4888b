"""Bytes of a rank, by cause, under a DeepSpeed config: the allocations of DeepSpeed 0.19, as read from its source.

N ranks; F and T: frozen and trained parameters; b: bytes of the type that is computed in; g: bytes of the type in which
gradients are accumulated (4 under ZeRO-2 and 3 here, b under 0 and 1).

    stage         frozen   trained      gradients   optimizer (fp32 master, two moments)
    0             b F      b T          b T         12 T (fp32: 8 T, parameters are their own master)
    1             b F      b T          b T         12 T / N
    2             b F      b T          g T / N     12 T / N
    3             b F / N  b T / N      g T / N     12 T / N

With `frozen_weights=int8` (stages 0 to 2) a linear weight of a frozen decoder layer has one byte instead of b. Stage 1
without accumulation, and stage 2 where g = b, keep the whole gradient of every parameter that the rank's share touches.
ZeRO-3 also keeps parameters up to `stage3_param_persistence_threshold` whole, and with hpZ a second shard of every
other parameter within its group of ranks. An offloaded optimizer comes with 4 T / N bytes of float32 gradients. In
addition to these states a rank needs communication buckets, gathered parameters (ZeRO-3), activations (activations.py),
a float32 copy of the gradient in the update, and 16 MiB pieces while it saves a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

from zero_ds.training.checkpoint import PIECE, STATE_BYTES
from zero_ds.training.planning.model_size import ActivationBytes, ModelSize

GIB = 2.0**30
CAUSES = ("frozen", "trained", "gradients", "optimizer", "buckets", "gather", "activations", "logits", "update", "save")
"""Causes in the order of the tables. `update` and `save` are needed when activations, logits and gathered parameters
are not."""
STATES = ("frozen", "trained", "gradients", "optimizer")
"""Causes that need memory all the time."""
PASSES = ("buckets", "gather", "activations", "logits")
"""Causes that need memory during the forward and backward pass."""
PLACES = ("gpu", "host", "disk")

PERSISTENT = 100_000
"""DeepSpeed's default of `stage3_param_persistence_threshold`, in elements."""

Bytes = dict[str, dict[str, float]]
"""Bytes by place and cause."""


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank."""

    by_cause: Bytes
    """Bytes by place and cause."""
    peak: dict[str, float] = field(default_factory=dict)
    """Bytes of the phase that needs most, by place."""

    def total(self, cause: str) -> float:
        """Returns the bytes of a cause in all places together."""
        return sum(self.by_cause[place].get(cause, 0.0) for place in PLACES)

    def keeping(self, activations: float) -> Memory:
        """Returns the same with another number of bytes for activations."""
        gpu = {**self.by_cause["gpu"], "activations": activations}
        return Memory({**self.by_cause, "gpu": gpu}, {**self.peak, "gpu": _peak(gpu)})


def memory(
    model: ModelSize, ds: dict[str, Any], world_size: int, activations: ActivationBytes, *, accumulation: int = 1
) -> Memory:
    """Returns the memory that a rank of `world_size` needs with no layer recomputed.

    Args:
        ds: the resolved DeepSpeed configuration.
        activations: bytes of one micro-batch.
        accumulation: number of micro-batches per step.
    """
    if ds["zero_optimization"]["stage"] == 3:
        states = _sharded(model, ds, world_size)
    else:
        states = _whole(model, ds, world_size, accumulation)
    gpu = states["gpu"]
    gpu["activations"] = activations.whole
    gpu["logits"] = activations.logits
    gpu["save"] = 2.0 * 4 * PIECE
    states["host"]["save"] = 3.0 * 4 * PIECE
    return Memory(states, {place: _peak(states[place]) for place in PLACES})


def recomputed(
    whole: Memory,
    activations: ActivationBytes,
    fits: Callable[[Memory], bool],
    checkpointing: Literal["auto", True, False],
) -> tuple[int, Memory]:
    """Returns how many decoder layers are recomputed (the first recomputable ones), and the memory of a rank then.

    Args:
        whole: memory with no layer recomputed.
        activations: bytes of one micro-batch, as for `memory`.
        fits: whether there is room for so much.
        checkpointing: the recipe's `activation_checkpointing`. `auto` takes the smallest number that fits, and all
            layers if not even that fits.
    """
    counts = activations.recompute_counts
    if checkpointing != "auto":
        counts = counts[-1:] if checkpointing else counts[:1]
    for count in counts:
        need = whole.keeping(activations.recomputing(count))
        if fits(need):
            break
    return count, need


def _peak(by_cause: dict[str, float]) -> float:
    """Returns the bytes at the peak.

    Forward/backward, update and checkpoint run one after another, so the peak is the largest of the three.
    """
    states = sum(by_cause.get(cause, 0.0) for cause in STATES)
    passes = sum(by_cause.get(cause, 0.0) for cause in PASSES)
    return states + max(passes, by_cause.get("update", 0.0), by_cause.get("save", 0.0))


def _itemsizes(ds: dict[str, Any], itemsize: int) -> tuple[int, int]:
    """Returns the bytes of an element that is computed with, and of one in which gradients are accumulated."""
    accumulated = ds.get("data_types", {}).get("grad_accum_dtype")
    return itemsize, {"fp32": 4, "fp16": 2, "bf16": 2}.get(accumulated, itemsize)


def _place(section: Any) -> str:
    """Returns the place that an offload section of the DeepSpeed configuration names."""
    device = str(section.get("device", "none")) if isinstance(section, dict) else "none"
    return {"none": "gpu", "cpu": "host", "nvme": "disk"}[device]


# -- ZeRO stages 0, 1 and 2: whole parameters on every rank ------------------------------------------------------------


def _whole(model: ModelSize, ds: dict[str, Any], world_size: int, accumulation: int) -> Bytes:
    zero = ds["zero_optimization"]
    b, g = _itemsizes(ds, model.itemsize)
    trained = sum(model.trained)
    largest = max(model.trained)
    gpu: dict[str, float] = {"frozen": model.frozen_bytes, "trained": b * trained}
    host: dict[str, float] = {}
    result: Bytes = {"gpu": gpu, "host": host, "disk": {}}
    if zero["stage"] == 0:
        master = 0 if model.itemsize == 4 else 4
        gpu["gradients"] = b * trained
        gpu["optimizer"] = (STATE_BYTES - 4 + master) * trained
        gpu["update"] = master * trained
        return result

    shards = _group_shards(model, world_size)
    shard = sum(shards)
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    gpu["buckets"] = (2 if zero.get("overlap_comm") else 1) * b * bucket
    if largest > bucket:
        gpu["buckets"] += b * largest
    compact = zero["stage"] == 2 and g != b
    touched = g * shard if compact else b * _touched(model, shards, world_size)
    if _place(zero.get("offload_optimizer")) == "gpu":
        accumulates_whole = zero["stage"] == 1 and accumulation > 1
        gpu["gradients"] = b * trained if accumulates_whole else touched
        gpu["optimizer"] = STATE_BYTES * shard
        gpu["update"] = 4 * max(shards)
        return result

    gpu["buckets"] += b * largest
    if compact:
        gpu["gradients"] = touched
    host["gradients"] = 4 * shard
    if accumulation > 1 and not compact:
        host["gradients"] += touched
    host["optimizer"] = STATE_BYTES * shard
    host["buckets"] = b * (shard + largest)
    return result


def _group_shards(model: ModelSize, world_size: int) -> list[int]:
    """Returns the elements of a rank's share of every optimizer group, which is padded to equal shares of even size."""
    return [ceil(sum(group) / (2 * world_size)) * 2 for group in model.groups.values()]


def _touched(model: ModelSize, shards: list[int], world_size: int) -> int:
    """Returns the elements of the parameters that a rank's share of the flattened groups touches, at most."""
    most = 0
    for rank in range(world_size):
        touched = 0
        for group, shard in zip(model.groups.values(), shards, strict=True):
            begin, end, offset = rank * shard, (rank + 1) * shard, 0
            for elements in group:
                if offset < end and begin < offset + elements:
                    touched += elements
                offset += elements
        most = max(most, touched)
    return most


# -- ZeRO stage 3: everything in shards, parameters gathered when they are used ----------------------------------------


def _sharded(model: ModelSize, ds: dict[str, Any], world_size: int) -> Bytes:
    zero = ds["zero_optimization"]
    b, _ = _itemsizes(ds, model.itemsize)
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    result: Bytes = {place: {} for place in PLACES}
    _add_parameters(result, model, zero, b, world_size, threshold)
    _add_optimizer(result, model, ds, world_size)
    bucket, largest = int(zero.get("reduce_bucket_size", 5e8)), max(model.trained)
    # the bucket, its copy in the order of the ranks, and the whole gradient of a parameter that no bucket holds
    result["gpu"]["buckets"] = float(b * (2 * bucket + (largest if largest > bucket else 0)))
    result["gpu"]["gather"] = b * _gathered(model, zero, threshold)
    return result


def _add_parameters(
    result: Bytes, model: ModelSize, zero: dict[str, Any], b: int, world_size: int, threshold: int
) -> None:
    """Adds the shards of all parameters, whole persistent parameters, hpZ's second shards, and NVMe's buffers."""
    group = int(zero.get("zero_hpz_partition_size", 1))
    place = _place(zero.get("offload_param"))
    for cause, sizes in (("frozen", model.frozen), ("trained", model.trained)):
        result[place][cause] = b * _shards(sizes, world_size)
        result["gpu"][cause] = result["gpu"].get(cause, 0.0) + b * sum(size for size in sizes if size <= threshold)
        if group > 1:
            result["gpu"][cause] += b * sum(size // group for size in sizes if size > threshold)
    if place == "disk":
        section = zero["offload_param"]
        pool = int(section.get("buffer_count", 5)) * float(section.get("buffer_size", 1e8))
        inside = min(_shards(model.trained, world_size), float(section.get("max_in_cpu", 1e9)))
        result["host"]["buckets"] = b * (pool + inside)


def _add_optimizer(result: Bytes, model: ModelSize, ds: dict[str, Any], world_size: int) -> None:
    """Adds gradients, the optimizer's states, and what its update needs."""
    zero = ds["zero_optimization"]
    _, g = _itemsizes(ds, model.itemsize)
    trained = _shards(model.trained, world_size)
    at_a_time = min(trained, int(zero.get("sub_group_size", 1e9)))
    place = _place(zero.get("offload_optimizer"))
    if place == "gpu":
        result["gpu"]["gradients"] = g * trained
        result["gpu"]["optimizer"] = STATE_BYTES * trained
        result["gpu"]["update"] = 4 * at_a_time
        return
    result["host"]["gradients"] = g * trained
    result[place]["optimizer"] = STATE_BYTES * trained
    if place == "host":
        result["host"]["gradients"] += 4 * trained
    else:
        count = int(zero["offload_optimizer"].get("buffer_count", 4))
        result["host"]["buckets"] = result["host"].get("buckets", 0.0) + 4.0 * count * at_a_time
        result["disk"]["gradients"] = 4.0 * trained


def _shards(sizes: Sequence[int], world_size: int) -> int:
    """Returns the elements of a rank's shards of parameters of these sizes."""
    return sum(ceil(size / world_size) for size in sizes)


def _gathered(model: ModelSize, zero: dict[str, Any], threshold: int) -> float:
    """Returns the largest number of elements that ZeRO-3 may hold whole at a time, without persistent parameters."""
    gatherable = sum(size for size in (*model.frozen, *model.trained) if size > threshold)
    prefetched = int(zero.get("stage3_prefetch_bucket_size", 5e7))
    allowed = max(int(zero.get("stage3_max_live_parameters", 1e9)), model.largest_unit + prefetched)
    return min(gatherable, allowed)
