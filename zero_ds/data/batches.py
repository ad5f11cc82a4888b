"""Collates encoded samples into the tensors of a micro-batch: one sample per row, padded, or several per row, packed.

Packed samples do not see each other. The positions of each start at 0, and attention follows positions: transformers
derives block-diagonal masks or variable-length kernels from them. A step holds the same samples packed or padded, so
its loss and its gradient are the same.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from zero_ds.data.conversations import IGNORE
from zero_ds.data.samples import EncodedSample

INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "pixel_values", "token_weights")
"""Fields of a batch that the model's forward pass takes."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    The collate functions below fill every field except `token_weights`. Those depend on the responses of the whole
    global batch, which no loader of a single rank knows, so the training loop adds them
    (`model.losses.with_token_weights`). Nothing else changes after collation, except that `data.workers` normalises
    pixel values on their way out of the loader.
    """

    input_ids: torch.Tensor
    """Token ids: (rows, seq) int64, with IMAGE_TOKEN at image positions and padding on the right."""
    labels: torch.Tensor
    """Token ids where a token carries loss, IGNORE elsewhere: (rows, seq) int64."""
    responses: torch.Tensor
    """Number of the response that a token belongs to, counted through the batch, or -1: (rows, seq) int64."""
    attention_mask: torch.Tensor
    """1 at tokens, 0 at padding: (rows, seq) int64. The first position of an empty row counts as a token."""
    lengths: torch.Tensor
    """Number of tokens of each sample: (samples,) int64."""
    ids: list[str]
    """Ids of the samples, row by row."""
    position_ids: torch.Tensor | None = None
    """Position of each token in its own sample: (rows, seq) int64. None unless the rows are packed."""
    pixel_values: torch.Tensor | None = None
    """Views of all images, in the order of their tokens: (max(views, 1), 3, size, size). None without a vision encoder.

    Every rank runs the vision encoder exactly once per micro-batch, so a batch without images holds one black image in
    float32. Views are uint8 until `data.workers` normalises them to float32.
    """
    skipped: tuple[str, ...] = ()
    """Reason for each sample that is missing because it cannot be used."""
    too_long: tuple[str, ...] = ()
    """Reason for each sample that is missing because no answer of it fits within the length limit."""
    layout: int | None = None
    """Checksum of how the step's samples are distributed over rows, which ranks compare. None outside of a loader."""
    sources: torch.Tensor | None = None
    """Number of the source of each token's sample: (rows, seq) int16. None if all are of the first source."""
    skipped_sources: tuple[int, ...] = ()
    """Number of the source of each sample in `skipped`, and then of those in `too_long`."""
    token_weights: torch.Tensor | None = None
    """Factor for the loss of each label: (rows, seq) float32. None if every token has the same weight."""
    images: tuple[Image.Image, ...] = ()
    """All images as they were read, in the order of their tokens in the batch, from a loader with `raw_images`."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """Returns the tensors that the model's forward pass takes, by the names of its parameters."""
        return {name: tensor for name, tensor in self.tensors().items() if name in INPUTS}

    def sequence_bounds(self) -> torch.Tensor:
        """Returns where the samples begin in the flattened rows, and the number of all positions: (n + 1,) int32.

        Padding counts as a sequence of its own.
        """
        rows, length = self.input_ids.shape
        if self.position_ids is not None:
            starts = (self.position_ids.flatten() == 0).nonzero().flatten()
        else:
            first = torch.arange(0, rows * length, length)
            starts = torch.stack([first, first + self.attention_mask.sum(1)], dim=1).flatten()
            starts = starts[starts < torch.stack([first + length] * 2, dim=1).flatten()]
        return torch.cat([starts, torch.tensor([rows * length])]).to(torch.int32)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns every tensor of the batch by the name of its field."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def pin_memory(self) -> Batch:
        """Returns the batch in page-locked memory. torch's DataLoader calls this by its name."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self.tensors().items()})  # type: ignore[arg-type]


def collate(
    samples: Sequence[EncodedSample],
    pad_id: int,
    image_size: int | None,
    *,
    skipped: Sequence[str] = (),
    too_long: Sequence[str] = (),
    layout: int | None = None,
) -> Batch:
    """Returns a batch of one sample per row, padded to the longest sample.

    Without any sample the batch is one row of one token that carries no label. `image_size` is the side of the vision
    encoder's input in pixels, or None without one; the other options are fields of the batch.
    """
    rows = [[sample] for sample in samples]
    batch = collate_rows(rows, pad_id, image_size, skipped=skipped, too_long=too_long, layout=layout)
    return replace(batch, position_ids=None)


def collate_rows(
    rows: Sequence[Sequence[EncodedSample]],
    pad_id: int,
    image_size: int | None,
    *,
    skipped: Sequence[str] = (),
    too_long: Sequence[str] = (),
    layout: int | None = None,
) -> Batch:
    """Returns a batch of several samples per row, padded to the longest row, with their position_ids.

    Padding counts as a sample of its own: its positions start at 0 as well. The first token of a sample carries no
    label, because nothing before it in the row belongs to the sample. The arguments after the rows are those of
    `collate`.
    """
    rows = rows or [[]]
    length = max(1, *(sum(len(sample.input_ids) for sample in row) for row in rows))
    shape = (len(rows), length)
    input_ids = np.full(shape, pad_id)
    labels = np.full(shape, IGNORE)
    responses = np.full(shape, -1)
    attention_mask = np.zeros(shape, np.int64)
    attention_mask[:, 0] = 1  # in an empty row as well: no position may attend to nothing
    position_ids = np.zeros(shape, np.int64)
    sources = np.zeros(shape, np.int16) if any(sample.source for row in rows for sample in row) else None
    responses_so_far = 0
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            end = start + len(sample.input_ids)
            input_ids[number, start:end] = sample.input_ids
            labels[number, start:end] = sample.labels
            labels[number, start] = IGNORE
            attention_mask[number, start:end] = 1
            position_ids[number, start:end] = np.arange(end - start)
            if sources is not None:
                sources[number, start:end] = sample.source
            of_sample = np.array(sample.responses)
            responses[number, start:end] = np.where(of_sample >= 0, of_sample + responses_so_far, of_sample)
            responses_so_far += int(of_sample.max()) + 1
            start = end
        position_ids[number, start:] = np.arange(length - start)
    samples = [sample for row in rows for sample in row]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        responses=torch.from_numpy(responses),
        attention_mask=torch.from_numpy(attention_mask),
        lengths=torch.tensor([len(sample.input_ids) for sample in samples], dtype=torch.long),
        ids=[sample.id for sample in samples],
        position_ids=torch.from_numpy(position_ids),
        pixel_values=_views(samples, image_size),
        skipped=tuple(skipped),
        too_long=tuple(too_long),
        layout=layout,
        images=tuple(image for sample in samples for image in sample.images),
        sources=None if sources is None else torch.from_numpy(sources),
    )


def _views(samples: Sequence[EncodedSample], image_size: int | None) -> torch.Tensor | None:
    """Returns the views of all images, or a black one if there is none; None without a vision encoder."""
    if image_size is None:
        return None
    views = [sample.pixels for sample in samples if len(sample.pixels)]
    return torch.cat(views) if views else torch.zeros(1, 3, image_size, image_size)


def layout_checksum(layout: Any) -> int:
    """Returns a number below 2**16 that stands for a layout. Ranks compare theirs through sums that stay exact."""
    return zlib.crc32(repr(layout).encode()) & 0xFFFF


def pack_rows(lengths: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Distributes samples over rows of at most `limit` tokens, as few as possible in a multiple of `multiple`.

    `lengths` holds the number of tokens of each sample; samples of length 0 are skipped, and one longer than `limit`
    gets a row of its own. Rows are as equal in length as possible and sorted from longest to shortest, because rows of
    one micro-batch are padded to the longest. Returns the numbers of the samples in each row. The result depends on the
    arguments alone, so that every rank arrives at the same rows.
    """
    present = [number for number, length in enumerate(lengths) if length]
    longest_first = sorted(present, key=lambda number: (-lengths[number], number))
    fitted = _first_fit(longest_first, lengths, limit)
    count = max(multiple, -(-len(fitted) // multiple) * multiple)
    balanced = _balanced(longest_first, lengths, count)
    if all(len(row) < 2 or sum(lengths[number] for number in row) <= limit for row in balanced):
        rows = balanced
    else:
        rows = fitted + [[] for _ in range(count - len(fitted))]
    return sorted(rows, key=lambda row: -sum(lengths[number] for number in row))


def _first_fit(longest_first: Sequence[int], lengths: Sequence[int], limit: int) -> list[list[int]]:
    """Puts each sample into the first row that has room ("first fit decreasing"), which says how many rows it takes."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number in longest_first:
        row = next((row for row, left in enumerate(room) if lengths[number] <= left), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(limit)
        rows[row].append(number)
        room[row] -= lengths[number]
    return rows


def _balanced(longest_first: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Puts each sample into the row that is shortest so far, which makes `count` rows as equal as possible."""
    rows: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for number in longest_first:
        filled, row = heapq.heappop(heap)
        rows[row].append(number)
        heapq.heappush(heap, (filled + lengths[number], row))
    return rows
