"""Encoded samples -> tensors of a micro-batch: one sample a row, padded, or several, packed.

Packed samples see nothing of each other: their positions start at 0 each, and attention follows positions
(transformers derives block-diagonal masks, or variable-length kernels, from them). A step holds the same samples
whether they are packed or not, so that losses and gradients are the same.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from zero_ds.data.conversations import IGNORE

Batch = dict[str, Any]
INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "pixel_values", "token_weights")
"""Entries of a batch that the model's forward pass takes."""


def collate(samples: Sequence[dict[str, Any]], pad_id: int, image_size: int | None) -> Batch:
    """Pads to the longest sample; no sample at all gives one row of one token without a label.

    Returns input_ids, labels, responses, attention_mask: (batch, seq), responses numbered through the batch;
    pixel_values: (max(views, 1), 3, size, size), of the samples' type, one blank picture in float32 where the batch has
    none, because every rank runs the encoder exactly once a micro-batch; lengths: (samples,), tokens; ids.
    """
    batch = collate_rows([[sample] for sample in samples], pad_id, image_size)
    del batch["position_ids"]
    return batch


def collate_rows(rows: Sequence[Sequence[dict[str, Any]]], pad_id: int, image_size: int | None) -> Batch:
    """Rows of several samples each, padded to the longest row; as `collate`, and position_ids: (batch, seq).

    What fills a row up counts as a sample of its own. No label asks a sample's last token for the next one's first.
    """
    rows = rows or [[]]
    length = max(1, *(sum(len(sample["input_ids"]) for sample in row) for row in rows))
    shape = (len(rows), length)
    input_ids, labels, responses = (np.full(shape, value) for value in (pad_id, IGNORE, -1))
    mask, positions = np.zeros((2, *shape), np.int64)
    numbered = 0
    for number, row in enumerate(rows):
        start = 0
        for sample in row:
            place = (number, slice(start, start := start + len(sample["input_ids"])))
            input_ids[place] = sample["input_ids"]
            labels[place] = sample["labels"]
            labels[number, place[1].start] = IGNORE
            mask[place] = 1
            positions[place] = np.arange(len(sample["input_ids"]))
            own = np.array(sample["responses"])
            responses[place] = np.where(own >= 0, own + numbered, own)
            numbered += int(own.max()) + 1
        positions[number, start:] = np.arange(length - start)
        mask[number, 0] = 1  # also in an empty row: no position may attend to nothing
    samples = [sample for row in rows for sample in row]
    batch: Batch = {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(labels),
        "responses": torch.from_numpy(responses),
        "attention_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(positions),
        "lengths": torch.tensor([len(sample["input_ids"]) for sample in samples], dtype=torch.long),
        "ids": [sample["id"] for sample in samples],
    }
    if image_size is not None:
        views = [sample["pixels"] for sample in samples if len(sample["pixels"])]
        batch["pixel_values"] = torch.cat(views) if views else torch.zeros(1, 3, image_size, image_size)
    return batch


def plan_number(plan: Any) -> int:
    """A number below 2**16 that stands for a plan of rows: ranks compare theirs, in sums that stay exact."""
    return zlib.crc32(repr(plan).encode()) & 0xFFFF


def plan_rows(lengths: Sequence[int], limit: int, multiple: int) -> list[list[int]]:
    """Distributes samples over rows of at most `limit` tokens, as few as may be, in a multiple of `multiple`.

    Rows come out as equal in length as may be, the longest first, since what stands side by side is padded to the
    longest. A longer sample gets a row of its own. Samples of length 0 are left out. Pure function of its arguments,
    so that all ranks plan alike.
    """
    ranked = sorted((number for number, length in enumerate(lengths) if length), key=lambda n: (-lengths[n], n))
    fitted: list[list[int]] = []
    room: list[int] = []
    for number in ranked:  # first fit decreasing: how many rows there must be
        row = next((r for r, left in enumerate(room) if lengths[number] <= left), len(fitted))
        if row == len(fitted):
            fitted.append([])
            room.append(limit)
        fitted[row].append(number)
        room[row] -= lengths[number]
    count = max(multiple, -(-len(fitted) // multiple) * multiple)
    balanced: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, row) for row in range(count)]
    for number in ranked:  # the longest that is left into the shortest row: how equal they can be
        filled, row = heapq.heappop(heap)
        balanced[row].append(number)
        heapq.heappush(heap, (filled + lengths[number], row))
    fits = all(len(row) < 2 or sum(lengths[n] for n in row) <= limit for row in balanced)
    rows = balanced if fits else [*fitted, *([] for _ in range(count - len(fitted)))]
    return sorted(rows, key=lambda row: -sum(lengths[n] for n in row))
