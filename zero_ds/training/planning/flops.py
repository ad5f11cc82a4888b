"""Counts the FLOPs of a training step: of a model in training by formula, of a cut model by PyTorch's own counter.

FLOPs are those that the method needs, as in the usual definition of MFU: matrix products forward and backward, and the
attention scores of whole sequences. Recomputation, padding and element-wise operations are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from zero_ds.model.decoders import Family
from zero_ds.model.decoders.cut import cut_config
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import active_share, is_expert
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.planning.cluster import PEAK
from zero_ds.training.planning.model_size import NO_TOWER, DecoderSize, StepCost, Tower

LENGTH = 64
"""Number of tokens of a sequence of the demo; the ratios hardly depend on it."""
SUPERVISED = 24
"""Number of these tokens that carry loss."""


# -- a decoder by PyTorch's counter ------------------------------------------------------------------------------------


def encoder_step_ratio(
    surrogate: DecoderFolder | Path, *, distilled: bool, target: DecoderFolder | Path | None = None, every: int = 1
) -> float:
    """Returns the decoder's FLOPs in an encoder-stage step on a surrogate, divided by those on its target.

    Args:
        distilled: whether the translators follow the target in this stage (`distill.*`). Then the target's late layers
            run forward, and the surrogate's late layers a second time.
        target: folder of the target; by default the one that surrogate.json names.
        every: number of steps of which one is distilled (`distill.every`).

    Raises:
        ConfigError: `surrogate` is not a surrogate, or its target is missing.
    """
    small = DecoderFolder.of(surrogate)
    info = small.surrogate or read_surrogate(small.path)  # which refuses a folder that is not a surrogate
    large = DecoderFolder.of(target or local_folder(info.target))
    flops: float = step_flops(small, length=LENGTH, supervised=SUPERVISED)
    if distilled:
        plan = info.plan
        late, again = len(plan.target_late), len(plan.late)
        more = step_flops(large, length=LENGTH, supervised=SUPERVISED, layers=late, backward=False)
        more += step_flops(small, length=LENGTH, supervised=SUPERVISED, layers=again, trained=len(plan.translators))
        flops += more / every
    return flops / step_flops(large, length=LENGTH, supervised=SUPERVISED)


def step_flops(
    folder: DecoderFolder | Path,
    *,
    length: int,
    supervised: int,
    batch: int = 1,
    layers: int | None = None,
    trained: int = 0,
    backward: bool = True,
) -> int:
    """Returns the FLOPs of a decoder in one step: forward, and backward to its input through frozen weights.

    Args:
        folder: model folder, of which only the config is read.
        length: tokens of a sequence.
        supervised: tokens of a sequence that get logits.
        batch: number of sequences.
        layers: number of decoder layers; by default all.
        trained: number of these layers, from the first, that also get gradients of their weights.
        backward: whether there is a backward pass.
    """
    from transformers import AutoModelForCausalLM

    folder = DecoderFolder.of(folder)
    family = folder.family
    config = folder.text_config()
    if layers is not None:
        config = cut_config(config, family, range(config.num_hidden_layers - layers, config.num_hidden_layers))
    with torch.device("meta"):
        decoder = cast(Any, AutoModelForCausalLM).from_config(config, attn_implementation="eager").requires_grad_(False)
        for layer in family.layers(decoder)[:trained]:
            layer.requires_grad_(True)
        if not folder.is_registered:  # not every class runs on the meta device: a router chooses by numbers
            return _by_formula(decoder, family, length, supervised, backward=backward) * batch
        embeddings = torch.zeros(batch, length, config.hidden_size, requires_grad=backward)
        mask = torch.ones(batch, length, dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            hidden = family.hidden_states(decoder, embeddings, mask)
            logits = family.logits(decoder, hidden[:, :supervised])
            if backward:
                logits.sum().backward()
    return int(counter.get_total_flops())


def _by_formula(decoder: Any, family: Family, length: int, supervised: int, *, backward: bool) -> int:
    """Returns the FLOPs of a step on one sequence by the formula of `step_cost`."""
    width, heads = _heads(decoder.config)
    share = active_share(decoder.config)
    tower = _count_layers(family.layers(decoder), width * heads, input_learns=backward, active=share)
    head = _count_layers([decoder.get_output_embeddings()], 0, input_learns=backward)
    if backward:
        return int(tower.per_token * length + tower.per_pair * length**2 + head.per_token * supervised)
    return int(tower.forward_token * length + tower.forward_pair * length**2 + head.forward_token * supervised)


def decoder_size(model: VisionLanguageModel) -> DecoderSize:
    """Returns the number of the decoder's parameters, and of those of a mixture of experts that compute a token."""
    decoder = cast(Any, model.decoder)
    share = active_share(decoder.config.get_text_config())
    sizes = {name: parameter_shape(p).numel() for name, p in decoder.named_parameters()}
    resting = sum((1 - share) * size for name, size in sizes.items() if is_expert(name))
    if not resting:
        return DecoderSize(sum(sizes.values()))
    inputs, head = decoder.get_input_embeddings().weight, decoder.get_output_embeddings().weight
    looked_up = 0 if inputs is head else parameter_shape(inputs).numel()
    return DecoderSize(sum(sizes.values()), round(sum(sizes.values()) - resting - looked_up))


# -- a model in training by formula ------------------------------------------------------------------------------------


def step_cost(model: VisionLanguageModel) -> StepCost:
    """Reads the cost of a step from the model's modules, which may be on the meta device, and from what trains in them.

    A second pass for `distill` is not counted.
    """
    vision = _count_vision(model)
    decoder, per_supervised = _count_decoder(model, input_learns=vision.learns)
    text_decoder, per_supervised_text = _count_decoder(model, input_learns=False)
    return StepCost(
        vision.encoder,
        vision.patches,
        vision.per_image,
        vision.per_image_token,
        decoder,
        per_supervised,
        text_decoder,
        per_supervised_text,
    )


def _count_layers(layers: Iterable[Any], attention_width: int, *, input_learns: bool, active: float = 1.0) -> Tower:
    """Counts a stack of layers.

    Args:
        layers: the layers in their order.
        attention_width: number of heads times head size; 0 without attention.
        input_learns: whether something before the first layer trains.
        active: share of a layer's experts that compute a token.
    """
    token = pair = forward_token = forward_pair = 0.0
    for layer in layers:
        named = [(name, p) for name, p in layer.named_parameters() if len(parameter_shape(p)) > 1]
        weights = [p for _, p in named]
        sizes = [parameter_shape(p).numel() * (active if is_expert(name) else 1) for name, p in named]
        size = sum(sizes)
        trained = sum(one for one, p in zip(sizes, weights, strict=True) if p.requires_grad)
        learns = input_learns or trained > 0
        # a layer of several matrices begins with a norm; if that trains, the input of the first matrices learns
        passed_on = input_learns or (trained > 0 and len(weights) > 1)
        forward_token += 2.0 * size
        forward_pair += 4.0 * attention_width
        token += 2.0 * size + 2.0 * trained
        if passed_on:
            token += 2.0 * size
        pair += (12.0 if learns else 4.0) * attention_width
        input_learns = learns
    return Tower(token, pair, forward_token, forward_pair)


@dataclass(frozen=True)
class _Vision:
    """Cost of the vision side of a model, as in `StepCost`."""

    encoder: Tower = NO_TOWER
    patches: int = 0
    per_image: float = 0.0
    per_image_token: float = 0.0
    learns: bool = False
    """True if anything in it trains, so that the decoder's input needs a gradient."""


def _count_vision(model: VisionLanguageModel) -> _Vision:
    if model.encoder is None or model.encoder_family is None or model.encoder_config is None:
        return _Vision()
    family = model.encoder_family
    settings = family.vision_config(model.encoder)
    used = family.used_layers(model.encoder, model.encoder_config.feature_layer)
    within = {p for layer in family.layers(model.encoder) for p in layer.parameters()}
    before = [p for p in set(model.encoder.parameters()) - within if len(parameter_shape(p)) > 1]
    learns = any(p.requires_grad for p in before)
    encoder = _count_layers(used, settings.hidden_size, input_learns=learns)
    learns = learns or any(p.requires_grad for layer in used for p in layer.parameters())

    places = family.tokens_per_image(settings)
    per_image = 0.0
    for parameter in before:
        shape = parameter_shape(parameter)
        if len(shape) == 4:  # the convolution that cuts the image; its input never learns
            per_image += 2.0 * shape.numel() * (2 if parameter.requires_grad else 1) * places

    parts = [part for part in (model.adapter, model.aligner) if part is not None]
    linears = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    per_image_token = _count_layers(linears, 0, input_learns=learns).per_token
    learns = learns or any(p.requires_grad for part in parts for p in part.parameters())
    return _Vision(encoder, places + family.prefix_tokens, per_image, per_image_token, learns)


def _count_decoder(model: VisionLanguageModel, *, input_learns: bool) -> tuple[Tower, float]:
    """Returns the decoder's layers, and the FLOPs of the output head for a token with loss."""
    decoder = cast(Any, model.decoder)
    config = decoder.config.get_text_config()
    head_size, heads = _heads(config)
    layers = list(model.family.layers(model.decoder))
    learns = input_learns or any(p.requires_grad for layer in layers for p in layer.parameters())
    head = _count_layers([decoder.get_output_embeddings()], 0, input_learns=learns)
    width = head_size * heads
    share = active_share(config)
    return _count_layers(layers, width, input_learns=input_learns, active=share), head.per_token


def _heads(config: Any) -> tuple[int, int]:
    """Returns the width of a head and the number of heads; zeros for a decoder without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    if not heads:
        return 0, 0
    return vars(config).get("head_dim") or config.hidden_size // heads, heads


# -- the device --------------------------------------------------------------------------------------------------------


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of this rank's device: the maker's figure if known, else the speed of a matrix product now."""
    if device.type == "cuda" and dtype != torch.float32:
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK.items():
            if part in name:
                return peak
    size = 256
    while True:
        left, right = torch.ones(2, size, size, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(3):
            started = time.perf_counter()
            float((left @ right)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - started)
        # long enough to be measured, and no longer: a CPU without half precision takes seconds for a large product
        if best > 5e-3 or size == 4096:
            return 2.0 * size**3 / best
        size *= 2
