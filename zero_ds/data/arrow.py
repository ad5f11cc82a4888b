"""Checked records as memory-mapped Arrow: written once for a data file, found again by its content, read by row.

Ranks and workers that open the same file share the operating system's pages of it; nothing of it is copied into a
process before a row is asked for.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zero_ds.data.conversations import Role
from zero_ds.data.files import BrokenLine, raw_records
from zero_ds.data.formats import DataError, Row, parse
from zero_ds.runtime.files import open_regular, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 2
"""Changes when the meaning of the converted records changes, so that old ones are not read."""
ROWS = 4096
"""Records that are converted at a time, at most."""
CHARACTERS = 1 << 25
"""Characters of records that are converted at a time, about; a list of texts holds 2 GiB at most."""
KEPT_COMPLAINTS = 1000
"""Records that cannot be used, of which the reason is kept; the others are counted."""
SETTLED = 2.0
"""Seconds after which a file's time of change tells it from a later version of the same size."""

_LETTERS: dict[Role, str] = {"system": "s", "user": "u", "assistant": "a"}
_ROLES = {letter: role for role, letter in _LETTERS.items()}


@dataclass(frozen=True)
class Complaints:
    """What was wrong with records that were left out."""

    count: int
    first: tuple[str, ...]
    """The first KEPT_COMPLAINTS, in the order of the file, each naming number and sample."""


class Table(Sequence[Row]):
    """The usable records of one data file."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.name = folder.name
        """Follows from the content of the file that was converted."""
        self._data = datasets.Dataset.from_file(str(folder / "records.arrow")).data.table
        content = json.loads((folder / "complaints.json").read_text(encoding="utf-8"))
        self.complaints = Complaints(content["count"], tuple(content["first"]))
        self._batches = [_Batch(batch) for batch in self._data.to_batches()]
        self._ends = [0, *accumulate(batch.rows for batch in self._batches)]
        if len(self) != content["rows"]:
            raise ValueError(f"{folder} holds {len(self)} of {content['rows']} records")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        batch, row = self._place(index)
        return Row(
            batch.ids[row].as_py(),
            tuple(_ROLES[letter] for letter in batch.roles[row].as_py()),
            tuple(batch.texts.of(row)),
            tuple(batch.images.of(row)),
            batch.full_path[row].as_py(),
        )

    def images(self, index: int) -> int:
        """Number of pictures of a record."""
        batch, row = self._place(index)
        return batch.images.count(row)

    def size(self, index: int) -> int:
        """Bytes of a record's texts."""
        batch, row = self._place(index)
        return batch.texts.bytes(row)

    def with_images(self) -> Any:
        """Rows that have a picture: (n,), int64 numpy array."""
        import pyarrow.compute as compute

        return compute.indices_nonzero(compute.list_value_length(self._data.column("images"))).to_numpy()

    def _place(self, index: int) -> tuple[_Batch, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index) - 1
        return self._batches[number], index - self._ends[number]


class _Batch:
    """A stretch of records as it lies in the file."""

    def __init__(self, batch: Any) -> None:
        self.rows: int = batch.num_rows
        self.ids, self.roles, self.full_path = (batch.column(name) for name in ("id", "roles", "full_path"))
        self.texts, self.images = (_Strings(batch.column(name)) for name in ("texts", "images"))


class _Strings:
    """A column of lists of strings, by row."""

    def __init__(self, lists: Any) -> None:
        self._values = lists.values
        self._starts = lists.offsets.to_numpy()
        count = self._values.offset + len(self._values) + 1
        offsets = self._values.buffers()[1]
        self._bytes = np.frombuffer(offsets, np.int32, count) if offsets else np.zeros(1, np.int32)

    def of(self, row: int) -> list[str]:
        start, end = self._starts[row], self._starts[row + 1]
        strings: list[str] = self._values[start:end].to_pylist() if end > start else []
        return strings

    def count(self, row: int) -> int:
        return int(self._starts[row + 1] - self._starts[row])

    def bytes(self, row: int) -> int:
        first = self._values.offset
        return int(self._bytes[first + self._starts[row + 1]] - self._bytes[first + self._starts[row]])


def table_of(path: Path) -> Table:
    """The records of a data file, converted now unless an earlier run did. One process a machine converts.

    Raises:
        DataError: a file that cannot be read, or whose records cannot be written.
    """
    import datasets
    from filelock import FileLock

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "zero_ds"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        digest = _digest(path, cache)
        folder = cache / digest
        if (table := _kept(folder)) is not None:
            return table
        _remove_left(cache, besides=digest)
        with FileLock(cache / f"{digest}.lock"):
            if (table := _kept(folder)) is not None:
                return table
            for left in (folder, *cache.glob(f".{digest}.*")):
                shutil.rmtree(left, ignore_errors=True)
            _convert(path, folder)
            return Table(folder)
    except OSError as error:
        raise DataError(
            f"the records of {path} cannot be kept in {cache}: {error.strerror or error}; make room there, or choose "
            "another folder with HF_DATASETS_CACHE"
        ) from None


def _kept(folder: Path) -> Table | None:
    """What was converted, if it is there and whole: a machine that failed may have cut off a file behind its name."""
    import pyarrow

    if not folder.is_dir():
        return None
    try:
        return Table(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        logger.warning("%s is damaged and made again: %s", folder, error)
        return None


def _remove_left(cache: Path, besides: str) -> None:
    """Removes what processes left that died while they converted; a lock that is free has no process any more."""
    from filelock import FileLock, Timeout

    for left in cache.glob(".*.*"):
        digest = left.name.split(".")[1]
        if left.is_dir() and digest != besides:
            try:
                with FileLock(cache / f"{digest}.lock", timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            except Timeout:
                logger.debug("%s is being written", left)


def _digest(path: Path, cache: Path) -> str:
    """Hash of the file's content; remembered with its size and time of change, for a gigabyte takes a while.

    Raises:
        DataError: a file that is not there or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return _digest_of(path, file, cache)
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None


def _digest_of(path: Path, file: BinaryIO, cache: Path) -> str:
    known = cache / f"known-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    stat = os.fstat(file.fileno())
    seen = [FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    try:
        content = json.loads(known.read_text(encoding="utf-8"))
        if content["seen"] == seen:
            return str(content["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        logger.debug("%s was not seen before", path)
    digest = hashlib.blake2b(f"{FORMAT}{path.suffix}".encode(), digest_size=12)
    while block := file.read(1 << 22):
        digest.update(block)
    if time.time() - stat.st_mtime > SETTLED:
        with contextlib.suppress(OSError):  # a note saves time; a cache that cannot be written is told of later
            write_atomically(known, json.dumps({"seen": seen, "digest": digest.hexdigest()}) + "\n")
    return digest.hexdigest()


def _convert(path: Path, folder: Path) -> None:
    """Writes the records of `path` into `folder`, which appears when it is complete."""
    import pyarrow
    from tqdm import tqdm

    strings = pyarrow.list_(pyarrow.string())
    schema = pyarrow.schema(
        {
            "id": pyarrow.string(),
            "roles": pyarrow.string(),
            "texts": strings,
            "images": strings,
            "full_path": pyarrow.bool_(),
        }
    )
    complaints: list[str] = []
    good = bad = 0
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        size = path.stat().st_size
        with (
            tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=None, delay=1) as bar,
            pyarrow.OSFile(str(temporary / "records.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, schema) as writer,
        ):
            for batch in _batches(_parsed(path, bar.update)):
                rows = [row for row in batch if isinstance(row, Row)]
                wrong = [row for row in batch if isinstance(row, str)]
                good += len(rows)
                bad += len(wrong)
                complaints += wrong[: KEPT_COMPLAINTS - len(complaints)]
                columns = [
                    [row.id for row in rows],
                    ["".join(_LETTERS[role] for role in row.roles) for row in rows],
                    [row.texts for row in rows],
                    [row.images for row in rows],
                    [row.full_path for row in rows],
                ]
                arrays = [pyarrow.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        content = {"rows": good, "count": bad, "first": complaints}
        (temporary / "complaints.json").write_text(json.dumps(content), encoding="utf-8")
        for name in ("records.arrow", "complaints.json"):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _parsed(path: Path, progress: Any) -> Iterator[Row | str]:
    """Each record, or what is wrong with it."""
    for number, record in enumerate(raw_records(path, progress, tolerant=True)):
        try:
            yield f"#{number}: {record}" if isinstance(record, BrokenLine) else parse(record, f"#{number}")
        except DataError as error:
            yield str(error)


def _batches(rows: Iterator[Row | str]) -> Iterator[list[Row | str]]:
    batch: list[Row | str] = []
    characters = 0
    for row in rows:
        batch.append(row)
        characters += sum(map(len, row.texts)) if isinstance(row, Row) else len(row)
        if len(batch) >= ROWS or characters >= CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
