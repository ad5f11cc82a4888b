"""Loads each sample of a data set once, in its order and in padded rows, for measurements during a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from zero_ds.data.batches import Batch
from zero_ds.data.loader import Loader, Steps
from zero_ds.data.sources import Records
from zero_ds.data.workers import stream_steps


@dataclass(frozen=True)
class Once:
    """Loads one rank's part of samples, of which each belongs to one rank.

    Every rank gets the same number of micro-batches; one without a sample has a row that carries no label.
    """

    loader: Loader
    """Loader of a run on the same ranks."""
    records: Records
    limit: int | None = None
    """Number of samples, at even distances; None: all of them."""

    def batches(self) -> Iterator[Batch]:
        """Yields the micro-batches. The state of torch's random generator stays as it is.

        Raises:
            DataError: A sample that cannot be used, unless the run skips such samples.
        """
        loader = replace(self.loader, records=self.records, prepared=None, packing=False, grouping="off")
        parts = _Parts(loader, self.indices())
        workers = min(loader.workers, len(parts))
        with torch.random.fork_rng(devices=[]):  # torch's DataLoader draws a seed for its workers
            for batches in stream_steps(parts, 0, len(parts), workers, loader.sample_encoder.processor):
                yield from batches

    def indices(self) -> Sequence[int]:
        """Returns the indices of the samples."""
        count = len(self.records)
        if self.limit is None or self.limit >= count:
            return range(count)
        return [int(index) for index in np.arange(self.limit) * count // self.limit]


class _Parts(Dataset[Iterator[Batch]]):
    """Maps the number of a micro-batch to it."""

    def __init__(self, loader: Loader, indices: Sequence[int]) -> None:
        self.loader = loader
        self.indices = indices
        self.steps = Steps(loader)

    def __len__(self) -> int:
        return -(-len(self.indices) // (self.loader.micro_batch * self.loader.world_size))

    def __getitem__(self, number: int) -> Iterator[Batch]:
        first = (number * self.loader.world_size + self.loader.rank) * self.loader.micro_batch
        own = self.indices[first : first + self.loader.micro_batch]
        yield self.steps.padded_batch(own)
