"""Worker processes of a loader: how they begin and end, and how a step's batches get from them to their rank.

A worker is forked, so that it shares what the rank has loaded. It hands over a step in one nameless file in memory: a
descriptor, a message and a mapping for each tensor would cost as much as a small tensor's making.
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
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageProcessor

ALIGNED = 64
"""Bytes to a multiple of which a tensor's place is rounded up."""


def alone(error: DataError) -> DataError:
    """The error without its traceback, whose frames hold the whole step: kept with it, that would be a circle that only
    a search for garbage ends, and a worker makes few of those."""
    return type(error)(*error.args)


def steps_of(
    made: Dataset[Iterator[Batch]], first: int, last: int, workers: int, processor: ImageProcessor | None
) -> Iterator[list[Batch]]:
    """Yields the batches of made[first], ..., made[last - 1], with pixel values that the processor has normalised.

    Raises:
        DataError: one that a step raised; a worker would wrap it in a traceback of its own, so it comes as a value.
    """
    stream = DataLoader(
        made,
        sampler=range(first, last),
        batch_size=None,
        collate_fn=functools.partial(_handed_over if workers else _finished, processor),
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin,
    )
    others = multiprocessing.active_children()
    steps = iter(stream)
    started = [process for process in multiprocessing.active_children() if process not in others]

    def end() -> None:
        """At the exit of a rank that failed: Python would ask them to end, which they do not hear, and wait."""
        for process in started:
            process.kill()

    atexit.register(end)
    try:
        for step in steps:
            if isinstance(step, DataError):
                raise step
            yield step.unpacked() if isinstance(step, _Parcel) else step
    finally:
        atexit.unregister(end)
        del steps  # ends the workers now: an error's traceback would hold them until somebody looks for garbage


def _begin(worker: int) -> None:
    """A signal to all processes of a job asks the ranks to commit and stop; their workers end with them.

    What the rank has loaded is not looked through for garbage: that alone would copy every page of it. A tokenizer's
    own threads would take the cores from the other workers.
    """
    gc.freeze()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _finish_(processor: ImageProcessor | None, batch: Batch) -> None:
    """Pixel values of a batch whose pictures are bytes still."""
    pixels = batch.get("pixel_values")
    if processor is not None and pixels is not None and pixels.dtype == torch.uint8:
        batch["pixel_values"] = processor.normalized(pixels)


def _finished(processor: ImageProcessor | None, made: Iterator[Batch]) -> list[Batch] | DataError:
    try:
        batches = list(made)
    except DataError as error:
        return alone(error)
    for batch in batches:
        _finish_(processor, batch)
    return batches


def _handed_over(processor: ImageProcessor | None, made: Iterator[Batch]) -> _Parcel | DataError:
    try:
        return _Parcel(processor, made)
    except DataError as error:
        return alone(error)


class _Place(NamedTuple):
    """Where a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class _Parcel:
    """The micro-batches of a step, all tensors in one nameless file in memory, pictures as bytes.

    Pixel values are made of the bytes where they are used: as float32 they would take four times the memory in every
    step that waits, and most of the time of a step's way to the rank. Each batch is written when it is made, and not
    mapped: a worker holds one of them at a time.
    """

    def __init__(self, processor: ImageProcessor | None, made: Iterator[Batch]) -> None:
        self.processor = processor
        self.batches: list[dict[str, Any]] = []
        self.size = 0
        descriptor = _nameless_file()
        try:
            for batch in made:
                self.batches.append({k: self._put(descriptor, v) for k, v in batch.items()})
            os.truncate(descriptor, self.size)
            self.descriptor = multiprocessing.reduction.DupFd(descriptor)
        finally:
            os.close(descriptor)

    def _put(self, descriptor: int, value: Any) -> Any:
        """Writes a tensor behind the others, and says where; what else a batch holds stays as it is."""
        if not isinstance(value, torch.Tensor):
            return value
        place = _Place(self.size, value.dtype, value.shape)
        left = value.contiguous().flatten().view(torch.uint8).numpy().data
        at = place.start
        while left:
            written = os.pwrite(descriptor, left, at)
            left, at = left[written:], at + written
        self.size += max(1, -(-value.nbytes // ALIGNED)) * ALIGNED
        return place

    def unpacked(self) -> list[Batch]:
        """The batches, whose tensors but the pictures lie in the file still."""
        descriptor = self.descriptor.detach()
        try:
            memory = torch.frombuffer(mmap.mmap(descriptor, self.size), dtype=torch.uint8)
        finally:
            os.close(descriptor)
        batches = [{k: _at(memory, v) if isinstance(v, _Place) else v for k, v in b.items()} for b in self.batches]
        for batch in batches:
            _finish_(self.processor, batch)
        return batches

    def pin_memory(self) -> list[Batch]:
        """The same in page-locked memory; torch's DataLoader calls this in a thread of its own."""
        batches = self.unpacked()
        return [{k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]


def _at(memory: torch.Tensor, place: _Place) -> torch.Tensor:
    end = place.start + place.shape.numel() * place.dtype.itemsize
    return memory[place.start : end].view(place.dtype).view(place.shape)


def _nameless_file() -> int:
    """Descriptor of a file in memory, on Linux; elsewhere on the disk."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("zero_ds")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
