"""The lens: reads the hidden states of any layer as a prediction of the next token.

Source: section 1.1 of the paper (Eq. 1-3). The output X^l of every layer l = 0..L-1, input embeddings excluded, goes
through the decoder's final norm and output head: q^l = softmax(norm(X^l) W^T). p is the same prediction of the last
layer, X^(L-1), whose hidden states are taken before the final norm like all others. metrics.py compares q^l with p.

The logits of a whole text are never in memory together: they are computed layer by layer, for some rows and a part of
the vocabulary at a time. Only positions that count are read, so padding has no influence on the result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from zero_ds.model.decoders import Family
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.texts import TokenSample

SCORES = 1 << 20
"""Number of logits in memory at a time: 4 MB in float32, which stay in the CPU's cache. On two CPU cores in bfloat16,
1024 positions of a layer and 49152 words took 0.09 s in pieces of 1024 x 1024, and 0.14 s in pieces of 170 x 49152."""
ROWS = 1024
"""Largest number of positions that a piece of the head is applied to at a time."""


class Lens:
    """A decoder's final norm and output head, through which the hidden states of any layer can be read.

    The head is applied in pieces, each to many rows at a time, so that the logits are still in the cache when they are
    summed. Subclasses say where the head comes from (`blocks`).
    """

    def __init__(self, family: Family, config: Any, norm: nn.Module) -> None:
        self.family, self.config = family, config
        self.norm = _WithOne(norm) if family.head_bias else norm

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the head, (vocabulary, hidden), in one or more parts: the first token id and the rows of each.

        Of a head with a bias, the bias is the last column, (vocabulary, hidden + 1), since `norm` ends in a one.
        """
        raise NotImplementedError

    def pieces(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the head in parts so small that `rows` positions, or at most ROWS of them, have SCORES logits."""
        size = max(1, SCORES // max(1, min(rows, ROWS)))
        for first, head in self.blocks():
            for start in range(0, len(head), size):
                yield first + start, head[start : start + size]

    def scores(self, normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits (rows, part) of final-normed states (rows, hidden) for a part of the head."""
        return self.family.capped(self.config, normed @ head.T).float()

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Returns float32 logits of few positions: (rows, hidden), before the final norm -> (rows, vocabulary)."""
        normed = self.norm(hidden_states)
        return torch.cat([self.scores(normed, head) for _, head in self.pieces(len(normed))], dim=1)

    def normalizer(self, normed: torch.Tensor) -> torch.Tensor:
        """Returns the log of the sum of exponentials over the vocabulary, (rows,), of final-normed states."""
        total = torch.full((len(normed),), -torch.inf, device=normed.device)
        for _, head in self.pieces(len(normed)):
            for rows in row_chunks(len(normed)):
                total[rows] = torch.logaddexp(total[rows], self.scores(normed[rows], head).logsumexp(1))
        return total


class ResidentLens(Lens):
    """The lens on a decoder that is in memory."""

    def __init__(self, decoder: nn.Module, family: Family) -> None:
        super().__init__(family, cast(Any, decoder).config, family.norm(decoder))
        self.decoder = decoder
        self.head = cast(Any, decoder).get_output_embeddings()
        assert family.head_bias or getattr(self.head, "bias", None) is None, "the description knows of no bias"

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields the whole head."""
        yield 0, with_bias(self.head.weight, self.head.bias) if self.family.head_bias else self.head.weight


class _WithOne(nn.Module):
    """A norm with a one after its units, which meets the bias of the head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norms states: (..., hidden) -> (..., hidden + 1)."""
        normed = self.norm(hidden_states)
        return torch.cat([normed, torch.ones_like(normed[..., :1])], dim=-1)


def with_bias(weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Returns rows of a head with their bias as the last column: (rows, hidden), (rows,) -> (rows, hidden + 1)."""
    return torch.cat([weight, bias.to(weight.dtype)[:, None]], dim=1)


@dataclass(frozen=True)
class FinalLayer:
    """The last layer's prediction p at the positions that are read."""

    normed: torch.Tensor
    """Final-normed states of the last layer, (rows, hidden)."""
    normalizer: torch.Tensor
    """Log of the sum of exponentials over the vocabulary, (rows,)."""


def row_chunks(count: int) -> Iterator[slice]:
    """Yields slices of at most ROWS rows that cover `count` rows."""
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


@contextlib.contextmanager
def tapped(layers: nn.ModuleList, receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Calls `receive(number, output)` with every layer's output, (batch, seq, hidden), as long as the block is open."""

    def hook(number: int) -> Any:
        return lambda module, inputs, output: receive(number, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_lens(decoder: nn.Module, family: Family, sample: TokenSample) -> None:
    """Compares the last layer seen through the lens with the model's own logits on one sample.

    Raises:
        ConfigError: they differ, so this family has more than a norm and a head between its layers and its logits.
    """
    states: list[torch.Tensor] = []
    input_ids = torch.tensor([sample.input_ids[:64]], device=cast(Any, decoder).device)
    with torch.inference_mode(), tapped(family.layers(decoder), lambda _, output: states.append(output)):
        expected = decoder(input_ids=input_ids, use_cache=False).logits[0].float()
        lens = ResidentLens(decoder, family)
        seen = torch.cat([lens.scores(lens.norm(states[-1][0]), head) for _, head in lens.pieces(64)], dim=1)
    error = float((seen - expected).norm() / expected.norm())
    tolerance = 1e-3 if next(decoder.parameters()).dtype == torch.float32 else 1e-2
    if not error < tolerance:
        raise ConfigError(
            f"the last layer through the norm and head of family '{family.name}' differs from the model's own logits "
            f"(by {error:.2g}); the family's description in zero_ds/model/decoders does not fit this model."
        )
