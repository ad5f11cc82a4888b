"""Dense translators: layers of a mixture of experts whose experts and router are replaced by one dense network.

model/decoders/dense.py has the config of such a surrogate. Here are its tensors: a dense network starts with random
first matrices and zeros in the last one, so that at first the layer adds what its attention adds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.runtime.safetensors import Computed, Tensor, torch_dtype


def dense_tensors(
    target: DecoderFolder, dense: Any, copied: list[tuple[str, Any]], numbers: Sequence[int], dtype: str
) -> list[tuple[str, Tensor]]:
    """Returns the surrogate's tensors: copied ones, without experts in the translators, and their dense networks.

    dense: config of the surrogate. copied: its tensors with copied translators. dtype: safetensors name of the number
    format of new tensors.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        state = AutoModelForCausalLM.from_config(dense).state_dict()
    prefixes = tuple(f"{target.family.layer_prefix}{number}." for number in numbers)
    wanted = {name: tuple(value.shape) for name, value in state.items() if name.startswith(prefixes)}
    kept = [
        (name, tensor)
        for name, tensor in copied
        if not name.startswith(prefixes) or wanted.get(name) == tuple(tensor.shape)
    ]
    std = float(getattr(dense, "initializer_range", 0.02) or 0.02)
    new = [
        (name, _random(name, shape, dtype, 0.0 if "down" in name or "w2" in name else std))
        for name, shape in wanted.items()
        if name not in dict(kept)
    ]
    return [*kept, *new]


def _random(name: str, shape: tuple[int, ...], dtype: str, std: float) -> Computed:
    """Returns a tensor of normal random numbers that follow from its name."""
    size = math.prod(shape) * torch_dtype(dtype).itemsize
    return Computed(dtype, shape, size, partial(_blocks, name, shape, dtype, std))


def _blocks(name: str, shape: tuple[int, ...], dtype: str, std: float) -> Iterator[Any]:
    import torch

    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std
    flat: Any = values.to(torch_dtype(dtype)).contiguous().view(-1).view(torch.uint8).numpy()
    yield memoryview(flat)
