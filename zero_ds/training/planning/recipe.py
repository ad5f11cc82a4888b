"""The plan of one run: its memory under every DeepSpeed config, what fits, what is fastest, and the hours it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.deepspeed import ds_config, ds_config_names
from zero_ds.training.planning.activations import Kept, kept_by_longest
from zero_ds.training.planning.architecture import Architecture, architecture
from zero_ds.training.planning.data import Data, Sample, data_of, steps_of
from zero_ds.training.planning.memory import GIB, Memory, memory, recomputed
from zero_ds.training.planning.speed import Cluster, Step, flops, step

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "auto": torch.bfloat16}
"""`auto` is planned as on GPUs since Ampere."""


@dataclass(frozen=True)
class Words:
    """What is said on the command line about the data, in place of what is assumed."""

    samples: int | None = None
    tokens: int | None = None
    supervised: int | None = None


@dataclass(frozen=True)
class Option:
    """The run under one DeepSpeed config."""

    zero: str
    memory: Memory
    """At the recipe's micro-batch, or the next smaller one that divides a rank's share."""
    recomputed: int
    """Decoder layers that are then recomputed, as the recipe's `activation_checkpointing` says."""
    bounds: tuple[Memory, Memory]
    """The same with none and with all of them recomputed."""
    least: Memory
    """At the smallest micro-batch."""
    fits: bool
    """Whether it fits at the smallest micro-batch."""
    micro_batch: int
    """The fastest that fits, of equally fast ones the largest; 1 if none fits."""
    again: int
    """Decoder layers that are recomputed at that micro-batch."""
    step: Step
    """At that micro-batch."""

    @property
    def gib(self) -> dict[str, float]:
        """Peak of a rank by place."""
        return {place: size / GIB for place, size in self.memory.peak.items()}


@dataclass(frozen=True)
class RunPlan:
    """What a run needs on a cluster."""

    config: RunConfig
    cluster: Cluster
    parts: Architecture
    sample: Sample
    """The average one, which times are computed for."""
    longest: int
    """Tokens of the longest one, which memory is computed for."""
    kept: Kept
    """Of one sample of that length."""
    micro_batch: int
    """At which memory is shown."""
    options: tuple[Option, ...]
    refused: dict[str, str]
    """Configs that cannot be used here, and why."""
    steps: int | None

    @property
    def fitting(self) -> list[Option]:
        """Those that fit, the fastest first; of two equally fast ones that which needs less memory."""
        fitting = [option for option in self.options if option.fits]
        return sorted(fitting, key=lambda o: (round(o.step.seconds, 3), o.memory.peak["gpu"] + o.memory.peak["host"]))

    @property
    def smallest(self) -> Option:
        """The one that needs least of a GPU."""
        return min(self.options, key=lambda option: option.least.peak["gpu"])

    def hours(self, seconds: float) -> float | None:
        """Of the whole run, at so many seconds a step, without loading and saving."""
        return None if self.steps is None else self.steps * seconds / 3600


def plan_run(
    config: RunConfig,
    cluster: Cluster,
    *,
    replace: list[str] | None = None,
    translators: int = 1,
    words: Words | None = None,
    share: float = 1.0,
    only_pictures: bool = False,
) -> RunPlan:
    """Plans one run. share: the part of its data that it sees; only_pictures: without sources of text alone.

    Raises:
        ConfigError: what cannot be planned, in one sentence.
    """
    words = words or Words()
    if config.global_batch % cluster.gpus:
        raise ConfigError(
            f"global_batch={config.global_batch} is no multiple of {cluster.gpus} GPUs; give --gpus a divisor of it."
        )
    of_rank = config.global_batch // cluster.gpus
    parts, of_one = _model(_same_model(config), tuple(replace or ()), translators)
    vision = stages.STAGES[config.stage].vision
    data = data_of(config, vision, words.samples, only_pictures)
    sample = (data or Data(float(vision), float(not vision))).sample(
        parts.model.tokens_per_image(), config.data.max_length, words.tokens, words.supervised
    )
    micro_batches = [n for n in range(1, of_rank + 1) if of_rank % n == 0]
    shown = max(n for n in micro_batches if n <= max(1, config.micro_batch))
    cost = parts.cost

    def work(layers: int) -> tuple[float, float]:
        return flops(parts, cost, sample, config.global_batch, layers / len(of_one.layers))

    options, refused = [], {}
    for name in zero_names(config):
        changed = config.model_copy(update={"zero": name, "nvme_path": config.nvme_path or "/nvme"})
        try:
            ds = ds_config(changed, cluster.gpus, cluster.ranks_per_node)
        except ConfigError as error:
            if name == config.zero:
                raise
            refused[name] = str(error)
            continue
        options.append(_option(name, parts, ds, cluster, of_one, micro_batches, shown, work, changed))
    return RunPlan(
        config,
        cluster,
        parts,
        sample,
        config.data.max_length,
        of_one,
        shown,
        tuple(options),
        refused,
        steps_of(config, data, share),
    )


WITHOUT_EFFECT = (
    *("out", "init_from", "continue_from", "zero", "global_batch", "micro_batch", "optimizer", "checkpoint"),
    "activation_checkpointing",
)
"""Entries of a run on which neither its model depends nor what a sample keeps."""


def _same_model(config: RunConfig) -> str:
    """The run's configuration as text, alike for runs with the same model and the same longest sample."""
    some = RunConfig(stage=config.stage, target=config.target, out="")
    return config.model_copy(update={name: getattr(some, name) for name in WITHOUT_EFFECT}).model_dump_json()


@lru_cache(maxsize=8)
def _model(text: str, replace: tuple[str, ...], translators: int) -> tuple[Architecture, Kept]:
    """The run's model, and what one sample of the greatest length keeps."""
    config = RunConfig.model_validate_json(text)
    parts = architecture(config, dtype=DTYPES[config.precision], replace=list(replace), translators=translators)
    return parts, kept_by_longest(parts.model, config)


def zero_names(config: RunConfig) -> list[str]:
    """All of ds_configs/, and the run's own file where it is another."""
    names = ds_config_names()
    return names if config.zero in names else [*names, config.zero]


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Whether a rank's GPU, and a node's host memory, hold it."""
    gpu = memory.peak["gpu"] / GIB + cluster.reserve_gib
    host = cluster.ranks_per_node * (memory.peak["host"] / GIB + cluster.process_gib)
    return gpu <= cluster.memory_gib and host <= cluster.host_gib


def _option(
    name: str,
    parts: Architecture,
    ds: dict[str, Any],
    cluster: Cluster,
    of_one: Kept,
    micro_batches: list[int],
    shown: int,
    work: Callable[[int], tuple[float, float]],
    config: RunConfig,
) -> Option:
    """work: FLOPs by the number of decoder layers that are recomputed, as `flops` has them."""
    of_rank = micro_batches[-1]
    bounds: dict[int, tuple[Memory, Memory]] = {}
    needs: dict[int, tuple[int, Memory]] = {}
    for n in micro_batches:
        kept = of_one.times(n)
        whole = memory(parts, ds, cluster.gpus, kept, accumulation=of_rank // n)
        bounds[n] = whole, whole.keeping(kept.checkpointed)
        needs[n] = recomputed(whole, kept, lambda need: fits(need, cluster), config.activation_checkpointing)

    def at(n: int) -> Step:
        layers, need = needs[n]
        return step(parts, ds, need, cluster, work(layers), of_rank // n)

    fitting = [n for n in micro_batches if fits(needs[n][1], cluster)]
    fastest = min(fitting, key=lambda n: (at(n).seconds, -n), default=1)
    layers, need = needs[shown]
    again = needs[fastest][0]
    zero = Path(name).stem
    return Option(zero, need, layers, bounds[shown], needs[1][1], bool(fitting), fastest, again, at(fastest))
