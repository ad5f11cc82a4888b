"""Plans all stages of the surrogate's route and of the baseline's, and the paper's own layout of shards.

The routes are those of the paper's Table 9. The paper trains Llama-70B with PyTorch FSDP on 128 GPUs (A.4): everything
is sharded over 16 ranks, and there are 8 such groups. No DeepSpeed config does that (`ds_configs/zero3_hpz` comes
nearest), so `shard_groups` computes it separately: fp32 parameters, gradients and two moments, 16 bytes per trained
parameter, b bytes per frozen one; gathers and reduce-scatters within a group, an all-reduce of the gradients between
groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.checkpoint import STATE_BYTES
from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.data import DECODER_SHARE, DataOverrides
from zero_ds.training.planning.memory import GIB
from zero_ds.training.planning.recipe import RunPlan, plan_run
from zero_ds.training.planning.speed import Step, work

PAPER_HOURS = {
    "Llama-3.1-70B-Instruct": {
        "surrogate": {"pretrain": 9.36, "encoder": 4.25, "decoder": 5.56},
        "baseline": {"baseline-adapter": 7.01, "baseline-decoder": 27.88},
    }
}
"""Hours of Table 9, on 128 A100-80G, without loading and saving."""
PAPER_GPUS = 128
"""Number of GPUs of these hours."""
PAPER_STEP = 20.5
"""Seconds of a step of the full Llama-70B, 16-way shards, 128 samples (A.4)."""
PAPER_GROUP = 16
"""Number of ranks that the paper shards over."""


@dataclass(frozen=True)
class Leg:
    """One stage of a route."""

    name: str
    plan: RunPlan
    share: float
    """Part of its data that the stage sees."""

    def hours(self) -> float | None:
        """Returns the hours under the fastest DeepSpeed config that fits.

        None if no config fits, or the number of steps is not known.
        """
        fitting = self.plan.fitting
        return self.plan.hours(fitting[0].step.seconds) if fitting else None

    def hours_in_groups(self, cluster: Cluster, ranks: int) -> float | None:
        """Returns the hours with everything sharded over groups of `ranks` ranks."""
        return self.plan.hours(shard_groups(self.plan, cluster, ranks).step.seconds)


@dataclass(frozen=True)
class Route:
    """Stages that run one after another."""

    name: str
    legs: tuple[Leg, ...]


def routes(
    recipe: str,
    overrides: list[str],
    cluster: Cluster,
    *,
    replace: list[str] | None = None,
    translators: int = 1,
    dense_width: int | None = None,
    data: DataOverrides | None = None,
    decoder_share: float = DECODER_SHARE,
) -> list[Route]:
    """Plans the surrogate's route and the baseline's from the recipes next to `recipe`; empty if one is missing.

    Where the baseline has no recipes of its own, its adapter trains as `pretrain` does, on the target, and its decoder
    as `decoder` does. As in the paper, the baseline's adapter sees no text-only data sets.
    """
    configs: dict[str, RunConfig] = {}
    for name in ("pretrain", "encoder", "decoder", "baseline-adapter", "baseline-decoder"):
        try:
            configs[name] = load_run(sibling(recipe, name), overrides)
        except ConfigError:
            continue
    if not {"pretrain", "encoder", "decoder"} <= set(configs):
        return []
    configs.setdefault("baseline-adapter", configs["pretrain"].model_copy(update={"decoder": "target"}))
    configs.setdefault("baseline-decoder", configs["decoder"])
    legs = {}
    for name, config in configs.items():
        share = decoder_share if name == "decoder" else 1.0
        plan = plan_run(
            config,
            cluster,
            replace=replace,
            translators=translators,
            dense_width=dense_width,
            data=data,
            share=share,
            images_only=name == "baseline-adapter",
        )
        legs[name] = Leg(name, plan, share)
    return [
        Route("surrogate", (legs["pretrain"], legs["encoder"], legs["decoder"])),
        Route("baseline", (legs["baseline-adapter"], legs["baseline-decoder"])),
    ]


def sibling(recipe: str, name: str) -> str:
    """Returns the recipe called `name` next to another one."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return str(path.with_name(f"{name}{path.suffix}"))
    return str(path.parent / name)


def total(hours: list[float | None]) -> float | None:
    """Returns the sum; None if a stage has none."""
    known = [value for value in hours if value is not None]
    return sum(known) if len(known) == len(hours) else None


# -- everything sharded over groups of ranks, as FSDP does it ----------------------------------------------------------


@dataclass(frozen=True)
class ShardGroups:
    """A run with everything sharded over groups of ranks. The fields are keys of the plan's JSON file."""

    ranks: int
    """Number of ranks of a group."""
    replicas: int
    """Number of groups."""
    state: float
    """Bytes of a rank for parameters, gradients and moments."""
    peak: float
    """Bytes of a rank with gathered parameters, activations and logits at the micro-batch."""
    fits: bool
    micro_batch: int
    """Largest micro-batch that fits; 1 if none does."""
    step: Step
    """Time of a step at that micro-batch."""


def group_sizes(cluster: Cluster) -> list[int]:
    """Returns group sizes that divide the number of GPUs: 1 rank, 1 node, 2 nodes, 4 nodes, ... and all ranks."""
    sizes = [1]
    ranks = cluster.ranks_per_node
    while ranks < cluster.gpus:
        sizes.append(ranks)
        ranks *= 2
    return [size for size in dict.fromkeys([*sizes, cluster.gpus]) if cluster.gpus % size == 0]


def shard_groups(plan: RunPlan, cluster: Cluster, ranks: int) -> ShardGroups:
    """Plans the run with everything sharded over groups of `ranks` ranks."""
    b = plan.size.itemsize
    frozen, trained = sum(plan.size.frozen), sum(plan.size.trained)
    state = (b * frozen + (4 + STATE_BYTES) * trained) / ranks  # the master copy is the parameter, and its gradient
    unit = plan.size.largest_unit
    gathered = 0.0
    if ranks > 1:
        gathered = 2.0 * b * unit  # this unit and the next
        if trained > frozen:
            gathered += b * unit  # its gradient
    of_rank = plan.config.global_batch // cluster.gpus
    recompute = (
        plan.config.activation_checkpointing is not False
    )  # as in the paper's runs; `auto` recomputes no less here

    def peak(micro_batch: int) -> float:
        activations = plan.activations.times(micro_batch)
        passes = activations.checkpointed if recompute else activations.whole
        return state + gathered + passes + activations.logits

    room = (cluster.memory_gib - cluster.reserve_gib) * GIB
    fitting = [n for n in range(1, of_rank + 1) if of_rank % n == 0 and peak(n) <= room]
    micro_batch = max(fitting, default=1)
    accumulation = of_rank // micro_batch
    whole = b * (frozen + trained)
    communication = accumulation * (2 * cluster.collective(whole, ranks) + cluster.collective(b * trained, ranks))
    communication += cluster.between_replicas(b * trained, ranks)
    needed = work(plan.size, plan.sample, plan.config.global_batch, float(recompute))
    computing = needed.computed / (cluster.gpus * cluster.peak * cluster.mfu)
    step = Step(computing, communication, 0.0, needed.method, cluster.gpus, cluster.peak)
    return ShardGroups(ranks, cluster.gpus // ranks, state, peak(micro_batch), bool(fitting), micro_batch, step)


def fitted(plan: RunPlan, cluster: Cluster, *, seconds: float = PAPER_STEP, ranks: int = PAPER_GROUP) -> Cluster | None:
    """Returns the cluster with the rate between nodes at which a step in groups of `ranks` takes `seconds`.

    None where no rate gives that: computing alone takes longer, or neither the groups nor their replicas use a link
    between nodes.
    """
    low, high = 1e-3, 1e6
    fast = shard_groups(plan, replace(cluster, between=high), ranks).step.seconds
    slow = shard_groups(plan, replace(cluster, between=low), ranks).step.seconds
    if not fast < seconds < slow:
        return None
    for _ in range(100):
        middle = (low * high) ** 0.5
        if shard_groups(plan, replace(cluster, between=middle), ranks).step.seconds > seconds:
            low = middle
        else:
            high = middle
    return replace(cluster, between=high)


def paper_cluster(found: list[Route], cluster: Cluster, target: str) -> Cluster | None:
    """Returns the cluster fitted to the paper's step; None for another model or number of GPUs than it was measured
    with.

    found: both routes; target: name of the model.
    """
    if target not in PAPER_HOURS or cluster.gpus != PAPER_GPUS:
        return None
    baseline_decoder = found[1].legs[-1]
    return fitted(baseline_decoder.plan, cluster)
