"""Loads vision encoders: a folder of their own, or the vision tower of a class with text and vision."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zero_ds.model.loading import load_complete
from zero_ds.runtime.errors import ConfigError, one_line
from zero_ds.runtime.safetensors import shard_files

if TYPE_CHECKING:
    from torch import nn

    from zero_ds.model.encoders.base import EncoderFamily


def whole_config(folder: str | Path) -> Any:
    """Returns transformers' config of a folder.

    Raises:
        ConfigError: transformers cannot read it, or would run code of the folder for it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds of errors
        raise ConfigError(f"transformers cannot read {folder}/config.json ({one_line(error)}).") from None


def vision_config(folder: str | Path) -> Any:
    """Returns the config of the vision transformer in a folder; no weights are read.

    Raises:
        ConfigError: as `whole_config`.
    """
    return tower_of(whole_config(folder))


def tower_of(config: Any) -> Any:
    """Returns the config of a model's vision transformer, without the pooling head, which no image token passes."""
    config = getattr(config, "vision_config", config)
    for name in ("vision_use_head", "use_head"):
        if getattr(config, name, False) is True:
            setattr(config, name, False)
    return config


def load_encoder(family: EncoderFamily, folder: Path, **arguments: Any) -> nn.Module:
    """Loads the vision encoder of a folder.

    Raises:
        ConfigError: as `load_complete`; or the files hold more layers than config.json says.
    """
    info: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Any:
        loaded: Any = family.load(path, **options)
        info.update(loaded[1])
        return loaded

    module = load_complete(load, folder, **arguments)
    depth, layers = int(family.vision_config(module).num_hidden_layers), family.layers(module)
    place = next(name for name, child in module.named_modules() if child is layers)
    pattern = re.compile(rf"(?:vision_model\.)?{re.escape(place)}\.(\d+)\..+")
    numbers = [int(match[1]) for name in info.get("unexpected_keys", ()) if (match := pattern.fullmatch(name))]
    if numbers and max(numbers) >= depth:
        raise ConfigError(
            f"the weights in {folder} have {max(numbers) + 1} layers, and its config.json says num_hidden_layers="
            f"{depth}; fetch it again."
        )
    _empty_parameters_to_buffers_(module)
    return module


def _empty_parameters_to_buffers_(module: nn.Module) -> None:
    """Makes buffers of parameters without elements (no registers), which ZeRO-3 cannot gather."""
    import torch

    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            if 0 in shape:
                delattr(owner, name)
                owner.register_buffer(name, torch.empty(tuple(shape), dtype=parameter.dtype, device=parameter.device))


def empty_encoder(family: EncoderFamily, config: Any, **options: Any) -> nn.Module:
    """Makes a vision transformer without loading weights. options: those of transformers' `from_config`."""
    import transformers

    if family.auto:
        return transformers.AutoModel.from_config(config, **options)
    return getattr(transformers, family.class_name)._from_config(config, **options)


def published_names(module: nn.Module) -> dict[str, str]:
    """Returns the name that transformers gives a vision transformer's tensors in files, by their names in the class.

    They differ where the library has renamed modules since. transformers looks for the older names, and may make
    something else of the newer ones.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    kind: Any = type(module)
    with torch.device("meta"):
        fresh = kind(copy.deepcopy(module.config))  # a loaded one would remember the prefix that its folder had
    names = {}
    for name, tensor in fresh.state_dict().items():
        found = list(revert_weight_conversion(fresh, {name: tensor}))
        names[name] = found[0] if len(found) == 1 else name
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def load_tower(class_name: str, path: str, **arguments: Any) -> Any:
    """Loads a vision transformer of a class by `from_pretrained`, from its own folder or as a tower of a larger model.

    path: folder; arguments: those of `from_pretrained`.
    """
    import transformers

    kind: Any = getattr(transformers, class_name)
    config = vision_config(path)
    prefix = _tower_prefix(Path(path), kind, config)
    if prefix:
        arguments["key_mapping"] = {f"^{re.escape(prefix)}": ""}
    return kind.from_pretrained(path, config=config, **arguments)


def _tower_prefix(folder: Path, kind: Any, config: Any) -> str:
    """Returns the prefix that a vision tower's tensors have in a folder; empty if it is not clear."""
    import torch

    try:
        names = set(shard_files(folder))
    except (OSError, ValueError):  # `from_pretrained` says what is wrong with the files
        return ""
    with torch.device("meta"):
        model = kind(copy.deepcopy(config))
    own = [name for name, _ in model.named_parameters()]
    if not own or set(own) <= names:
        return ""
    candidates = {name.removesuffix(own[0]) for name in names if name.endswith(f".{own[0]}")}
    return next((prefix for prefix in sorted(candidates) if all(f"{prefix}{one}" in names for one in own)), "")
