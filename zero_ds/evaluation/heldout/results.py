"""Results of a held-out evaluation, and the JSON file that holds them.

The field names are those of the file; earlier versions of this package wrote the same ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zero_ds.data.formats import DataError
from zero_ds.runtime.files import write_atomically

FORMAT = 1
CONDITIONS = ("own", "shuffled")
"""Every question is asked about its own image and, as the control, about another image of the set."""


@dataclass(frozen=True)
class WordResult:
    """Scores of one word of one answer."""

    kind: str
    word: str
    choices: tuple[str, ...]
    free: str | None
    """First of the choices that appears in the generated answer; None if none does."""
    free_correct: bool
    """Whether `free` is the true word."""
    log_probs: tuple[float, ...]
    """Log-probability of each choice, given the prompt and the true answer up to the word."""
    forced_correct: bool
    """Whether the true word has the highest of these log-probabilities."""


@dataclass(frozen=True)
class ItemResult:
    """Result of one record under one condition."""

    id: str
    record_kind: str
    condition: str
    image: str
    """The record's own image."""
    shown: str
    """The image that the model was shown."""
    question: str
    answer: str
    generated: str
    words: tuple[WordResult, ...]


@dataclass(frozen=True)
class Evaluation:
    """All results of one model, with the settings they were measured under."""

    name: str
    items: tuple[ItemResult, ...]
    setting: dict[str, Any] = field(default_factory=dict)
    """Root of the images, seed, limits, precision, device, time, and entries that the caller adds."""

    def of(self, condition: str) -> tuple[ItemResult, ...]:
        """Returns the results under one of CONDITIONS."""
        return tuple(item for item in self.items if item.condition == condition)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of the result file."""
        return {
            "format": FORMAT,
            "name": self.name,
            "setting": self.setting,
            "items": [asdict(item) for item in self.items],
        }

    def write(self, path: Path) -> None:
        """Writes the result file atomically, and makes its folder if needed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n")


def read_evaluation(path: Path) -> Evaluation:
    """Reads a file that `Evaluation.write` wrote.

    Raises:
        DataError: the file is missing or damaged, or has another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise DataError(
                f"{path} has format {content['format']!r}, but this version reads format {FORMAT}; evaluate again"
            )
        items = tuple(_item_from_json(item) for item in content["items"])
        return Evaluation(content["name"], items, content["setting"])
    except FileNotFoundError:
        raise DataError(f"evaluation {path} does not exist; make it with zero-ds eval records") from None
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a result of zero-ds eval records ({error}); evaluate again") from None


def _item_from_json(item: dict[str, Any]) -> ItemResult:
    words = []
    for word in item["words"]:
        words.append(
            WordResult(**{**word, "choices": tuple(word["choices"]), "log_probs": tuple(word["log_probs"])}),
        )
    return ItemResult(**{**item, "words": tuple(words)})
