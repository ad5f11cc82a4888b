"""Seconds of an optimizer step: computing from FLOPs, communication from the volume of the ZeRO variant.

    computing = (FLOPs of the method + recomputed forward passes) / (peak x mfu)
    step      = max(computing, overlapped) + exposed + update (and collectives after the passes)

cluster.py has the time of a collective. Of the collectives during the passes, those are exposed that nothing overlaps:
gradients without `overlap_comm`, and the part of each frozen layer that ZeRO-3 does not prefetch (gathering.py). All
others are assumed to overlap fully, which is the best case. Latencies, stragglers, padding and data loading are not
counted. Volumes follow the ZeRO paper (arXiv:1910.02054, section 7) and ZeRO++'s hpZ
(arXiv:2306.10209).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zero_ds.training.checkpoint import STATE_BYTES
from zero_ds.training.gathering import share_ahead
from zero_ds.training.planning.cluster import ASSUMED, PCIE, Cluster
from zero_ds.training.planning.data import AverageSample
from zero_ds.training.planning.memory import PERSISTENT, Memory
from zero_ds.training.planning.model_size import ModelSize


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and where they go. The fields are keys of the plan's JSON file."""

    computing: float
    """Seconds of the passes."""
    communication: float
    """Seconds of the collectives during the passes, the exposed ones included."""
    update: float
    """Seconds of the optimizer, of transfers to and from its place, and of gathers after it."""
    flops: float
    """FLOPs that the method needs for the global batch."""
    gpus: int
    peak: float
    """FLOP/s of a GPU."""
    exposed: float = 0.0
    """Seconds of those collectives during the passes that no computing overlaps."""

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return max(self.computing, self.communication - self.exposed) + self.exposed + self.update

    @property
    def mfu(self) -> float:
        """Model FLOPs utilization as runs report it: the method's FLOPs over the GPUs' peak in the step."""
        return self.flops / self.seconds / (self.gpus * self.peak)


@dataclass(frozen=True)
class Work:
    """FLOPs of a global batch."""

    method: float
    """FLOPs that the method needs."""
    computed: float
    """FLOPs that are computed: the method's and those of recomputed layers."""


def work(model: ModelSize, sample: AverageSample, global_batch: int, recomputed: float) -> Work:
    """Returns the FLOPs of a global batch; recomputed: share of the decoder's layers that are recomputed."""
    cost = model.cost
    images = sample.images if cost.patches > 0 else 0.0
    image_tokens = images * model.image_tokens
    once = cost.flops(sample.length, sample.length**2, sample.supervised, images, image_tokens)
    forward = cost.decoder.forward_token * sample.length + cost.decoder.forward_pair * sample.length**2
    again = recomputed * forward if cost.decoder.backward else 0.0
    return Work(global_batch * once, global_batch * (once + again))


def step(model: ModelSize, ds: dict[str, Any], memory: Memory, cluster: Cluster, work: Work, accumulation: int) -> Step:
    """Returns the time of a step of `accumulation` micro-batches on every rank.

    Args:
        ds: the resolved DeepSpeed configuration.
        memory: memory of a rank under it.
    """
    computing = work.computed / (cluster.gpus * cluster.peak * cluster.mfu)
    if ds["zero_optimization"]["stage"] == 3:
        found = _sharded(model, ds, cluster, accumulation)
    else:
        found = _whole(model, ds, cluster, accumulation)
    update = found.after + _update(model, ds, memory, cluster)
    return Step(computing, found.during, update, work.method, cluster.gpus, cluster.peak, found.exposed)


@dataclass(frozen=True)
class _Collectives:
    """Seconds of a step's collectives."""

    during: float
    """Seconds during the passes."""
    exposed: float
    """Seconds during the passes that no computing overlaps."""
    after: float
    """Seconds after the passes."""


def _whole(model: ModelSize, ds: dict[str, Any], cluster: Cluster, accumulation: int) -> _Collectives:
    """Returns the seconds of collectives during and after the passes under stages 0 to 2.

    Gradients are reduced once per step (stage 2: once per micro-batch), and updated parameters are gathered afterwards.
    """
    once = cluster.collective(model.itemsize * sum(model.trained), cluster.gpus)
    zero = ds["zero_optimization"]
    if zero["stage"] == 0:
        return _Collectives(2 * once, 0.0, 0.0)
    reduced = (accumulation if zero["stage"] == 2 else 1) * once
    return _Collectives(reduced, 0.0 if zero.get("overlap_comm", False) else reduced, once)


def _sharded(model: ModelSize, ds: dict[str, Any], cluster: Cluster, accumulation: int) -> _Collectives:
    """Returns the seconds of collectives during and after the passes under stage 3.

    Every forward and backward pass gathers the parameters, and every backward pass reduces and scatters the gradients.
    """
    zero, b = ds["zero_optimization"], model.itemsize
    threshold = int(zero.get("stage3_param_persistence_threshold", PERSISTENT))
    group = int(zero.get("zero_hpz_partition_size", 1))
    frozen = b * sum(size for size in model.frozen if size > threshold)
    trained = b * sum(size for size in model.trained if size > threshold)
    persistent = b * sum(size for size in model.trained if size <= threshold)
    if group > 1:  # the first pass after an update gathers trained parameters from all GPUs
        gathers = cluster.collective(trained, cluster.gpus)
        gathers += (2 * accumulation - 1) * cluster.collective(trained, group)
        gathers += 2 * accumulation * cluster.collective(frozen, group)
    else:
        gathers = 2 * accumulation * cluster.collective(frozen + trained, cluster.gpus)
    reduced = accumulation * cluster.collective(b * sum(model.trained), cluster.gpus)
    moved = 2 * accumulation * (frozen + trained) / cluster.gpus
    device = _device(zero, "offload_param")
    if device == "cpu":
        gathers += moved / (PCIE * 1e9)
    elif device == "nvme":
        gathers += moved / (ASSUMED["disk"] / cluster.ranks_per_node * 1e9)
    layers = [[size for size in layer if size > threshold] for layer in model.frozen_layers]
    late = sum((1 - share_ahead(zero, sum(layer))) * sum(layer) for layer in layers)
    exposed = 2 * accumulation * cluster.collective(b * late, group if group > 1 else cluster.gpus)
    exposed += 0.0 if zero.get("overlap_comm", True) else reduced
    return _Collectives(gathers + reduced, exposed, cluster.collective(persistent, cluster.gpus))


def _device(zero: dict[str, Any], section: str) -> str:
    """Returns the device that an offload section names."""
    return str((zero.get(section) or {}).get("device", "none"))


def _update(model: ModelSize, ds: dict[str, Any], memory: Memory, cluster: Cluster) -> float:
    """Returns the seconds of the update.

    It reads and writes master copies and moments once, and moves gradients and parameters if they are offloaded.
    """
    zero, b = ds["zero_optimization"], model.itemsize
    share = memory.total("optimizer") / STATE_BYTES
    touched = 2 * memory.total("optimizer") + 4 * share
    local = cluster.ranks_per_node
    device = _device(zero, "offload_optimizer")
    if device == "none":
        return touched / (ASSUMED["gpu_memory"] * 1e9)
    seconds = (4 + b) * share / (PCIE * 1e9) + touched / (ASSUMED["host_memory"] / local * 1e9)
    if device == "nvme":
        seconds += 2 * memory.total("optimizer") / (ASSUMED["disk"] / local * 1e9)
    return seconds
