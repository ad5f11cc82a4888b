"""The lens on a decoder's layers: how far the prediction of every layer is from the model's own (Eq. 1-4, Figure 3).

Source: section 1.1 of the paper, appendices A.1 (greedy answers) and A.11. Every layer's output is read through the
final norm and the output head (the lens): q^l = softmax(norm(X^l) W^T), l = 0..L-1, input embeddings excluded; p is the
same of the last layer, X^(L-1), taken before the final norm like all others. Two metrics:

    sequence    (the paper's) q^l and p are the probabilities of the true next token at the N - 1 positions that have
                one, clamped at 1e-6 and normalised over the sequence to sum to one; D = sum_n q^l_n log(q^l_n / p_n).
                Eq. 2 prints the shift the other way round; meant is P[:-1] read at t[1:].
    vocabulary  (the usual one of lens studies) D = KL(q^l || p) over the vocabulary, averaged over the positions.

Logits are never held as a whole: they come layer by layer, for some rows and a part of the vocabulary at a time, and
only the positions that count are read, so that padding has no part in anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from zero_ds.model.decoders import Family
from zero_ds.runtime.errors import ConfigError

METRICS = ("sequence", "vocabulary")
FLOOR = 1e-6
"""Smallest probability of a true token in the `sequence` metric, as in the paper."""
SCORES = 1 << 20
"""Logits that are held at a time: 4 MB in float32, which stay in the cache. On two CPU cores in bfloat16 a layer's 1024
positions and 49152 words took 0.09 s as 1024 x 1024, and 0.14 s as 170 x 49152."""
ROWS = 1024
"""Most positions that a piece of the head is applied to at a time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenSample:
    """One conversation, ready for the model."""

    id: str
    input_ids: list[int]


class Lens:
    """A decoder's final norm and output head, through which the hidden states of any layer can be read.

    The head is applied in pieces, to many rows at a time: then the scores are still in the cache when they are summed.
    Where the head comes from is said by `blocks`.
    """

    def __init__(self, family: Family, config: Any, norm: nn.Module) -> None:
        self.family, self.config, self.norm = family, config, norm

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """The head, (vocabulary, hidden), in one or more parts: first token id and rows of each."""
        raise NotImplementedError

    def pieces(self, rows: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The same in parts that give SCORES logits for so many rows, or for ROWS of them."""
        size = max(1, SCORES // max(1, min(rows, ROWS)))
        for first, head in self.blocks():
            for start in range(0, len(head), size):
                yield first + start, head[start : start + size]

    def scores(self, normed: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Final-normed states (rows, hidden), part of the head (part, hidden) -> float32 logits (rows, part)."""
        return self.family.capped(self.config, normed @ head.T).float()

    def normalizer(self, normed: torch.Tensor) -> torch.Tensor:
        """Log of the sum of exponentials over the vocabulary: (rows,)."""
        total = torch.full((len(normed),), -torch.inf, device=normed.device)
        for _, head in self.pieces(len(normed)):
            for rows in _chunks(len(normed)):
                total[rows] = torch.logaddexp(total[rows], self.scores(normed[rows], head).logsumexp(1))
        return total

    def true_token_log_probs(self, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Statistic of a layer for the `sequence` metric: log softmax(norm(X) W^T) at the true next tokens (Eq. 2, 3).

        hidden_states: (rows, hidden), of any samples together, not normed; targets: (rows,). Returns float32 (rows,).
        """
        normed = self.norm(hidden_states)
        total = torch.full((len(targets),), -torch.inf, device=normed.device)
        chosen = torch.zeros_like(total)
        for first, head in self.pieces(len(normed)):
            for rows in _chunks(len(targets)):
                scores = self.scores(normed[rows], head)
                total[rows] = torch.logaddexp(total[rows], scores.logsumexp(1))
                place = targets[rows] - first
                inside = (place >= 0) & (place < len(head))
                found = scores.gather(1, place.clamp(0, len(head) - 1)[:, None]).squeeze(1)
                chosen[rows] += torch.where(inside, found, 0.0)
        return chosen - total

    def divergence(self, hidden_states: torch.Tensor, final: torch.Tensor, normalizer: torch.Tensor) -> torch.Tensor:
        """Statistic of one layer for the `vocabulary` metric: KL(q^l || p) over the vocabulary at every row.

        hidden_states: (rows, hidden), not normed; final: those of the last layer, normed; normalizer: (rows,), of
        those. Returns float32 (rows,).
        """
        normed = self.norm(hidden_states)
        own = self.normalizer(normed)
        result = torch.zeros_like(own)
        for _, head in self.pieces(len(normed)):
            for rows in _chunks(len(normed)):
                log_q = self.scores(normed[rows], head) - own[rows, None]
                log_p = self.scores(final[rows], head) - normalizer[rows, None]
                result[rows] += (log_q.exp() * (log_q - log_p)).sum(1)
        return result


class ResidentLens(Lens):
    """The lens on a decoder in memory."""

    def __init__(self, decoder: nn.Module, family: Family) -> None:
        super().__init__(family, cast(Any, decoder).config, family.norm(decoder))
        self.decoder = decoder
        self.head = cast(Any, decoder).get_output_embeddings()
        assert getattr(self.head, "bias", None) is None, "no registered family has a bias in its head"

    def blocks(self) -> Iterator[tuple[int, torch.Tensor]]:
        yield 0, self.head.weight


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def sequence_divergences(log_probs: Floats) -> Floats:
    """Eq. 4 of one sample: log probabilities of the true tokens, (layers, N - 1) -> (layers,), in nats."""
    probs = np.maximum(np.exp(log_probs), FLOOR)
    probs /= probs.sum(axis=1, keepdims=True)
    return cast(Floats, (probs * np.log(probs / probs[-1])).sum(axis=1))


@contextlib.contextmanager
def tapped(layers: nn.ModuleList, receive: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While open, `receive(number, output)` is called with every layer's output, (batch, seq, hidden)."""

    def hook(number: int) -> Any:
        return lambda module, inputs, output: receive(number, output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Sample numbers in batches of like length, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def measure(
    decoder: nn.Module, family: Family, samples: Sequence[TokenSample], *, metric: str, batch_size: int
) -> Floats:
    """Divergence of every layer's prediction from the last layer's: (samples, layers), in nats.

    Raises:
        ConfigError: the model computes something other than finite numbers in its precision.
    """
    assert metric in METRICS
    lens = ResidentLens(decoder, family)
    curves = np.empty((len(samples), len(family.layers(decoder))))
    lengths = [len(sample.input_ids) for sample in samples]
    with torch.inference_mode(), progress(sum(lengths), "measuring", "token") as bar:
        for rows in batches(lengths, batch_size):
            curves[rows] = _measure_batch(lens, [samples[row].input_ids for row in rows], metric)
            bar.update(sum(lengths[row] for row in rows))
    refuse_non_finite(curves, samples, next(decoder.parameters()).dtype)
    return curves


def refuse_non_finite(curves: Floats, samples: Sequence[TokenSample], dtype: torch.dtype) -> None:
    """Raises ConfigError, naming the first sample whose curve is not finite."""
    bad = np.flatnonzero(~np.isfinite(curves).all(axis=1))
    if len(bad):
        remedy = "its weights are damaged, fetch the model again"
        if dtype != torch.float32:
            remedy = "run with --dtype float32"
        raise ConfigError(f"the model's predictions for sample {samples[bad[0]].id} are not finite; {remedy}.")


def per_sample(statistics: torch.Tensor, lengths: Sequence[int], metric: str) -> Floats:
    """Curves of samples of `lengths` tokens from (layers, rows), their followed positions one after the other."""
    ends = np.cumsum([length - 1 for length in lengths])
    parts = np.split(statistics.double().cpu().numpy(), ends[:-1], axis=1)
    if metric == "sequence":
        return np.stack([sequence_divergences(log_probs) for log_probs in parts])
    return np.stack([divergences.mean(axis=1) for divergences in parts])


def _measure_batch(lens: ResidentLens, samples: Sequence[list[int]], metric: str) -> Floats:
    """Runs the decoder once and reads every layer at the positions that a token follows: (batch, layers)."""
    input_ids, mask = padded(samples, cast(Any, lens.decoder).device)
    valid = mask.bool()
    own, reading = readings(samples)
    targets = input_ids[valid].roll(-1)[own]
    received: list[torch.Tensor] = []

    def receive(number: int, output: torch.Tensor) -> None:
        assert number == len(received), "the layers did not run once each, in order"
        hidden_states = output[valid][own]
        received.append(lens.true_token_log_probs(hidden_states, targets) if metric == "sequence" else hidden_states)

    embeds = cast(Any, lens.decoder).get_input_embeddings()(input_ids)
    with tapped(lens.family.layers(lens.decoder), receive):
        lens.family.hidden_states(lens.decoder, embeds, mask)
    if metric == "vocabulary":
        final = lens.norm(received[-1])
        normalizer = lens.normalizer(final)
        read = [lens.divergence(states, final, normalizer) for states in received[:-1]]
        received = [*read, torch.zeros_like(normalizer)]
    return per_sample(torch.stack(received)[:, reading], [len(ids) for ids in samples], metric)


def readings(samples: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions must be read through the lens, and which of the readings every position has.

    Conversations begin alike: with the template's system message. A causal decoder's predictions there are the same in
    all samples, so they are read in the first one alone.

    samples: token ids. Returns `own`, numbers of positions among all tokens, sample after sample, and `reading`, for
    every position that a token follows, in that order, its place in `own`.
    """
    same = 0
    for tokens in zip(*samples, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    shared = max(0, same - 1)  # the last common token is predicted by the position before it
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


def padded(samples: Sequence[list[int]], device: Any, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (batch, seq), padded on the right, or on the left for generation."""
    width = max(len(ids) for ids in samples)
    input_ids = torch.zeros((len(samples), width), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(samples):
        span = slice(width - len(ids), width) if left else slice(len(ids))
        input_ids[row, span] = torch.tensor(ids)
        mask[row, span] = 1
    return input_ids.to(device), mask.to(device)


def check_lens(decoder: nn.Module, family: Family, sample: TokenSample) -> None:
    """Compares the last layer seen through the lens with the model's own logits on one sample.

    Raises:
        ConfigError: they differ, so that this family's norm or head is not all that lies between layers and logits.
    """
    states: list[torch.Tensor] = []
    input_ids = torch.tensor([sample.input_ids[:64]], device=cast(Any, decoder).device)
    with torch.inference_mode(), tapped(family.layers(decoder), lambda _, output: states.append(output)):
        expected = decoder(input_ids=input_ids, use_cache=False).logits[0].float()
        lens = ResidentLens(decoder, family)
        seen = torch.cat([lens.scores(lens.norm(states[-1][0]), head) for _, head in lens.pieces(64)], dim=1)
    error = float((seen - expected).norm() / expected.norm())
    if not error < (1e-3 if next(decoder.parameters()).dtype == torch.float32 else 1e-2):
        raise ConfigError(
            f"the last layer through the norm and head of family '{family.name}' differs from the model's own logits "
            f"(by {error:.2g}); the family's description in zero_ds/families does not fit this model."
        )


def progress(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "token", disable=None, dynamic_ncols=True)
