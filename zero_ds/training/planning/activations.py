"""Counts the bytes that a forward pass keeps for the backward pass, by autograd's own hooks on meta tensors.

The parts of the model run one after another as they do in training. A hook notes every tensor that autograd saves; each
storage counts once, parameters and buffers do not count. So frozen layers, which keep less than trained ones, and every
family's own operations count as they are. Attention without a kept score matrix (sdpa, flash) is replaced by an
operation that saves what those kernels save: query, key, value, output, and one float32 per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders.shrink import active_share, is_expert
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.training.planning.model_size import COPIES, SLICE, ActivationBytes


def longest_sample_bytes(model: VisionLanguageModel, config: RunConfig) -> ActivationBytes:
    """Returns the bytes that one sample of the run's greatest length keeps; model: the run's, on meta tensors."""
    length = config.data.max_length
    vision = model.encoder is not None
    always_image = bool(config.data.sources) and all(source.images_only for source in config.data.sources)
    images = 1 + max((rows * columns for rows, columns in config.data.image_grid), default=0)
    if config.data.packing and vision:  # a row may be full of images
        images = max(images, length // model.tokens_per_image())
    image_tokens = model.tokens_per_image() if vision and always_image else 0
    of_row = activation_bytes(
        model,
        length=length,
        supervised=max(1, length - image_tokens),
        images=images if vision else 0,
        attention=config.attention,
        distilled=config.distill.active,
    )
    return of_row.with_mask() if config.data.packing else of_row


def activation_bytes(
    model: VisionLanguageModel, *, length: int, supervised: int, images: int, attention: str, distilled: bool = False
) -> ActivationBytes:
    """Runs one sample through the model on meta tensors; returns the bytes that it keeps.

    Args:
        model: on meta tensors, with `requires_grad` set on the parameters that train.
        length: tokens of the sample.
        supervised: tokens of the sample that get logits.
        images: number of images of the sample.
        attention: the run's attention implementation.
        distilled: whether the translators follow the target. Then the layers from the first translator on run twice.
    """
    width = cast(Any, model.decoder).config.get_text_config().hidden_size
    dtype = next(model.decoder.parameters()).dtype
    saved = _SavedTensors(model)
    decoder_layers = list(model.family.layers(model.decoder))
    stacks = [decoder_layers]
    if model.encoder is not None and model.encoder_family is not None:
        stacks.append(list(model.encoder_family.layers(model.encoder)))
    with (
        _attention_as_kernels(model, attention) as masks,
        _experts_by_number(model),
        _repeats_skipped(stacks, saved),
        saved.noting(),
    ):
        learns = False
        if images and model.encoder is not None and model.encoder_family is not None:
            size = model.encoder_family.image_size(model.encoder_family.vision_config(model.encoder))
            features = model.image_features(torch.empty(images, 3, size, size, dtype=dtype, device="meta"))
            learns = features.requires_grad
        layers = _LayerSizes(decoder_layers, saved)
        embeddings = torch.empty(1, length, width, dtype=dtype, device="meta")
        embedding = cast(Any, model.decoder).get_input_embeddings().weight
        embeddings.requires_grad_(learns or embedding.requires_grad)
        mask = torch.ones(1, length, dtype=torch.long, device="meta")
        before = saved.total
        try:
            hidden = model.family.hidden_states(model.decoder, embeddings, mask)
        except Exception:  # some classes look at numbers, which meta tensors lack, each with errors of its own
            if model.family.per_layer_config is not None:
                raise
            hidden, layers.sizes = _KeepNothing.apply(embeddings), _sizes_by_formula(model, length, dtype)
            saved.total = before + int(sum(layers.sizes))
        layers.remove_hooks()
        logits = model.logits(hidden[:, :supervised])
    outside = saved.total - sum(layers.sizes)
    if embeddings.requires_grad:
        outside += 2 * embeddings.nbytes
    second_pass: tuple[float, ...] = ()
    logits_computed = 1
    if distilled and model.plan is not None:
        second_pass = tuple(layers.sizes[model.plan.first_replaced :]) if learns else ()
        logits_computed = 3 if learns else 2
    return ActivationBytes(
        outside,
        tuple(layers.sizes),
        second_pass,
        layer_input=embeddings.nbytes,
        scores=2.0 * logits.nbytes * logits_computed,
        loss_slice=float(COPIES * min(SLICE, logits.numel() * 4)),
        mask=max(masks, default=0.0),
    )


def _sizes_by_formula(model: VisionLanguageModel, length: int, dtype: torch.dtype) -> list[float]:
    """Returns about the bytes of every layer: the inputs and outputs of all matrices that compute a token."""
    share = active_share(cast(Any, model.decoder).config)
    sizes = []
    for layer in model.family.layers(model.decoder):
        units = 0.0
        for name, weight in layer.named_parameters():
            if weight.dim() == 3 and is_expert(name):
                units += (weight.shape[1] + weight.shape[2]) * weight.shape[0] * share
            elif weight.dim() == 2:
                units += sum(weight.shape) * (share if is_expert(name) else 1)
        sizes.append(float(round(units * length * dtype.itemsize)))
    return sizes


class _SavedTensors:
    """Storages that autograd saves, each counted once."""

    def __init__(self, model: nn.Module) -> None:
        self._counted = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._alive: list[torch.Tensor] = []  # a storage that is freed could give its number to another
        self.total = 0
        """Bytes so far."""

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        key = _storage(tensor)
        if key not in self._counted:
            self._counted.add(key)
            self._alive.append(tensor)
            self.total += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Counts what autograd saves while the block is open."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class _LayerSizes:
    """Bytes that autograd saves in the forward pass of each layer."""

    def __init__(self, layers: list[nn.Module], saved: _SavedTensors) -> None:
        self.sizes: list[float] = []
        self._saved = saved
        self._before = 0
        self._hooks: list[Any] = []
        for layer in layers:
            self._hooks.append(layer.register_forward_pre_hook(self._enter))
            self._hooks.append(layer.register_forward_hook(self._leave))

    def _enter(self, *_: Any) -> None:
        self._before = self._saved.total

    def _leave(self, *_: Any) -> None:
        self.sizes.append(self._saved.total - self._before)

    def remove_hooks(self) -> None:
        """Ends the counting."""
        for hook in self._hooks:
            hook.remove()


# -- layers that repeat each other -------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """Measurements of one layer's forward pass."""

    size: int = 0
    """Bytes by which `_SavedTensors.total` grew."""
    returns_tuple: bool = False
    """Whether the layer returns its hidden states in a tuple."""


@contextmanager
def _repeats_skipped(stacks: Sequence[Sequence[nn.Module]], saved: _SavedTensors) -> Iterator[None]:
    """Lets layers that repeat the two before them count as much as the layer before, without running them.

    Where layers with the same shapes, settings and trained parameters follow each other, the second, third, ... keep
    the same number of bytes; only the first may also keep tensors that all of them share. Measuring a model of 80
    layers then takes as long as measuring one of a few layers.

    stacks: the layers of every part of the model, in the order in which they run.
    """
    replaced: list[nn.Module] = []
    handles: list[Any] = []
    for layers in stacks:
        traits = [_traits(layer) for layer in layers]
        measured = _Measured()
        for number in range(1, len(layers)):
            if traits[number] != traits[number - 1]:
                continue
            if number == 1 or traits[number - 1] != traits[number - 2]:  # the second of its kind stands for the rest
                measured = _Measured()
                handles += _measure(layers[number], measured, saved)
            else:
                cast(Any, layers[number]).forward = partial(_count_again, measured, saved)
                replaced.append(layers[number])
    try:
        yield
    finally:
        for layer in replaced:
            del layer.forward  # uncovers the method of the class
        for handle in handles:
            handle.remove()


def _traits(layer: nn.Module) -> list[Any]:
    """Returns all that a layer's need of memory can depend on, in a form that can be compared."""
    tensors = [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad)
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    ]
    settings = [
        (name, type(module), key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if key != "layer_idx" and isinstance(value, bool | int | float | str | None)
    ]
    return [tensors, settings]


def _measure(layer: nn.Module, measured: _Measured, saved: _SavedTensors) -> list[Any]:
    """Measures the layer's next forward pass into `measured`; returns the handles of the hooks that do so."""

    def entering(*_: Any) -> None:
        measured.size = -saved.total

    def leaving(module: nn.Module, inputs: Any, output: Any) -> None:
        measured.size += saved.total
        measured.returns_tuple = isinstance(output, tuple)

    return [layer.register_forward_pre_hook(entering), layer.register_forward_hook(leaving)]


def _count_again(measured: _Measured, saved: _SavedTensors, *inputs: Any, **named: Any) -> Any:
    """Replaces a layer's forward pass: counts the measured bytes, and returns hidden states of the same shape."""
    hidden = inputs[0] if inputs else named["hidden_states"]
    saved.total += measured.size
    output = _KeepNothing.apply(hidden)
    return (output,) if measured.returns_tuple else output


class _KeepNothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return upstream[0]


# -- attention that keeps no score matrix ------------------------------------------------------------------------------

KERNEL = "zero_ds_planned"
"""Name under which transformers knows the stand-in for sdpa and flash attention."""


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _attention_as_kernels(model: VisionLanguageModel, attention: str) -> Iterator[list[float]]:
    """Lets decoder and vision encoder attend as they will in training; eager attention stays as it is.

    Yields a list that receives, for every attention of the decoder, the bytes that a mask would add. transformers gives
    sdpa a mask where it cannot be omitted. Keys and values are then repeated for every head, and in every layer torch
    turns the mask into numbers of the type that is computed in. Variable-length kernels take no mask.
    """
    masks: list[float] = []
    attention = model.family.attention(attention)
    if attention == "eager":
        yield masks
        return
    from transformers import AttentionInterface

    decoder_modules = set(model.decoder.modules())

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if module in decoder_modules and attention == "sdpa":
            repeated = query.shape[1] // key.shape[1] - 1
            scores = query.shape[0] * query.shape[2] * key.shape[2]
            masks.append(float(repeated * (key.nbytes + value.nbytes) + scores * query.dtype.itemsize))
        output = cast(torch.Tensor, _KernelAttention.apply(query, key, value))
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(KERNEL, attend)
    configs: dict[int, Any] = {}
    for part in (model.decoder, model.encoder):
        for module in part.modules() if part is not None else ():
            if hasattr(module, "config"):
                configs[id(module.config)] = module.config
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation = KERNEL
    try:
        yield masks
    finally:
        for config, name in before:
            config._attn_implementation = name


# -- experts -----------------------------------------------------------------------------------------------------------


def _one_expert(
    module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Stands for a layer's experts, which choose by numbers that meta tensors lack: one expert takes every token.

    It takes each token as often as experts would, so it keeps as much as they do together.
    """
    chosen = top_k_index.shape[-1]
    inputs = hidden_states.repeat_interleave(chosen, dim=0)

    def product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return values @ (weight[0] if module.is_transposed else weight[0].T)

    if module.has_gate:
        inner = module._apply_gate(product(inputs, module.gate_up_proj))
    else:
        inner = module.act_fn(product(inputs, module.up_proj))
    weighted = product(inner, module.down_proj) * top_k_weights.reshape(-1, 1)
    return weighted.view(len(hidden_states), chosen, -1).sum(dim=1).to(hidden_states.dtype)


@contextmanager
def _experts_by_number(model: VisionLanguageModel) -> Iterator[None]:
    """Lets one expert stand for those of every layer."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:  # versions of the library without one
        yield
        return
    ALL_EXPERTS_FUNCTIONS.register(KERNEL, _one_expert)
    configs: dict[int, Any] = {
        id(module.config): module.config for module in model.decoder.modules() if hasattr(module, "has_gate")
    }
    before = [(config, config._experts_implementation) for config in configs.values()]
    for config, _ in before:
        config._experts_implementation = KERNEL
    try:
        yield
    finally:
        for config, name in before:
            config._experts_implementation = name
