"""What a training step costs by count: of a model in training, and, on meta tensors by PyTorch's own counter, of a cut.

FLOPs are those that the method asks for, as in the usual definition of MFU: matrix products forward and backward, the
attention scores over whole sequences, no recomputation, no padding, no element-wise work.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.flop_counter import FlopCounterMode

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.samples import image_positions
from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import text_config
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.model.losses import count_supervised
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime import distributed
from zero_ds.runtime.hub import local_folder
from zero_ds.runtime.zero3 import parameter_shape

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
        flops += step_flops(target, length=LENGTH, supervised=SUPERVISED, layers=len(plan.target_late), backward=False)
        flops += step_flops(
            surrogate, length=LENGTH, supervised=SUPERVISED, layers=len(plan.late), trained=len(plan.translators)
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


# -- a model in training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tower:
    """FLOPs of a stack of layers in one step, forward and backward, per token and per pair of tokens."""

    per_token: float
    per_pair: float
    forward_token: float = 0.0
    """Of these, in the forward pass."""
    forward_pair: float = 0.0

    @property
    def backward(self) -> bool:
        """Whether there is a backward pass."""
        return self.per_token > self.forward_token

    @classmethod
    def of(cls, layers: Iterable[Any], attention_width: int, *, input_learns: bool) -> Tower:
        """layers: in their order; attention_width: heads x head size; input_learns: whether something before trains."""
        token = pair = forward_token = forward_pair = 0.0
        for layer in layers:
            weights = [p for p in layer.parameters() if len(parameter_shape(p)) > 1]
            size = sum(parameter_shape(p).numel() for p in weights)
            trained = sum(parameter_shape(p).numel() for p in weights if p.requires_grad)
            learns = input_learns or trained > 0
            # a layer of several matrices begins with a norm: where it trains, the first matrices' input learns, too
            passed_on = input_learns or (trained > 0 and len(weights) > 1)
            token += 2.0 * size + 2.0 * size * passed_on + 2.0 * trained
            pair += 4.0 * attention_width * (3 if learns else 1)
            forward_token, forward_pair = forward_token + 2.0 * size, forward_pair + 4.0 * attention_width
            input_learns = learns
        return cls(token, pair, forward_token, forward_pair)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of a model's step: linear in tokens, square in the lengths of sequences."""

    encoder: Tower
    patches: int
    per_picture: float
    """Of cutting a picture into patch embeddings."""
    per_image_token: float
    decoder: Tower
    per_supervised: float
    of_text: Tower
    """The decoder where there is no picture: nothing before its first trained layer needs a gradient."""
    per_supervised_text: float

    @classmethod
    def of(cls, model: VisionLanguageModel) -> StepCost:
        """Read from the modules, also on meta tensors, and from what trains in them; `distill` is not counted."""
        encoder, patches, picture, image_token, learns = Tower(0.0, 0.0), 0, 0.0, 0.0, False
        if model.encoder is not None and model.encoder_family is not None and model.encoder_config is not None:
            vision = model.encoder_family.vision_config(model.encoder)
            used = model.encoder_family.used_layers(model.encoder, model.encoder_config.feature_layer)
            within = {p for layer in model.encoder_family.layers(model.encoder) for p in layer.parameters()}
            before = [p for p in set(model.encoder.parameters()) - within if len(parameter_shape(p)) > 1]
            learns = any(p.requires_grad for p in before)
            encoder = Tower.of(used, vision.hidden_size, input_learns=learns)
            places = model.encoder_family.tokens_per_image(vision)
            patches = places + model.encoder_family.prefix_tokens
            cutting = [p for p in before if len(parameter_shape(p)) == 4]  # a convolution; its input never learns
            picture = sum(2.0 * parameter_shape(p).numel() * (1 + p.requires_grad) * places for p in cutting)
            learns = learns or any(p.requires_grad for layer in used for p in layer.parameters())
            parts = [part for part in (model.adapter, model.aligner) if part is not None]
            image_token = Tower.of([m for part in parts for m in _linear(part)], 0, input_learns=learns).per_token
            learns = learns or any(p.requires_grad for part in parts for p in part.parameters())
        config = cast(Any, model.decoder).config.get_text_config()
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        layers = list(model.family.layers(model.decoder))
        head = cast(Any, model.decoder).get_output_embeddings()
        learns_in_layers = any(p.requires_grad for layer in layers for p in layer.parameters())
        towers = []
        for input_learns in (learns, False):
            behind = Tower.of([head], 0, input_learns=input_learns or learns_in_layers).per_token
            width = head_size * config.num_attention_heads
            towers.append((Tower.of(layers, width, input_learns=input_learns), behind))
        (decoder, behind), (of_text, behind_text) = towers
        return cls(encoder, patches, picture, image_token, decoder, behind, of_text, behind_text)

    def flops(self, tokens: float, pairs: float, supervised: float, pictures: float, image_tokens: float) -> float:
        """Of so much data: tokens of sequences, their pairs (the sum of squared lengths), pictures, their tokens."""
        text = self.patches > 0 and pictures == 0
        decoder, behind = (self.of_text, self.per_supervised_text) if text else (self.decoder, self.per_supervised)
        of_tokens = decoder.per_token * tokens + decoder.per_pair * pairs + behind * supervised
        of_picture = self.per_picture + self.encoder.per_token * self.patches + self.encoder.per_pair * self.patches**2
        return of_tokens + pictures * of_picture + self.per_image_token * image_tokens


def _linear(part: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in part.modules() if isinstance(module, torch.nn.Linear)]


@dataclass(frozen=True)
class Counts:
    """What a step's micro-batches hold."""

    supervised: float
    tokens: float
    padded: float
    """Places in the batch, filled or not."""
    pictures: float
    flops: float
    skipped: float
    """Samples that could not be used."""
    too_long: float
    """Samples of which no answer fits."""
    layout: int = 0
    """Checksum of the layout of this rank's rows in the step (`Batch.layout`), or its number of passes."""
    same_layout: bool = True
    """Whether the layout is the same on all ranks."""

    @classmethod
    def of(cls, batches: list[Batch], cost: StepCost) -> Counts:
        supervised = tokens = padded = shown = flops = skipped = too_long = 0.0
        for batch in batches:
            lengths = batch.lengths.double()
            labels = count_supervised(batch.labels)
            supervised, tokens = supervised + labels, tokens + float(lengths.sum())
            padded += batch.attention_mask.numel()
            skipped, too_long = skipped + len(batch.skipped), too_long + len(batch.too_long)
            pictures = image_tokens = 0
            if batch.pixel_values is not None and bool((images := image_positions(batch.input_ids)).any()):
                pictures, image_tokens = len(batch.pixel_values), int(images.sum())
                shown += pictures
            flops += cost.flops(float(lengths.sum()), float((lengths**2).sum()), labels, pictures, image_tokens)
        layout = batches[0].layout
        number = len(batches) if layout is None else layout
        return cls(supervised, tokens, padded, shown, flops, skipped, too_long, number)

    def over_ranks(self) -> Counts:
        """The global batch's. A collective."""
        values = (
            self.supervised,
            self.tokens,
            self.padded,
            self.pictures,
            self.flops,
            self.skipped,
            self.too_long,
        )
        sums, same_layout = distributed.sum_and_compare(values, mark=self.layout)
        supervised, tokens, padded, pictures, flops, skipped, too_long = sums
        return Counts(supervised, tokens, padded, pictures, flops, skipped, too_long, self.layout, same_layout)

    def check_plan(self, step: int) -> None:
        """Refuses a step that the ranks plan differently; called on the counts of the global batch.

        Raises:
            DataError: the ranks have other rows or another number of passes, and would wait for each other. Raised on
                every rank.
        """
        if not self.same_layout:
            raise DataError(
                f"the ranks plan step {step} unlike each other, as if one of them read other data; see what the log "
                "says of samples left out, and run again from the last commit"
            )

    def scalars(self, seconds: float) -> dict[str, float]:
        """What a monitor shows of them, for a step that took so long."""
        return {
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens": self.supervised,
            "padding_share": 1 - self.tokens / self.padded,
        }


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
"""Dense bf16 (V100: fp16) FLOP/s that the makers state, by a part of the device's name; the first that fits counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one rank's device: the maker's figure where it is known, else what a matrix product reaches now."""
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
        # long enough to be measured, and no longer: a CPU that has no half precision takes seconds for a large one
        if best > 5e-3 or size == 4096:
            return 2.0 * size**3 / best
        size *= 2
