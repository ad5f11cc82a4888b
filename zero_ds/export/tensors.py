"""Tensors of an export on their way from file to file: unchanged, cast, or with LoRA merged, some rows at a time."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import Any

import torch

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Computed, Span, Tensor, dtype_name, torch_dtype

BLOCK = 16 << 20
"""Number of bytes of a source that are in memory at a time."""
_ONE_PRODUCT = Lock()
"""Lets one thread at a time compute a product, because it is large in float32 and several threads write shards."""


def read(span: Span) -> torch.Tensor:
    """Reads a tensor as a whole."""
    return torch.cat(list(_rows(span))).view(span.shape)


def as_dtype(span: Span, dtype: torch.dtype) -> Tensor:
    """Returns a tensor in a number format. If that is its own, its bytes will be copied, otherwise cast in blocks."""
    if span.dtype == dtype_name(dtype):
        return span

    def blocks() -> Iterator[Any]:
        for rows in _rows(span):
            yield buffer(rows.to(dtype))

    return Computed(dtype_name(dtype), span.shape, span.parameters * dtype.itemsize, blocks)


def in_memory(tensor: torch.Tensor, dtype: torch.dtype) -> Computed:
    """Returns a tensor in memory, cast to a number format, as one to be written."""
    size = tensor.numel() * dtype.itemsize
    return Computed(dtype_name(dtype), tuple(tensor.shape), size, lambda: iter([buffer(tensor.detach().to(dtype))]))


def merged(base: Span, down: Span, up: Span, scaling: float, dtype: torch.dtype) -> Computed:
    """Returns W + scaling B A, rounded wherever PEFT's merge of a model in `dtype` rounds.

    base: W (out, in); down: A (rank, in); up: B (out, rank); scaling: alpha / rank. Only some rows of W are in memory
    at a time, but the product is computed as a whole: in parts, its sums could have another order, and bfloat16 would
    round some elements differently.

    Raises:
        ConfigError: the shapes do not fit.
    """
    if (down.shape[1], up.shape[0], down.shape[0]) != (base.shape[1], base.shape[0], up.shape[1]):
        raise ConfigError(
            f"LoRA of shapes {up.shape} x {down.shape} does not fit a weight of shape {base.shape}; "
            "the run was made for another model."
        )

    def blocks() -> Iterator[Any]:
        with _ONE_PRODUCT:
            product = read(up).to(dtype).float() @ read(down).to(dtype).float()
            delta = product.mul_(scaling).to(dtype)
            del product
        start = 0
        for flat in _rows(base):
            rows = flat.view(-1, base.shape[1]).to(dtype)
            yield buffer(rows + delta[start : start + len(rows)])
            start += len(rows)

    return Computed(dtype_name(dtype), base.shape, base.parameters * dtype.itemsize, blocks)


def _rows(span: Span) -> Iterator[torch.Tensor]:
    """Yields the tensor's elements as flat blocks of whole rows (the last axis).

    Raises:
        ConfigError: the file has become shorter than its header says.
    """
    dtype = torch_dtype(span.dtype)
    row = (span.shape[-1] if span.shape else 1) * dtype.itemsize
    step = max(row, BLOCK // max(1, row) * row)
    with span.file.open("rb") as file:
        for start in range(0, span.size, max(1, step)):
            size = min(step, span.size - start)
            data = os.pread(file.fileno(), size, span.start + start)
            if len(data) != size:
                raise ConfigError(f"{span.file} ended early; fetch the model again.")
            yield torch.frombuffer(bytearray(data), dtype=dtype)
    if not span.size:
        yield torch.empty(0, dtype=dtype)


def values(tensor: Tensor) -> Iterator[torch.Tensor]:
    """Yields the elements of a tensor as flat blocks, as they will be in the file."""
    if isinstance(tensor, Span):
        yield from _rows(tensor)
        return
    for block in tensor.blocks():
        if block.nbytes:
            yield torch.frombuffer(block, dtype=torch_dtype(tensor.dtype))


def check_range(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Checks that no value is lost to infinity where a tensor is cast to float16, whose largest value is 65,504.

    Tensors that are copied are not read. The others are computed once more when they are written.

    Raises:
        ConfigError: a tensor that does not fit; the message names the first one.
    """
    for name, tensor in tensors:
        if isinstance(tensor, Span) or torch_dtype(tensor.dtype) != torch.float16:
            continue
        if any(bool(block.isinf().any()) for block in values(tensor)):
            raise ConfigError(
                f"{name} has values beyond {torch.finfo(torch.float16).max:,.0f}, the largest of float16; use --dtype "
                "bfloat16 or float32."
            )


def buffer(tensor: torch.Tensor) -> Any:
    """Returns the tensor's bytes, without a copy if the tensor is contiguous and on the CPU."""
    flat: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
