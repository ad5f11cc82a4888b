"""Evaluates one model twice: each question with its own picture, and, as the control, with another one.

A model that does not look answers both alike; what it gets right with the wrong picture is what can be guessed. Which
picture stands in for which is a fixed derangement: the same for every model, seed and data alike.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from zero_ds.data.conversations import PLACEHOLDER, Turn
from zero_ds.data.formats import DataError
from zero_ds.evaluation.heldout.records import EvaluationRecord
from zero_ds.evaluation.heldout.scoring import first_choice
from zero_ds.grafting.generate import Answerer, Choice, Query
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)

FORMAT = 1
CONDITIONS = ("own", "shuffled")


@dataclass(frozen=True)
class WordResult:
    """What became of one word of one answer."""

    kind: str
    word: str
    choices: tuple[str, ...]
    free: str | None
    """The first of the choices in the generated answer."""
    free_correct: bool
    log_probs: tuple[float, ...]
    """Log-probability of each choice, given the prompt and the true answer before it."""
    forced_correct: bool
    """Whether the true word has the highest one."""


@dataclass(frozen=True)
class ItemResult:
    """One record under one condition."""

    id: str
    record_kind: str
    condition: str
    image: str
    """The record's own picture."""
    shown: str
    """The picture the model was given."""
    question: str
    answer: str
    generated: str
    words: tuple[WordResult, ...]


@dataclass(frozen=True)
class Evaluation:
    """All results of one model, and what they were measured with."""

    name: str
    items: tuple[ItemResult, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    """root (of the pictures), seed, limits, precision, device, time, and what the caller adds."""

    def of(self, condition: str) -> tuple[ItemResult, ...]:
        return tuple(item for item in self.items if item.condition == condition)

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "setting": self.setting,
            "items": [asdict(item) for item in self.items],
        }

    def write(self, path: Path) -> None:
        """Replaces the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Reads what `Evaluation.write` wrote.

    Raises:
        DataError: missing, damaged, or written by a version with another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(f"{path} has format {content['format']!r}, this version reads {FORMAT}; evaluate again")
        items = tuple(
            ItemResult(**{**item, "words": tuple(_word_from_json(word) for word in item["words"])})
            for item in content["items"]
        )
        return Evaluation(content["name"], items, content["setting"])
    except FileNotFoundError:
        raise DataError(f"there is no evaluation {path}") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no evaluation of this program ({error}); evaluate again") from None


def _word_from_json(word: dict[str, Any]) -> WordResult:
    return WordResult(**{**word, "choices": tuple(word["choices"]), "log_probs": tuple(word["log_probs"])})


def shuffled_pictures(pictures: Sequence[str], seed: int) -> dict[str, str]:
    """For every picture another one, each used once: the pictures in a seeded order, rolled by one.

    Raises:
        DataError: there is only one picture.
    """
    names = list(dict.fromkeys(pictures))
    if len(names) < 2:
        raise DataError("the control needs at least two pictures; evaluate on more records")
    random.Random(seed).shuffle(names)
    return dict(zip(names, [*names[1:], names[0]], strict=True))


def image_features(answerer: Answerer, records: Sequence[EvaluationRecord]) -> list[torch.Tensor]:
    """Features of the records' pictures, in the order of their first appearance: (tokens, hidden) of each.

    Encoder and adapter alone decide about them: pass them to `evaluate` for every decoder that shares both.
    """
    paths = list({record.image: str(record.path) for record in records}.values())
    with tqdm(total=len(paths), desc="reading pictures", unit="picture", disable=None) as bar:
        return answerer.features(paths, bar.update)


def evaluate(
    answerer: Answerer,
    records: Sequence[EvaluationRecord],
    name: str,
    *,
    features: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
    setting: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Generates and scores every record under both conditions.

    features: see `image_features`; computed here if empty. `setting` is kept beside what this function records.

    Raises:
        DataError, ImageError: a record or a picture that cannot be used.
    """
    names = list(dict.fromkeys(record.image for record in records))
    control = shuffled_pictures(names, seed)
    started = time.monotonic()
    if features is None:
        features = image_features(answerer, records)
    assert len(features) == len(names), "the features are not those of the records' pictures"
    row = {picture: number for number, picture in enumerate(names)}
    cases = [
        (record, condition, record.image if condition == "own" else control[record.image])
        for condition in CONDITIONS
        for record in records
    ]
    queries = [_query(record, row[shown]) for record, _, shown in cases]
    with tqdm(total=len(queries), desc=f"evaluating {name}", unit="answer", disable=None) as bar:
        replies = answerer.examine(queries, features, bar.update)
    seconds = time.monotonic() - started
    items = tuple(
        _result(record, condition, shown, reply.text, reply.log_probs)
        for (record, condition, shown), reply in zip(cases, replies, strict=True)
    )
    measured = {
        "root": str(_root(records[0])),
        "seed": seed,
        "max_new_tokens": answerer.max_new_tokens,
        "dtype": str(next(answerer.model.decoder.parameters()).dtype).removeprefix("torch."),
        "device": str(answerer.device),
        "records": len(records),
        "pictures": len(names),
        "seconds": round(seconds, 2),
        "answers_per_second": round(len(queries) / seconds, 2),
    }
    logger.info("%s: %d answers in %.0f s", name, len(queries), seconds)
    return Evaluation(name, items, {**measured, **(setting or {})})


def _root(record: EvaluationRecord) -> Path:
    """The folder to which the record's picture is relative."""
    return next(folder for folder in record.path.parents if (folder / record.image).resolve() == record.path)


def _query(record: EvaluationRecord, picture: int) -> Query:
    choices = tuple(Choice(word.start, word.word, word.choices) for word in record.words)
    turns = (Turn("user", f"{PLACEHOLDER}\n{record.question}"),)
    return Query(record.id, turns, (picture,), record.answer, choices)


def _result(
    record: EvaluationRecord, condition: str, shown: str, generated: str, log_probs: Sequence[Sequence[float]]
) -> ItemResult:
    words = []
    for word, values in zip(record.words, log_probs, strict=True):
        free = first_choice(generated, word.choices)
        best = word.choices[int(np.argmax(values))]
        rounded = tuple(round(value, 5) for value in values)
        words.append(
            WordResult(word.kind, word.word, word.choices, free, free == word.word, rounded, best == word.word)
        )
    return ItemResult(
        record.id, record.kind, condition, record.image, shown, record.question, record.answer, generated, tuple(words)
    )
