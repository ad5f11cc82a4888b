"""Low-rank adapters (LoRA) of decoder layers, made by PEFT: injects them, names them, and merges them into the weights.

In a weights file their names are `lora.` + the name that PEFT gives them in the decoder, without PEFT's adapter name.
Source: appendix A.2 of the paper.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import LoraConfig
from zero_ds.model.decoders import Family
from zero_ds.runtime.errors import ConfigError

_ADAPTER = "default"
_PIECES = re.compile(rf"\.lora_[A-Z]\w*\.{_ADAPTER}(?=\.|$)")


def inject_(decoder: nn.Module, family: Family, config: LoraConfig, dtype: torch.dtype) -> None:
    """Adds low-rank adapters to the linear layers that the config names; B is zero, so they have no effect yet.

    They are drawn from the current random state and are whole on every rank. Nothing else in the decoder changes.

    Raises:
        ConfigError: the decoder does not have a module name or layer number.
    """
    import peft

    layers = family.layers(decoder)
    names = {name.rsplit(".", 1)[-1] for name, part in layers[0].named_modules() if isinstance(part, nn.Linear)}
    for module in config.modules:
        if module not in names:
            raise ConfigError(f"lora.modules names '{module}'; a layer of this decoder has {', '.join(sorted(names))}.")
    numbers = range(len(layers)) if config.layers is None else config.layers
    for number in numbers:
        if not 0 <= number < len(layers):
            raise ConfigError(f"lora.layers names layer {number}; the decoder has layers 0 to {len(layers) - 1}.")
    prefix = re.escape(family.layer_prefix)
    chosen = rf"{prefix}({'|'.join(map(str, numbers))})\..*\.({'|'.join(map(re.escape, config.modules))})"
    settings = peft.LoraConfig(r=config.rank, lora_alpha=cast(Any, config.alpha), target_modules=chosen)
    peft.inject_adapter_in_model(settings, decoder, adapter_name=_ADAPTER)
    for name, parameter in decoder.named_parameters():
        if _PIECES.search(name):
            parameter.data = parameter.data.to(dtype)


def named_parameters(decoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the adapters' parameters under their names in a weights file."""
    return [
        (f"lora.{name.replace(f'.{_ADAPTER}', '')}", parameter)
        for name, parameter in decoder.named_parameters()
        if _PIECES.search(name)
    ]


def without(decoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the decoder's own parameters under the names that they have without adapters."""
    return [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in decoder.named_parameters()
        if not _PIECES.search(name)
    ]


def stored_tensors(decoder: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Returns what files of the decoder hold without adapters: its own parameters, and the buffers that are stored."""
    stored = decoder.state_dict()
    buffers = [(name, buffer) for name, buffer in decoder.named_buffers() if name in stored]
    return [*((name, parameter.detach()) for name, parameter in without(decoder)), *buffers]


@torch.no_grad()
def merge_(decoder: nn.Module) -> None:
    """Adds the adapters to the weights that they adapt and removes them, which leaves an ordinary decoder."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            cast(Any, module).merge()
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, cast(Any, module).get_base_layer())
