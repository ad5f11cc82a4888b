"""Opens shards of a source when their turn comes, for sources that are too large to be read at the first start.

The first start counts the samples of each shard, from Parquet's footers or tar's headers. The order follows from seed,
pass and these counts alone: shards come in random order, and the samples of a few neighbours in that order are mixed.
So the position of a run needs no state beside the step, on any number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tarfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.data.archives import tar_members
from zero_ds.data.arrow import SETTLED, Complaints, Table, cache_folder, load_table
from zero_ds.data.formats import DataError, Row, named
from zero_ds.data.forms import Reading
from zero_ds.data.webdataset import sample_name
from zero_ds.runtime.files import open_regular, write_atomically

logger = logging.getLogger(__name__)

LAYOUT = 1
"""Version of remembered counts."""
MIXED = 8
"""Number of shards whose samples are mixed."""
OPENED = 4 * MIXED
"""Number of shards that a process has open at most."""
SIZES = "sizes.json"
"""File beside tar shards that holds the number of samples of each, by its name."""


class Shard:
    """The records of a data file that is read when the first of them is asked for.

    Records that cannot be used have places after the others, so that the number of places is known beforehand.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        """Counts the records.

        Raises:
            DataError: A file that is missing or damaged, or of a format without a count.
        """
        self._path, self._reading = path, reading
        self._count, self.name = _counted(path)
        self.complaints = Complaints(0, ())
        self.unread: dict[str, int] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, row: int) -> Row:
        """Returns a record.

        Raises:
            DataError: A record that cannot be used, or a shard that cannot be read.
        """
        table = self._table()
        if row < len(table):
            return table[row]
        first = table.complaints.first
        number = row - len(table)
        raise DataError(f"{self._path} {first[number] if number < len(first) else 'has a record that cannot be used'}")

    def images(self, row: int) -> int:
        """Returns the number of images of a record; 0 if it cannot be read."""
        with contextlib.suppress(DataError):  # reported when the sample's turn comes
            table = self._table()
            return table.images(row) if row < len(table) else 0
        return 0

    def size(self, row: int) -> int:
        """Returns the number of bytes of a record's texts; 0 if it cannot be read."""
        with contextlib.suppress(DataError):
            table = self._table()
            return table.size(row) if row < len(table) else 0
        return 0

    def _table(self) -> Table:
        table = _opened(self._path, self._reading)
        if isinstance(table, str):
            raise DataError(table)
        found = len(table) + table.complaints.count
        if found != self._count:
            raise DataError(
                f"data file {self._path} holds {found:,} samples, and not {self._count:,}, as its count at the start "
                f"of the run or {SIZES} says; correct {SIZES}, or start a new run if the file has changed"
            )
        return table


@functools.lru_cache(maxsize=OPENED)
def _opened(path: Path, reading: Reading) -> Table | str:
    """Returns the records of a shard, or why it cannot be read, which every sample of it would find out again."""
    try:
        return load_table(path, reading)
    except DataError as error:
        return str(error)


def mixed_order(rows: Any, starts: Any, seed: Sequence[int]) -> Any:
    """Returns a random order of rows in which only MIXED shards have their turn at a time.

    rows: (n,) rows of all shards. starts: (shards + 1,) first row of each shard. Returns indices into `rows`: (n,).
    """
    generator = np.random.default_rng(list(seed))
    turns = generator.permutation(len(starts) - 1) // MIXED
    shards = np.searchsorted(starts, rows, side="right") - 1
    return np.lexsort((generator.random(len(rows)), turns[shards]))


def _counted(path: Path) -> tuple[int, str]:
    """Returns the number of records of a shard, and a name that changes with the file."""
    count = {".parquet": _rows_of_parquet, ".tar": _samples_of_tar}.get(path.suffix)
    if count is None:
        raise DataError(f"data file {path} cannot be streamed; Parquet and .tar files can: drop stream, or convert it")
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
        number = _listed(path) if path.suffix == ".tar" else None
        if number is None:
            number = _remembered(path, [LAYOUT, stat.st_size, stat.st_mtime_ns, stat.st_ino], count)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"data file {path} must hold a list of samples, and at least one")
    mark = hashlib.blake2b(f"{path.name} {stat.st_size} {number}".encode("utf-8", "surrogateescape"), digest_size=12)
    return number, mark.hexdigest()


def _remembered(path: Path, seen: list[int], count: Any) -> int:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    known = cache_folder() / f"count-{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(known.read_text(encoding="utf-8"))
        if content["seen"] == seen:
            return int(content["count"])
    number: int = count(path)
    if time.time() - seen[2] / 1e9 > SETTLED:
        with contextlib.suppress(OSError):  # it only saves time
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(known, json.dumps({"seen": seen, "count": number}) + "\n")
    return number


def _rows_of_parquet(path: Path) -> int:
    import pyarrow
    from pyarrow import parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"data file {path} cannot be read: {str(error).splitlines()[0]}") from None


def _samples_of_tar(path: Path) -> int:
    try:
        with open_regular(path) as file:
            return sum(1 for _ in groupby(tar_members(path, file), key=lambda member: sample_name(path, member)[0]))
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"data file {path} cannot be read: {str(error) or type(error).__name__}") from None


def _listed(path: Path) -> int | None:
    """Returns the number of samples that sizes.json states; None if it states none."""
    listed = _sizes(path.parent)
    if listed is None:
        return None
    number = listed.get(path.name)
    if number is not None and (type(number) is not int or number < 1):
        raise DataError(f"{path.parent / SIZES} gives {named(str(number))} as the number of samples of {path.name}")
    return number


@functools.lru_cache(maxsize=16)
def _sizes(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / SIZES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        raise DataError(f"{folder / SIZES} is not JSON; correct it or remove it") from None
    if not isinstance(content, dict):
        raise DataError(f"{folder / SIZES} must hold an object with the number of samples of each shard")
    return content
