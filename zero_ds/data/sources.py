"""The samples of a run: the records of its data files, mixed, with paths that stay below their roots."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.config.schema import SourceConfig
from zero_ds.data.arrow import Table, table_of
from zero_ds.data.conversations import Turn
from zero_ds.data.files import data_files
from zero_ds.data.formats import DataError, Row, named, quoted
from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

PATH_SHOWN = 300
"""Characters that a message shows of a path from data."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its pictures, checked."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths of existing-by-name files inside the source's root."""


class Records(Sequence[Sample]):
    """All samples of the sources, mixed by evenly spaced insertion; item access reads one memory-mapped row."""

    def __init__(self, sources: Sequence[SourceConfig], *, skip_bad: bool = False, permute: int | None = None) -> None:
        """skip_bad: leave out records that cannot be used, instead of refusing their file; permute: seed of a random
        order within each source, of which `limit` then takes the first.

        Raises:
            ConfigError: no source. DataError: a file that cannot be read, or has a record that cannot be used.
        """
        if not sources:
            raise ConfigError("no data: set data.sources in the recipe to at least one file.")
        seeds = [None if permute is None else [permute, number] for number in range(len(sources))]
        self._sources = [_Source(*each, skip_bad) for each in zip(sources, seeds, strict=True)]
        self._order = evenly_spaced([len(source) for source in self._sources])

    def complaints(self) -> Iterator[tuple[list[str], int]]:
        """For each data file the reasons why records were left out, and their number, which may be larger."""
        for source in self._sources:
            for file, table in zip(source.files, source.tables, strict=True):
                yield [f"{file} {sentence}" for sentence in table.complaints.first], table.complaints.count

    def content(self) -> str:
        """Hash of all samples' texts and names of pictures, by the content of their files."""
        names = [[table.name for table in source.tables] for source in self._sources]
        return hashlib.sha256(json.dumps([names, len(self)]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        source, table, row = self._place(index)
        record = table[row]
        turns = tuple(Turn(role, text) for role, text in zip(record.roles, record.texts, strict=True))
        return Sample(record.id, turns, source.paths(record))

    def images(self, index: int) -> int:
        """Number of pictures of a sample."""
        _, table, row = self._place(index)
        return table.images(row)

    def size(self, index: int) -> int:
        """Bytes of a sample's texts."""
        _, table, row = self._place(index)
        return table.size(row)

    def _place(self, index: int) -> tuple[_Source, Table, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        source, row = self._order[index]
        return self._sources[source], *self._sources[source].place(int(row))


class _Source:
    """The files of one source, one behind the other, and the rows of them that are used."""

    def __init__(self, config: SourceConfig, seed: list[int] | None, skip_bad: bool) -> None:
        self.config = config
        self.files = data_files(config.path, config.files)
        beside = self.files[0].parent if len(self.files) == 1 else config.path
        self.root = Path(config.root or beside).expanduser().resolve()
        self.tables = [table_of(file) for file in self.files]
        for file, table in zip(self.files, self.tables, strict=True):
            if table.complaints.count:
                _complain(file, table, skip_bad)
        self._starts = np.cumsum([0, *(len(table) for table in self.tables)])
        rows: Any = np.arange(self._starts[-1])
        if config.images_only:
            pairs = zip(self._starts, self.tables, strict=False)
            rows = np.concatenate([start + table.with_images() for start, table in pairs])
        if seed is not None:
            rows = np.random.default_rng(seed).permutation(rows)
        self._rows = rows[: config.limit]
        if not len(self._rows):
            what = "sample with a picture; drop images_only or the file" if config.images_only else "usable sample"
            raise DataError(f"data file {config.path} has no {what}")

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, row: int) -> tuple[Table, int]:
        number = int(np.searchsorted(self._starts, place := self._rows[row], side="right")) - 1
        return self.tables[number], int(place - self._starts[number])

    def paths(self, record: Row) -> tuple[str, ...]:
        """The record's pictures as paths that may be opened."""
        if not record.full_path:
            return tuple(str(inside(self.root, name, record.id)) for name in record.images)
        if not self.config.full_path:
            raise DataError(
                f"sample {named(record.id)} names pictures by full_path, outside of the data root; allow that for this "
                "source with full_path: true"
            )
        for name in record.images:
            if not Path(name).is_absolute():
                raise DataError(f"sample {named(record.id)}: full_path {quoted(name, PATH_SHOWN)} is no absolute path")
        return record.images


def _complain(file: Path, table: Table, skip_bad: bool) -> None:
    """Refuses a file with records that cannot be used, or says how many are left out."""
    count, first = table.complaints.count, table.complaints.first[0]
    if not skip_bad:
        more = f" ({count:,} such records; data.bad_samples=skip leaves them out)" if count > 1 else ""
        raise DataError(f"{file} {first}{more}")
    logger.warning(
        "%s: %s of %s records cannot be used and are left out; the first: %s",
        file,
        f"{count:,}",
        f"{count + len(table):,}",
        first,
    )


def evenly_spaced(lengths: Sequence[int]) -> Any:
    """Mixes sources so that each is spread evenly over the whole, its own order kept.

    Row i of a source of n stands at relative position (i + 1/2) / n. Returns (source, row) pairs: (total, 2), int32.
    """
    source = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    row = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    size = np.repeat(np.asarray(lengths, dtype=np.float64), lengths)
    order = np.lexsort((row, source, (row + 0.5) / size))
    return np.stack([source[order], row[order]], axis=1)


def inside(root: Path, name: str, sample_id: str) -> Path:
    """The file `name` below `root`.

    Raises:
        DataError: an absolute path, one that leaves the root, also through a symbolic link, or one that leads nowhere.
    """
    relative = Path(name)
    where = f"sample {named(sample_id)}: image path {quoted(name, PATH_SHOWN)}"
    try:
        path = _real_folder(root / relative.parent) / relative.name
        if path.is_symlink() or relative.name == "..":
            path = path.resolve()
    except (OSError, RuntimeError) as error:  # too long; a link to itself, which Python called a RuntimeError
        reason = getattr(error, "strerror", None) or "a link leads to itself"
        raise DataError(f"{where} cannot be followed: {reason}") from None
    if relative.is_absolute() or not path.is_relative_to(root):
        raise DataError(f"{where} leaves the data root {root}")
    return path


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> Path:
    """A folder's own path; few folders hold many pictures, and each part of a path costs a look at the disk."""
    return folder.resolve()
