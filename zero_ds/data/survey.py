"""Checks a whole data set before a run reads it: which samples are unusable, and how long they are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zero_ds.data.formats import DataError, TooLongError, named
from zero_ds.data.images import ImageError, check_header, open_image
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records

Look = Literal["decode", "headers", "none"]
"""Extent to which images are read."""
SHOWN = 20
"""Number of examples that are kept of each kind of fault."""


@dataclass
class Survey:
    """Findings about a data set."""

    samples: int = 0
    images: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    """Number of samples by their number of turns."""
    lengths: list[int] = field(default_factory=list)
    """Length of each sample in tokens."""
    measured: bool = False
    """Whether lengths are counted in tokens instead of estimated from bytes."""
    faults: Counter[str] = field(default_factory=Counter)
    """Number of samples by the kind of their fault: record, picture, path, template or too long."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Messages about the first samples with each kind of fault."""
    unread: dict[str, int] = field(default_factory=dict)
    """Number of samples with each key that is not read."""
    companions: list[str] = field(default_factory=list)
    """Files of the folder that hold no samples and are skipped."""

    @property
    def unusable(self) -> int:
        """Number of samples that cannot be used."""
        return sum(self.faults.values())

    def add_fault(self, kind: str, sentence: str) -> None:
        """Counts an unusable sample, and keeps the message if it is among the first."""
        self.faults[kind] += 1
        if len(self.examples.setdefault(kind, [])) < SHOWN:
            self.examples[kind].append(sentence)

    def add(self, sample: _Inspected) -> None:
        """Counts an inspected sample."""
        self.samples += 1
        self.images += sample.images
        self.turns[sample.turns] += 1
        self.lengths.append(sample.length)
        if sample.fault:
            self.add_fault(sample.fault, sample.message)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of check.json."""
        return {
            "samples": self.samples,
            "pictures": self.images,
            "turns": {str(turns): count for turns, count in sorted(self.turns.items())},
            "lengths": {"unit": "tokens" if self.measured else "tokens, estimated", **quantiles(self.lengths)},
            "faults": dict(self.faults),
            "examples": self.examples,
            "keys that are not read": self.unread,
            "skipped files": self.companions,
        }

    def lines(self) -> list[str]:
        """Returns the findings as lines of text."""
        kind = "tokens" if self.measured else "tokens, estimated at four bytes each"
        found = quantiles(self.lengths)
        lines = [f"{self.samples:,} samples, {self.images:,} images"]
        lines.append(f"length in {kind}: " + "  ".join(f"{name} {value:,}" for name, value in found.items()))
        for fault, count in self.faults.most_common():
            lines.append(f"{count:,} x {fault}")
            lines += [f"    {sentence}" for sentence in self.examples[fault][:3]]
        if self.companions:
            lines.append(f"skipped files, which hold no samples: {', '.join(self.companions)}")
        if self.unread:
            counts = ", ".join(f"{named(key)} ({count:,})" for key, count in self.unread.items())
            lines.append(f"keys that are not read, with the number of their samples: {counts}")
        lines.append("nothing is wrong" if not self.faults else f"{self.unusable:,} samples cannot be used")
        return lines


def quantiles(lengths: Iterable[int]) -> dict[str, int]:
    """Returns median, 90th and 99th percentile and maximum by name; empty if no lengths are given."""
    values = np.asarray(list(lengths))
    if not len(values):
        return {}
    marks = {"median": 50, "90 %": 90, "99 %": 99, "longest": 100}
    return {name: int(np.percentile(values, mark)) for name, mark in marks.items()}


class _Inspected(NamedTuple):
    """Findings about one sample."""

    turns: int
    images: int
    length: int
    """Tokens, estimated as four bytes each where they are not counted."""
    fault: str = ""
    """Kind of the fault, if there is one."""
    message: str = ""


class _Inspection(Dataset[_Inspected]):
    """Maps the index of a sample to the findings about it."""

    def __init__(self, records: Records, sample_encoder: SampleEncoder | None, look: Look) -> None:
        self.records = records
        self.sample_encoder = sample_encoder
        self.look = look

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> _Inspected:
        images = self.records.images(index)
        length = self.records.size(index) // 4
        try:
            sample = self.records[index]
        except DataError as error:
            return _Inspected(0, images, length, "path", str(error))
        turns = len(sample.turns)
        try:
            if self.sample_encoder is not None:
                length = len(self.sample_encoder.tokens(sample).input_ids)
        except TooLongError as error:
            return _Inspected(turns, images, length, "too long", str(error))
        except DataError as error:
            return _Inspected(turns, images, length, "template", str(error))
        try:
            for path in sample.images:
                if self.look == "decode":
                    open_image(path)
                elif self.look == "headers":
                    check_header(path)
        except ImageError as error:
            return _Inspected(turns, images, length, "picture", f"sample {named(sample.id)}: {error}")
        return _Inspected(turns, images, length)


def survey(
    records: Records, *, encoder: SampleEncoder | None = None, look: Look = "decode", workers: int = 0
) -> Survey:
    """Inspects every sample; faults do not end it.

    The sample encoder counts tokens and applies its length limit; without one, lengths are estimated. `look` says how
    much of the images is read.
    """
    found = Survey(measured=encoder is not None, unread=records.unread())
    found.companions = [str(file) for file in records.companions()]
    for sentences, count in records.complaints():
        for sentence in sentences:
            found.add_fault("record", sentence)
        if count > len(sentences):  # not every reason was kept
            found.faults["record"] += count - len(sentences)
    loader: DataLoader[Any] = DataLoader(
        _Inspection(records, encoder, look),
        batch_size=64,
        collate_fn=list,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    with tqdm(total=len(records), desc="looking at samples", unit="sample", disable=None) as bar:
        for batch in loader:
            for inspected in batch:
                found.add(inspected)
            bar.update(len(batch))
    return found


def write(found: Survey, out: Path, limit: int | None) -> None:
    """Writes check.json and lengths.png, a histogram with a line at `limit`, into a folder."""
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
