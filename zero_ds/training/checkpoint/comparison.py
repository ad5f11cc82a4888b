"""Compares the gathered content of a checkpoint with the model that trains, every element of every tensor.

Between the two are DeepSpeed's map from parameters to its shards, and a gather. A fault in either does not show: losses
of the run stay right, and hashes of its checkpoints match. So each rank compares the master copies that it holds,
rounded, with the weights that it computes with; the bits that the ranks hold, multiplied by their positions, are summed
up and compared with those that have arrived where they are written; and the weights of all ranks are compared with each
other. All of it reads memory once and moves a few numbers.
"""

from __future__ import annotations

import torch

from zero_ds.runtime import distributed
from zero_ds.runtime.zero3 import is_partitioned, parameter_shape
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.checkpoint.exchange import Piece
from zero_ds.training.checkpoint.optimizer_state import OptimizerState

_FIELDS = (*KEYS, "elements", "unlike")
"""Numbers of each parameter whose sums over the ranks tell whether all is well."""


STRIDE = 2**15
"""Number of elements that are converted to integers of 64 bits at a time on a CPU, in whose cache they fit."""
GPU_STRIDE = 2**20
"""The same number on a GPU, where fewer and larger kernels are faster."""


class Comparison:
    """The comparison of one save. Every rank goes through the parameters in the same order."""

    def __init__(self, state: OptimizerState) -> None:
        self._state = state
        self._places: dict[str, int] = {}
        """Index of each parameter's first number in `_sums`."""
        self._sums: list[torch.Tensor | int] = []
        self._live: list[torch.Tensor | int] = []
        self._surplus: dict[int, list[torch.Tensor]] = {}
        """Sums of the bits of the pieces that this rank writes, by index in `_sums`."""

    def add(self, name: str, parameter: torch.nn.Parameter) -> None:
        """Takes account of this rank's part of a parameter, before it is gathered."""
        self._places[name] = len(self._sums)
        (start, count), size = self._state.span(parameter), parameter_shape(parameter).numel()
        self._sums += [_bits(self._state.held(parameter, key), start) for key in KEYS]
        self._sums.append(count - size if distributed.is_rank_zero() else count)
        self._sums.append(0 if self._state.equals_live(parameter) else 1)
        self._live.append(0 if is_partitioned(parameter) else _bits(parameter.detach()))

    def add_piece(self, piece: Piece) -> None:
        """Takes account of a piece as it has arrived on this rank, which will write it."""
        index = self._places[piece.cut.name] + KEYS.index(piece.cut.key)
        self._surplus.setdefault(index, []).append(_bits(piece.values, piece.cut.start))

    def verdict(self) -> str | None:
        """Returns a sentence about the first tensor that differs; None if all are equal. A collective."""
        sums = _numbers(self._sums)
        for index, pieces in self._surplus.items():
            sums[index] = _wrapped(sums[index] - sum(_numbers(pieces)))
        found = distributed.sum_integers(sums)
        live = _numbers(self._live)
        extremes = distributed.max_integers([*live, *(~value for value in live)])
        for number, (name, start) in enumerate(self._places.items()):
            largest, smallest = extremes[number], ~extremes[number + len(self._places)]
            if (reason := _reason(name, found[start : start + len(_FIELDS)], largest != smallest)) is not None:
                return reason
        return None


def _reason(name: str, found: list[int], apart: bool) -> str | None:
    """Returns a sentence about a parameter that differs; None if it does not.

    found: the sums over the ranks, in the order of `_FIELDS`; apart: whether ranks compute with different weights.
    """
    of = dict(zip(_FIELDS, found, strict=True))
    if of["elements"]:
        return f"the ranks hold {abs(of['elements'])} elements too {'many' if of['elements'] > 0 else 'few'} of {name}"
    if of["unlike"]:
        return (
            f"the master copy of {name} differs from the weights that the model computes with (on {of['unlike']} of "
            f"{distributed.world_size()} ranks)"
        )
    for key in KEYS:
        if of[key]:
            return f"{name} ({key}) was changed on its way to the rank that writes it"
    return f"the ranks compute with different weights of {name}" if apart else None


def _bits(tensor: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Returns the sum of a tensor's elements, taken as integers and multiplied by their positions, modulo 2**64.

    A change of a single element changes it, and so does an exchange of two. Sums of parts add up to that of the whole.

    start: position of the first element in the whole tensor.
    """
    kind = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.flatten().view(kind)
    stride = STRIDE if tensor.device.type == "cpu" else GPU_STRIDE
    places = torch.arange(1, min(len(flat), stride) + 1, device=tensor.device)
    for begin in range(0, len(flat), stride):
        part = flat[begin : begin + stride].to(torch.int64)
        total += part.sum() * (start + begin)
        total += part.mul_(places[: len(part)]).sum()
    return total


def _numbers(values: list[torch.Tensor | int] | list[torch.Tensor]) -> list[int]:
    """Returns values as Python's integers, after one transfer from each device."""
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    numbers: dict[int, int] = {}
    for device in {tensor.device for tensor in tensors}:
        there = [tensor for tensor in tensors if tensor.device == device]
        for tensor, number in zip(there, torch.stack(there).tolist(), strict=True):
            numbers[id(tensor)] = int(number)
    return [numbers[id(value)] if isinstance(value, torch.Tensor) else value for value in values]


def _wrapped(value: int) -> int:
    """Returns a number modulo 2**64, as a signed integer."""
    return (value + 2**63) % 2**64 - 2**63
