"""Mixes data sets into one file, as the paper does before training: each is shuffled, then spread evenly."""

from __future__ import annotations

import base64
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import Role
from zero_ds.data.formats import DataError, named
from zero_ds.data.read_image import is_embedded
from zero_ds.data.sources import Records, Sample
from zero_ds.data.stored import StoredImage
from zero_ds.runtime.errors import ConfigError

_FROM: dict[Role, str] = {"system": "system", "user": "human", "assistant": "gpt"}


def mix(sources: Sequence[SourceConfig], out: Path, *, seed: int = 0, shuffle: bool = True) -> int:
    """Writes the samples of all sources into one file in LLaVA's format and returns their number.

    Each source is permuted by `seed`, unless `shuffle` is off, and inserted at even distances. The paths of images are
    relative to the folder of `out`. The file is a JSON list, or JSON lines if its name ends in .jsonl.

    Raises:
        ConfigError: A negative seed, or an `out` that exists, has another ending, or is in a folder that does not hold
            the images.
        DataError: A source that cannot be read, or a path that leaves its root.
    """
    if out.suffix not in (".json", ".jsonl"):
        raise ConfigError(f"--out {out} must end in .json or .jsonl.")
    if seed < 0:
        raise ConfigError(f"--seed {seed} is negative; choose 0 or more.")
    if out.exists():
        raise ConfigError(f"{out} already exists; choose another --out or remove it.")
    records = Records(sources, permute=seed if shuffle else None, remedy="repair or remove them")
    if out.suffix == ".jsonl":
        start, separator, end = "", "\n", "\n"
    else:
        start, separator, end = "[\n", ",\n", "\n]\n"
    temporary = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(start)
            for number, record in enumerate(_llava_records(records, out.parent.resolve())):
                if number:
                    file.write(separator)
                file.write(json.dumps(record, ensure_ascii=False))
            file.write(end)
        temporary.replace(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}.") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(records)


def _llava_records(records: Records, folder: Path) -> Iterator[dict[str, Any]]:
    with tqdm(total=len(records), desc="mixing", unit="sample", disable=None) as bar:
        for index in range(len(records)):
            yield llava_record(records[index], folder)
            bar.update()


def llava_record(sample: Sample, folder: Path) -> dict[str, Any]:
    """Returns a sample in LLaVA's format, with image paths relative to `folder`.

    Raises:
        ConfigError: An image that is not in `folder`.
    """
    record: dict[str, Any] = {"id": sample.id}
    if sample.images:
        images = [_address(image) if isinstance(image, StoredImage) else image for image in sample.images]
        for image in images:
            if not is_embedded(image) and not Path(image).is_relative_to(folder):
                raise ConfigError(
                    f"sample {named(sample.id)} has its image in {Path(image).parent}, outside of {folder}; write "
                    "--out into a folder that holds the images of all sources."
                )
        names = [image if is_embedded(image) else os.path.relpath(image, folder) for image in images]
        record["image"] = names[0] if len(names) == 1 else names
    record["conversations"] = [
        {"from": _FROM[turn.role], "value": turn.text, **({} if turn.learned else {"weight": 0})}
        for turn in sample.turns
    ]
    return record


def _address(image: StoredImage) -> str:
    """Returns an image as a `data:` address."""
    try:
        return f"data:;base64,{base64.b64encode(image.read()).decode()}"
    except (OSError, ValueError) as error:
        raise DataError(f"image {image} cannot be read: {error}") from None
