"""Turns samples into micro-batches, in an order that depends on seed and epoch only and can be entered at any step."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch.utils.data import Dataset

from zero_ds.data.batches import Batch, collate, collate_rows, layout_checksum, pack_rows
from zero_ds.data.conversations import EncodedConversation
from zero_ds.data.formats import DataError, TooLongError
from zero_ds.data.prepared import Prepared
from zero_ds.data.samples import EncodedSample, SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.data.workers import stream_steps, without_traceback

logger = logging.getLogger(__name__)

WINDOW = 8
"""Number of global batches within which samples are grouped. More saves little padding and ties batches to lengths."""

Rows = list[list[EncodedSample | DataError]]
"""Samples of each row of a micro-batch, or the reason why one is missing."""


def sample_order(n: int, seed: int, epoch: int) -> Sequence[int]:
    """Returns the order of `n` samples: as in the data in the first epoch (it is shuffled already), then permuted."""
    if epoch == 0:
        return range(n)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return cast(Sequence[int], torch.randperm(n, generator=generator).numpy())  # 8 bytes per sample; a list takes 36


def group_similar(
    window: Sequence[int], measure: Callable[[int], Any], batch: int, seed: int, begun: int = 0
) -> list[int]:
    """Reorders one window of samples so that samples of similar measure share a batch; batches come in random order.

    The first `begun` samples complete a batch that the previous epoch has begun, and a batch that the window does not
    fill stays last, so batches begin at the same positions as before. The result depends on the arguments alone,
    not on the number of ranks.
    """
    ranked = sorted(window, key=measure)
    split = len(ranked) - begun
    ranked, completing = ranked[:split], ranked[split:]
    batches = [ranked[start : start + batch] for start in range(0, len(ranked), batch)]
    whole = [group for group in batches if len(group) == batch]
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed)).tolist()
    groups = [completing, *(whole[number] for number in order), *batches[len(whole) :]]
    return [sample for group in groups for sample in group]


@dataclass(frozen=True)
class Loader:
    """Loads the micro-batches of one rank.

    Sample `step * global_batch + i` of the run belongs to the same step on any number of ranks. In padded rows,
    rank r takes the samples i with i // (global_batch / world_size) == r. In packed rows, the ranks share the rows of
    the step.
    """

    records: Records
    sample_encoder: SampleEncoder
    global_batch: int
    """Number of samples per step, over all ranks."""
    micro_batch: int
    """Number of rows of a micro-batch."""
    rank: int
    world_size: int
    pad_id: int
    seed: int
    workers: int = 0
    """Number of worker processes."""
    prepared: Prepared | None = None
    """Tokens of the samples, where they have been prepared."""
    grouping: Literal["off", "length", "modality"] = "off"
    skip_bad: bool = False
    """Skip samples that cannot be used instead of ending the run."""
    packing: bool = False
    """Put several samples into a row of at most the sample encoder's `max_length` tokens.

    Every rank then reads the texts of the whole step, and the number of micro-batches differs from step to step, though
    not from rank to rank.
    """
    raw_images: bool = False
    """Give images as they were read (`Batch.images`) in place of pixel values, which then are None."""

    def steps(self, first: int, last: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of step `first`, `first + 1`, ..., `last - 1`.

        Raises:
            DataError: A sample that cannot be used, unless such samples are skipped.
        """
        yield from stream_steps(Steps(self), first, last, self.workers, self.sample_encoder.processor)

    def image_size(self) -> int | None:
        """Returns the side of the pixel values; None without a vision encoder, and if images stay raw."""
        processor = self.sample_encoder.processor
        return processor.size if processor and not self.raw_images else None


class Steps(Dataset[Iterator[Batch]]):
    """Maps the number of a step to the rank's micro-batches, made one by one.

    It keeps no position, only caches, so any step can be the first.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self._order: tuple[int, Sequence[int]] = (-1, [])
        """Epoch, and the order of its samples."""
        self._window: tuple[tuple[int, int], list[int]] = ((-1, -1), [])
        """Epoch and number of a window, and the order of its samples."""

    def __getitem__(self, step: int) -> Iterator[Batch]:
        first = step * self.loader.global_batch
        indices = [self.index(first + i) for i in range(self.loader.global_batch)]
        layout, micro_batches = self._packed(indices) if self.loader.packing else self._padded(indices)
        checksum = layout_checksum(layout)
        for rows in micro_batches:
            yield self._collated(rows, checksum)

    def padded_batch(self, indices: Sequence[int]) -> Batch:
        """Returns the samples with these indices as a micro-batch of padded rows.

        Raises:
            DataError: A sample that cannot be used, unless such samples are skipped.
        """
        return self._collated([[self._encoded(index)] for index in indices], 0)

    def _padded(self, indices: list[int]) -> tuple[Any, Iterator[Rows]]:
        """Returns the layout that all ranks should agree on, and the rows of each micro-batch, of one sample each.

        Rows are made one micro-batch after the other, because the samples of a whole step alongside its batches would
        take the memory twice.
        """
        loader = self.loader
        share = loader.global_batch // loader.world_size
        of_rank = indices[loader.rank * share : (loader.rank + 1) * share]

        def micro_batches() -> Iterator[Rows]:
            for start in range(0, share, loader.micro_batch):
                yield [[self._encoded(index)] for index in of_rank[start : start + loader.micro_batch]]

        return indices, micro_batches()

    def _packed(self, indices: list[int]) -> tuple[Any, Iterator[Rows]]:
        """Returns the same for rows of several samples each, which are packed from the samples of the whole step."""
        loader = self.loader
        measured = [self._measured(index) for index in indices]
        lengths, texts = [length for length, _ in measured], [text for _, text in measured]
        rows_per_pass = loader.micro_batch * loader.world_size
        packed = pack_rows(lengths, loader.sample_encoder.max_length, rows_per_pass)
        share = loader.global_batch // loader.world_size
        errors = [
            text for text in texts[loader.rank * share : (loader.rank + 1) * share] if isinstance(text, DataError)
        ]

        def micro_batches() -> Iterator[Rows]:
            first = loader.rank * loader.micro_batch
            for start in range(first, len(packed), rows_per_pass):
                rows: Rows = []
                for row in packed[start : start + loader.micro_batch]:
                    rows.append([self._encoded(indices[number], texts[number]) for number in row])
                if start == first:  # samples without a row are counted by the rank whose share they are
                    rows.append([*errors])
                yield rows

        return [indices, packed], micro_batches()

    def _measured(self, index: int) -> tuple[int, EncodedConversation | DataError | None]:
        """Returns the number of a sample's tokens, and its text; None if it is prepared and can be read later."""
        if self.loader.prepared is None:
            text = self._text(index)
            return (0 if isinstance(text, DataError) else len(text.input_ids)), text
        try:
            return self.loader.prepared.length(index), None
        except DataError as error:
            return 0, without_traceback(error, self._source(index))

    def _text(self, index: int) -> EncodedConversation | DataError:
        try:
            return self._tokens(index)
        except DataError as error:
            return without_traceback(error, self._source(index))

    def _tokens(self, index: int) -> EncodedConversation:
        loader = self.loader
        if loader.prepared is not None:
            return loader.prepared.tokens(index)
        return loader.sample_encoder.tokens(loader.records[index])

    def _encoded(self, index: int, text: EncodedConversation | DataError | None = None) -> EncodedSample | DataError:
        """Encodes a sample, whose text may have been encoded before."""
        source = self._source(index)
        try:
            sample, encoder = self.loader.records[index], self.loader.sample_encoder
            if self.loader.prepared is not None and text is None:
                text = self.loader.prepared.tokens(index)
            if self.loader.raw_images:
                read = text if isinstance(text, EncodedConversation) else encoder.tokens(sample)
                encoded = encoder.with_raw_images(sample, read)
            elif isinstance(text, EncodedConversation):
                encoded = encoder.with_pixels(sample, text)
            else:
                encoded = encoder(sample)
            return replace(encoded, source=source) if source else encoded
        except DataError as error:
            return without_traceback(error, source)

    def _source(self, index: int) -> int:
        """Returns the number of a sample's source."""
        records = self.loader.records
        return records.source(index) if isinstance(records, Records) else 0

    def _collated(self, rows: Rows, layout: int) -> Batch:
        """Collates the samples that can be used.

        Raises:
            DataError: A sample that cannot be used, unless such samples are skipped.
        """
        errors = [sample for row in rows for sample in row if isinstance(sample, DataError)]
        bad = [error for error in errors if not isinstance(error, TooLongError)]
        if bad and not self.loader.skip_bad:
            raise bad[0]
        skipped = [str(error) for error in bad]
        too_long = [str(error) for error in errors if isinstance(error, TooLongError)]
        sources = [error.source for error in bad]
        sources += [error.source for error in errors if isinstance(error, TooLongError)]
        usable = [[sample for sample in row if isinstance(sample, EncodedSample)] for row in rows]
        pad_id, image_size = self.loader.pad_id, self.loader.image_size()
        if self.loader.packing:
            filled = [row for row in usable if row]
            batch = collate_rows(filled, pad_id, image_size, skipped=skipped, too_long=too_long, layout=layout)
        else:
            samples = [sample for row in usable for sample in row]
            batch = collate(samples, pad_id, image_size, skipped=skipped, too_long=too_long, layout=layout)
        return replace(batch, skipped_sources=tuple(sources)) if sources else batch

    def index(self, position: int) -> int:
        """Returns the index of the sample at a position of the run."""
        records = self.loader.records
        place = self._place(position)
        if not getattr(records, "epochs_differ", False):
            return place
        return position // len(records) * len(records) + place

    def _place(self, position: int) -> int:
        """Returns the index within its epoch of the sample at a position of the run."""
        records, seed = self.loader.records, self.loader.seed
        epoch, place = divmod(position, len(records))
        if self._order[0] != epoch:
            in_order = getattr(records, "in_order", False)
            self._order = (epoch, range(len(records)) if in_order else sample_order(len(records), seed, epoch))
        if self.loader.grouping == "off":
            return int(self._order[1][place])
        batch = self.loader.global_batch
        window = position // (batch * WINDOW)
        # windows are aligned to steps and not to epochs, and end with an epoch, so that a group is a step
        epoch_start = epoch * len(records)
        first = max(epoch_start, window * batch * WINDOW)
        last = min(epoch_start + len(records), (window + 1) * batch * WINDOW)
        if self._window[0] != (epoch, window):
            samples = self._order[1][first - epoch_start : last - epoch_start]
            window_seed = ((seed * 1_000_003 + epoch) * 1_000_003 + window) % 2**63
            begun = min(-first % batch, last - first)
            of_epoch = epoch_start if getattr(records, "epochs_differ", False) else 0

            def measure(place: int) -> tuple[bool, int]:
                return self._measure(of_epoch + place)

            self._window = ((epoch, window), group_similar(samples, measure, batch, window_seed, begun))
        return int(self._window[1][position - first])

    def _measure(self, index: int) -> tuple[bool, int]:
        """Returns whether a sample has an image, if that matters, and about how many tokens it has.

        A token of text counts as four bytes.
        """
        records, encoder = self.loader.records, self.loader.sample_encoder
        images = records.images(index)
        image_tokens = encoder.tokens_per_image * images
        if images and encoder.processor is not None and encoder.processor.grid:
            with contextlib.suppress(DataError):  # reported when the sample's turn comes
                image_tokens = sum(encoder.image_tokens(records[index]))
        return self.loader.grouping == "modality" and images > 0, records.size(index) // 4 + image_tokens
