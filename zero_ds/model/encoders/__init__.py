"""Vision encoders, one module per kind. A new kind is a module and one line in `ENCODERS`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zero_ds.model.encoders import clip, siglip
from zero_ds.model.encoders.base import EncoderFamily
from zero_ds.runtime.errors import ConfigError

ENCODERS: dict[str, EncoderFamily] = {family.name: family for family in (clip.FAMILY, siglip.FAMILY)}


def encoder_of(folder: str | Path) -> EncoderFamily:
    """Returns the kind of the vision encoder in a Hugging Face folder.

    Raises:
        ConfigError: no such folder, or a model type that belongs to no kind.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it holds no config.json.")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} names no model_type.") from None
    for encoder in ENCODERS.values():
        if model_type in encoder.model_types:
            return encoder
    registered = ", ".join(t for encoder in ENCODERS.values() for t in encoder.model_types)
    raise ConfigError(
        f"no vision encoder is registered for model_type '{model_type}' of {folder}; registered: {registered}."
    )


def vision_config(folder: str | Path) -> Any:
    """Returns the config of the vision transformer in a folder; no weights are read."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    return getattr(config, "vision_config", config)


__all__ = ["ENCODERS", "EncoderFamily", "encoder_of", "vision_config"]
