"""Reads a whole data set before a run does: what is wrong with it, and how long its samples are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zero_ds.data.formats import DataError, TooLongError, named
from zero_ds.data.images import ImageError, check_header, open_image
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records

Look = Literal["decode", "headers", "none"]
SHOWN = 20
"""Examples that are kept of each kind of fault."""


@dataclass
class Survey:
    """What was found; lengths in tokens if a model was named, else estimated from bytes."""

    samples: int = 0
    pictures: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    """Number of turns -> samples."""
    lengths: list[int] = field(default_factory=list)
    measured: bool = False
    """Whether lengths are counted tokens."""
    faults: Counter[str] = field(default_factory=Counter)
    """Kind -> samples: record, picture, path, template, too long."""
    examples: dict[str, list[str]] = field(default_factory=dict)

    @property
    def wrong(self) -> int:
        return sum(self.faults.values())

    def add(self, kind: str, sentence: str, count: int = 1) -> None:
        self.faults[kind] += count
        if len(self.examples.setdefault(kind, [])) < SHOWN:
            self.examples[kind].append(sentence)

    def to_json(self) -> dict[str, Any]:
        return {
            "samples": self.samples,
            "pictures": self.pictures,
            "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
            "lengths": {"unit": "tokens" if self.measured else "tokens, estimated", **quantiles(self.lengths)},
            "faults": dict(self.faults),
            "examples": self.examples,
        }

    def lines(self) -> list[str]:
        """What a person reads."""
        kind = "tokens" if self.measured else "tokens, estimated at four bytes each"
        found = quantiles(self.lengths)
        lines = [f"{self.samples:,} samples, {self.pictures:,} pictures"]
        lines.append(f"length in {kind}: " + "  ".join(f"{name} {value:,}" for name, value in found.items()))
        for fault, count in self.faults.most_common():
            lines.append(f"{count:,} x {fault}")
            lines += [f"    {sentence}" for sentence in self.examples[fault][:3]]
        lines.append("nothing is wrong" if not self.faults else f"{self.wrong:,} samples cannot be used")
        return lines


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """Median, 90th, 99th percentile and maximum; nothing of nothing."""
    values = np.asarray(list(lengths))
    if not len(values):
        return {}
    marks = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(np.percentile(values, mark)) for name, mark in marks.items()}


class _Looked(Dataset[tuple[int, int, int, str, str]]):
    """Number of a sample -> turns, pictures, length, kind of fault, sentence."""

    def __init__(self, records: Records, encoder: SampleEncoder | None, look: Look) -> None:
        self.records, self.encoder, self.look = records, encoder, look

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[int, int, int, str, str]:
        pictures, length = self.records.images(index), self.records.size(index) // 4
        try:
            sample = self.records[index]
        except DataError as error:
            return 0, pictures, length, "path", str(error)
        turns = len(sample.turns)
        try:
            if self.encoder is not None:
                length = len(self.encoder.tokens(sample).input_ids)
        except TooLongError as error:
            return turns, pictures, length, "too long", str(error)
        except DataError as error:
            return turns, pictures, length, "template", str(error)
        try:
            for path in sample.images:
                if self.look == "decode":
                    open_image(path)
                elif self.look == "headers":
                    check_header(path)
        except ImageError as error:
            return turns, pictures, length, "picture", f"sample {named(sample.id)}: {error}"
        return turns, pictures, length, "", ""


def survey(
    records: Records, *, encoder: SampleEncoder | None = None, look: Look = "decode", workers: int = 0
) -> Survey:
    """Looks at every sample; faults do not end it.

    encoder: counts tokens with it, and applies its length limit; look: what is read of the pictures.
    """
    found = Survey(measured=encoder is not None)
    for sentences, count in records.complaints():
        for sentence in sentences:
            found.add("record", sentence)
        if count > len(sentences):
            found.faults["record"] += count - len(sentences)
    loader: DataLoader[Any] = DataLoader(
        _Looked(records, encoder, look),
        batch_size=64,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    with tqdm(total=len(records), desc="looking at samples", unit="sample", disable=None) as bar:
        for batch in loader:
            for turns, pictures, length, kind, sentence in batch:
                found.samples += 1
                found.pictures += pictures
                found.turns[turns] += 1
                found.lengths.append(length)
                if kind:
                    found.add(kind, sentence)
            bar.update(len(batch))
    return found


def write(found: Survey, out: Path, limit: int | None) -> None:
    """Writes check.json and lengths.png into a folder; `limit` is drawn as a line."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    (out / "check.json").write_text(json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    top = max(found.lengths, default=1)
    axes.hist(found.lengths, bins=min(80, top + 1), color="#4c78a8")
    if limit is not None and limit < 1.5 * top:
        axes.axvline(limit, color="#d1742f", label=f"data.max_length = {limit}")
        axes.legend(frameon=False)
    axes.set_xlabel("tokens" if found.measured else "tokens, estimated at four bytes each")
    axes.set_ylabel("samples")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "lengths.png", dpi=150)
