"""Seconds of an optimizer step: computing from FLOPs, communication from the volume of the ZeRO variant.

    computing     = (FLOPs of the method + recomputed forward passes) / (peak x mfu)
    collective    = max(bytes (m - 1) / m / link inside a node,  bytes of the node (n - 1) / n / link between nodes)
    step          = max(computing, collectives beside the passes) + update (and collectives behind the passes)

for bytes that end up on a rank (all-gather) or leave it (reduce-scatter), m ranks of a node and n nodes in the group;
an all-reduce is both. Collectives are taken to run wholly beside the passes (`overlap_comm`, prefetch), which is the
best case; what DeepSpeed gathers behind the update is not. Latencies, stragglers, padding and data loading are left
out. Volumes follow the ZeRO paper (arXiv:1910.02054, section 7) and ZeRO++'s hpZ (arXiv:2306.10209).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zero_ds.runtime.errors import ConfigError, did_you_mean
from zero_ds.training.planning.architecture import Architecture
from zero_ds.training.planning.cost import PEAK, StepCost
from zero_ds.training.planning.data import Sample
from zero_ds.training.planning.memory import PROCESS_GIB, RESERVE_GIB, Memory

LINKS = {"B200": 900.0, "H200": 450.0, "H100 PCIe": 64.0, "H100": 450.0, "A100": 300.0, "V100": 150.0}
"""GB/s of a GPU to the others of its node, one direction, as the makers state it (NVLink); others: PCIe."""
PCIE = 32.0
"""GB/s of a GPU to its host, one direction: 16 lanes of the fourth generation."""
ASSUMED = {"between": 50.0, "gpu_memory": 1500.0, "host_memory": 200.0, "disk": 6.0}
"""GB/s that are assumed of any machine: a node's links to other nodes together (4 x 100 Gb/s, one direction), a GPU's
memory, a node's host memory, a node's disk."""
REACHED = 0.8
"""Share of a link's nominal rate that collectives reach, where the rate is not given."""


@dataclass(frozen=True)
class Cluster:
    """What the run will have."""

    gpus: int
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    name: str = "A100"
    peak: float = PEAK["A100"]
    """FLOP/s of a GPU, dense, in the type that is computed in."""
    mfu: float = 0.4
    """Share of it that computing reaches, recomputed passes counted as work."""
    inside: float = REACHED * LINKS["A100"]
    """GB/s that collectives reach for each GPU inside a node, one direction."""
    between: float = REACHED * ASSUMED["between"]
    """GB/s that they reach for each node to the others, one direction."""
    reserve_gib: float = RESERVE_GIB
    """Of each GPU, for what is not planned."""
    host_gib: float = 1000.0
    """Host memory of a node."""
    process_gib: float = PROCESS_GIB
    """Of it, for each rank's process."""

    @property
    def ranks_per_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    def nodes(self, ranks: int) -> int:
        """Machines that a group of so many neighbouring ranks lies on."""
        return -(-ranks // self.gpus_per_node)

    def collective(self, size: float, ranks: int) -> float:
        """Seconds of an all-gather or reduce-scatter of `size` bytes over groups of `ranks` neighbours, all at once."""
        inside, nodes = min(ranks, self.gpus_per_node), self.nodes(ranks)
        within = size * (inside - 1) / inside / (self.inside * 1e9)
        across = size * (nodes - 1) / nodes / (self.between * 1e9)
        return max(within, across)

    def between_replicas(self, size: float, ranks: int) -> float:
        """Seconds of an all-reduce of `size` bytes, of which groups of `ranks` neighbours hold a shard on each rank."""
        replicas = self.gpus // ranks
        share = size * min(1.0, self.gpus_per_node / ranks)  # of a node, whose ranks share its links
        return 2 * share * (replicas - 1) / replicas / (self.between * 1e9)


def gpu(name: str) -> tuple[str, float, float]:
    """Name or TFLOP/s -> name, peak FLOP/s, GB/s inside a node.

    Raises:
        ConfigError: a name that is not known.
    """
    try:
        peak = float(name)
    except ValueError:
        known = {part.lower(): part for part in PEAK}
        if name.lower() not in known:
            near = did_you_mean(name, list(PEAK))
            raise ConfigError(f"--gpu {name} is not known{near} Or give its peak in TFLOP/s.") from None
        part = known[name.lower()]
        return part, PEAK[part], LINKS.get(part, PCIE)
    if not 0 < peak < float("inf"):
        raise ConfigError(f"--gpu {name} is no peak; give TFLOP/s above 0, or a name such as A100.")
    return f"{peak:g} TFLOP/s", peak * 1e12, LINKS["A100"]


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step, and where they go."""

    computing: float
    communication: float
    """Beside the passes."""
    update: float
    """The optimizer, what moves to and from where it works, and gathers behind it."""
    flops: float
    """Of the method, of the global batch."""
    gpus: int
    peak: float

    @property
    def seconds(self) -> float:
        return max(self.computing, self.communication) + self.update

    @property
    def mfu(self) -> float:
        """As runs report it: the method's FLOPs over what the GPUs could do in the step."""
        return self.flops / self.seconds / (self.gpus * self.peak)


def flops(
    parts: Architecture, cost: StepCost, sample: Sample, global_batch: int, recomputed: float
) -> tuple[float, float]:
    """FLOPs of a global batch: the method's, and with what is computed again in that share of the decoder's layers."""
    pictures = sample.pictures * (cost.patches > 0)
    image_tokens = pictures * parts.model.tokens_per_image()
    once = cost.flops(sample.length, sample.length**2, sample.supervised, pictures, image_tokens)
    forward = cost.decoder.forward_token * sample.length + cost.decoder.forward_pair * sample.length**2
    again = recomputed * forward if cost.decoder.backward else 0.0
    return global_batch * once, global_batch * (once + again)


def step(
    parts: Architecture,
    ds: dict[str, Any],
    memory: Memory,
    cluster: Cluster,
    work: tuple[float, float],
    accumulation: int,
) -> Step:
    """Of a global batch with so much `work` (see `flops`) in `accumulation` micro-batches on every rank."""
    zero = ds["zero_optimization"]
    computing = work[1] / (cluster.gpus * cluster.peak * cluster.mfu)
    of_passes, behind = (_sharded if zero["stage"] == 3 else _whole)(parts, ds, cluster, accumulation)
    return Step(computing, of_passes, behind + _update(parts, ds, memory, cluster), work[0], cluster.gpus, cluster.peak)


def _whole(parts: Architecture, ds: dict[str, Any], cluster: Cluster, accumulation: int) -> tuple[float, float]:
    """Stages 0 to 2: gradients are reduced once a step (2: a micro-batch), updated parameters gathered behind it."""
    once = cluster.collective(parts.dtype.itemsize * sum(parts.trained), cluster.gpus)
    stage = ds["zero_optimization"]["stage"]
    if stage == 0:
        return 2 * once, 0.0
    return once * (accumulation if stage == 2 else 1), once


def _sharded(parts: Architecture, ds: dict[str, Any], cluster: Cluster, accumulation: int) -> tuple[float, float]:
    """Stage 3: gathers in every forward and backward pass, and a reduce-scatter in every backward pass."""
    zero, b = ds["zero_optimization"], parts.dtype.itemsize
    threshold = int(zero.get("stage3_param_persistence_threshold", 100_000))
    group = int(zero.get("zero_hpz_partition_size", 1))
    frozen = b * sum(size for size in parts.frozen if size > threshold)
    trained = b * sum(size for size in parts.trained if size > threshold)
    behind = b * sum(size for size in parts.trained if size <= threshold)
    if group > 1:  # forward passes gather what the update has changed from everywhere, all else within the group
        gathers = cluster.collective(trained, cluster.gpus)
        gathers += (2 * accumulation - 1) * cluster.collective(trained, group)
        gathers += 2 * accumulation * cluster.collective(frozen, group)
    else:
        gathers = 2 * accumulation * cluster.collective(frozen + trained, cluster.gpus)
    reduced = accumulation * cluster.collective(b * sum(parts.trained), cluster.gpus)
    moved = 2 * accumulation * (frozen + trained) / cluster.gpus
    for device, rate in (("cpu", PCIE), ("nvme", ASSUMED["disk"] / cluster.ranks_per_node)):
        if _device(zero, "offload_param") == device:
            gathers += moved / (rate * 1e9)
    return gathers + reduced, cluster.collective(behind, cluster.gpus)


def _device(zero: dict[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))


def _update(parts: Architecture, ds: dict[str, Any], memory: Memory, cluster: Cluster) -> float:
    """Reads and writes master copies and moments once, and moves gradients and parameters where they were offloaded."""
    zero, b = ds["zero_optimization"], parts.dtype.itemsize
    share = memory.total("optimizer") / 12
    touched = 2 * memory.total("optimizer") + 4 * share
    local = cluster.ranks_per_node
    device = _device(zero, "offload_optimizer")
    if device == "none":
        return touched / (ASSUMED["gpu_memory"] * 1e9)
    seconds = (4 + b) * share / (PCIE * 1e9) + touched / (ASSUMED["host_memory"] / local * 1e9)
    if device == "nvme":
        seconds += 2 * memory.total("optimizer") / (ASSUMED["disk"] / local * 1e9)
    return seconds
