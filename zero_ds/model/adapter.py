"""The adapter between vision encoder and decoder: its modules, the names and shapes of its tensors, its initial scale.

Three modules, of which the last two are options (`AdapterConfig`):

    adapter    (images, patches, vision width) -> (images, tokens, adapter width), in one of the KINDS; the paper's is
               Linear, GELU, Linear
    boundary   a learned embedding before and after the tokens of every image: tokens -> tokens + 2
    aligner    Linear to the decoder's width, if the adapter was trained for a decoder of another width (appendix A.8)

Weights files name their tensors `adapter.*`, `boundary.*` and `aligner.*`. Grafting, export, planning and the loaders
ask this file for the names and shapes. The number of image tokens is `AdapterConfig.image_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from zero_ds.config.schema import AdapterConfig
from zero_ds.runtime.zero3 import gathered

T = TypeVar("T")

PARTS = ("adapter", "boundary", "aligner")
"""Modules between vision encoder and decoder, in the order in which image features pass through them."""

LINEARS = ("adapter.0", "adapter.2")
"""Names of the adapter's linear layers, first to last; `.weight` and `.bias` follow. The kind `linear` has the first
alone."""

BOUNDARY = "boundary.embeddings.weight"
"""Name of the image-boundary embeddings: (2, adapter width), start before end."""

ALIGNER = "aligner"
"""Name of the aligner's linear layer; `.weight` and `.bias` follow."""

BOUNDARY_STD = 0.02
"""Standard deviation of the initial boundary embeddings."""


# -- squares of patches ------------------------------------------------------------------------------------------------


def squares_of(patches: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts grids of patches into squares: (images, patches, width) -> (images, squares, size * size, width).

    Patches and squares are in reading order: row by row, each from left to right. A grid that `size` does not divide is
    filled up with zeros at its right and lower edge.
    """
    side = isqrt(patches.shape[1])
    assert side**2 == patches.shape[1], "AdapterConfig.image_tokens refuses other grids"
    grid = patches.unflatten(1, (side, side))
    if missing := -side % size:
        grid = F.pad(grid, (0, 0, 0, missing, 0, missing))
    cut = grid.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # images, rows, size, columns, size, width
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def side_by_side(patches: torch.Tensor, size: int) -> torch.Tensor:
    """Puts the features of a square's patches side by side: (images, patches, width) -> (images, tokens, size^2 width).

    They are in reading order, as after the pixel shuffle of InternVL 1.5 (arXiv:2404.16821) and Idefics3
    (arXiv:2408.12637). Patches outside a grid that `size` does not divide are zeros.
    """
    return squares_of(patches, size).flatten(2)


def averaged(patches: torch.Tensor, size: int) -> torch.Tensor:
    """Averages each square of patches: (images, patches, width) -> (images, tokens, width).

    As the pooling of DeCo (arXiv:2405.20985). Squares at the edge of a grid that `size` does not divide are
    averages of the patches that they have.
    """
    means = squares_of(patches, size).mean(2)
    if isqrt(patches.shape[1]) % size == 0:
        return means
    present = squares_of(torch.ones_like(patches[:1, :, :1], dtype=torch.float32), size).mean(2)
    return (means / present).to(means.dtype)


@dataclass(frozen=True)
class Kind:
    """Computation of a value of `adapter.kind`."""

    depth: int = 2
    """Number of linear layers, with GELU between them."""
    merge: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    """Function that makes one token of each square of patches before the first linear layer; None keeps all patches."""
    widens: bool = False
    """True if a merged token is as wide as the patches of its square together."""


KINDS: dict[str, Kind] = {
    "mlp": Kind(),
    "linear": Kind(depth=1),
    "pixel_shuffle": Kind(merge=side_by_side, widens=True),
    "pooling": Kind(merge=averaged),
}
"""Kinds of adapters, by `adapter.kind`. Exports have the same in `export/remote/modeling_grafted.py`."""


# -- modules -----------------------------------------------------------------------------------------------------------


class Adapter(nn.Sequential):
    """Linear layers with GELU between them, after squares of patches have been merged if the kind does that.

    (images, patches, vision width) -> (images, tokens, width)
    """

    merge: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    square = 1

    def __init__(self, vision_width: int, width: int, config: AdapterConfig | None = None) -> None:
        config = config or AdapterConfig()
        kind = KINDS[config.kind]
        modules: list[nn.Module] = [nn.Linear(vision_width * (config.square**2 if kind.widens else 1), width)]
        for _ in range(1, kind.depth):
            modules += [nn.GELU(), nn.Linear(width, width)]
        super().__init__(*modules)
        self.merge, self.square = kind.merge, config.square

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Computes image tokens from patch features. input: (images, patches, vision width)."""
        merged = input if self.merge is None else self.merge(input, self.square)
        return cast(torch.Tensor, super().forward(merged))

    @property
    def last(self) -> nn.Linear:
        """The last linear layer."""
        return cast(nn.Linear, self[-1])

    @classmethod
    def of_linears(cls, layers: Sequence[nn.Linear], activation: nn.Module | None = None) -> Adapter:
        """Makes an adapter of trained linear layers, first to last, with an activation between them, by default GELU.

        Their number is that of the adapter that was trained, which need not be the number in new adapters.
        """
        modules: list[nn.Module] = [layers[0]]
        for layer in layers[1:]:
            modules += [activation or nn.GELU(), layer]
        adapter = cls.__new__(cls)
        nn.Sequential.__init__(adapter, *modules)
        return adapter


class Boundary(nn.Module):
    """Learned start- and end-of-image embeddings; a module with a forward, so that ZeRO-3 gathers it when used."""

    def __init__(self, width: int, std: float = BOUNDARY_STD) -> None:
        super().__init__()
        self.embeddings = nn.Embedding.from_pretrained(torch.empty(2, width).normal_(std=std), freeze=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Adds the two embeddings to every image: (images, tokens, width) -> (images, tokens + 2, width)."""
        both = self.embeddings(torch.arange(2, device=features.device)).to(features.dtype)
        start, end = both.view(2, 1, 1, -1).expand(2, len(features), 1, -1)
        return torch.cat([start, features, end], dim=1)


def adapter_modules(config: AdapterConfig, vision_width: int, decoder_width: int) -> dict[str, nn.Module]:
    """Makes the modules between vision encoder and decoder, by their names in the model, with random weights."""
    width = config.width or decoder_width
    modules: dict[str, nn.Module] = {"adapter": Adapter(vision_width, width, config)}
    if config.boundary_tokens:
        modules["boundary"] = Boundary(width)
    if config.width:
        modules["aligner"] = nn.Linear(width, decoder_width)
    return modules


def adapter_shapes(config: AdapterConfig, vision_width: int, decoder_width: int) -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor between vision encoder and decoder."""
    with torch.device("meta"):
        modules = adapter_modules(config, vision_width, decoder_width)
    return {
        f"{part}.{name}": tuple(parameter.shape)
        for part, module in modules.items()
        for name, parameter in module.named_parameters()
    }


def belongs_to(name: str, *parts: str) -> bool:
    """Returns whether a tensor belongs to one of these PARTS; to any of them if none is given."""
    assert set(parts) <= set(PARTS), parts
    return name.startswith(tuple(f"{part}." for part in parts or PARTS))


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a VisionLanguageModel that are between vision encoder and decoder, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if belongs_to(name)}


def missing_tensors(model: nn.Module, loaded: Collection[str]) -> list[str]:
    """Returns the tensors between vision encoder and decoder that a model has and `loaded` lacks.

    They would stay random without an error: the loss would still fall, and the model would still answer.

    loaded: names of the tensors that weights files have brought.
    """
    return [name for name in adapter_parameters(model) if name not in loaded]


def linear_layers(tensors: Mapping[str, T]) -> list[tuple[T, T]]:
    """Returns weight and bias of the adapter's linear layers, first to last. An aligner is the last of them."""
    layers = [layer for layer in (*LINEARS, ALIGNER) if f"{layer}.weight" in tensors]
    return [(tensors[f"{layer}.weight"], tensors[f"{layer}.bias"]) for layer in layers]


def output_width(shapes: Mapping[str, Any]) -> int | None:
    """Returns the width of the adapter's output, from the shapes of a result's tensors; None if it holds no adapter.

    An adapter that lacks its last layers has the width of the last one that is there. Loading it names missing tensors.
    """
    for layer in (ALIGNER, *reversed(LINEARS)):
        for name in (f"{layer}.weight", f"{layer}.bias"):
            if name in shapes:
                return int(shapes[name][0])
    return None


@torch.no_grad()
def match_embeddings_(model: Any, pixel_values: torch.Tensor) -> float:
    """Scales the last layer of adapter or aligner so that image tokens have the standard deviation of word embeddings.

    model: a VisionLanguageModel. pixel_values: (images, 3, height, width), on which the deviation is measured, the same
    on every rank. Returns the factor. This only changes the initial weights: the trained adapter has ordinary layers.
    """
    assert model.adapter is not None
    words = cast(Any, model.decoder).get_input_embeddings().weight
    last = model.aligner if model.aligner is not None else model.adapter.last
    boundary, model.boundary = model.boundary, None
    try:
        # the engine, which would gather partitioned parameters for a forward pass, does not exist yet
        parts = [model.encoder, model.adapter, model.aligner]
        with gathered([words, *(p for part in parts if part is not None for p in part.parameters())]):
            scale = model.family.embedding_scale(model.decoder)
            features = model.image_features(pixel_values.to(last.weight.device))  # of the gathered weights
            measured = scale * float(words.float().std()) / float(features.float().std())
    finally:
        model.boundary = boundary
    # rounded to three digits, because the others depend on threads and kernels, and initial weights should not
    factor = float(f"{measured:.3g}")
    with gathered(list(last.parameters()), modifier_rank=0):
        last.weight.mul_(factor)
        last.bias.mul_(factor)
    return factor
