"""Activation checkpointing of a run: which decoder layers are recomputed in the backward pass instead of kept.

Under `activation_checkpointing: auto` these are as few as the plan of the run says that the memory at hand asks for.
Nothing is drawn at random in a pass, so what is recomputed comes out the same, and the choice costs or saves time only.
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
from zero_ds.training import stages
from zero_ds.training.deepspeed import resolve_precision
from zero_ds.training.planning.activations import longest_sample_bytes
from zero_ds.training.planning.architecture import architecture
from zero_ds.training.planning.cluster import PROCESS_GIB, RESERVE_GIB
from zero_ds.training.planning.memory import GIB, Memory, memory, recomputed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """Decoder layers that are recomputed, and what a rank then needs."""

    layers: tuple[int, ...]
    depth: int
    """Layers of the decoder."""
    need: float
    """Bytes of its device at the peak, by the plan."""
    fits: bool


def checkpoint_activations_(model: VisionLanguageModel, config: RunConfig, ds: dict[str, Any]) -> None:
    """Lets the decoder recompute the layers that the run's `activation_checkpointing` asks for. A collective.

    model: with what trains in it marked; ds: the run's resolved DeepSpeed configuration.
    """
    depth = len(model.family.layers(model.decoder))
    if config.activation_checkpointing != "auto":
        recompute_(model, range(depth) if config.activation_checkpointing else ())
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
            "the plan expects that a rank needs %.2f GiB of the %.2f that may be used, though all decoder layers are "
            "recomputed; if memory runs out, set a smaller micro_batch or another zero= (`zero-ds plan` compares them)",
            choice.need / GIB,
            usable / GIB,
        )


def recompute_(model: VisionLanguageModel, layers: Collection[int]) -> None:
    """Has the decoder recompute the layers of these numbers in the backward pass, and keep all others' activations.

    The library's own switch knows all layers or every n-th, and lets the word embeddings need a gradient, so that every
    backward pass would go down to them, whatever trains.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    for number, layer in enumerate(model.family.layers(model.decoder)):
        assert isinstance(layer, GradientCheckpointingLayer), "layers of another kind would ignore what is set here"
        layer.gradient_checkpointing = number in layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]


def usable_bytes() -> float:
    """Bytes of a rank's device that a plan may fill, the least over all ranks. A collective."""
    spared = RESERVE_GIB if distributed.device().type == "cuda" else PROCESS_GIB
    return max(0.0, -distributed.max_over_ranks(spared * GIB - distributed.device_bytes())[0])


def choose(
    config: RunConfig, ds: dict[str, Any], world_size: int, usable: float, plan: LayerPlan | None = None
) -> Choice:
    """As few layers as fit at the run's micro-batch of its longest samples; all of them if not even that fits.

    ds: resolved; usable: bytes of a rank's device; plan: that of the surrogate which is trained against. The same on
    every rank that is told the same.
    """
    if plan is None:  # whatever the decoder is, it is taken whole
        config = config.model_copy(update={"target": stages.decoder_folder(config), "decoder": "target"})
    parts = architecture(config, dtype=resolve_precision(config), plan=plan)
    activations = longest_sample_bytes(parts.model, config).times(config.micro_batch)
    whole = memory(parts, ds, world_size, activations, accumulation=ds["gradient_accumulation_steps"])
    # without a GPU, what is offloaded to the host lies beside what is not
    places = ("gpu",) if distributed.device().type == "cuda" else ("gpu", "host")

    def need(memory: Memory) -> float:
        return sum(memory.peak[place] for place in places)

    count, found = recomputed(
        whole, activations, lambda memory: need(memory) <= usable, config.activation_checkpointing
    )
    layers = activations.recomputable[:count]
    return Choice(layers, len(activations.layers), need(found), need(found) <= usable)
