"""Collects tokenized texts into batches of tensors, and lists the positions that the lens has to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Returns the indices of all samples, in batches of samples of similar length.

    The longest samples come first, so that a batch that does not fit into memory fails at once.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def padded(samples: Sequence[list[int]], device: Any, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns token ids and attention mask, both (batch, seq), padded on the right, or on the left for generation."""
    width = max(len(ids) for ids in samples)
    input_ids = torch.zeros((len(samples), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(samples):
        span = slice(width - len(ids), width) if left else slice(len(ids))
        input_ids[row, span] = torch.tensor(ids)
        mask[row, span] = 1
    return input_ids.to(device), mask.to(device)


def readings(samples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the positions to read through the lens, and for every position the index of its reading.

    Conversations begin with the same system message, where a causal decoder makes the same predictions for all samples.
    The lens therefore reads these positions only in the first sample.

    Args:
        samples: token ids.

    Returns:
        own: positions to read, as indices into the concatenated tokens of all samples.
        reading: for every position that has a next token, in the same order, the index in `own` of its reading.
    """
    same = 0
    for tokens in zip(*samples, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    shared = max(0, same - 1)  # positions whose next token is common to all samples as well
    own: list[int] = []
    reading: list[int] = []
    start = 0
    for number, ids in enumerate(samples):
        skipped = shared if number else 0
        reading += range(skipped)
        reading += range(len(own), len(own) + len(ids) - 1 - skipped)
        own += range(start + skipped, start + len(ids) - 1)
        start += len(ids)
    return torch.tensor(own), torch.tensor(reading)


def progress(total: int, what: str, unit: str) -> Any:
    """Returns a progress bar that appears only on a terminal."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "token", disable=None, dynamic_ncols=True)
