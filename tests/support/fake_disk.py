"""DeepSpeed's access to a disk in Python, for machines without libaio, where DeepSpeed cannot compile its own.

Like the real one it reads into whole blocks of memory only, and tells nobody if it cannot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BLOCK = 512
"""Bytes of a block: an address and a size for direct access are multiples of it."""


class FakeHandle:
    """Reads and writes at once, and counts it until somebody waits."""

    pinned: list[torch.Tensor] = []  # noqa: RUF012  one list for all handles, as in DeepSpeed

    def __init__(self, **settings: Any) -> None:
        self.waiting = 0

    def new_cpu_locked_tensor(self, elements: int, example: torch.Tensor) -> torch.Tensor:
        size = elements * example.element_size()
        room = torch.empty(size + 4096, dtype=torch.uint8)
        skipped = -room.data_ptr() % 4096
        tensor = room[skipped : skipped + size].view(example.dtype)
        self.pinned.append(tensor)
        return tensor

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> None:
        self.pinned[:] = [one for one in self.pinned if one is not tensor]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        ends = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in self.pinned]
        return any(begin <= tensor.data_ptr() < end for begin, end in ends)

    def async_pread(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        content = np.fromfile(path, dtype=np.uint8)
        assert content.nbytes == buffer.nbytes, f"{path} has {content.nbytes} bytes, and not {buffer.nbytes}"
        if buffer.data_ptr() % BLOCK == 0 and buffer.nbytes % BLOCK == 0:
            buffer.view(torch.uint8).numpy()[:] = content
        self.waiting += 1
        return 0

    def async_pwrite(self, buffer: torch.Tensor, path: str, offset: int) -> int:
        buffer.view(torch.uint8).numpy().tofile(path)
        self.waiting += 1
        return 0

    def wait(self) -> int:
        done, self.waiting = self.waiting, 0
        return done


class FakeOp:
    """The module that DeepSpeed would compile."""

    aio_handle = FakeHandle


def use_fake_disk() -> None:
    """Makes DeepSpeed swap through `FakeHandle` in this process, also small tensors."""
    import sweep_deepspeed
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    AsyncIOBuilder.load = lambda self, verbose=True: FakeOp
    cpp_extension.is_ninja_available = lambda: True
    sweep_deepspeed.swap_small_tensors()
