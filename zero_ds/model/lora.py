"""Low-rank adapters on decoder layers, by PEFT: put in, named, and merged into the weights they stand beside.

In a weights file they are called `lora.` + the name that PEFT gives them in the decoder, without its adapter's name.
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
    """Puts adapters beside the named linear layers; they begin without effect (B is zero).

    Whole on every rank, from the current random state. Everything else in the decoder stays as it is.

    Raises:
        ConfigError: a module name or layer number that the decoder does not have.
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
    """The adapters' parameters under their names in a weights file."""
    return [
        (f"lora.{name.replace(f'.{_ADAPTER}', '')}", parameter)
        for name, parameter in decoder.named_parameters()
        if _PIECES.search(name)
    ]


def without(decoder: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The decoder's own parameters under the names that they have without adapters."""
    return [
        (name.replace(".base_layer.", "."), parameter)
        for name, parameter in decoder.named_parameters()
        if not _PIECES.search(name)
    ]


@torch.no_grad()
def merge_(decoder: nn.Module) -> None:
    """Adds the adapters to the weights beside them, and takes them out: an ordinary decoder stays."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(decoder.named_modules()):
        if isinstance(module, LoraLayer):
            cast(Any, module).merge()
            parent, _, child = name.rpartition(".")
            setattr(decoder.get_submodule(parent), child, cast(Any, module).get_base_layer())
