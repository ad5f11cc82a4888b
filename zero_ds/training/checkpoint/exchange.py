"""Moves the tensors of a checkpoint, piece by piece, from the ranks that hold them to the ranks that write them.

In each round, every writer gets the next piece of its share, all of them in one collective: a rank sends the elements
that it holds and nothing else. The pieces of a round are at most `PIECE` elements together, so that no rank holds more
in addition to its own share of the model, however many ranks there are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.zero3 import parameter_shape
from zero_ds.training.checkpoint import KEYS, PIECE
from zero_ds.training.checkpoint.optimizer_state import OptimizerState
from zero_ds.training.checkpoint.shares import Shares


class Cut(NamedTuple):
    """Consecutive elements of one of a parameter's flattened tensors (`KEYS`)."""

    name: str
    key: str
    start: int
    stop: int


@dataclass(frozen=True)
class Piece:
    """Elements that this rank has got to write."""

    cut: Cut
    values: torch.Tensor
    """The elements: (stop - start,), float32, on the CPU."""


def exchanged(state: OptimizerState, named: Mapping[str, torch.nn.Parameter], shares: Shares) -> Iterator[Piece]:
    """Yields the pieces of this rank's share in the order in which they are written. A collective.

    Every rank has to exhaust it, also one that writes nothing.
    """
    held = _Held(state, named)
    spans = _all_spans(state, named)
    size = max(1, PIECE // len(shares.writers))
    streams = [_cuts(names, named, size) for names in shares.names]
    for cuts in itertools.zip_longest(*streams):
        wanted = dict(zip(shares.writers, cuts, strict=True))
        sent = [held.within(wanted.get(rank)) for rank in range(distributed.world_size())]
        mine = wanted.get(distributed.rank())
        extents = [_overlap(mine, span) for span in spans[mine.name]] if mine else []
        got = distributed.exchange(sent, [stop - start for start, stop in extents])
        if mine is not None:
            yield Piece(mine, _placed(mine, extents, got))


class _Held:
    """This rank's elements. The tensor that each writer gets at the moment is kept, because it may be on a disk."""

    def __init__(self, state: OptimizerState, named: Mapping[str, torch.nn.Parameter]) -> None:
        self._state, self._named = state, named
        self._open: dict[str, tuple[str, torch.Tensor]] = {}
        self._nothing = torch.zeros(0, device=distributed.device())

    def within(self, cut: Cut | None) -> torch.Tensor:
        """Returns the elements of a cut that this rank holds, where the ranks' processors can send them."""
        if cut is None:
            return self._nothing
        first, count = self._state.span(self._named[cut.name])
        start, stop = _overlap(cut, (first, count))
        if start == stop:
            return self._nothing
        if self._open.get(cut.name, ("",))[0] != cut.key:
            self._open = {n: k for n, k in self._open.items() if n != cut.name}
            self._open[cut.name] = (cut.key, self._state.held(self._named[cut.name], cut.key))
        part = self._open[cut.name][1][start - first : stop - first].to(distributed.device(), torch.float32)
        if cut.key == KEYS[-1] and stop == first + count:
            del self._open[cut.name]
        return part


def _cuts(names: Sequence[str], named: Mapping[str, torch.nn.Parameter], size: int) -> Iterator[Cut]:
    """Yields the cuts of a share, of at most `size` elements each, in the order in which they are written."""
    for name in names:
        total = parameter_shape(named[name]).numel()
        for key in KEYS:
            for start in range(0, total, size):
                yield Cut(name, key, start, min(start + size, total))


def _all_spans(state: OptimizerState, named: Mapping[str, torch.nn.Parameter]) -> dict[str, list[tuple[int, int]]]:
    """Returns first element and number of elements of each parameter that rank 0, 1, ... holds. A collective."""
    mine = [number for parameter in named.values() for number in state.span(parameter)]
    table = distributed.integers_of_all_ranks(mine).view(distributed.world_size(), len(named), 2)
    return {name: [(first, count) for first, count in table[:, number].tolist()] for number, name in enumerate(named)}


def _overlap(cut: Cut, span: tuple[int, int]) -> tuple[int, int]:
    """Returns the first element, and the one after the last, that are both in a cut and in a span (first, count)."""
    start, stop = max(cut.start, span[0]), min(cut.stop, span[0] + span[1])
    return (start, stop) if start < stop else (cut.start, cut.start)


def _placed(cut: Cut, extents: list[tuple[int, int]], got: torch.Tensor) -> torch.Tensor:
    """Puts the elements that arrived, rank by rank, at their places in the piece."""
    got = got.cpu()
    parts = [(start, stop) for start, stop in extents if start < stop]
    follow = [cut.start, *(stop for _, stop in parts)] == [*(start for start, _ in parts), cut.stop]
    if follow:
        return got
    piece = torch.zeros(cut.stop - cut.start)
    taken = 0
    for start, stop in parts:
        piece[start - cut.start : stop - cut.start] = got[taken : taken + stop - start]
        taken += stop - start
    return piece
