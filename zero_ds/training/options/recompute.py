"""`activation_checkpointing`: which decoder layers are recomputed in the backward pass instead of kept.

With `auto` these are as few as fit into memory by the plan of the run (`zero-ds plan`). Nothing is drawn at random in a
pass, so recomputed layers give the same numbers, and the choice only costs or saves time.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from zero_ds.config.schema import RunConfig
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.deepspeed import resolve_precision
from zero_ds.training.options.fallback import recomputes_all
from zero_ds.training.planning.activations import longest_sample_bytes
from zero_ds.training.planning.architecture import architecture
from zero_ds.training.planning.cluster import PROCESS_GIB, RESERVE_GIB
from zero_ds.training.planning.memory import GIB, Memory, memory, recomputed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Decoder layers that are recomputed, and the memory that a rank then needs."""

    layers: tuple[int, ...]
    """Numbers of these layers."""
    depth: int
    """Number of layers of the decoder."""
    need: float
    """Peak bytes of a rank's device, by the plan."""
    fits: bool
    """True if that is no more than may be used."""


def checkpoint_activations_(model: VisionLanguageModel, config: RunConfig, ds: dict[str, Any]) -> None:
    """Lets the decoder recompute the layers that the run's `activation_checkpointing` asks for. A collective.

    model: with the parts that train marked. ds: resolved DeepSpeed configuration of the run.
    """
    depth = len(model.family.layers(model.decoder))
    if not depth:
        return
    if config.activation_checkpointing != "auto":
        recompute_(model, range(depth) if config.activation_checkpointing else ())
        return
    if distributed.max_over_ranks(float(recomputes_all(config, distributed.world_size())))[0]:
        recompute_(model, range(depth))
        if distributed.is_rank_zero():
            logger.warning(
                "activation checkpointing: all %d decoder layers are recomputed, because an earlier attempt "
                "ran out of memory with fewer",
                depth,
            )
        return
    usable = usable_bytes()
    choice = choose(config, ds, distributed.world_size(), usable, model.plan)
    recompute_(model, choice.layers)
    if not distributed.is_rank_zero():
        return
    logger.info(
        "activation checkpointing: %d of %d decoder layers recomputed; the plan expects %.2f GiB of %.2f",
        len(choice.layers),
        depth,
        choice.need / GIB,
        usable / GIB,
    )
    if not choice.fits:
        logger.warning(
            "by the plan a rank needs %.2f GiB, and %.2f may be used, although all decoder layers are recomputed; if "
            "memory runs out, set a smaller micro_batch or another zero= (`zero-ds plan` compares them)",
            choice.need / GIB,
            usable / GIB,
        )


def recompute_(model: VisionLanguageModel, layers: Collection[int]) -> None:
    """Lets the decoder recompute the layers of these numbers in the backward pass, and keep the others' activations.

    transformers' own switch takes all layers or every n-th, and makes the word embeddings need a gradient, so that
    every backward pass would go down to them, whatever trains.

    Raises:
        ConfigError: layers that the library cannot recompute.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for number, layer in enumerate(model.family.layers(model.decoder)):
        if not isinstance(layer, GradientCheckpointingLayer):  # would ignore these attributes
            if layers:
                raise ConfigError(
                    f"layers of {model.family.name} cannot be recomputed; set activation_checkpointing=false."
                )
            continue
        layer.gradient_checkpointing = number in layers
        # nothing is drawn at random in a layer, and keeping the generator's state would wait for the device in each
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer._gradient_checkpointing_func = again  # type: ignore[assignment]


def recomputed_layers(model: VisionLanguageModel) -> tuple[int, int]:
    """Returns the number of decoder layers that are recomputed, and that of all decoder layers."""
    layers = list(model.family.layers(model.decoder))
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers), len(layers)


def usable_bytes() -> float:
    """Returns the bytes of a rank's device that a plan may fill, the smallest of all ranks. A collective."""
    spared = RESERVE_GIB if distributed.device().type == "cuda" else PROCESS_GIB
    return max(0.0, -distributed.max_over_ranks(spared * GIB - distributed.device_bytes())[0])


def choose(
    config: RunConfig, ds: dict[str, Any], world_size: int, usable: float, plan: LayerPlan | None = None
) -> Choice:
    """Chooses as few layers as fit with a micro-batch of the longest samples; all of them if not even that fits.

    ds: resolved DeepSpeed configuration. usable: bytes of a rank's device. plan: LayerPlan of the surrogate that the
    run trains against. The result is a function of the arguments, so ranks with equal arguments choose the same.
    """
    if plan is None:  # the decoder is planned as a full model, whichever it is
        config = config.model_copy(update={"target": stages.decoder_folder(config), "decoder": "target"})
    parts = architecture(config, dtype=resolve_precision(config), plan=plan)
    activations = longest_sample_bytes(parts.model, config).times(config.micro_batch)
    whole = memory(parts.size, ds, world_size, activations, accumulation=ds["gradient_accumulation_steps"])
    # without a GPU, offloaded tensors share the host's memory with all others
    places = ("gpu",) if distributed.device().type == "cuda" else ("gpu", "host")

    def need(memory: Memory) -> float:
        return sum(memory.peak[place] for place in places)

    count, found = recomputed(
        whole, activations, lambda memory: need(memory) <= usable, config.activation_checkpointing
    )
    layers = activations.recomputable[:count]
    return Choice(layers, len(activations.layers), need(found), need(found) <= usable)
