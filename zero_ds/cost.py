"""What a training step costs by count: PyTorch's own FLOP counter over meta tensors, no weights needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from zero_ds.families import family_of
from zero_ds.hub import local_folder
from zero_ds.pretrained import text_config
from zero_ds.surrogate import read_surrogate

LENGTH, SUPERVISED = 64, 24
"""A sequence of the demo in tokens, and how many of them carry loss; the ratios hardly depend on either."""


def encoder_step_ratio(surrogate: Path, *, distilled: bool, target: Path | None = None) -> float:
    """Decoder FLOPs of an encoder-stage step on a surrogate over those of the same step on its target.

    distilled: whether the translators follow the target in this stage (`distill.*`), which costs the target's late
    layers forward, and the surrogate's a second time; target: where the target lies now.

    Raises:
        ConfigError: `surrogate` is no surrogate, or its target is not there.
    """
    info = read_surrogate(surrogate)
    target = target or local_folder(info.target)
    flops = step_flops(surrogate, length=LENGTH, supervised=SUPERVISED)
    if distilled:
        plan = info.plan
        late = plan.depth - plan.replaced[0].first
        again = plan.surrogate_depth - plan.translators[0]
        flops += step_flops(target, length=LENGTH, supervised=SUPERVISED, layers=late, backward=False)
        flops += step_flops(
            surrogate, length=LENGTH, supervised=SUPERVISED, layers=again, trained=len(plan.translators)
        )
    return flops / step_flops(target, length=LENGTH, supervised=SUPERVISED)


def step_flops(
    folder: Path,
    *,
    length: int,
    supervised: int,
    batch: int = 1,
    layers: int | None = None,
    trained: int = 0,
    backward: bool = True,
) -> int:
    """FLOPs of a decoder in one step: forward, and backward to its input through frozen weights.

    folder: model folder, of which the config is read; batch: sequences, of `length` tokens, of which `supervised` get
    logits; layers: only so many of the decoder's layers, of which the first `trained` also get gradients of their
    weights.
    """
    from transformers import AutoModelForCausalLM

    family = family_of(folder)
    config = text_config(folder)
    if layers is not None:
        config.num_hidden_layers = layers
        for key in family.per_layer_config:
            if isinstance(values := getattr(config, key, None), list):
                setattr(config, key, values[-layers:])
    with torch.device("meta"):
        decoder = cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager").requires_grad_(False)
        for layer in family.layers(decoder)[:trained]:
            layer.requires_grad_(True)
        embeddings = torch.zeros(batch, length, config.hidden_size, requires_grad=backward)
        mask = torch.ones(batch, length, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            hidden = family.hidden_states(decoder, embeddings, mask)
            logits = family.logits(decoder, hidden[:, :supervised])
            if backward:
                logits.sum().backward()
    return int(counter.get_total_flops())
