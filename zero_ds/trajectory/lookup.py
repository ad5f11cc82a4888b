"""Questions whose answer is a word that the text before it names: what a model can look up.

A file is a JSON list of `{"id", "question", "answer", "words"}`, where `words` is a list of
`{"kind", "word", "start", "choices"}` as in evaluation records, so that questions about images become questions about
told scenes by telling the scene in the question. `start`, the index of the word's first character in the answer, may be
left out where the word occurs once, and `choices` where they are all words of the same kind in the file. The model
reads the question and the answer up to the word; the choice whose first token it finds most probable is its answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zero_ds.data.conversations import Turn
from zero_ds.data.files import raw_records
from zero_ds.data.formats import DataError
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.tokens import ConversationError
from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lookup:
    """One word that is looked up, in a model's tokens."""

    id: str
    kind: str
    input_ids: list[int]
    """Token ids of the question and of the answer up to the word, whose first token comes next."""
    choices: tuple[int, ...]
    """First token of every choice; no two are the same."""
    answer: int
    """Index of the true word's token in `choices`."""

    def is_found(self, scores: torch.Tensor) -> bool:
        """Returns whether the true word has the highest score: (vocabulary,), at the last token of `input_ids`."""
        return int(scores[list(self.choices)].argmax()) == self.answer


@dataclass(frozen=True)
class _Word:
    """A word of a file, before it is tokenized."""

    id: str
    kind: str
    question: str
    before: str
    """Answer up to the word."""
    word: str
    choices: tuple[str, ...] | None


def read_lookups(path: Path, encoder: SampleEncoder, *, count: int | None = None, seed: int = 0) -> list[Lookup]:
    """Reads and tokenizes `count` words, chosen at random, or all there are.

    Words are skipped whose first token is that of a wrong choice as well, and those that do not fit into
    `encoder.max_length` tokens.

    Raises:
        DataError: the file cannot be read, or a record is wrong.
        ConfigError: no word is left.
    """
    words = [word for number, record in enumerate(raw_records(path)) for word in _parse(record, f"{path} #{number}")]
    of_kind: dict[str, list[str]] = {}
    for one in words:
        if one.word not in of_kind.setdefault(one.kind, []):
            of_kind[one.kind].append(one.word)
    found: list[Lookup] = []
    for index in np.random.default_rng(seed).permutation(len(words)).tolist():
        if count is not None and len(found) == count:
            break
        lookup = _tokenized(words[index], of_kind[words[index].kind], encoder)
        if lookup is not None:
            found.append(lookup)
    if not found:
        raise ConfigError(
            f"no word of {path} can be looked up with this tokenizer: either all choices of a word begin with the same "
            f"token, or no question fits into {encoder.max_length} tokens; give other words or raise data.max_length."
        )
    return found


def _parse(record: Any, where: str) -> Iterator[_Word]:
    """Yields the words of a record.

    Raises:
        DataError: the record is wrong.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a question must be an object, not {type(record).__name__}")
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise DataError(f"{where}: '{key}' must be a non-empty string, not {record.get(key)!r}")
    words = record.get("words")
    if not isinstance(words, list) or not words or not all(isinstance(word, dict) for word in words):
        raise DataError(f"{where}: 'words' must be a list with at least one object")
    answer = record["answer"]
    for entry in words:
        word = entry.get("word")
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{where}: 'word' must be a non-empty string, not {word!r}")
        start = entry.get("start", answer.find(word) if answer.count(word) == 1 else None)
        if type(start) is not int or start < 0 or answer[start : start + len(word)] != word:
            raise DataError(f"{where}: {word!r} does not start at character {start!r} of the answer; correct 'start'")
        choices = entry.get("choices")
        if choices is not None:
            listed = isinstance(choices, list) and all(isinstance(one, str) and one.strip() for one in choices)
            if not listed or word not in choices or len(set(choices)) < 2:
                raise DataError(f"{where}: 'choices' must list {word!r} and at least one other word")
        name = str(record.get("id", where))
        kind = str(entry.get("kind", "word"))
        yield _Word(name, kind, record["question"], answer[:start], word, tuple(choices) if choices else None)


def _tokenized(one: _Word, others: Sequence[str], encoder: SampleEncoder) -> Lookup | None:
    """Returns a word in the model's tokens; None if it cannot be told from another choice, or is too long."""
    choices = list(dict.fromkeys(one.choices or others))
    before = one.before.rstrip()
    try:
        encoded = [_answered(one.question, f"{one.before}{choice}", encoder) for choice in choices]
        up_to_word = [_answered(one.question, before, encoder)] if before else []
    except ConversationError as error:
        raise DataError(f"question {one.id}: {error}") from None
    common = _common(encoded)
    if not 0 < common <= encoder.max_length or any(len(ids) <= common for ids in encoded):
        return None
    if common > _common([*up_to_word, *encoded[:1]]):
        return None  # the choices differ only after their first token
    first = [ids[common] for ids in encoded]
    true = first[choices.index(one.word)]
    distinct = tuple(dict.fromkeys(first))
    if first.count(true) > 1 or len(distinct) < 2:
        return None
    return Lookup(one.id, one.kind, encoded[0][:common], distinct, distinct.index(true))


def _answered(question: str, answer: str, encoder: SampleEncoder) -> list[int]:
    """Returns the token ids of a question and its answer."""
    return encoder.encode(encoder.with_system([Turn("user", question), Turn("assistant", answer)])).input_ids


def _common(texts: Sequence[Sequence[int]]) -> int:
    """Returns the number of tokens that all texts have in common at their beginning."""
    count = 0
    for tokens in zip(*texts, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def chance(lookups: Sequence[Lookup]) -> float:
    """Returns the share that guessing would find."""
    return float(np.mean([1 / len(lookup.choices) for lookup in lookups]))
