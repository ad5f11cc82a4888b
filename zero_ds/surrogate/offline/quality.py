"""How good translators are: on texts that are held out, and on questions whose answer the text names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from zero_ds.surrogate.offline.corpus import HELD_OUT, LOOKUPS
from zero_ds.surrogate.offline.states import StateStore
from zero_ds.surrogate.offline.student import Student
from zero_ds.trajectory.batching import padded
from zero_ds.trajectory.lookup import chance

ROWS = 256
"""Number of positions whose logits are in memory at a time."""


@dataclass(frozen=True)
class TextBatch:
    """Texts with the hidden states of the target, padded on the right."""

    ids: torch.Tensor
    """Token ids, (batch, seq)."""
    mask: torch.Tensor
    """1 at tokens, (batch, seq)."""
    states: dict[int, torch.Tensor]
    """Hidden states by the number of layers before them, (batch, seq, hidden)."""

    @classmethod
    def of(cls, store: StateStore, texts: Sequence[int], after: Sequence[int], device: torch.device) -> TextBatch:
        """Reads texts and their hidden states after each number of layers in `after`."""
        ids, mask = padded([store.corpus.ids[text] for text in texts], device)
        states = {}
        for number in after:
            padded_states = torch.zeros((*ids.shape, store.hidden), dtype=store.dtype)
            for row, text in enumerate(texts):
                found = store.rows(number, text)
                padded_states[row, : len(found)] = found
            states[number] = padded_states.to(device)
        return cls(ids, mask, states)

    def followed(self) -> torch.Tensor:
        """Returns the positions that have a next token, (batch, seq), bool."""
        found = torch.zeros_like(self.mask, dtype=torch.bool)
        found[:, :-1] = self.mask[:, 1:].bool()
        return found


@dataclass(frozen=True)
class Quality:
    """Quality of translators. The fields are keys of translate.json."""

    kl: float
    """KL(target || surrogate) over the vocabulary in nats per token, mean over the held-out tokens."""
    agreement: float
    """Share of these tokens at which both find the same token most probable."""
    hidden: float
    """Relative squared error of the last translator's output, mean over these tokens."""
    lookup: float | None
    """Share of the questions whose word the surrogate finds; None without questions."""


@dataclass(frozen=True)
class LookupQuality:
    """Look-up accuracy of the target itself, and of guessing. The fields are keys of translate.json."""

    questions: int
    target: float
    chance: float


@torch.no_grad()
def measure(student: Student, store: StateStore, batch_size: int) -> Quality:
    """Measures the student's translators as they are now."""
    depth, first, goal = student.plan.depth, student.plan.first_replaced, student.goals[-1]
    kl = agreed = error = 0.0
    tokens = 0
    for batch, _ in _batches(store, HELD_OUT, (first, goal, depth), batch_size, student):
        outputs, normed = student(batch.states[first], batch.mask)
        places = batch.followed()
        wanted = student.norm(batch.states[depth][places])
        for rows in torch.arange(len(wanted), device=wanted.device).split(ROWS):
            p = student.scores(wanted[rows]).float().log_softmax(-1)
            q = student.scores(normed[places][rows]).float().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            agreed += float((p.argmax(-1) == q.argmax(-1)).sum())
        aim = batch.states[goal][places].float()
        error += float(((outputs[-1][places].float() - aim).square().sum(-1) / aim.square().sum(-1)).sum())
        tokens += len(wanted)
    lookup = None
    if store.corpus.lookups:
        found = 0
        for batch, texts in _batches(store, LOOKUPS, (first,), batch_size, student):
            _, normed = student(batch.states[first], batch.mask)
            found += _found(student, store, batch, texts, normed)
        lookup = found / len(store.corpus.lookups)
    return Quality(kl / tokens, agreed / tokens, error / tokens, lookup)


@torch.no_grad()
def measure_target(student: Student, store: StateStore, batch_size: int) -> LookupQuality | None:
    """Returns the target's look-up accuracy; None without questions."""
    lookups = store.corpus.lookups
    if not lookups:
        return None
    depth, found = student.plan.depth, 0
    for batch, texts in _batches(store, LOOKUPS, (depth,), batch_size, student):
        found += _found(student, store, batch, texts, student.norm(batch.states[depth]))
    return LookupQuality(len(lookups), found / len(lookups), chance(lookups))


def _found(student: Student, store: StateStore, batch: TextBatch, texts: Sequence[int], normed: torch.Tensor) -> int:
    """Returns how many words are found at the last tokens of questions. normed: (batch, seq, hidden)."""
    last = batch.mask.sum(1) - 1
    scores = student.scores(normed[torch.arange(len(last), device=last.device), last]).float().cpu()
    start = store.corpus.groups[LOOKUPS].start
    return sum(store.corpus.lookups[text - start].is_found(row) for text, row in zip(texts, scores, strict=True))


def _batches(
    store: StateStore, group: str, after: Sequence[int], batch_size: int, student: Student
) -> Iterator[tuple[TextBatch, list[int]]]:
    """Yields the texts of a group in batches of similar length, and their numbers."""
    numbers = sorted(store.corpus.groups[group], key=lambda text: (-len(store.corpus.ids[text]), text))
    for start in range(0, len(numbers), batch_size):
        texts = numbers[start : start + batch_size]
        yield TextBatch.of(store, texts, after, student.files.device), texts
