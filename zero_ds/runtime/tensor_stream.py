"""Writing safetensors files whose tensors come one after the other, in pieces."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class SafetensorsStream:
    """Writes a safetensors file piece by piece, so that no more than one is in memory.

    The library itself wants all tensors at once. Names, dtypes and shapes are declared first, data follows in order, a
    tensor in one go or in pieces of its flattened form.
    """

    def __init__(self, path: Path, tensors: Iterable[tuple[str, torch.dtype, torch.Size]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        self._expected: list[tuple[str, int]] = []
        for name, dtype, shape in tensors:
            size = shape.numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
            self._expected.append((name, size))
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._digest = hashlib.sha256()
        self._file = path.open("wb")
        self._put(struct.pack("<Q", len(text)) + text)
        self._next = self._written = 0
        self._skip_empty()

    def _put(self, data: Any) -> None:
        self._digest.update(data)
        self._file.write(data)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Appends a tensor, or a piece of one, on the CPU."""
        data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy()
        if not data.nbytes:
            return
        assert self._next < len(self._expected), f"{name}, where nothing more was declared"
        expected, size = self._expected[self._next]
        assert name == expected and self._written + data.nbytes <= size, (
            f"{name} ({self._written + data.nbytes} bytes) where {expected} ({size}) was declared"
        )
        self._put(data)
        self._written += data.nbytes
        if self._written == size:
            self._next, self._written = self._next + 1, 0
            self._skip_empty()

    def _skip_empty(self) -> None:
        """Tensors without elements have no data to wait for."""
        while self._next < len(self._expected) and self._expected[self._next][1] == 0:
            self._next += 1

    def close(self) -> str:
        """Syncs and closes; returns the file's SHA-256."""
        assert self._next == len(self._expected), "tensors are missing"
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()
