"""Vision encoders: found by their structure and verified (`structure`), or registered here, one module per kind.

A registered kind is one that published folders of this package depend on. Others need no code.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from zero_ds.data.images import ImageProcessor
from zero_ds.model.encoders import clip
from zero_ds.model.encoders.base import EncoderFamily, native_size
from zero_ds.model.encoders.loading import (
    empty_encoder,
    load_encoder,
    load_tower,
    published_names,
    tower_of,
    vision_config,
    whole_config,
)
from zero_ds.model.encoders.structure import describe
from zero_ds.model.verdicts import UnverifiedError
from zero_ds.runtime.errors import ConfigError

ENCODERS: dict[str, EncoderFamily] = {clip.FAMILY.name: clip.FAMILY}


def registered(model_type: str) -> EncoderFamily | None:
    """Returns the registered kind that a `model_type` belongs to; None if there is none."""
    return next((family for family in ENCODERS.values() if model_type in family.model_types), None)


def encoder_of(folder: str | Path, image_size: int | None = None) -> EncoderFamily:
    """Returns the description of the vision encoder in a Hugging Face folder, or of the vision tower of a larger model.

    image_size: height and width of the images that it will read, in pixels; by default those of its config, or, for a
    class that reads any size, of its image processor.

    Raises:
        ConfigError: no such folder, a structure that cannot be verified, or a size that the encoder cannot read.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it holds no config.json.")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} names no model_type.") from None
    known = registered(model_type)
    if known is not None and image_size is None:
        return known
    whole = whole_config(folder)
    config = tower_of(whole)
    family = known or described(config, folder)
    if config is not whole and known is None:  # a tower of a class that no family knows
        family = replace(family, load=partial(load_tower, family.class_name))
    return fitted(family, config, folder, image_size)


def described(config: Any, folder: object) -> EncoderFamily:
    """Returns the registered kind or the verified description of a vision transformer's config.

    folder: only appears in the error message.

    Raises:
        ConfigError: the structure cannot be verified.
    """
    known = registered(config.model_type)
    if known is not None:
        return known
    try:
        return describe(config)
    except UnverifiedError as error:
        raise ConfigError(
            f"the model in {folder} ({config.model_type}) cannot be used as a vision encoder: "
            f"{str(error).rstrip('.')}; `zero-ds models` lists those that can."
        ) from None


def fitted(family: EncoderFamily, config: Any, folder: str | Path, image_size: int | None) -> EncoderFamily:
    """Returns the description for images of `image_size` pixels, or of the size that the encoder's own files say.

    Raises:
        ConfigError: as `EncoderFamily.at_size`.
    """
    if image_size is not None:
        return family.at_size(image_size, config, folder)
    own = ImageProcessor.size_of(folder) if family.takes_any_size else None
    fits = own is not None and own % family.patch_size(config) == 0 and own != native_size(config)
    return replace(family, size=own) if fits else family


__all__ = [
    "ENCODERS",
    "EncoderFamily",
    "described",
    "empty_encoder",
    "encoder_of",
    "fitted",
    "load_encoder",
    "published_names",
    "registered",
    "vision_config",
]
