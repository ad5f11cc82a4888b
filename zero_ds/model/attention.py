"""Implementations of attention: the names that can be used here, and the lengths that kernels are told in advance."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from zero_ds.runtime.environment import has_cuda
from zero_ds.runtime.errors import ConfigError, did_you_mean

PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
    "flash_attention_4": ("flash_attn", "flash-attn-4"),
}
"""Module and name of the package that each implementation of flash attention needs, unless `kernels` brings it."""

HUB = "kernels-community/"
"""Owner of the kernels that transformers loads from the hub by name; it trusts no other."""


class Sequences(NamedTuple):
    """Bounds of the sequences of a batch, which attend within themselves, counted through its flattened rows."""

    bounds: torch.Tensor
    """First position of each sequence, and the number of all positions: (sequences + 1,) int32."""
    longest: int
    """Length of the longest sequence."""


def is_flash(name: str) -> bool:
    """Returns whether an implementation is a variable-length kernel; transformers goes by the name as well."""
    return "flash" in name


def known_attentions() -> list[str]:
    """Returns the names that the installed transformers knows, without those of its serving engine."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ["eager", *(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]


def check_attention(name: str, *, trains: bool = False) -> None:
    """Checks that an implementation of attention can be used on this machine.

    Raises:
        ConfigError: transformers does not know the name, or a package or a GPU is missing.
    """
    if "/" in name:
        if not name.startswith(HUB):
            raise ConfigError(f"attention={name} is not a kernel that transformers loads; name one of {HUB}*.")
        if importlib.util.find_spec("kernels") is None:
            raise ConfigError(f"attention={name} needs kernels, which is not installed; pip install kernels.")
        return
    known = known_attentions()
    if name not in known:
        raise ConfigError(f"attention={name} is unknown{did_you_mean(name, known)}")
    module, package = PACKAGES.get(name, ("torch", "torch"))
    if importlib.util.find_spec(module) is None and importlib.util.find_spec("kernels") is None:
        how = "'zero_ds[flash]'" if name == "flash_attention_2" else package
        raise ConfigError(
            f"attention={name} needs {package}, which is not installed; with a GPU: pip install {how}, else "
            "attention=sdpa."
        )
    if (name in PACKAGES or (name == "flex_attention" and trains)) and not has_cuda():
        raise ConfigError(f"attention={name} needs a GPU{' to train' * (name not in PACKAGES)}; set attention=sdpa.")
