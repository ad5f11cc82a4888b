"""Plans one run: its memory under every DeepSpeed config, which of them fit, which is fastest, and the hours it
takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt
from pathlib import Path
from typing import Any

from zero_ds.config.batches import largest_divisor
from zero_ds.config.schema import AdapterConfig, RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.deepspeed import ds_config, ds_config_names
from zero_ds.training.gathering import follow_layers_
from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.data import AverageSample, DataOverrides, DataSize, data_size, steps_of
from zero_ds.training.planning.memory import GIB, Memory, memory, recomputed
from zero_ds.training.planning.model_config import config_texts
from zero_ds.training.planning.model_size import ActivationBytes, ModelSize, Numbers, cached_numbers
from zero_ds.training.planning.speed import Step, Work, step, work

DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "auto": "bfloat16"}
"""Type that each `precision` computes in; `auto` as on GPUs since Ampere."""


@dataclass(frozen=True)
class Option:
    """The run under one DeepSpeed config."""

    zero: str
    """Name of the config."""
    memory: Memory
    """Memory at the recipe's micro-batch, or the next smaller one that divides a rank's share."""
    recomputed: int
    """Number of decoder layers recomputed at that micro-batch, by the recipe's `activation_checkpointing`."""
    bounds: tuple[Memory, Memory]
    """Memory at that micro-batch with no and with all decoder layers recomputed."""
    least: Memory
    """Memory at the smallest micro-batch."""
    fits: bool
    """Whether the run fits at the smallest micro-batch."""
    micro_batch: int
    """Fastest micro-batch that fits, of equally fast ones the largest; 1 if none fits."""
    step_recomputed: int
    """Number of decoder layers recomputed at the fastest micro-batch."""
    step: Step
    """Time of a step at the fastest micro-batch."""


@dataclass(frozen=True)
class Merging:
    """The run with squares of patches merged into one image token, under its fastest DeepSpeed config."""

    factor: int
    """Height and width of the squares in patches (`adapter.factor`); 1 merges none."""
    image_tokens: int
    """Number of positions that an image takes in the decoder."""
    length: float
    """Number of tokens of the average sample."""
    step: Step
    """Time of a step at the micro-batch that is fastest for the run itself."""


@dataclass(frozen=True)
class RunPlan:
    """Memory and time of a run on a cluster."""

    config: RunConfig
    cluster: Cluster
    size: ModelSize
    sample: AverageSample
    """Average sample, for which times are computed."""
    longest: int
    """Tokens of the longest sample, for which memory is computed."""
    activations: ActivationBytes
    """Bytes that one sample of that length keeps."""
    micro_batch: int
    """Micro-batch for which memory is shown."""
    options: tuple[Option, ...]
    refused: dict[str, str]
    """Configs that cannot be used here, and why."""
    steps: int | None
    """Number of optimizer steps; None if it is not known."""
    merging: tuple[Merging, ...] = ()
    """Steps with squares of patches merged into one image token, by their size; empty where nothing fits or sees."""

    @property
    def fitting(self) -> list[Option]:
        """Options that fit, the fastest first; of two equally fast ones the one that needs less memory."""

        def rank(option: Option) -> tuple[float, float]:
            return round(option.step.seconds, 3), option.memory.peak["gpu"] + option.memory.peak["host"]

        return sorted((option for option in self.options if option.fits), key=rank)

    @property
    def smallest(self) -> Option:
        """Option that needs least of a GPU."""
        return min(self.options, key=lambda option: option.least.peak["gpu"])

    def hours(self, seconds: float) -> float | None:
        """Returns the hours of the whole run if a step takes `seconds`, without loading and saving."""
        return None if self.steps is None else self.steps * seconds / 3600


def plan_run(
    config: RunConfig,
    cluster: Cluster,
    *,
    replace: list[str] | None = None,
    translators: int = 1,
    dense_width: int | None = None,
    data: DataOverrides | None = None,
    share: float = 1.0,
    images_only: bool = False,
) -> RunPlan:
    """Plans one run.

    Args:
        replace, translators, dense_width: how the surrogate is cut, as for `architecture.planned_cut`.
        data: facts about the data, which replace assumptions.
        share: part of its data that the run sees.
        images_only: whether text-only sources are excluded.

    Raises:
        ConfigError: a run that cannot be planned.
    """
    data = data or DataOverrides()
    if config.global_batch % cluster.gpus:
        raise ConfigError(
            f"global_batch={config.global_batch} is not a multiple of {cluster.gpus} GPUs; give --gpus a divisor of it."
        )
    of_rank = config.global_batch // cluster.gpus
    size, activations = _numbers(_same_model(config), tuple(replace or ()), translators, dense_width)
    vision = stages.has_vision(config)
    found = data_size(config, vision, data.samples, images_only)
    kind = found or DataSize(float(vision), float(not vision))
    sample = kind.average(size.image_tokens, config.data.max_length, data)
    micro_batches = [n for n in range(1, of_rank + 1) if of_rank % n == 0]
    shown = largest_divisor(of_rank, config.micro_batch)
    planner = _Planner(config, cluster, size, activations, sample, micro_batches, shown)

    options: list[Option] = []
    resolved: dict[str, dict[str, Any]] = {}
    refused: dict[str, str] = {}
    for name in zero_names(config):
        changed = config.model_copy(update={"zero": name, "nvme_path": config.nvme_path or "/nvme"})
        try:
            ds = ds_config(changed, cluster.gpus, cluster.ranks_per_node)
            follow_layers_(ds, size.units, cluster.gpus)  # the micro-batch of the plan is chosen later
        except ConfigError as error:
            if name == config.zero:
                raise
            refused[name] = str(error)
            continue
        options.append(planner.option(Path(name).stem, ds))
        resolved[options[-1].zero] = ds
    run = RunPlan(
        config=config,
        cluster=cluster,
        size=size,
        sample=sample,
        longest=config.data.max_length,
        activations=activations,
        micro_batch=shown,
        options=tuple(options),
        refused=refused,
        steps=steps_of(config, found, share),
    )
    if not (vision and run.fitting):
        return run
    best = run.fitting[0]
    merging = tuple(
        planner.merging(factor, kind.average(tokens, config.data.max_length, data), tokens, best, resolved[best.zero])
        for factor, tokens in image_tokens_by_factor(config.adapter, size).items()
    )
    return dataclasses.replace(run, merging=merging)


def image_tokens_by_factor(adapter: AdapterConfig, size: ModelSize) -> dict[int, int]:
    """Returns the tokens of an image by height and width of the squares that are merged: 1, 2, 3 and the run's own."""
    patches = size.patches or size.image_tokens - adapter.model_copy(update={"kind": "mlp"}).image_tokens(0)
    side = isqrt(patches)
    if side**2 != patches:
        return {}
    found = {}
    for factor in sorted({1, 2, 3, adapter.square}):
        if factor <= side:
            merged = adapter.model_copy(update={"kind": "pooling", "factor": factor})
            found[factor] = merged.image_tokens(patches)
    return found


WITHOUT_EFFECT = (
    "out",
    "init_from",
    "continue_from",
    "zero",
    "global_batch",
    "micro_batch",
    "optimizer",
    "checkpoint",
    "activation_checkpointing",
    "preview",
    "profile",
    "align",
    "translate",
    "validation",
    "log_every",
    "seed",
)
"""Entries of a run that change neither its model nor the bytes that a sample keeps."""


def _same_model(config: RunConfig) -> str:
    """Returns the run's configuration as text that is equal for runs with the same model and longest sample."""
    some = RunConfig(stage=config.stage, target=config.target, out="")
    plain = config.model_copy(update={name: getattr(some, name) for name in WITHOUT_EFFECT})
    return plain.model_dump_json(exclude_defaults=True)  # so that a new key changes no text


@lru_cache(maxsize=8)
def _numbers(text: str, replace: tuple[str, ...], translators: int, dense_width: int | None) -> Numbers:
    """Returns the size of the run's model, and the bytes that one sample of the greatest length keeps."""
    config = RunConfig.model_validate_json(text)

    def count() -> Numbers:
        import torch

        from zero_ds.training.planning.activations import longest_sample_bytes
        from zero_ds.training.planning.architecture import architecture

        dtype = getattr(torch, DTYPE_NAMES[config.precision])
        built = architecture(
            config, dtype=dtype, replace=list(replace), translators=translators, dense_width=dense_width
        )
        return built.size, longest_sample_bytes(built.model, config)

    dense = [] if dense_width is None else [f"dense {dense_width}"]
    return cached_numbers([text, *replace, str(translators), *dense, *config_texts(config)], count)


def zero_names(config: RunConfig) -> list[str]:
    """Returns the names of all configs in ds_configs/, and the run's own file if it is another."""
    names = ds_config_names()
    return names if config.zero in names else [*names, config.zero]


def fits(memory: Memory, cluster: Cluster) -> bool:
    """Returns whether a rank's GPU and a node's host memory have room for it."""
    gpu = memory.peak["gpu"] / GIB + cluster.reserve_gib
    host = cluster.ranks_per_node * (memory.peak["host"] / GIB + cluster.process_gib)
    return gpu <= cluster.memory_gib and host <= cluster.host_gib


@dataclass(frozen=True)
class _Planner:
    """Everything about a run that does not depend on the DeepSpeed config."""

    config: RunConfig
    cluster: Cluster
    size: ModelSize
    activations: ActivationBytes
    """Bytes of one sample of the greatest length."""
    sample: AverageSample
    micro_batches: list[int]
    """Divisors of a rank's share of the global batch, the share itself last."""
    shown: int
    """Micro-batch for which memory is shown."""

    def option(self, zero: str, ds: dict[str, Any]) -> Option:
        """Plans the run under one resolved DeepSpeed configuration."""
        found = {size: self._at(size, ds) for size in self.micro_batches}
        fitting = [size for size in self.micro_batches if fits(found[size].memory, self.cluster)]

        def rank(size: int) -> tuple[float, int]:
            return self._step(size, found[size], ds).seconds, -size

        fastest = min(fitting, key=rank, default=1)
        shown = found[self.shown]
        return Option(
            zero=zero,
            memory=shown.memory,
            recomputed=shown.recomputed,
            bounds=shown.bounds,
            least=found[1].memory,
            fits=bool(fitting),
            micro_batch=fastest,
            step_recomputed=found[fastest].recomputed,
            step=self._step(fastest, found[fastest], ds),
        )

    def merging(self, factor: int, sample: AverageSample, tokens: int, best: Option, ds: dict[str, Any]) -> Merging:
        """Plans the time of a step with another number of image tokens.

        Merged tokens are counted with the run's own adapter, whose cost next to a decoder is small.

        Args:
            factor: height and width, in patches, of a merged square.
            sample: average sample with images of that many tokens.
            tokens: number of tokens of an image.
            best, ds: the run's fastest option, and its resolved DeepSpeed configuration.
        """
        other = dataclasses.replace(self, size=dataclasses.replace(self.size, image_tokens=tokens), sample=sample)
        work, accumulation = other._work(best.step_recomputed), self.micro_batches[-1] // best.micro_batch
        return Merging(
            factor, tokens, sample.length, step(other.size, ds, best.memory, self.cluster, work, accumulation)
        )

    def _at(self, size: int, ds: dict[str, Any]) -> _MicroBatch:
        """Plans the memory of micro-batches of `size` samples."""
        activations = self.activations.times(size)
        accumulation = self.micro_batches[-1] // size
        whole = memory(self.size, ds, self.cluster.gpus, activations, accumulation=accumulation)
        count, need = recomputed(
            whole, activations, lambda need: fits(need, self.cluster), self.config.activation_checkpointing
        )
        return _MicroBatch(count, need, (whole, whole.keeping(activations.checkpointed)))

    def _step(self, size: int, found: _MicroBatch, ds: dict[str, Any]) -> Step:
        """Plans the time of a step in micro-batches of `size` samples."""
        accumulation = self.micro_batches[-1] // size
        return step(self.size, ds, found.memory, self.cluster, self._work(found.recomputed), accumulation)

    def _work(self, layers: int) -> Work:
        """Returns the FLOPs of a global batch in which `layers` decoder layers are recomputed."""
        share = layers / len(self.activations.layers)
        return work(self.size, self.sample, self.config.global_batch, share)


@dataclass(frozen=True)
class _MicroBatch:
    """The run under one DeepSpeed config with one size of micro-batches."""

    recomputed: int
    """Number of decoder layers that are recomputed."""
    memory: Memory
    """Memory with these layers recomputed."""
    bounds: tuple[Memory, Memory]
    """Memory with no and with all decoder layers recomputed."""
