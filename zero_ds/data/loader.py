"""Samples -> micro-batches, in an order that depends on seed and epoch only, from any position on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch.utils.data import Dataset

from zero_ds.data.batches import Batch, collate, collate_rows, plan_number, plan_rows
from zero_ds.data.conversations import (
    Encoded,
)
from zero_ds.data.formats import DataError, TooLongError
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.data.workers import alone, steps_of

logger = logging.getLogger(__name__)


def sample_order(n: int, seed: int, epoch: int) -> Sequence[int]:
    """Order of the samples in an epoch: as they stand in the first (pre-shuffled data), permuted from then on."""
    if epoch == 0:
        return range(n)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return cast(Sequence[int], torch.randperm(n, generator=generator).numpy())  # 8 bytes a sample; a list has 36


WINDOW = 8
"""Global batches in which samples are grouped: more saves little padding, and ties batches to lengths."""


def group_alike(
    window: Sequence[int], measure: Callable[[int], Any], batch: int, seed: int, begun: int = 0
) -> list[int]:
    """Reorders one window of samples so that those of like measure share a batch; the batches come in random order.

    The first `begun` samples fill a batch up that an epoch before has begun, and a batch that the window does not fill
    stays last, so that batches begin where they began before. Pure function of its arguments, whatever the number of
    ranks.
    """
    ranked = sorted(window, key=measure)
    ranked, first = ranked[: len(ranked) - begun], ranked[len(ranked) - begun :]
    batches = [ranked[start : start + batch] for start in range(0, len(ranked), batch)]
    whole = [b for b in batches if len(b) == batch]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [first, *(whole[i] for i in order), *batches[len(whole) :]]
    return [sample for group in groups for sample in group]


@dataclass(frozen=True)
class Loader:
    """Micro-batches of one rank.

    Sample `step * global_batch + i` of the run belongs to the same step whatever the number of ranks. In rows of their
    own, rank r takes the samples i with i // (global_batch / world_size) == r; packed, the ranks share the step's rows.
    """

    records: Records
    encoder: SampleEncoder
    global_batch: int
    micro_batch: int
    """Rows of a micro-batch."""
    rank: int
    world_size: int
    pad_id: int
    seed: int
    workers: int = 0
    grouping: Literal["off", "length", "modality"] = "off"
    skip_bad: bool = False
    """Leave out samples that cannot be used, instead of ending the run."""
    packing: bool = False
    """Several samples in a row of at most the encoder's max_length. Every rank then reads the texts of the whole step,
    and the number of micro-batches differs from step to step, the same on every rank."""

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of step first, first + 1, ..., last - 1.

        A batch's `skipped` and `too_long` say what is wrong with the samples that it lacks.

        Raises:
            DataError: a sample that cannot be used, unless bad ones are skipped.
        """
        yield from steps_of(_Steps(self), first, last, self.workers, self.encoder.processor)


class _Steps(Dataset[Iterator[Batch]]):
    """Number of a step -> a rank's micro-batches, made one by one; holds no state, so any step can be the first."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._order: tuple[int, Sequence[int]] = (-1, [])
        self._window: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def __getitem__(self, step: int) -> Iterator[Batch]:
        numbers = [self.index(step * self.loader.global_batch + i) for i in range(self.loader.global_batch)]
        plan, rows = self._packed(numbers) if self.loader.packing else self._plain(numbers)
        size = self.loader.encoder.processor.size if self.loader.encoder.processor else None
        for micro in rows:
            wrong = [sample for row in micro for sample in row if isinstance(sample, DataError)]
            skipped = [error for error in wrong if not isinstance(error, TooLongError)]
            if skipped and not self.loader.skip_bad:
                raise skipped[0]
            good = [[sample for sample in row if isinstance(sample, dict)] for row in micro]
            if self.loader.packing:
                batch = collate_rows([row for row in good if row], self.loader.pad_id, size)
            else:
                batch = collate([sample for row in good for sample in row], self.loader.pad_id, size)
            batch["skipped"] = [str(error) for error in skipped]
            batch["too_long"] = [str(error) for error in wrong if isinstance(error, TooLongError)]
            batch["plan"] = plan_number(plan)
            yield batch

    def _plain(self, numbers: list[int]) -> tuple[Any, Iterator[_Rows]]:
        """What all ranks should agree on, and for each micro-batch its rows, of one sample each.

        They are made one after the other: a step's samples besides its batches would take as much memory again.
        """
        loader = self.loader
        share = loader.global_batch // loader.world_size
        mine = numbers[loader.rank * share : (loader.rank + 1) * share]
        places = range(0, share, loader.micro_batch)
        return numbers, ([[self._encoded(number)] for number in mine[i : i + loader.micro_batch]] for i in places)

    def _packed(self, numbers: list[int]) -> tuple[Any, Iterator[_Rows]]:
        """As `_plain`, with rows of several samples each, from a plan over the whole step."""
        loader = self.loader
        texts = [self._tokens(number) for number in numbers]
        lengths = [0 if isinstance(text, DataError) else len(text.input_ids) for text in texts]
        side_by_side = loader.micro_batch * loader.world_size
        plan = plan_rows(lengths, loader.encoder.max_length, side_by_side)
        share = loader.global_batch // loader.world_size
        wrong = [text for text in texts[loader.rank * share : (loader.rank + 1) * share] if isinstance(text, DataError)]

        def micros() -> Iterator[_Rows]:
            first = loader.rank * loader.micro_batch
            for start in range(first, len(plan), side_by_side):
                rows: _Rows = [
                    [self._encoded(numbers[n], texts[n]) for n in row] for row in plan[start:][: loader.micro_batch]
                ]
                yield [*rows, [*wrong]] if start == first else rows  # counted here, where their place would have been

        return [numbers, plan], micros()

    def _tokens(self, number: int) -> Encoded | DataError:
        try:
            return self.loader.encoder.tokens(self.loader.records[number])
        except DataError as error:
            return alone(error)

    def _encoded(self, number: int, text: Encoded | DataError | None = None) -> dict[str, Any] | DataError:
        try:
            sample = self.loader.records[number]
            if isinstance(text, Encoded):
                return self.loader.encoder.with_pixels(sample, text)
            return self.loader.encoder(sample)
        except DataError as error:
            return alone(error)

    def index(self, position: int) -> int:
        """Which sample stands at a position of the run."""
        records, seed = self.loader.records, self.loader.seed
        epoch, place = divmod(position, len(records))
        if self._order[0] != epoch:
            self._order = (epoch, sample_order(len(records), seed, epoch))
        if self.loader.grouping == "off":
            return int(self._order[1][place])
        batch = self.loader.global_batch
        window = position // (batch * WINDOW)
        # windows lie by steps, not by epochs, and end with an epoch: what is grouped together is a step together
        first = max(epoch * len(records), window * batch * WINDOW)
        last = min((epoch + 1) * len(records), (window + 1) * batch * WINDOW)
        if self._window[0] != (epoch, window):
            samples = self._order[1][first - epoch * len(records) : last - epoch * len(records)]
            seed = ((seed * 1_000_003 + epoch) * 1_000_003 + window) % 2**63
            begun = min(-first % batch, last - first)
            self._window = ((epoch, window), group_alike(samples, self._measure, batch, seed, begun))
        return int(self._window[1][position - first])

    def _measure(self, index: int) -> tuple[bool, int]:
        """Whether a sample has a picture, if that matters; about how many tokens: bytes of text / 4, and images'."""
        records, encoder = self.loader.records, self.loader.encoder
        pictures = records.images(index)
        shown = encoder.tokens_per_image * pictures
        if pictures and encoder.processor is not None and encoder.processor.grid:
            with contextlib.suppress(DataError):  # said when its turn comes
                shown = sum(encoder.image_tokens(records[index]))
        return self.loader.grouping == "modality" and pictures > 0, records.size(index) // 4 + shown


_Rows = list[list[dict[str, Any] | DataError]]
