"""Decoders: found by their structure and verified (`structure`), or registered here, one module per family.

A registered family corrects or completes what structure cannot tell. To add one, write its module and list it in
`FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from zero_ds.model.decoders import gemma, llama, qwen
from zero_ds.model.decoders.base import Family
from zero_ds.model.decoders.structure import describe
from zero_ds.model.verdicts import UnverifiedError
from zero_ds.runtime.errors import ConfigError

FAMILIES: dict[str, Family] = {
    family.name: family for family in (llama.FAMILY, qwen.QWEN2, qwen.QWEN3, gemma.GEMMA2, gemma.GEMMA3)
}


def registered(model_type: str) -> Family | None:
    """Returns the registered family that a `model_type` belongs to; None if there is none."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)


def family_of_config(config: Any, folder: object) -> Family:
    """Returns the family of a text config: a registered one, or the description of its structure.

    folder: only appears in the error message.

    Raises:
        ConfigError: no family is registered, and the structure cannot be verified.
    """
    known = registered(config.model_type)
    if known is not None:
        return known
    try:
        return describe(config)
    except UnverifiedError as error:
        raise ConfigError(
            f"the model in {folder} ({config.model_type}) cannot be used as a decoder: {str(error).rstrip('.')}; "
            "`zero-ds models` lists those that can."
        ) from None


__all__ = ["FAMILIES", "Family", "family_of_config", "registered"]
