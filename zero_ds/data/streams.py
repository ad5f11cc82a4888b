"""Opens shards of a source when their turn comes, for sources that are too large to be read at the first start.

The first start counts the samples of each shard, from Parquet's footers or tar's headers. The order follows from seed,
pass and these counts alone: shards come in random order, and each gives its samples in parts, mixed with parts of the
shards before it. So the position of a run needs no state but the step, on any number of ranks and workers.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
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
"""Number of parts of a shard, and so of shards whose samples are mixed. Another one changes the order of all runs."""
OPENED = 16 * MIXED
"""Number of shards that a process has open at most."""
BLOCK, BLOCKS = 1 << 16, 8
"""Bytes and number of the places at which a shard is compared with what it was."""
SIZES = "sizes.json"
"""File in a folder of tar shards that holds the number of samples of each, by its name."""


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

    def read_ahead(self) -> None:
        """Reads the shard in a thread, so that it is there when its turn comes. Errors are reported then."""
        threading.Thread(target=_opened, args=(self._path, self._reading, self.name, self._count), daemon=True).start()

    def _table(self) -> Table:
        table = _opened(self._path, self._reading, self.name, self._count)
        if isinstance(table, str):
            raise DataError(table)
        return table


@functools.lru_cache(maxsize=OPENED)
def _opened(path: Path, reading: Reading, name: str, count: int) -> Table | str:
    """Returns the records of a shard, or why it cannot be read, which every sample of it would find out again.

    name, count: those of the shard when the run began.
    """
    try:
        table = load_table(path, reading)
        changed = _mark(path, count) != name
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"data file {path} cannot be read: {error.strerror or error}"
    if changed:
        return f"data file {path} has changed since the start of the run; start again"
    found = len(table) + table.complaints.count
    if found != count:
        return f"data file {path} holds {found:,} samples, and not {count:,}, as {SIZES} says; correct {SIZES}"
    return table


class MixedOrder:
    """A random order of a pass over shards, in which only MIXED shards have their turn at a time.

    Each shard is permuted and cut into MIXED parts. Turn t takes the first part of shard t, the second of shard t - 1
    and so on, all permuted together, so only one shard is new in a turn. Nothing is stored for each sample.
    """

    def __init__(
        self, sizes: Sequence[int], seed: Sequence[int], begins: Callable[[int], object] | None = None
    ) -> None:
        """Draws the order of shards with `sizes` samples each; `begins` is called with the one whose turn is next."""
        self._sizes, self._seed, self._begins = sizes, list(seed), begins
        self._first = np.cumsum([0, *sizes])
        """Index of the first sample of each shard."""
        self._shards = np.random.default_rng(self._seed).permutation(np.flatnonzero(sizes))
        """Shards in the order of their turns."""
        turns = np.zeros(len(self._shards) + MIXED - 1, np.int64)
        own = np.asarray(sizes)[self._shards]
        for part in range(MIXED):
            turns[part : part + len(own)] += (own + MIXED - 1 - part) // MIXED
        self._ends = np.cumsum(turns)
        self._drawn = functools.lru_cache(maxsize=2)(self._turn)

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, place: int) -> int:
        """Returns the index of the sample at a place of the pass."""
        turn = int(np.searchsorted(self._ends, place, side="right"))
        samples = self._drawn(turn)
        return int(samples[place - int(self._ends[turn])])  # counted from the end

    def _turn(self, turn: int) -> Any:
        """Returns the samples of a turn: (n,) indices."""
        if self._begins is not None and turn + 1 < len(self._shards):
            self._begins(int(self._shards[turn + 1]))
        parts = []
        for part in range(MIXED):
            if 0 <= turn - part < len(self._shards):
                shard = int(self._shards[turn - part])
                order = np.random.default_rng([*self._seed, 1, shard]).permutation(self._sizes[shard])
                parts.append(self._first[shard] + order[part::MIXED])
        return np.random.default_rng([*self._seed, 2, turn]).permutation(np.concatenate(parts))


def _counted(path: Path) -> tuple[int, str]:
    """Returns the number of records of a shard, and a name that changes with the file."""
    count = {".parquet": _rows_of_parquet, ".tar": _samples_of_tar}.get(path.suffix)
    if count is None:
        raise DataError(f"data file {path} cannot be streamed; Parquet and .tar files can: drop stream, or convert it")
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
        listed = _listed(path) if path.suffix == ".tar" else None
        number, mark = _remembered(path, [LAYOUT, stat.st_size, stat.st_mtime_ns, stat.st_ino, listed], count)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None
    if not number:
        raise DataError(f"data file {path} must hold a list of samples, and at least one")
    return number, mark


def _remembered(path: Path, seen: list[int | None], count: Callable[[Path], int]) -> tuple[int, str]:
    """Returns number of records and mark of a shard; `seen` says which file it is, and a count that is stated."""
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:24]
    known = cache_folder() / f"count-{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(known.read_text(encoding="utf-8"))
        if content["seen"] == seen:
            return int(content["count"]), str(content["mark"])
    stated = seen[-1]
    number = count(path) if stated is None else stated
    mark = _mark(path, number)
    if time.time() - (seen[2] or 0) / 1e9 > SETTLED:
        with contextlib.suppress(OSError):  # it only saves time
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(known, json.dumps({"seen": seen, "count": number, "mark": mark}) + "\n")
    return number, mark


def _mark(path: Path, count: int) -> str:
    """Returns a hash of a shard's size, count and content at a few places; reading all of it would take too long."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.blake2b(f"{path.suffix} {size} {count}".encode(), digest_size=12)
        for number in range(BLOCKS):
            file.seek(max(0, size - BLOCK) * number // (BLOCKS - 1))
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


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
    return None if number is None else int(number)


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
