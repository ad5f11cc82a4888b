"""Mixes data sets into one file, as the paper does before training: each shuffled, then spread evenly."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import Role
from zero_ds.data.formats import named
from zero_ds.data.sources import Records, Sample
from zero_ds.runtime.errors import ConfigError

_FROM: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}


def mix(sources: Sequence[SourceConfig], out: Path, *, seed: int = 0, shuffle: bool = True) -> int:
    """Writes the samples of all sources into one file in LLaVA's format; returns their number.

    Each source is permuted by `seed` (or kept in its order) and inserted at even distances. Pictures are named relative
    to the folder of `out`; a JSON list, or JSON lines if `out` ends in .jsonl.

    Raises:
        ConfigError: a negative seed, `out` exists, has another ending, or lies where pictures cannot be named
            relative to it.
        DataError: a source that cannot be read, a path that leaves its root.
    """
    if out.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--out {out} must end in .json or .jsonl.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; choose 0 or more.")
    if out.exists():
        raise ConfigError(f"{out} already exists; choose another --out or remove it.")
    records = Records(sources, permute=seed if shuffle else None)
    home = out.parent.resolve()
    lines = out.suffix == ".jsonl"
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("" if lines else "[")
            for number, record in enumerate(_plain(records, home)):
                separator = ("\n" if number else "") if lines else (",\n" if number else "\n")
                file.write(separator + json.dumps(record, ensure_ascii=False))
            file.write("\n" if lines else "\n]\n")
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(records)


def _plain(records: Records, home: Path) -> Iterator[dict[str, Any]]:
    with tqdm(total=len(records), desc="mixing", unit="sample", disable=None) as bar:
        for index in range(len(records)):
            yield plain(records[index], home)
            bar.update()


def plain(sample: Sample, home: Path) -> dict[str, Any]:
    """A sample in LLaVA's format, with pictures named relative to `home`.

    Raises:
        ConfigError: a picture that lies elsewhere.
    """
    record: dict[str, Any] = {"id": sample.id}
    if sample.images:
        for image in sample.images:
            if not Path(image).is_relative_to(home):
                raise ConfigError(
                    f"sample {named(sample.id)} has its picture in {Path(image).parent}, outside of {home}; write "
                    "--out into a folder that holds the pictures of all sources."
                )
        names = [os.path.relpath(image, home) for image in sample.images]
        record["image"] = names[0] if len(names) == 1 else names
    record["conversations"] = [{"from": _FROM[turn.role], "value": turn.text} for turn in sample.turns]
    return record
