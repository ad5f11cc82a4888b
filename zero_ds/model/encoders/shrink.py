"""Small random copies of vision encoders: same class, same number of layers, few units, on the CPU in float32."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import torch
from torch import nn

from zero_ds.model.decoders.shrink import seeded

HIDDEN, HEADS, INNER, PATCH, GRID = 32, 4, 32, 4, 4
"""Width, heads, inner width, pixels of a patch's side, and patches along a side of an image, in a small copy."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"hidden_size|embed_dim|embedding_dim|d_model|projection_(dim|size)", HIDDEN),
    (r"(num|n)_(attention_|key_value_)?heads?", HEADS),
    (r"head_dim", HIDDEN // HEADS),
    (r"(\w+_)?intermediate_size|mlp_dim", INNER),
    (r"patch_size", PATCH),
    (r"image_size", PATCH * GRID),
    (r"max_ima?ge?_size", 2 * PATCH * GRID),
    (r"num_patches", GRID * GRID),
    (r"patch_dim", 3 * PATCH * PATCH),
)
"""Names of config entries, as patterns, each with the value of a small copy, which is never larger than the entry."""


def shrunk(config: Any) -> Any:
    """Returns a copy of a vision transformer's config with the same depth, but small widths and images."""
    small = copy.deepcopy(config)
    for name, value in list(vars(small).items()):
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        if size is None or value is None:
            continue
        if isinstance(value, list | tuple):
            setattr(small, name, type(value)(min(item, size) for item in value))
        elif isinstance(value, int) and not isinstance(value, bool):
            setattr(small, name, min(value, size))
    if hasattr(small, "initializer_range"):
        small.initializer_range = 0.2
    return small


def vision_class(config: Any) -> Any:
    """Returns transformers' class of a vision transformer's config; None if it has none that reads images alone."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    try:
        found: Any = MODEL_MAPPING[type(config)]
    except KeyError:
        found = _named_after(config)
    if isinstance(found, tuple | list):
        found = found[0]
    return found if found is not None and "pixel_values" in parameters(found) else None


def is_auto(config: Any) -> bool:
    """Returns whether AutoModel finds the class of a config."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    return type(config) in MODEL_MAPPING


def _named_after(config: Any) -> Any:
    """Returns the class that is called as its config, which AutoModel lacks for some vision towers."""
    import transformers

    stem = type(config).__name__.removesuffix("Config")
    names = (f"{stem}Model", f"{stem}Transformer")
    return next((found for name in names if (found := getattr(transformers, name, None)) is not None), None)


def parameters(kind: Any) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class's forward pass, by name."""
    found = dict(inspect.signature(kind.forward).parameters)
    found.pop("self", None)
    return {name: one for name, one in found.items() if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)}


def small_model(kind: Any, config: Any, *, attention: str = "eager", seed: int = 0) -> nn.Module:
    """Builds a class with random weights; its own errors pass through."""
    config = copy.deepcopy(config)
    config._attn_implementation = attention
    with seeded(seed):
        model = kind(config).float().eval()
        for parameter in model.parameters():  # scales and norms that start at a constant would hide a wrong order
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.requires_grad_(False)
