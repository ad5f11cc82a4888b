"""What a forward pass keeps for the backward pass: counted by autograd's own hooks, on meta tensors.

The parts of the model run one after the other as they do in training; a hook notes every tensor that autograd saves,
once a storage, parameters and buffers left out. So frozen layers, which keep less than those that train, and every
family's own operations count as they are. Attention without a kept score matrix (sdpa, flash) is stood in for by an
operation that saves what those kernels save: query, key, value, output, and one float32 a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import RunConfig
from zero_ds.model.vlm import VisionLanguageModel

SLICE = 1 << 28
"""Float32 scores that the loss works on at a time on a GPU (`vocabulary.ROWS_BYTES`), in bytes."""
COPIES = 3
"""Of such a slice, while the loss works on it."""


@dataclass(frozen=True)
class Kept:
    """Bytes for one sample of `length` tokens with `pictures` pictures, or for a micro-batch of such samples."""

    outside: float
    """What autograd keeps outside of the decoder's layers."""
    layers: tuple[float, ...]
    """What it keeps in each of them; 0 where nothing in it or before it learns."""
    again: tuple[float, ...]
    """The same of the layers that distillation runs a second time."""
    input: float
    """Of one layer: all that is left of a layer whose activations are recomputed in the backward pass."""
    scores: float
    """Logits at the supervised positions, and their gradient."""
    slice: float
    """Of these in float32, what the loss works on at a time."""
    masked: float = 0.0
    """What each layer keeps besides where a mask goes into sdpa: where rows are padded or packed."""

    def times(self, micro_batch: int) -> Kept:
        """For so many samples at a time, padded to the longest of them; the slice grows no further than `SLICE`."""
        kept = self.with_mask() if micro_batch > 1 else self
        return replace(
            kept,
            outside=self.outside * micro_batch,
            layers=tuple(size * micro_batch for size in kept.layers),
            again=tuple(size * micro_batch for size in kept.again),
            input=self.input * micro_batch,
            scores=self.scores * micro_batch,
            slice=min(self.slice * micro_batch, COPIES * SLICE),
        )

    def with_mask(self) -> Kept:
        """For a row that is padded or packed."""
        layers, again = (
            tuple(size + self.masked if size else 0.0 for size in sizes) for sizes in (self.layers, self.again)
        )
        return replace(self, layers=layers, again=again, masked=0.0)

    @property
    def logits(self) -> float:
        """Bytes of scores at the supervised positions, their gradient, and the float32 slice of the loss."""
        return self.scores + self.slice

    @property
    def keeping(self) -> tuple[int, ...]:
        """Numbers of the decoder layers that keep something: only these can be recomputed."""
        return tuple(number for number, size in enumerate(self.layers) if size)

    @property
    def counts(self) -> Sequence[int]:
        """How many of these may be recomputed, from none to all; nothing in between where some run a second time."""
        most = len(self.keeping)
        return (0, most) if self.again else range(most + 1)

    @property
    def whole(self) -> float:
        """Bytes with nothing recomputed."""
        return self.recomputing(0)

    @property
    def checkpointed(self) -> float:
        """Bytes with all decoder layers recomputed: their inputs, and what the largest of them keeps again."""
        return self.recomputing(len(self.keeping))

    def recomputing(self, count: int) -> float:
        """Bytes at the peak with the first `count` of the layers that keep something recomputed; one of `counts`.

        The first layers' turn comes last in the backward pass, when what the later ones kept is freed. So the peak is
        at the end of the forward pass, unless one of the first keeps more than all later ones together.
        """
        sizes = [self.layers[number] for number in self.keeping]
        whole = self.outside + sum(sizes) + sum(self.again)
        if not count:
            return whole
        inputs = self.input * (count + len(self.again))
        return min(whole, self.outside + inputs + max(sum(sizes[count:]), max(sizes[:count])))


def kept_by_longest(model: VisionLanguageModel, config: RunConfig) -> Kept:
    """What one sample of the run's greatest length keeps; model: the run's, on meta tensors."""
    length, vision = config.data.max_length, model.encoder is not None
    only = all(source.images_only for source in config.data.sources) and bool(config.data.sources)
    tiles = max((rows * columns for rows, columns in config.data.image_grid), default=0)
    pictures = 1 + tiles
    if config.data.packing and vision:  # a row may be full of them
        pictures = max(pictures, length // model.tokens_per_image())
    of_row = kept(
        model,
        length=length,
        supervised=max(1, length - (model.tokens_per_image() if vision and only else 0)),
        pictures=pictures if vision else 0,
        attention=config.attention,
        distilled=config.distill.active,
    )
    return of_row.with_mask() if config.data.packing else of_row


def kept(
    model: VisionLanguageModel, *, length: int, supervised: int, pictures: int, attention: str, distilled: bool = False
) -> Kept:
    """What one sample keeps: `length` tokens, of which `supervised` get logits, and `pictures` pictures.

    model: on meta tensors, with what trains in it marked; attention: the run's implementation; distilled: whether the
    translators follow the target, which runs the layers from the first of them on a second time.
    """
    width = cast(Any, model.decoder).config.get_text_config().hidden_size
    dtype = next(model.decoder.parameters()).dtype
    saved = _Saved(model)
    layers = list(model.family.layers(model.decoder))
    stacks = [layers]
    if model.encoder is not None and model.encoder_family is not None:
        stacks.append(list(model.encoder_family.layers(model.encoder)))
    with _attention_as_kernels(model, attention) as masked, _repeats_skipped(stacks, saved), saved.noting():
        learns = False
        if pictures and model.encoder is not None and model.encoder_family is not None:
            size = model.encoder_family.vision_config(model.encoder).image_size
            features = model.image_features(torch.empty(pictures, 3, size, size, dtype=dtype, device="meta"))
            learns = features.requires_grad
        each = _by_layer(layers, saved)
        embeddings = torch.empty(1, length, width, dtype=dtype, device="meta")
        embedding = cast(Any, model.decoder).get_input_embeddings().weight
        embeddings.requires_grad_(learns or embedding.requires_grad)
        mask = torch.ones(1, length, dtype=torch.long, device="meta")
        hidden = model.family.hidden_states(model.decoder, embeddings, mask)
        for handle in each.handles:
            handle.remove()
        scores = model.logits(hidden[:, :supervised])
    outside = saved.total - sum(each.sizes) + (2 * embeddings.nbytes if embeddings.requires_grad else 0)
    again: tuple[float, ...] = ()
    second_logits = 1
    if distilled and model.plan is not None:
        again = tuple(each.sizes[model.plan.first_replaced :]) if learns else ()
        second_logits = 3 if learns else 2
    part = float(COPIES * min(SLICE, scores.numel() * 4))
    scores_kept = 2.0 * scores.nbytes * second_logits
    return Kept(outside, tuple(each.sizes), again, embeddings.nbytes, scores_kept, part, max(masked, default=0.0))


class _Saved:
    """Storages that autograd saves, each counted once."""

    def __init__(self, model: nn.Module) -> None:
        self._own = {_storage(t) for t in (*model.parameters(), *model.buffers())}
        self._alive: list[torch.Tensor] = []  # a storage that is freed could give its number to another
        self.total = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if (key := _storage(tensor)) not in self._own:
            self._own.add(key)
            self._alive.append(tensor)
            self.total += tensor.untyped_storage().nbytes()
        return tensor

    @contextmanager
    def noting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass
class _Layers:
    sizes: list[float]
    handles: list[Any]


def _by_layer(layers: list[nn.Module], saved: _Saved) -> _Layers:
    """Notes, for every layer, by how much `saved` grows in its forward pass."""
    noted = _Layers([], [])
    entered = [0]

    def entering(*_: Any) -> None:
        entered[0] = saved.total

    def leaving(*_: Any) -> None:
        noted.sizes.append(saved.total - entered[0])

    for layer in layers:
        noted.handles += [layer.register_forward_pre_hook(entering), layer.register_forward_hook(leaving)]
    return noted


# -- layers that repeat each other -------------------------------------------------------------------------------------


@dataclass
class _Measured:
    """Measurements of one layer's forward pass."""

    size: int = 0
    """Bytes by which `_Saved.total` grew."""
    returns_tuple: bool = False
    """Whether the layer returns its hidden states in a tuple."""


@contextmanager
def _repeats_skipped(stacks: Sequence[Sequence[nn.Module]], saved: _Saved) -> Iterator[None]:
    """Lets layers that repeat the two before them count as much as the layer before, without running them.

    Where layers with the same shapes, settings and trained parameters follow each other, the second, third, ... keep
    the same number of bytes; only the first may also keep what they share. Measuring a model of 80 layers then takes
    as long as measuring one of a few layers.

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


def _measure(layer: nn.Module, measured: _Measured, saved: _Saved) -> list[Any]:
    """Notes in `measured` what the layer's next forward pass keeps; returns the handles of the hooks that do so."""

    def entering(*_: Any) -> None:
        measured.size = -saved.total

    def leaving(module: nn.Module, inputs: Any, output: Any) -> None:
        measured.size += saved.total
        measured.returns_tuple = isinstance(output, tuple)

    return [layer.register_forward_pre_hook(entering), layer.register_forward_hook(leaving)]


def _count_again(measured: _Measured, saved: _Saved, *inputs: Any, **named: Any) -> Any:
    """Stands in for a layer's forward pass: counts what was measured, and returns hidden states of the same shape."""
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


class _KernelAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(query.shape)
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, rows)
        return output

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _attention_as_kernels(model: VisionLanguageModel, attention: str) -> Iterator[list[float]]:
    """Lets decoder and encoder attend as they will in training; eager attention stays what it is.

    Notes the bytes that each attention of the decoder keeps besides with a mask, which transformers gives sdpa where it
    cannot be left out: keys and values are then repeated for every head, and torch makes of the mask, in every layer,
    numbers of the type that is computed in. Variable-length kernels take no mask.
    """
    masked: list[float] = []
    if attention not in model.family.attentions:
        attention = model.family.attentions[0]
    if attention == "eager":
        yield masked
        return
    from transformers import AttentionInterface

    inside = set(model.decoder.modules())

    def attend(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        if module in inside and attention == "sdpa":
            repeated = query.shape[1] // key.shape[1] - 1
            scores = query.shape[0] * query.shape[2] * key.shape[2]
            masked.append(float(repeated * (key.nbytes + value.nbytes) + scores * query.dtype.itemsize))
        output = cast(torch.Tensor, _KernelAttention.apply(query, key, value))
        return output.transpose(1, 2).contiguous(), None

    AttentionInterface.register(KERNEL, attend)
    parts = [part for part in (model.decoder, model.encoder) if part is not None]
    configs: dict[int, Any] = {id(m.config): m.config for part in parts for m in part.modules() if hasattr(m, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config, _ in before:
        config._attn_implementation = KERNEL
    try:
        yield masked
    finally:
        for config, name in before:
            config._attn_implementation = name
