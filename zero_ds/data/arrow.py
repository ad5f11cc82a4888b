"""Stores checked records as memory-mapped Arrow: converted once per data file, found again by content, read by row.

Ranks and workers that open the same file share the operating system's pages of it. Nothing is copied into a process
until a row is read.
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
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from zero_ds.data.conversations import Role
from zero_ds.data.files import BrokenLine, raw_records
from zero_ds.data.formats import DataError, Row
from zero_ds.data.forms import Reading, read_record
from zero_ds.runtime.files import open_regular, write_atomically

logger = logging.getLogger(__name__)

FORMAT = 2
"""Version of the names of conversions. Checkpoints keep them, so a run cannot be resumed after a change."""
LAYOUT = 4
"""Version of the converted records; a new one keeps old conversions from being read."""
ROWS = 4096
"""Number of records that are converted at a time, at most."""
CHARACTERS = 1 << 25
"""Number of characters that are converted at a time, approximately; a list of texts holds 2 GiB at most."""
KEPT_COMPLAINTS = 1000
"""Number of unusable records whose reason is kept; the others are only counted."""
KEPT_KEYS = 100
"""Largest number of unread keys whose records are counted; the most frequent keys are."""
SETTLED = 2.0
"""Age in seconds from which a file's modification time distinguishes it from a later version of the same size."""

_LETTERS: dict[Role, str] = {"system": "s", "user": "u", "assistant": "a"}
_ROLES = {letter: role for role, letter in _LETTERS.items()}
_NOT_LEARNED = "x"
"""Letter of an answer that is not learned."""


@dataclass(frozen=True)
class Complaints:
    """Reasons why records of a file cannot be used."""

    count: int
    """Number of such records."""
    first: tuple[str, ...]
    """Reasons of the first KEPT_COMPLAINTS, in the order of the file; each names number and sample."""


class Table(Sequence[Row]):
    """The usable records of one data file."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self.name = folder.name.partition("-")[0]
        """Name that follows from the content of the converted file."""
        self._data = datasets.Dataset.from_file(str(folder / "records.arrow")).data.table
        content = json.loads((folder / "complaints.json").read_text(encoding="utf-8"))
        self.complaints = Complaints(content["count"], tuple(content["first"]))
        self.unread: dict[str, int] = content["unread"]
        """Number of records with each key that is not read."""
        self._chunks = [_Chunk(batch) for batch in self._data.to_batches()]
        self._ends = [0, *accumulate(chunk.rows for chunk in self._chunks)]
        if len(self) != content["rows"]:
            raise ValueError(f"{folder} holds {len(self)} of {content['rows']} records")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        chunk, row = self._locate(index)
        letters: str = chunk.roles[row].as_py()
        return Row(
            chunk.ids[row].as_py(),
            tuple(_ROLES.get(letter, "assistant") for letter in letters),
            tuple(chunk.texts.strings(row)),
            tuple(chunk.images.strings(row)),
            chunk.full_path[row].as_py(),
            tuple(letter != _NOT_LEARNED for letter in letters),
        )

    def images(self, index: int) -> int:
        """Returns the number of images of a record."""
        chunk, row = self._locate(index)
        return chunk.images.count(row)

    def size(self, index: int) -> int:
        """Returns the number of bytes of a record's texts."""
        chunk, row = self._locate(index)
        return chunk.texts.bytes(row)

    def with_images(self) -> Any:
        """Returns the indices of records with an image: (n,) int64 numpy array."""
        import pyarrow.compute as compute

        return compute.indices_nonzero(compute.list_value_length(self._data.column("images"))).to_numpy()

    def _locate(self, index: int) -> tuple[_Chunk, int]:
        """Returns the chunk of a record and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index) - 1
        return self._chunks[number], index - self._ends[number]


class _Chunk:
    """A stretch of records, mapped from the file."""

    def __init__(self, batch: Any) -> None:
        self.rows: int = batch.num_rows
        self.ids = batch.column("id")
        self.roles = batch.column("roles")
        self.full_path = batch.column("full_path")
        self.texts = _StringLists(batch.column("texts"))
        self.images = _StringLists(batch.column("images"))


class _StringLists:
    """A column in which each row is a list of strings."""

    def __init__(self, lists: Any) -> None:
        self._values = lists.values
        self._starts = lists.offsets.to_numpy()
        """Index of the first string of each row: (rows + 1,)."""
        count = self._values.offset + len(self._values) + 1
        offsets = self._values.buffers()[1]
        self._bytes = np.frombuffer(offsets, np.int32, count) if offsets else np.zeros(1, np.int32)
        """Offset of the first byte of each string."""

    def strings(self, row: int) -> list[str]:
        """Returns the strings of a row."""
        start, end = self._starts[row], self._starts[row + 1]
        strings: list[str] = self._values[start:end].to_pylist() if end > start else []
        return strings

    def count(self, row: int) -> int:
        """Returns the number of strings of a row."""
        return int(self._starts[row + 1] - self._starts[row])

    def bytes(self, row: int) -> int:
        """Returns the number of bytes of a row's strings."""
        first = self._values.offset
        return int(self._bytes[first + self._starts[row + 1]] - self._bytes[first + self._starts[row]])


def cache_folder() -> Path:
    """Returns the folder of conversions and indices."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "zero_ds"


def load_table(path: Path, reading: Reading | None = None) -> Table:
    """Returns the records of a data file, converting them unless an earlier run did. One process per machine does it.

    `reading` holds the choices on which the turns depend besides the file.

    Raises:
        DataError: A file that cannot be read, or whose records cannot be written.
    """
    from filelock import FileLock

    reading = reading or Reading()
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        digest = _digest(path, cache) + reading.mark()
        folder = cache / f"{digest}-{LAYOUT}"
        if (table := _existing(folder)) is not None:
            return table
        _remove_leftovers(cache, keep=digest)
        with FileLock(cache / f"{digest}.lock"):
            if (table := _existing(folder)) is not None:
                return table
            for leftover in (folder, *cache.glob(f".{folder.name}.*")):
                shutil.rmtree(leftover, ignore_errors=True)
            _convert(path, folder, reading)
            return Table(folder)
    except OSError as error:
        raise DataError(
            f"the records of {path} cannot be kept in {cache}: {error.strerror or error}; make room there, or choose "
            "another folder with HF_DATASETS_CACHE"
        ) from None


def _existing(folder: Path) -> Table | None:
    """Returns a conversion if it is complete; a machine that failed may have left a truncated file under this name."""
    import pyarrow

    if not folder.is_dir():
        return None
    try:
        return Table(folder)
    except (OSError, ValueError, KeyError, TypeError, pyarrow.ArrowException) as error:
        logger.warning("%s is damaged and is converted again: %s", folder, error)
        return None


def _remove_leftovers(cache: Path, keep: str) -> None:
    """Removes what processes left when they died during a conversion: where a lock is free, no process is at work."""
    from filelock import FileLock, Timeout

    for leftover in cache.glob(".*.*"):
        digest = leftover.name.split(".")[1].partition("-")[0]
        if leftover.is_dir() and digest != keep:
            try:
                with FileLock(cache / f"{digest}.lock", timeout=0):
                    shutil.rmtree(leftover, ignore_errors=True)
            except Timeout:
                logger.debug("%s is being written", leftover)


def _digest(path: Path, cache: Path) -> str:
    """Returns a hash of the file's content.

    It is remembered with the file's size and modification time, because hashing a gigabyte takes a while.

    Raises:
        DataError: A file that does not exist or cannot be read.
    """
    try:
        with open_regular(path) as file:
            return _digest_of_open(path, file, cache)
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None


def _digest_of_open(path: Path, file: BinaryIO, cache: Path) -> str:
    known = cache / f"known-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:24]}.json"
    stat = os.fstat(file.fileno())
    seen = [FORMAT, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    try:
        content = json.loads(known.read_text(encoding="utf-8"))
        if content["seen"] == seen:
            return str(content["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        logger.debug("the hash of %s is not known yet", path)
    digest = hashlib.blake2b(f"{FORMAT}{path.suffix}".encode(), digest_size=12)
    while block := file.read(1 << 22):
        digest.update(block)
    if time.time() - stat.st_mtime > SETTLED:
        with contextlib.suppress(OSError):  # it only saves time; a cache that cannot be written is reported later
            write_atomically(known, json.dumps({"seen": seen, "digest": digest.hexdigest()}) + "\n")
    return digest.hexdigest()


def _convert(path: Path, folder: Path, reading: Reading) -> None:
    """Converts the records of `path` into `folder`, which appears when it is complete."""
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
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    good = bad = 0
    first: list[str] = []
    unread: Counter[str] = Counter()
    try:
        size = path.stat().st_size
        with (
            tqdm(total=size, desc=f"reading {path.name}", unit="B", unit_scale=True, disable=None, delay=1) as bar,
            pyarrow.OSFile(str(temporary / "records.arrow"), "wb") as sink,
            pyarrow.ipc.new_stream(sink, schema) as writer,
        ):
            for chunk in _chunks(_parsed(path, bar.update, unread, reading)):
                rows = [row for row in chunk if isinstance(row, Row)]
                complaints = [row for row in chunk if isinstance(row, str)]
                good += len(rows)
                bad += len(complaints)
                first += complaints[: KEPT_COMPLAINTS - len(first)]
                columns = [
                    [row.id for row in rows],
                    [_letters(row) for row in rows],
                    [row.texts for row in rows],
                    [row.images for row in rows],
                    [row.full_path for row in rows],
                ]
                arrays = [pyarrow.array(c, field.type) for c, field in zip(columns, schema, strict=True)]
                writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        content = {"rows": good, "count": bad, "first": first, "unread": dict(unread.most_common(KEPT_KEYS))}
        (temporary / "complaints.json").write_text(json.dumps(content), encoding="utf-8")
        for name in ("records.arrow", "complaints.json"):
            with (temporary / name).open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _letters(row: Row) -> str:
    """Returns a letter for each turn of a record."""
    pairs = zip(row.roles, row.learned, strict=True)
    return "".join(_LETTERS[role] if learned else _NOT_LEARNED for role, learned in pairs)


def _parsed(path: Path, progress: Any, unread: Counter[str], reading: Reading) -> Iterator[Row | str]:
    """Yields each record, or the complaint about it."""
    columns = [column for name, column in reading.columns if name == "image"]
    for number, record in enumerate(raw_records(path, progress, tolerant=True, columns=columns)):
        if isinstance(record, BrokenLine):
            yield f"#{number}: {record}"
            continue
        try:
            yield read_record(record, f"#{number}", unread, reading)
        except DataError as error:
            yield str(error)


def _chunks(rows: Iterator[Row | str]) -> Iterator[list[Row | str]]:
    """Yields the rows in lists of at most ROWS, and of about CHARACTERS at most."""
    chunk: list[Row | str] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += sum(map(len, (*row.texts, *row.images))) if isinstance(row, Row) else len(row)
        if len(chunk) >= ROWS or characters >= CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
