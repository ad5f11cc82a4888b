"""Who writes what of a checkpoint: every writing rank has a share of the tensors, in a file of its own.

The parameters of a run have an order. A share is a stretch of it, so that a layer mostly goes to one rank, and the
files of all shares, one after the other, are what a single rank would write. The stretches are cut so that the largest
is as small as it can be. They follow from the sizes and the number of writers alone.

Ranks whose machine does not see the run folder of rank 0 cannot write into it; the others then write their shares as
well. So on machines with disks of their own, the ranks next to rank 0 write everything. A small checkpoint has one
writer: a file of a few kilobytes costs as much as one of a hundred megabytes.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint import STATE_BYTES

logger = logging.getLogger(__name__)

SMALLEST = 64 << 20
"""Bytes of weights and state for which a further rank writes."""


@dataclass(frozen=True)
class Shares:
    """The ranks that write a checkpoint, and the parameters that each of them writes."""

    writers: tuple[int, ...]
    """Ranks that write, in the order of their shares."""
    names: tuple[tuple[str, ...], ...]
    """Names of the parameters in each share; together they are all parameters, in their order."""

    @classmethod
    def of(cls, sizes: Mapping[str, int], writers: Sequence[int]) -> Shares:
        """Splits parameters over writers.

        sizes: number of bytes of each parameter, in order. writers: ranks; some of many may get nothing to write.
        """
        names = split(sizes, len(writers))
        return cls(tuple(writers[: len(names)]), names)

    @classmethod
    def of_rank_zero(cls, named: Mapping[str, torch.nn.Parameter]) -> Shares:
        """Lets rank 0 write everything."""
        return cls((0,), (tuple(named),))

    @property
    def mine(self) -> int | None:
        """Index of this rank's share; None if it does not write."""
        rank = distributed.rank()
        return self.writers.index(rank) if rank in self.writers else None


def agree_on_shares(
    run: Path, named: Mapping[str, torch.nn.Parameter], wanted: int | Literal["auto"] = "auto"
) -> Shares:
    """Returns the shares of a run's checkpoints, the same on every rank. A collective.

    run: existing folder. wanted: largest number of writers; `auto`: as many as have `SMALLEST` bytes to write.
    """
    sizes = {name: bytes_of(parameter) for name, parameter in named.items()}
    most = max(1, sum(sizes.values()) // SMALLEST) if wanted == "auto" else wanted
    if min(most, distributed.world_size()) == 1:
        return Shares.of_rank_zero(named)
    able = _ranks_that_share(run)
    count = min(most, len(able))
    # spread over the machines, each of which has a network and perhaps a disk of its own
    return Shares.of(sizes, [able[number * len(able) // count] for number in range(count)])


def bytes_of(parameter: torch.nn.Parameter) -> int:
    """Returns the bytes that a parameter takes in a checkpoint: its weight and its state."""
    return parameter_shape(parameter).numel() * (parameter.dtype.itemsize + STATE_BYTES)


def file_names(kind: str, count: int) -> list[str]:
    """Returns the names of the files of each share: `KIND.safetensors`, or numbered ones if there are several."""
    if count == 1:
        return [f"{kind}.safetensors"]
    return [f"{kind}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split(sizes: Mapping[str, int], count: int) -> tuple[tuple[str, ...], ...]:
    """Cuts a sequence into at most `count` stretches whose largest is as small as possible; returns their names."""
    low, high = max([math.ceil(sum(sizes.values()) / count), *sizes.values()]), sum(sizes.values())
    while low < high:
        middle = (low + high) // 2
        if len(_filled(sizes, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return tuple(_filled(sizes, low))


def _filled(sizes: Mapping[str, int], room: int) -> list[tuple[str, ...]]:
    """Cuts a sequence into stretches of at most `room`, each as long as possible."""
    found: list[list[str]] = [[]]
    left = room
    for name, size in sizes.items():
        if size > left and found[-1]:
            found.append([])
            left = room
        found[-1].append(name)
        left -= size
    return [tuple(names) for names in found]


def _ranks_that_share(run: Path) -> list[int]:
    """Returns the ranks whose files in the run folder rank 0 sees, rank 0 among them. A collective.

    Every rank writes a small file. It is new, so that no file system answers from its memory.
    """
    world, rank = distributed.world_size(), distributed.rank()
    (token,) = distributed.sum_integers([uuid.uuid4().int >> 66 if rank == 0 else 0])
    probes = [run / f".probe.{token:x}.{number}.tmp" for number in range(world)]
    with contextlib.suppress(OSError):
        probes[rank].write_text(f"{rank}\n", encoding="ascii")
    distributed.barrier()
    seen = [number == 0 or (rank == 0 and _holds(probes[number], number)) for number in range(world)]
    shared = distributed.sum_integers([int(value) if rank == 0 else 0 for value in seen])
    with contextlib.suppress(OSError):
        probes[rank].unlink(missing_ok=True)
    able = list(itertools.compress(range(world), shared))
    if len(able) < world and rank == 0:
        first = shared.index(0)
        logger.warning(
            "%d of %d ranks do not share %s with rank 0 (the first: rank %d); the others write their part of the "
            "checkpoints as well, and to go on from one all machines need that folder",
            world - len(able),
            world,
            run,
            first,
        )
    return able


def _holds(probe: Path, number: int) -> bool:
    try:
        return probe.read_text(encoding="ascii") == f"{number}\n"
    except (OSError, ValueError):
        return False
