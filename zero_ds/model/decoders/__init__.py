"""Decoder families, one module per family. To add one, write its module and list it in `FAMILIES`."""

from __future__ import annotations

import json
from pathlib import Path

from zero_ds.model.decoders import gemma, llama, qwen
from zero_ds.model.decoders.base import Family
from zero_ds.runtime.errors import ConfigError

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llama.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2, gemma.GEMMA3)
}


def family_of(folder: str | Path) -> Family:
    """Returns the family of the model in a Hugging Face folder, from its config.json.

    Raises:
        ConfigError: there is no such folder or no readable config.json, or no family has its model type.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it holds no config.json.")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} names no model_type.") from None
    return family_of_type(model_type, folder)


def family_of_type(model_type: str, folder: str | Path) -> Family:
    """Returns the family that a `model_type` belongs to. `folder` only appears in the error message.

    Raises:
        ConfigError: no family has this model type.
    """
    for family in FAMILIES.values():
        if model_type in family.model_types:
            return family
    registered = ", ".join(name for family in FAMILIES.values() for name in family.model_types)
    raise ConfigError(f"no family is registered for model_type '{model_type}' of {folder}; registered: {registered}.")


__all__ = ["FAMILIES", "Family", "family_of", "family_of_type"]
