"""Evaluation records: questions about held-out images, and the words of the true answers that are scored.

A file is a JSON list of `{"id", "kind", "image", "question", "answer", "words"}`, where `kind` is question or caption
and `words` is a list of `{"kind", "start", "word", "choices"}`. `start` is the index of the word's first character in
the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.data.files import raw_records
from zero_ds.data.formats import DataError
from zero_ds.data.sources import inside
from zero_ds.runtime.errors import did_you_mean

LINKS = "; put the images themselves into the folder of the records"
"""Advice in messages about images that are reached through links out of that folder."""
RECORD_KINDS = ("question", "caption")
RECORD_KEYS = ("id", "kind", "image", "question", "answer", "words")
WORD_KEYS = ("kind", "start", "word", "choices")


@dataclass(frozen=True)
class Word:
    """A scored word of an answer."""

    kind: str
    start: int
    """Index of the word's first character in the answer."""
    word: str
    choices: tuple[str, ...]
    """Words that are possible here, the true one included."""


@dataclass(frozen=True)
class EvaluationRecord:
    """A checked question about one image."""

    id: str
    kind: str
    image: str
    """Path of the image as the file states it."""
    path: Path
    """Resolved path of the image, inside the root of the data."""
    question: str
    answer: str
    words: tuple[Word, ...]


def read_records(path: Path, root: Path | None = None, limit_images: int | None = None) -> list[EvaluationRecord]:
    """Reads and checks all records, and returns those about the first `limit_images` images (None: all of them).

    root: Folder of the images; the folder of the file if None.

    Raises:
        DataError: the file cannot be read, or a record is wrong; names the first such record by its id.
    """
    folder = (root or path.parent).resolve()
    records = [parse_record(record, f"{path} #{number}", folder) for number, record in enumerate(raw_records(path))]
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"{path}: the id of sample {record.id} is used twice; give every sample its own id")
        seen.add(record.id)
    images = list(dict.fromkeys(record.image for record in records))
    selected = set(images[:limit_images])
    return [record for record in records if record.image in selected]


def parse_record(record: Any, where: str, root: Path) -> EvaluationRecord:
    """Checks one record of the file.

    where: File and number of the record, for error messages.

    Raises:
        DataError: a key is missing or unknown, a value has the wrong type, the image is outside `root`, or a word is
            not where `start` says.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(record).__name__}")
    sample = f"{where}: sample {record.get('id', '?')}"
    _check_keys(record, RECORD_KEYS, sample)
    for key in ("id", "image", "question", "answer"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise DataError(f"{sample}: '{key}' must be a non-empty string, not {record[key]!r}")
    if record["kind"] not in RECORD_KINDS:
        raise DataError(f"{sample}: kind {record['kind']!r} is unknown; known kinds: {', '.join(RECORD_KINDS)}")
    if not isinstance(record["words"], list) or not record["words"]:
        raise DataError(f"{sample}: 'words' must be a list with at least one word")
    words = []
    for number, word in enumerate(record["words"]):
        words.append(_parse_word(word, record["answer"], f"{sample}, word {number}"))
    return EvaluationRecord(
        id=record["id"],
        kind=record["kind"],
        image=record["image"],
        path=inside(root, record["image"], record["id"], remedy=LINKS),
        question=record["question"],
        answer=record["answer"],
        words=tuple(words),
    )


def _parse_word(word: Any, answer: str, where: str) -> Word:
    if not isinstance(word, dict):
        raise DataError(f"{where} must be an object, not {type(word).__name__}")
    _check_keys(word, WORD_KEYS, where)
    kind, start, text, choices = (word[key] for key in WORD_KEYS)
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{where}: 'kind' must be a non-empty string, not {kind!r}")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'word' must be a non-empty string, not {text!r}")
    is_index = isinstance(start, int) and not isinstance(start, bool) and start >= 0
    if not is_index or answer[start : start + len(text)] != text:
        raise DataError(f"{where}: {text!r} does not start at character {start!r} of the answer; correct 'start'")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise DataError(f"{where}: 'choices' must be a list of non-empty strings")
    if len({choice.lower() for choice in choices}) != len(choices) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must hold at least two words that differ in more than case")
    if text not in choices:
        raise DataError(f"{where}: {text!r} is not one of its choices; add it to 'choices'")
    return Word(kind, start, text, tuple(choices))


def _check_keys(content: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise DataError(f"{where}: unknown key '{key}'{did_you_mean(str(key), list(known))}")
    for key in known:
        if key not in content:
            raise DataError(f"{where}: '{key}' is missing")
