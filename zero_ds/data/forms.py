"""Recognises the form of a record by its keys and writes its turns as `messages`, which formats.py then checks.

| form | keys |
|---|---|
| lists of turns | `conversations`, `messages` or `text` (formats.py) |
| pairs in a list | `texts: [{user, assistant}]`, as in FineVision and the Cauldron |
| one question and its answer | two keys of PAIRS, such as `query` and `response` |
| a caption | an image, and a text in `caption` or `text`; the question is `data.caption_prompt` |

A list of turns wins over the other forms, and these over a caption. Columns with names of their own get one of these
names by the source's `columns`, whose values may also be made of several keys: `image: "train/{img_id:0>12}.jpg"`. The
keys of a record that is a list are the numbers of its entries.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from zero_ds.config.schema import CAPTION_PROMPT
from zero_ds.data.formats import FORMATS, IMAGE_KEYS, DataError, Row, as_turns, holds, named, parse
from zero_ds.runtime.errors import did_you_mean

PAIRS = (
    ("query", "response"),
    ("question", "answer"),
    ("instruction", "output"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
"""Keys of a question and its answer."""
INPUT = "input"
"""Key of a text that belongs to an `instruction` and is written after it."""
LISTED_PAIRS = ("texts",)
"""Keys of a list of pairs, each with a `user` and an `assistant`."""
CAPTIONS = ("caption", "text")
"""Keys of a caption."""
_FORM = re.compile(r"(.?[<>])?0?\d{0,2}[ds]?", re.DOTALL)
"""How a value is written between the braces of a column: filled up to at most 99 characters."""
FILE_NAME = "file_name"
"""Key of an image's path in the metadata files of image folders; read where no other key names an image."""


@dataclass(frozen=True)
class Reading:
    """Choices on which the turns of a record depend besides its own content."""

    columns: tuple[tuple[str, str], ...] = ()
    """Names that the columns of a source stand for, and the columns."""
    caption_prompt: str = CAPTION_PROMPT
    """Question before a caption."""

    def mark(self) -> str:
        """Returns what tells these choices from others in the name of a conversion; empty for the usual ones."""
        if self == Reading():
            return ""
        content = json.dumps([sorted(self.columns), self.caption_prompt])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def read_record(record: Any, where: str, unread: Counter[str] | None = None, reading: Reading | None = None) -> Row:
    """Checks one record of any form; the arguments are those of `formats.parse`.

    Raises:
        DataError: As `formats.parse`, or a column that the record lacks, or turns in more than one form.
    """
    reading = reading or Reading()
    if isinstance(record, list) and reading.columns:
        record = {str(number): value for number, value in enumerate(record)}
    if isinstance(record, dict):
        sample = f"{where}: sample {_name(record)}"
        if reading.columns:
            record = _renamed(record, reading.columns, sample, unread)
        record = _with_messages(record, sample, reading, unread)
    return parse(record, where, unread)


def _name(record: Mapping[str, Any]) -> str:
    name = record.get("id", record.get("idx"))
    return "?" if name is None else named(name)


def _renamed(
    record: dict[str, Any], columns: tuple[tuple[str, str], ...], sample: str, unread: Counter[str] | None
) -> dict[str, Any]:
    """Returns a record whose columns have the names that they stand for. Other keys that say the same are left out."""
    given: dict[str, Any] = {}
    taken: set[str] = set()
    for name, column in columns:
        keys = [column] if column in record else _keys(column, sample)
        for key in keys:
            if key not in record:
                raise DataError(
                    f"{sample} has no '{key}', which columns.{name} names{did_you_mean(key, list(map(str, record)))}"
                )
        given[name] = record[column] if keys == [column] else _filled(column, record, sample)
        taken.update(keys)
    covered = {*given}
    if "image" in given:
        covered |= {*IMAGE_KEYS, FILE_NAME}
    if covered & {"question", "answer", "caption", "conversations"}:
        covered |= {*FORMATS, *LISTED_PAIRS, *CAPTIONS, INPUT, *(key for pair in PAIRS for key in pair)}
    if unread is not None:
        unread.update(key for key in record if key in covered - taken and holds(record[key]))
    rest = {key: value for key, value in record.items() if key not in covered and key not in taken}
    return {**rest, **given}


def _keys(column: str, sample: str) -> list[str]:
    """Returns the keys of a record that a column is made of: those in its braces, or its own name."""
    try:
        parts = list(Formatter().parse(column))
    except ValueError as error:
        raise DataError(f"{sample}: columns has {named(column)}, which cannot be read ({error})") from None
    return [key for _, key, _, _ in parts if key is not None] or [column]


def _filled(column: str, record: Mapping[str, Any], sample: str) -> str | None:
    """Returns the text of a column that is made of several keys; None if one of them has no value.

    Only keys are looked up, and never attributes of their values.

    Raises:
        DataError: A value that is neither text nor an integer, or that does not have this form.
    """
    text = ""
    for before, key, form, _ in Formatter().parse(column):
        text += before
        if key is not None:
            value = record[key]
            if value is None or value == "":  # 0 is a number like others
                return None
            try:
                if not isinstance(value, str | int) or isinstance(value, bool) or not _FORM.fullmatch(form or ""):
                    raise ValueError
                text += format(value, form or "")
            except ValueError:
                what = f"'{key}'{f' as {form}' if form else ''}"
                raise DataError(f"{sample}: columns cannot write {what} for {named(str(value))}") from None
    return text


def _with_messages(
    record: dict[str, Any], sample: str, reading: Reading, unread: Counter[str] | None
) -> dict[str, Any]:
    """Returns the record with its turns as `messages`; unchanged if it has a list of turns, or no known form."""
    if any(as_turns(record.get(key)) for key in FORMATS):
        return record
    found = [key for key in LISTED_PAIRS if as_turns(record.get(key))]
    forms: list[tuple[str, ...]] = [(key,) for key in found]
    forms += [pair for pair in PAIRS if all(holds(record.get(key)) for key in pair)]
    if len(forms) > 1:
        one, other = (" and ".join(f"'{key}'" for key in form) for form in forms[:2])
        raise DataError(f"{sample} has turns in {one} and in {other}; choose with columns of the source")
    has_image = any(holds(record.get(key)) for key in (*IMAGE_KEYS, FILE_NAME))
    used: tuple[str, ...]
    if forms and len(forms[0]) == 1:
        used, turns = forms[0], _pairs(as_turns(record[forms[0][0]]), sample, unread)
    elif forms:
        used, turns = _question(record, forms[0])
    elif has_image and (caption := next((key for key in CAPTIONS if holds(record.get(key))), None)):
        used, turns = (caption,), _turns(reading.caption_prompt, record[caption])
    else:
        return record
    rest = {key: value for key, value in record.items() if key not in used}
    if FILE_NAME in rest and not any(holds(rest.get(key)) for key in IMAGE_KEYS):
        rest["image"] = rest.pop(FILE_NAME)
    return {**rest, "messages": turns}


def _turns(question: Any, answer: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _question(record: Mapping[str, Any], form: tuple[str, ...]) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Returns the keys that are used, and the turns of a question and its answer."""
    question, answer = record[form[0]], record[form[1]]
    more = record.get(INPUT)
    if form[0] == "instruction" and isinstance(question, str) and isinstance(more, str) and more.strip():
        return (*form, INPUT), _turns(f"{question}\n{more}", answer)
    return form, _turns(question, answer)


def _pairs(pairs: list[Any], sample: str, unread: Counter[str] | None) -> list[dict[str, Any]]:
    """Returns the turns of a list of pairs."""
    turns = []
    ignored: set[str] = set()
    for number, pair in enumerate(pairs):
        if not isinstance(pair, dict) or not {"user", "assistant"} <= pair.keys():
            raise DataError(f"{sample}, turn {number} of 'texts': it has no 'user' and 'assistant'")
        turns += _turns(pair["user"], pair["assistant"])
        ignored.update(f"{key} (of a turn)" for key in pair.keys() - {"user", "assistant"} if holds(pair[key]))
    if unread is not None:
        unread.update(ignored)
    return turns
