"""The surrogate's route beside the baseline's, as in the paper's Table 9, and shards of everything as in its A.4.

The paper trains Llama-70B with PyTorch FSDP on 128 GPUs: everything is sharded over 16 ranks, and there are 8 such
groups. No DeepSpeed config does that (`ds_configs/zero3_hpz` comes nearest), so it is computed here for itself: fp32
parameters, gradients and two moments, 16 bytes a trained parameter, b bytes a frozen one; gathers and reduce-scatters
within a group, an all-reduce of the gradients between groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.planning.memory import GIB
from zero_ds.training.planning.recipe import RunPlan, Words, plan_run
from zero_ds.training.planning.speed import Cluster, Step, flops

DECODER_SHARE = 0.2
"""Of the data, for a decoder that starts from the grafted encoder: enough in the paper (Tables 8 and 9)."""

PAPER_HOURS = {
    "Llama-3.1-70B-Instruct": {
        "surrogate": {"pretrain": 9.36, "encoder": 4.25, "decoder": 5.56},
        "baseline": {"baseline-adapter": 7.01, "baseline-decoder": 27.88},
    }
}
"""Table 9: hours on 128 A100-80G, without loading and saving."""
PAPER_STEP = 20.5
"""Seconds of a step of the full Llama-70B, 16-way shards, 128 samples (A.4)."""
PAPER_GROUP = 16


@dataclass(frozen=True)
class Leg:
    """One stage of a route."""

    name: str
    plan: RunPlan
    share: float

    def hours(self) -> float | None:
        """Under the fastest DeepSpeed config that fits; None if none does, or the number of steps is not known."""
        fitting = self.plan.fitting
        return self.plan.hours(fitting[0].step.seconds) if fitting else None

    def hours_in_groups(self, cluster: Cluster, ranks: int) -> float | None:
        """With everything sharded over groups of so many ranks."""
        return self.plan.hours(groups(self.plan, cluster, ranks).step.seconds)


@dataclass(frozen=True)
class Route:
    """Stages one after the other."""

    name: str
    legs: tuple[Leg, ...]


def routes(
    recipe: str,
    overrides: list[str],
    cluster: Cluster,
    *,
    replace: list[str] | None = None,
    translators: int = 1,
    words: Words | None = None,
    decoder_share: float = DECODER_SHARE,
) -> list[Route]:
    """The surrogate's route and the baseline's from the recipes beside `recipe`; none where they are not all there.

    Where there are no recipes of the baseline, its adapter trains as `pretrain` does, on the target, and its decoder as
    `decoder`. As in the paper the baseline's adapter sees no data sets of text alone.
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
    shares = {"decoder": decoder_share}
    legs = {
        name: Leg(
            name,
            plan_run(
                config,
                cluster,
                replace=replace,
                translators=translators,
                words=words,
                share=shares.get(name, 1.0),
                only_pictures=name == "baseline-adapter",
            ),
            shares.get(name, 1.0),
        )
        for name, config in configs.items()
    }
    return [
        Route("surrogate", (legs["pretrain"], legs["encoder"], legs["decoder"])),
        Route("baseline", (legs["baseline-adapter"], legs["baseline-decoder"])),
    ]


def sibling(recipe: str, name: str) -> str:
    """The recipe of that name beside another one."""
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml"):
        return str(path.with_name(f"{name}{path.suffix}"))
    return str(path.parent / name)


def total(hours: list[float | None]) -> float | None:
    """The sum, if every stage has one."""
    return None if any(value is None for value in hours) else sum(value for value in hours if value is not None)


# -- everything sharded over groups of ranks, as FSDP does it ----------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """Everything sharded over groups of `ranks`, of which there are `replicas`."""

    ranks: int
    replicas: int
    state: float
    """Bytes of parameters, gradients and moments of a rank."""
    peak: float
    """With what is gathered, activations and logits at the micro-batch."""
    fits: bool
    micro_batch: int
    step: Step


def group_sizes(cluster: Cluster) -> list[int]:
    """1, a node, two nodes, four nodes, ... and all ranks, as far as they divide."""
    sizes = [1]
    ranks = cluster.ranks_per_node
    while ranks < cluster.gpus:
        sizes.append(ranks)
        ranks *= 2
    return [size for size in dict.fromkeys([*sizes, cluster.gpus]) if cluster.gpus % size == 0]


def groups(plan: RunPlan, cluster: Cluster, ranks: int) -> Groups:
    """The run with everything sharded over groups of so many ranks."""
    parts, b = plan.parts, plan.parts.dtype.itemsize
    frozen, trained = sum(parts.frozen), sum(parts.trained)
    state = (b * frozen + 16 * trained) / ranks
    unit = parts.largest_unit
    gathered = 0.0 if ranks == 1 else 2.0 * b * unit + b * unit * (trained > frozen)  # this unit, the next, a gradient
    of_rank = plan.config.global_batch // cluster.gpus
    always = plan.config.activation_checkpointing is not False  # as the paper's runs: `auto` recomputes no less here

    def peak(micro_batch: int) -> float:
        kept = plan.kept.times(micro_batch)
        passes = kept.checkpointed if always else kept.whole
        return state + gathered + passes + kept.logits

    room = (cluster.memory_gib - cluster.reserve_gib) * GIB
    fitting = [n for n in range(1, of_rank + 1) if of_rank % n == 0 and peak(n) <= room]
    micro_batch = max(fitting, default=1)
    accumulation = of_rank // micro_batch
    whole = b * (frozen + trained)
    communication = accumulation * (2 * cluster.collective(whole, ranks) + cluster.collective(b * trained, ranks))
    communication += cluster.between_replicas(b * trained, ranks)
    work = flops(parts, parts.cost, plan.sample, plan.config.global_batch, float(always))
    computing = work[1] / (cluster.gpus * cluster.peak * cluster.mfu)
    step = Step(computing, communication, 0.0, work[0], cluster.gpus, cluster.peak)
    return Groups(ranks, cluster.gpus // ranks, state, peak(micro_batch), bool(fitting), micro_batch, step)


def fitted(plan: RunPlan, cluster: Cluster, *, seconds: float = PAPER_STEP, ranks: int = PAPER_GROUP) -> Cluster | None:
    """The cluster with the rate between nodes at which a step in groups of `ranks` takes `seconds`.

    None where no rate gives that: computing alone takes longer, or a group and its replicas need no link between nodes.
    """
    low, high = 1e-3, 1e6
    fast = groups(plan, replace(cluster, between=high), ranks).step.seconds
    slow = groups(plan, replace(cluster, between=low), ranks).step.seconds
    if not fast < seconds < slow:
        return None
    for _ in range(100):
        middle = (low * high) ** 0.5
        if groups(plan, replace(cluster, between=middle), ranks).step.seconds > seconds:
            low = middle
        else:
            high = middle
    return replace(cluster, between=high)
