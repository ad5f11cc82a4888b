"""How far ZeRO-3 gathers ahead: sizes in the DeepSpeed JSON that follow the decoder's layers.

DeepSpeed (0.19) starts to gather the parameters of the next modules while the current one computes, as many elements as
`stage3_prefetch_bucket_size` allows, as long as no more than `stage3_max_live_parameters` are whole. A frozen decoder
layer is one unit here, which runs once all of it has been gathered. Of a layer of 856 million elements (Llama-70B),
DeepSpeed's default of 50 million starts a tenth ahead of time, and every layer would wait for the rest of its own.

Parameters on a disk are read into buffers, one for each parameter, which they keep as long as they are whole. DeepSpeed
fails in the middle of a step if a unit has more parameters than there are buffers, or a larger one. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zero_ds.runtime.errors import ConfigError

if TYPE_CHECKING:
    from zero_ds.model.decoders.folder import DecoderFolder

PREFETCH, LIVE = "stage3_prefetch_bucket_size", "stage3_max_live_parameters"
SMALLEST = {PREFETCH: 50_000_000, LIVE: 1_000_000_000}
"""DeepSpeed's defaults, which are the smallest sizes used, so that several small layers are gathered ahead."""

SWAPPED_FROM = 2**20
"""Bytes of the smallest part of a parameter that DeepSpeed puts on a disk, unless `aio.block_size` is larger."""
BUFFERS = 5
"""DeepSpeed's number of buffers; the fewest used here."""
BUFFER = 20_000_000
"""Elements of the smallest buffer used, which hold a part of every parameter of an encoder or adapter."""


@dataclass(frozen=True)
class Units:
    """Sizes of a decoder's units, in elements."""

    layer: int
    """Elements of the largest decoder layer."""
    largest: int
    """Elements of the largest unit: a layer, the word embeddings or the output head."""
    parameters: tuple[tuple[int, ...], ...] = field(default=(), compare=False)
    """Elements of every parameter, by unit."""

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, int], layer_prefix: str) -> Units:
        """Returns the units of parameters with these numbers of elements, by the causal LM's names."""
        layers: dict[str, list[int]] = {}
        others = [0]
        for name, size in sizes.items():
            if name.startswith(layer_prefix):
                number = name.removeprefix(layer_prefix).partition(".")[0]
                layers.setdefault(number, []).append(size)
            else:
                others.append(size)
        layer = max(map(sum, layers.values()), default=0)
        parameters = (*map(tuple, layers.values()), *((size,) for size in others))
        return cls(layer, max(layer, *others), parameters)

    @classmethod
    def of_folder(cls, folder: DecoderFolder) -> Units:
        """Returns the units of the decoder in a folder."""
        sizes = {name: span.parameters for name, span in folder.located.items()}
        return cls.of_sizes(sizes, folder.family.layer_prefix)


def follow_layers_(ds: dict[str, Any], units: Units, ranks: int | None = None) -> None:
    """Fills in the sizes that a resolved DeepSpeed configuration leaves open: the next layer is gathered as a whole.

    ds: a configuration in which `ds_config` has removed "auto". ranks: number of ranks; None: that of its batch sizes.

    Raises:
        ConfigError: parameters are on a disk, and the configuration has too few or too small buffers for them.
    """
    zero = ds["zero_optimization"]
    if zero.get("stage") == 3:
        zero.setdefault(PREFETCH, max(SMALLEST[PREFETCH], units.layer))
        zero.setdefault(LIVE, max(SMALLEST[LIVE], units.largest + units.layer))
    if (section := zero.get("offload_param") or {}).get("device") == "nvme":
        of_batch = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
        _fill_buffers(section, ds, units, ranks or ds["train_batch_size"] // of_batch)


def _fill_buffers(section: dict[str, Any], ds: dict[str, Any], units: Units, ranks: int) -> None:
    """Fills in number and size of the buffers into which parameters are read from a disk, and checks stated ones."""
    element = 2 if ds["bf16"]["enabled"] or ds["fp16"]["enabled"] else 4
    smallest = max(SWAPPED_FROM, ds.get("aio", {}).get("block_size", SWAPPED_FROM))
    swapped = [[p for size in unit if (p := -(-size // ranks)) * element >= smallest] for unit in units.parameters]
    largest = max((part for unit in swapped for part in unit), default=0)
    most = max(map(len, swapped), default=0)
    for name, least, what in (
        ("buffer_size", largest, f"a part of the largest parameter has {largest} elements"),
        ("buffer_count", most, f"a layer has {most} parameters on the disk, all of which it needs together"),
    ):
        if section.get(name, least) < least:
            raise ConfigError(
                f"zero_optimization: offload_param.{name}={section[name]}, but {what}; write {least} or more, or "
                '"auto".'
            )
    section.setdefault("buffer_size", max(BUFFER, largest))
    section.setdefault("buffer_count", max(BUFFERS, most + 4))  # others stay whole during a unit, such as embeddings


def share_ahead(zero: Mapping[str, Any], unit: int) -> float:
    """Returns the part of a unit of `unit` elements that is gathered while the one before it computes, from 0 to 1."""
    prefetched = min(
        zero.get(PREFETCH, SMALLEST[PREFETCH]), max(0, int(zero.get(LIVE, SMALLEST[LIVE])) - unit)
    )  # the current unit is whole meanwhile
    return min(1.0, prefetched / unit) if unit else 1.0
