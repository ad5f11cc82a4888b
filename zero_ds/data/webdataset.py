"""Reads WebDataset shards: tar files in which the members of a sample follow each other and share a name.

`0001.jpg` and `0001.json` are a sample, and so are `0002.png` and `0002.txt`. JSON is the record, text is a caption,
and images are read where they lie, so samples are read at random and mixed like any others.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from zero_ds.data.archives import STORED, Member, plain_name, tar_members
from zero_ds.data.formats import IMAGE_KEYS, DataError, json_object, quoted
from zero_ds.data.stored import Span
from zero_ds.runtime.files import open_regular

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
"""Extensions of images, in small letters."""
TEXTS = ("txt", "text", "caption", "cap")
"""Extensions of captions."""
LONGEST = 1 << 26
"""Bytes that a record or a caption has at most."""


def read_webdataset(path: Path, progress: Callable[[int], object], columns: Sequence[str] = ()) -> Iterator[Any]:
    """Yields the records of a shard, with a span in the place of each image. `columns` has no effect.

    Raises:
        DataError: A file that is damaged, or a member that is a link or leaves the shard.
    """
    try:
        with open_regular(path) as file:
            for key, group in groupby(tar_members(path, file), key=lambda member: sample_name(path, member)[0]):
                members = list(group)
                yield _record(path, file, key, members)
                progress(sum(member.length for member in members))
    except (OSError, tarfile.TarError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"data file {path} cannot be read: {reason or type(error).__name__}") from None


def sample_name(path: Path, member: Member) -> tuple[str, str]:
    """Returns the name that the members of a sample share, and the extension, which begins at the first dot.

    Raises:
        DataError: As `read_webdataset`.
    """
    plain = plain_name(member.name)
    if plain is None or member.kind != STORED:
        what = "leaves its folder" if plain is None else "is a link, or has holes"
        raise DataError(
            f"data file {path} is refused: its member {quoted(member.name, 300)} {what}; pack the file itself"
        )
    name = PurePosixPath(plain)
    stem, _, extension = name.name.partition(".")
    return str(name.parent / stem), extension.lower()


def _record(path: Path, file: BinaryIO, key: str, members: Sequence[Member]) -> Any:
    """Returns the record of a sample. JSON that is not an object stands for itself, and is refused by its reader."""
    record: dict[str, Any] = {}
    images: list[Span] = []
    others: dict[str, Any] = {}
    for member in members:
        extension = sample_name(path, member)[1]
        kind = extension.rpartition(".")[2]
        if kind in IMAGES:
            images.append(Span(member.offset, member.length))
        elif kind == "json":
            content = _json(path, file, member)
            if not isinstance(content, dict):
                return content
            record |= content
        elif kind in TEXTS:
            others["caption"] = _read(path, file, member).decode("utf-8", "surrogateescape").strip()
        else:
            others[extension or "(no extension)"] = "a member of the shard"  # is counted as a key that is not read
    if images:
        record = {name: value for name, value in record.items() if name not in IMAGE_KEYS}
        record["images"] = images
    return {"id": key, **others, **record}


def _json(path: Path, file: BinaryIO, member: Member) -> Any:
    try:
        text = _read(path, file, member).decode("utf-8-sig", "surrogateescape")
        return json.loads(text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data file {path} cannot be read: its member {quoted(member.name, 300)} is not JSON "
            f"({str(error).splitlines()[0]})"
        ) from None


def _read(path: Path, file: BinaryIO, member: Member) -> bytes:
    if member.length > LONGEST:
        raise DataError(f"data file {path}: its member {quoted(member.name, 300)} has more than {LONGEST:,} bytes")
    return os.pread(file.fileno(), member.length, member.offset)
