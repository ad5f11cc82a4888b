"""Worker processes of a loader: how they begin and end, and how a step's batches get from them to their rank.

A worker is forked, so that it shares what the rank has loaded. It hands over a step in one piece of shared memory: a
descriptor, a message and a mapping for each tensor would cost as much as a small tensor's making.
"""

from __future__ import annotations

import atexit
import functools
import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from zero_ds.data.batches import Batch
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageProcessor

ALIGNED = 64
"""Bytes to a multiple of which a tensor's place is rounded up."""


def steps_of(
    made: Dataset[list[Batch] | DataError], first: int, last: int, workers: int, processor: ImageProcessor | None
) -> Iterator[list[Batch]]:
    """Yields made[first], ..., made[last - 1], with pixel values that the processor has normalised.

    Raises:
        DataError: one that stands in a step's place.
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


def _finished(processor: ImageProcessor | None, batches: list[Batch] | DataError) -> list[Batch] | DataError:
    for batch in [] if isinstance(batches, DataError) else batches:
        _finish_(processor, batch)
    return batches


def _handed_over(processor: ImageProcessor | None, batches: list[Batch] | DataError) -> _Parcel | DataError:
    return batches if isinstance(batches, DataError) else _Parcel(processor, batches)


class _Place(NamedTuple):
    """Where a tensor lies."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


class _Parcel:
    """The micro-batches of a step, all tensors in one piece of shared memory, pictures as bytes.

    Pixel values are made of the bytes where they are used: as float32 they would take four times the memory in every
    step that waits, and most of the time of a step's way to the rank.
    """

    def __init__(self, processor: ImageProcessor | None, batches: list[Batch]) -> None:
        self.processor = processor
        self.batches: list[dict[str, Any]] = []
        tensors: list[tuple[_Place, torch.Tensor]] = []
        size = 0
        for batch in batches:
            self.batches.append(placed := dict(batch))
            for key, value in batch.items():
                if isinstance(value, torch.Tensor):
                    placed[key] = place = _Place(size, value.dtype, value.shape)
                    tensors.append((place, value))
                    size += -(-value.nbytes // ALIGNED) * ALIGNED
        self.memory = torch.tensor([], dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        for place, tensor in tensors:
            self._at(place).copy_(tensor)

    def _at(self, place: _Place) -> torch.Tensor:
        end = place.start + place.shape.numel() * place.dtype.itemsize
        return self.memory[place.start : end].view(place.dtype).view(place.shape)

    def unpacked(self) -> list[Batch]:
        """The batches, whose tensors lie in the shared memory still."""
        batches = [{k: self._at(v) if isinstance(v, _Place) else v for k, v in b.items()} for b in self.batches]
        for batch in batches:
            _finish_(self.processor, batch)
        return batches

    def pin_memory(self) -> list[Batch]:
        """The same in page-locked memory; torch's DataLoader calls this in a thread of its own."""
        return [
            {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in self.unpacked()
        ]
