"""Evaluation records: questions about held-out pictures, and the words of the true answer that are looked for.

A file is a JSON list of `{"id", "kind", "image", "question", "answer", "words"}` with words as
`[{"kind", "start", "word", "choices"}]`. A record's `kind` is question or caption; `start` is the
character of the answer at which a word begins.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.data.files import raw_records
from zero_ds.data.formats import DataError
from zero_ds.data.sources import inside
from zero_ds.runtime.errors import did_you_mean

RECORD_KINDS = ("question", "caption")
RECORD_KEYS = ("id", "kind", "image", "question", "answer", "words")
WORD_KEYS = ("kind", "start", "word", "choices")


@dataclass(frozen=True)
class Word:
    """One word of an answer, at character `start`, and the words it could have been."""

    kind: str
    start: int
    word: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationRecord:
    """One question about one picture, checked."""

    id: str
    kind: str
    image: str
    """Path of the picture as the file has it."""
    path: Path
    """The same picture inside the root of the data."""
    question: str
    answer: str
    words: tuple[Word, ...]


def read_records(path: Path, root: Path | None = None, limit_pictures: int | None = None) -> list[EvaluationRecord]:
    """Reads and checks all records; with `limit_pictures`, those about the first so many pictures.

    root: folder of the images, the file's own if empty.

    Raises:
        DataError: an unreadable file, or the first record that is wrong, named by its id.
    """
    folder = (root or path.parent).resolve()
    records = [parse(record, f"{path} #{number}", folder) for number, record in enumerate(raw_records(path))]
    seen: set[str] = set()
    for record in records:
        if record.id in seen:
            raise DataError(f"{path}: sample {record.id} is there twice; ids must differ")
        seen.add(record.id)
    kept = set(list(dict.fromkeys(record.image for record in records))[:limit_pictures])
    return [record for record in records if record.image in kept]


def parse(record: Any, where: str, root: Path) -> EvaluationRecord:
    """Checks one record.

    Raises:
        DataError: a missing or unknown key, a wrong type, an image outside the root, a word that is elsewhere.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(record).__name__}")
    sample = f"{where}: sample {record.get('id', '?')}"
    _check_keys(record, RECORD_KEYS, sample)
    for key in ("id", "image", "question", "answer"):
        if not isinstance(record[key], str) or not record[key].strip():
            raise DataError(f"{sample}: '{key}' must be a text that is not empty, not {record[key]!r}")
    if record["kind"] not in RECORD_KINDS:
        raise DataError(f"{sample}: kind {record['kind']!r} is not known; known: {', '.join(RECORD_KINDS)}")
    if not isinstance(record["words"], list) or not record["words"]:
        raise DataError(f"{sample}: 'words' must be a list with at least one word")
    words = tuple(
        _word(word, record["answer"], f"{sample}, word {number}") for number, word in enumerate(record["words"])
    )
    path = inside(root, record["image"], record["id"])
    return EvaluationRecord(
        record["id"], record["kind"], record["image"], path, record["question"], record["answer"], words
    )


def _word(word: Any, answer: str, where: str) -> Word:
    if not isinstance(word, dict):
        raise DataError(f"{where} must be an object, not {type(word).__name__}")
    _check_keys(word, WORD_KEYS, where)
    kind, start, text, choices = (word[key] for key in WORD_KEYS)
    if not isinstance(kind, str) or not kind:
        raise DataError(f"{where}: 'kind' must be a text that is not empty, not {kind!r}")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: 'word' must be a text that is not empty, not {text!r}")
    if not isinstance(start, int) or isinstance(start, bool) or start < 0 or answer[start : start + len(text)] != text:
        raise DataError(f"{where}: {text!r} does not stand at character {start!r} of the answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c.strip() for c in choices):
        raise DataError(f"{where}: 'choices' must be a list of texts")
    if len({c.lower() for c in choices}) != len(choices) or len(choices) < 2:
        raise DataError(f"{where}: 'choices' must hold at least two different words")
    if text not in choices:
        raise DataError(f"{where}: {text!r} is not among its choices")
    return Word(kind, start, text, tuple(choices))


def _check_keys(content: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise DataError(f"{where}: unknown key '{key}'{did_you_mean(str(key), list(known))}")
    for key in known:
        if key not in content:
            raise DataError(f"{where}: '{key}' is missing")
