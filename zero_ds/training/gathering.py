"""How far ZeRO-3 gathers ahead: sizes in the DeepSpeed JSON that follow the decoder's layers.

DeepSpeed (0.19) starts to gather the parameters of the next modules while the current one computes, as many elements as
`stage3_prefetch_bucket_size` allows, as long as no more than `stage3_max_live_parameters` are whole. A frozen decoder
layer is one unit here, which runs once all of it has been gathered. Of a layer of 856 million elements (Llama-70B),
DeepSpeed's default of 50 million starts a tenth ahead of time, and every layer would wait for the rest of its own.
Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zero_ds.model.decoders.folder import DecoderFolder

PREFETCH, LIVE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters"
SMALLEST = {PREFETCH: 50_000_000, LIVE: 1_000_000_000}
"""DeepSpeed's defaults, which are the smallest sizes used, so that several small layers are gathered ahead."""


@dataclass(frozen=True)
class Units:
    """Sizes of a decoder's units, in elements."""

    layer: int
    """Elements of the largest decoder layer."""
    largest: int
    """Elements of the largest unit: a layer, the word embeddings or the output head."""

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, int], layer_prefix: str) -> Units:
        """Returns the units of parameters with these numbers of elements, by the causal LM's names."""
        layers: dict[str, int] = {}
        others = [0]
        for name, size in sizes.items():
            if name.startswith(layer_prefix):
                number = name.removeprefix(layer_prefix).partition(".")[0]
                layers[number] = layers.get(number, 0) + size
            else:
                others.append(size)
        layer = max(layers.values(), default=0)
        return cls(layer, max(layer, *others))

    @classmethod
    def of_folder(cls, folder: DecoderFolder) -> Units:
        """Returns the units of the decoder in a folder."""
        sizes = {name: span.parameters for name, span in folder.located.items()}
        return cls.of_sizes(sizes, folder.family.layer_prefix)


def follow_layers_(ds: dict[str, Any], units: Units) -> None:
    """Fills in the sizes that a resolved DeepSpeed configuration leaves open: the next layer is gathered as a whole.

    ds: a configuration in which `ds_config` has removed "auto".
    """
    zero = ds["zero_optimization"]
    if zero.get("stage") == 3:
        zero.setdefault(PREFETCH, max(SMALLEST[PREFETCH], units.layer))
        zero.setdefault(LIVE, max(SMALLEST[LIVE], units.largest + units.layer))


def share_ahead(zero: Mapping[str, Any], unit: int) -> float:
    """Returns the part of a unit of `unit` elements that is gathered while the one before it computes, from 0 to 1."""
    prefetched = min(
        zero.get(PREFETCH, SMALLEST[PREFETCH]), max(0, int(zero.get(LIVE, SMALLEST[LIVE])) - unit)
    )  # the current unit is whole meanwhile
    return min(1.0, prefetched / unit) if unit else 1.0
