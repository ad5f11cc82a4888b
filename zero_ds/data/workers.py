"""Worker processes of a loader: how they start and end, and how the batches of a step reach their rank.

A worker is forked, so it shares the memory of its rank. It hands over a step in one nameless file in memory, because a
descriptor, a message and a mapping for each tensor would cost as much as making a small tensor.
"""

from __future__ import annotations

import atexit
import functools
import gc
import mmap
import multiprocessing
import multiprocessing.reduction
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageProcessor
from zero_ds.runtime.environment import has_cuda

ALIGNMENT = 64
"""Alignment of tensors in bytes: offsets are rounded up to a multiple of it."""


def without_traceback(error: DataError, source: int | None = None) -> DataError:
    """Returns the error without its traceback, as one about a sample of `source` if that is given.

    Its frames hold the whole step. Kept with the error, they would form a cycle that only the garbage collector ends,
    and a worker rarely allocates enough objects to start that.
    """
    bare = type(error)(*error.args)
    bare.source = error.source if source is None else source
    return bare


def stream_steps(
    steps: Dataset[Iterator[Batch]], first: int, last: int, workers: int, processor: ImageProcessor | None
) -> Iterator[list[Batch]]:
    """Yields the batches of steps[first], ..., steps[last - 1], with pixel values that the processor has normalised.

    Raises:
        DataError: An error of a step. Workers pass it on as a value, because torch would wrap a raised one in a
            traceback of its own.
    """
    stream = DataLoader(
        steps,
        sampler=range(first, last),
        batch_size=None,
        collate_fn=functools.partial(_packed if workers else _finished, processor),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=has_cuda(),
        worker_init_fn=_start_worker,
    )
    others = multiprocessing.active_children()
    results = iter(stream)
    started = [process for process in multiprocessing.active_children() if process not in others]

    def kill_workers() -> None:
        """Ends the workers at the exit of a rank that failed.

        Python would send them a signal that they ignore, and wait.
        """
        for process in started:
            process.kill()

    atexit.register(kill_workers)
    try:
        for result in results:
            if isinstance(result, DataError):
                raise result
            yield result.unpacked() if isinstance(result, _Parcel) else result
    finally:
        atexit.unregister(kill_workers)
        del results  # ends the workers now: an error's traceback would hold them until the next garbage collection


def _start_worker(worker: int) -> None:
    """Prepares a worker process.

    It ignores the signals that ask all processes of a job to stop: ranks save a checkpoint first, and their workers end
    with them. Objects of the rank are exempt from garbage collection, which would copy every page of them. A
    tokenizer's own threads would take the cores from the other workers.
    """
    gc.freeze()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _normalized(processor: ImageProcessor | None, batch: Batch) -> Batch:
    """Returns the batch with float32 pixel values, where its views are bytes."""
    if processor is None or batch.pixel_values is None or batch.pixel_values.dtype != torch.uint8:
        return batch
    return replace(batch, pixel_values=processor.normalized(batch.pixel_values))


def _finished(processor: ImageProcessor | None, step: Iterator[Batch]) -> list[Batch] | DataError:
    """Makes the batches of a step in the rank's own process."""
    try:
        batches = list(step)
    except DataError as error:
        return without_traceback(error)
    for number, batch in enumerate(batches):  # one after the other, so that each frees its bytes
        batches[number] = _normalized(processor, batch)
    return batches


def _packed(processor: ImageProcessor | None, step: Iterator[Batch]) -> _Parcel | DataError:
    """Makes the batches of a step in a worker."""
    try:
        return _Parcel(processor, step)
    except DataError as error:
        return without_traceback(error)


class _Slot(NamedTuple):
    """Place of a tensor in a parcel's file."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class _Parcel:
    """The micro-batches of a step on their way to the rank: all tensors in one nameless file in memory.

    Views of images travel as bytes and are normalised by the rank: as float32 they would take four times the memory in
    every step that waits, and most of the time of the transfer. Each batch is written when it is made, and the file is
    not mapped in the worker, so a worker holds one batch at a time.
    """

    def __init__(self, processor: ImageProcessor | None, step: Iterator[Batch]) -> None:
        self.processor = processor
        self.batches: list[dict[str, Any]] = []
        """Fields of each batch by name, with a slot in the place of a tensor."""
        self.size = 0
        """Bytes of the file."""
        descriptor = _nameless_file()
        try:
            for batch in step:
                slots = {name: self._write(descriptor, tensor) for name, tensor in batch.tensors().items()}
                self.batches.append({**vars(batch), **slots})
            os.truncate(descriptor, self.size)
            self.descriptor = multiprocessing.reduction.DupFd(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, tensor: torch.Tensor) -> _Slot:
        """Appends a tensor to the file and returns its slot."""
        slot = _Slot(self.size, tensor.dtype, tensor.shape)
        remaining = tensor.contiguous().flatten().view(torch.uint8).numpy().data
        offset = slot.start
        while remaining:
            written = os.pwrite(descriptor, remaining, offset)
            remaining, offset = remaining[written:], offset + written
        self.size += max(1, -(-tensor.nbytes // ALIGNMENT)) * ALIGNMENT
        return slot

    def unpacked(self) -> list[Batch]:
        """Returns the batches. Their tensors, except for normalised pixel values, stay in the file."""
        descriptor = self.descriptor.detach()
        try:
            memory = torch.frombuffer(mmap.mmap(descriptor, self.size), dtype=torch.uint8)
        finally:
            os.close(descriptor)
        batches = []
        for fields in self.batches:
            tensors = {name: _read(memory, slot) for name, slot in fields.items() if isinstance(slot, _Slot)}
            batches.append(_normalized(self.processor, Batch(**{**fields, **tensors})))
        return batches

    def pin_memory(self) -> list[Batch]:
        """Returns the batches in page-locked memory; torch's DataLoader calls this in a thread of its own."""
        return [batch.pin_memory() for batch in self.unpacked()]


def _read(memory: torch.Tensor, slot: _Slot) -> torch.Tensor:
    end = slot.start + slot.shape.numel() * slot.dtype.itemsize
    return memory[slot.start : end].view(slot.dtype).view(slot.shape)


def _nameless_file() -> int:
    """Returns the descriptor of a file without a name: in memory on Linux, on disk elsewhere."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("zero_ds")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
