"""The lens on a decoder's layers: how far the prediction of every layer is from the model's own (Eq. 1-4, Figure 3).

Source: section 1.1 of the paper, appendices A.1 (greedy answers) and A.11. Every layer's output is read through the
final norm and the output head (the lens): q^l = softmax(norm(X^l) W^T), l = 0..L-1, input embeddings excluded; p is the
same of the last layer, X^(L-1), taken before the final norm like all others. Two metrics:

    sequence    (the paper's) q^l and p are the probabilities of the true next token at the N - 1 positions that have
                one, clamped at 1e-6 and normalised over the sequence to sum to one; D = sum_n q^l_n log(q^l_n / p_n).
                Eq. 2 prints the shift the other way round; meant is P[:-1] read at t[1:].
    vocabulary  (the usual one of lens studies) D = KL(q^l || p) over the vocabulary, averaged over the positions.

Logits of all layers are never held: they come layer by layer and in chunks of rows, and only the positions that count
are read, so that padding has no part in anything.
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

from zero_ds.config import ConfigError
from zero_ds.families import Family

METRICS = ("sequence", "vocabulary")
FLOOR = 1e-6
"""Smallest probability of a true token in the `sequence` metric, as in the paper."""
LOGITS_BYTES = 32 << 20
"""Size of the float32 logits that are held at a time."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenSample:
    """One conversation, ready for the model."""

    id: str
    input_ids: list[int]


@dataclass(frozen=True)
class Lens:
    """A decoder's final norm and output head, through which the hidden states of any layer can be read."""

    decoder: nn.Module
    family: Family

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Output of a layer, not normed: (rows, hidden) -> float32 (rows, vocabulary)."""
        return self.family.logits(self.decoder, self.family.norm(self.decoder)(hidden_states)).float()

    def chunks(self, hidden_states: torch.Tensor) -> Iterator[slice]:
        """Slices of the rows, each with logits of about LOGITS_BYTES."""
        vocabulary = cast(Any, self.decoder).get_output_embeddings().weight.shape[0]
        rows = max(1, LOGITS_BYTES // (4 * vocabulary))
        return (slice(start, start + rows) for start in range(0, len(hidden_states), rows))


def true_token_log_probs(lens: Lens, hidden_states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Statistic of one layer for the `sequence` metric: log softmax(norm(X) W^T) at the true next tokens (Eq. 2, 3).

    hidden_states: (rows, hidden), of any samples together; targets: (rows,). Returns float32 (rows,).
    """
    parts = []
    for rows in lens.chunks(hidden_states):
        logits = lens.logits(hidden_states[rows])
        chosen = logits.gather(1, targets[rows, None]).squeeze(1)
        parts.append(chosen - logits.logsumexp(dim=1))
    return torch.cat(parts)


def vocabulary_divergences(lens: Lens, layers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Statistic of all layers for the `vocabulary` metric: KL(q^l || p) at every row, p from the last entry.

    layers: one (rows, hidden) each. Returns float32 (layers, rows).
    """
    parts = []
    for rows in lens.chunks(layers[-1]):
        final = lens.logits(layers[-1][rows]).log_softmax(dim=1)
        divergences = []
        for hidden_states in layers[:-1]:
            log_probs = lens.logits(hidden_states[rows]).log_softmax(dim=1)
            divergences.append((log_probs.exp() * (log_probs - final)).sum(dim=1))
        parts.append(torch.stack([*divergences, torch.zeros_like(final[:, 0])]))
    return torch.cat(parts, dim=1)


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
    lens = Lens(decoder, family)
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


def _measure_batch(lens: Lens, samples: Sequence[list[int]], metric: str) -> Floats:
    """Runs the decoder once and reads every layer at the positions that a token follows: (batch, layers)."""
    input_ids, mask = padded(samples, cast(Any, lens.decoder).device)
    followed = mask[:, 1:].bool()
    targets = input_ids[:, 1:][followed]
    received: list[torch.Tensor] = []

    def receive(number: int, output: torch.Tensor) -> None:
        assert number == len(received), "the layers did not run once each, in order"
        hidden_states = output[:, :-1][followed]
        received.append(true_token_log_probs(lens, hidden_states, targets) if metric == "sequence" else hidden_states)

    embeds = cast(Any, lens.decoder).get_input_embeddings()(input_ids)
    with tapped(lens.family.layers(lens.decoder), receive):
        lens.family.hidden_states(lens.decoder, embeds, mask)
    statistics = torch.stack(received) if metric == "sequence" else vocabulary_divergences(lens, received)
    return per_sample(statistics, [len(ids) for ids in samples], metric)


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
        seen = Lens(decoder, family).logits(states[-1][0])
    error = float((seen - expected).norm() / expected.norm())
    if not error < (1e-3 if next(decoder.parameters()).dtype == torch.float32 else 1e-2):
        raise ConfigError(
            f"the last layer through the norm and head of family '{family.name}' differs from the model's own logits "
            f"(by {error:.2g}); the family's description in zero_ds/families does not fit this model."
        )


def progress(total: int, what: str, unit: str) -> Any:
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "token", disable=None, dynamic_ncols=True)
