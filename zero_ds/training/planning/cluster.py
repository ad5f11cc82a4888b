"""The machines that a run is planned for, and how fast their links are.

    collective = max(bytes (m - 1) / m / rate inside a node,  bytes of the node (n - 1) / n / rate between nodes)

for bytes that end up on a rank (all-gather) or leave it (reduce-scatter), m ranks of a node and n nodes in the group.
An all-reduce is both.
"""

from __future__ import annotations

from dataclasses import dataclass

from zero_ds.runtime.errors import ConfigError, did_you_mean

PEAK = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
}
"""Dense bf16 (V100: fp16) FLOP/s that the makers state, by a part of the device's name; the first match counts."""
LINKS = {"B200": 900.0, "H200": 450.0, "H100 PCIe": 64.0, "H100": 450.0, "A100": 300.0, "V100": 150.0}
"""GB/s of a GPU to the others of its node, one direction, as the makers state it (NVLink). All other GPUs: PCIe."""
PCIE = 32.0
"""GB/s of a GPU to its host, one direction: 16 lanes of the fourth generation."""
ASSUMED = {"between": 50.0, "gpu_memory": 1500.0, "host_memory": 200.0, "disk": 6.0}
"""GB/s that are assumed of any machine: a node's links to other nodes together (4 x 100 Gb/s, one direction), a GPU's
memory, a node's host memory, a node's disk."""
REACHED = 0.8
"""Share of a link's nominal rate that collectives reach, where the rate is not given."""
RESERVE_GIB = 3.0
"""Memory of a GPU left for uses outside the plan: CUDA's context, NCCL's buffers, fragmentation."""
PROCESS_GIB = 3.0
"""Host memory of each rank for Python, the libraries, and workers of the loader."""


@dataclass(frozen=True)
class Cluster:
    """The machines of a run. The fields are keys of the plan's JSON file."""

    gpus: int
    """Number of GPUs, one rank each."""
    gpus_per_node: int = 8
    memory_gib: float = 80.0
    """Memory of a GPU."""
    name: str = "A100"
    """Name of the GPU."""
    peak: float = PEAK["A100"]
    """FLOP/s of a GPU, dense, in the type that is computed in."""
    mfu: float = 0.4
    """Share of the peak that computing reaches, with recomputed passes counted as work."""
    inside: float = REACHED * LINKS["A100"]
    """GB/s that collectives reach for each GPU inside a node, one direction."""
    between: float = REACHED * ASSUMED["between"]
    """GB/s that collectives reach for each node to the others, one direction."""
    reserve_gib: float = RESERVE_GIB
    """Memory of each GPU left for uses outside the plan."""
    host_gib: float = 1000.0
    """Host memory of a node."""
    process_gib: float = PROCESS_GIB
    """Host memory that each rank's process takes for itself."""
    price: float | None = None
    """Price of an hour of a GPU, in the user's currency; None where costs are not wanted."""

    def check(self) -> None:
        """Checks that such machines can exist.

        Raises:
            ConfigError: a value out of its range; the message names the option of `zero-ds plan`.
        """
        for option, value in (
            ("--gpus", self.gpus),
            ("--gpu-memory", self.memory_gib),
            ("--gpus-per-node", self.gpus_per_node),
            ("--host-memory", self.host_gib),
        ):
            if not 0 < value < float("inf"):
                raise ConfigError(f"{option} {value:g} is not a size; give more than 0.")
        if self.price is not None and not 0 < self.price < float("inf"):
            raise ConfigError(f"--price {self.price:g} is not a price; give more than 0 for an hour of a GPU.")
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"--mfu {self.mfu:g} is not a share; give more than 0 and at most 1, such as 0.4.")
        if not 0 <= self.reserve_gib < self.memory_gib:
            raise ConfigError(f"--reserve {self.reserve_gib:g} is not a part of {self.memory_gib:g} GiB; give less.")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ConfigError(
                f"{self.gpus} GPUs are not a whole number of nodes of {self.gpus_per_node}; set --gpus-per-node."
            )
        if not 0 < min(self.inside, self.between) <= max(self.inside, self.between) < float("inf"):
            raise ConfigError(f"--bandwidth {self.inside:g}/{self.between:g} must be two rates above 0, in GB/s.")

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks of a node."""
        return min(self.gpus, self.gpus_per_node)

    def nodes(self, ranks: int) -> int:
        """Returns the number of nodes that a group of `ranks` neighbouring ranks occupies."""
        return -(-ranks // self.gpus_per_node)

    def cost(self, hours: float | None) -> float | None:
        """Returns the price of so many hours of all GPUs; None where the price or the hours are not known."""
        return None if self.price is None or hours is None else self.gpus * hours * self.price

    def collective(self, size: float, ranks: int) -> float:
        """Returns the seconds of an all-gather or reduce-scatter in all groups of `ranks` neighbours at once.

        size: bytes of the whole tensor.
        """
        inside, nodes = min(ranks, self.gpus_per_node), self.nodes(ranks)
        within = size * (inside - 1) / inside / (self.inside * 1e9)
        across = size * (nodes - 1) / nodes / (self.between * 1e9)
        return max(within, across)

    def between_replicas(self, size: float, ranks: int) -> float:
        """Returns the seconds of an all-reduce between groups of `ranks` neighbours that each hold all shards.

        size: bytes of the whole tensor, of which every rank of a group holds a shard.
        """
        replicas = self.gpus // ranks
        share = size * min(1.0, self.gpus_per_node / ranks)  # of a node, whose ranks share its links
        return 2 * share * (replicas - 1) / replicas / (self.between * 1e9)


def find_gpu(name: str) -> tuple[str, float, float]:
    """Returns name, peak FLOP/s and GB/s inside a node of a GPU given by its name or by its peak in TFLOP/s.

    Raises:
        ConfigError: an unknown name, or a peak that is not a positive number.
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
        raise ConfigError(f"--gpu {name} is not a peak; give TFLOP/s above 0, or a name such as A100.")
    return f"{peak:g} TFLOP/s", peak * 1e12, LINKS["A100"]


def bandwidths(text: str | None, link: float) -> tuple[float, float]:
    """Returns the rates that collectives reach inside a node and between nodes, in GB/s.

    Args:
        text: the rates as `INSIDE/BETWEEN`; None for REACHED of the nominal rates.
        link: GB/s of a GPU to the others of its node.

    Raises:
        ConfigError: `text` is not two numbers.
    """
    if text is None:
        return REACHED * link, REACHED * ASSUMED["between"]
    try:
        inside, between = (float(part) for part in text.split("/"))
    except ValueError:
        raise ConfigError(f"--bandwidth {text} cannot be read; write INSIDE/BETWEEN, e.g. 240/40.") from None
    return inside, between
