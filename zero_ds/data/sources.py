"""Provides the samples of a run: the records of its data files, mixed, with image paths that stay below their roots."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from zero_ds.config.schema import SourceConfig
from zero_ds.data.arrow import Table, load_table
from zero_ds.data.conversations import Turn
from zero_ds.data.files import data_files
from zero_ds.data.formats import DataError, Row, named, quoted
from zero_ds.data.read_image import is_embedded
from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

LINKS = "; if you trust it, name that folder in allowed_roots of this source (zero-ds data check --allow-root)"
"""Advice in messages about images that are reached through links out of their root."""
PATH_SHOWN = 300
"""Number of characters that a message shows of a path from data."""


@dataclass(frozen=True)
class Sample:
    """A checked conversation with its images."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths below the source's root, or absolute ones that the source allows. The files may not exist."""


class Records(Sequence[Sample]):
    """All samples of the sources, mixed by evenly spaced insertion. Indexing reads one memory-mapped row."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        skip_bad: bool = False,
        permute: int | None = None,
        remedy: str = "data.bad_samples=skip skips them",
    ) -> None:
        """Opens the data files, converting new ones.

        With `skip_bad`, records that cannot be used are skipped instead of being an error. `permute` is the seed of a
        random order within each source, of which `limit` then takes the first samples. `remedy` is
        the advice in messages about records that cannot be used.

        Raises:
            ConfigError: No source.
            DataError: A file that cannot be read, or one with a record that cannot be used.
        """
        if not sources:
            raise ConfigError("no data: set data.sources in the recipe to at least one file.")
        self._sources = []
        for number, config in enumerate(sources):
            seed = None if permute is None else [permute, number]
            self._sources.append(_Source(config, seed, skip_bad, remedy))
        self._order = evenly_spaced([len(source) for source in self._sources])

    def complaints(self) -> Iterator[tuple[list[str], int]]:
        """Yields, for each data file, the reasons why records were skipped and the number of such records.

        The number may be larger, because not every reason is kept.
        """
        for source in self._sources:
            for file, table in zip(source.files, source.tables, strict=True):
                yield [f"{file} {sentence}" for sentence in table.complaints.first], table.complaints.count

    def unread(self) -> dict[str, int]:
        """Returns the number of records with each key that is not read, in all data files, the most frequent first."""
        counts: Counter[str] = Counter()
        for source in self._sources:
            for table in source.tables:
                counts.update(table.unread)
        return dict(counts.most_common())

    def companions(self) -> list[Path]:
        """Returns the files of folders that hold no samples and are skipped."""
        return [file for source in self._sources for file in source.companions]

    def content(self) -> str:
        """Returns a hash of the samples' texts and image paths, which follows from the content of their files."""
        names = [[table.name for table in source.tables] for source in self._sources]
        return hashlib.sha256(json.dumps([names, len(self)]).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        source, table, row = self._locate(index)
        record = table[row]
        parts = zip(record.roles, record.texts, record.learned, strict=True)
        turns = tuple(Turn(role, text, learned) for role, text, learned in parts)
        return Sample(record.id, turns, source.paths(record))

    def images(self, index: int) -> int:
        """Returns the number of images of a sample."""
        _, table, row = self._locate(index)
        return table.images(row)

    def size(self, index: int) -> int:
        """Returns the number of bytes of a sample's texts."""
        _, table, row = self._locate(index)
        return table.size(row)

    def _locate(self, index: int) -> tuple[_Source, Table, int]:
        """Returns the source of a sample, its table there and its row in the table."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, row = self._order[index]
        source = self._sources[number]
        table, row_of_table = source.locate(int(row))
        return source, table, row_of_table


class _Source:
    """The files of one source, one after the other, and the rows of them that are used."""

    def __init__(self, config: SourceConfig, seed: list[int] | None, skip_bad: bool, remedy: str) -> None:
        self.config = config
        self.files, self.companions = data_files(config.path, config.files)
        own_folder = self.files[0].parent if len(self.files) == 1 else config.path
        self.root = Path(config.root or own_folder).expanduser().resolve()
        self.allowed = tuple(Path(folder).expanduser().resolve() for folder in config.allowed_roots)
        self.tables = [load_table(file) for file in self.files]
        for file, table in zip(self.files, self.tables, strict=True):
            if table.complaints.count:
                _report_unusable(file, table, skip_bad, remedy)
        self._starts = np.cumsum([0, *(len(table) for table in self.tables)])
        rows: Any = np.arange(self._starts[-1])
        if config.images_only:
            pairs = zip(self._starts, self.tables, strict=False)
            rows = np.concatenate([start + table.with_images() for start, table in pairs])
        if seed is not None:
            rows = np.random.default_rng(seed).permutation(rows)
        self._rows = rows[: config.limit]
        if not len(self._rows):
            what = "sample with an image; drop images_only or the file" if config.images_only else "usable sample"
            raise DataError(f"data file {config.path} has no {what}")

    def __len__(self) -> int:
        return len(self._rows)

    def locate(self, row: int) -> tuple[Table, int]:
        """Returns the table of one of the used rows, and its row there."""
        row_of_source = self._rows[row]
        number = int(np.searchsorted(self._starts, row_of_source, side="right")) - 1
        return self.tables[number], int(row_of_source - self._starts[number])

    def paths(self, record: Row) -> tuple[str, ...]:
        """Returns the paths of a record's images, which may be opened.

        Raises:
            DataError: A path that leaves the root, unless record and source both allow it.
        """
        if not record.full_path:
            return tuple(
                name if is_embedded(name) else str(inside(self.root, name, record.id, self.allowed, LINKS))
                for name in record.images
            )
        if not self.config.full_path:
            raise DataError(
                f"sample {named(record.id)} names images by full_path, outside of the data root; allow that for this "
                "source with full_path: true"
            )
        for name in record.images:
            if not (is_embedded(name) or Path(name).is_absolute()):
                raise DataError(
                    f"sample {named(record.id)}: full_path {quoted(name, PATH_SHOWN)} is not an absolute path"
                )
        return record.images


def _report_unusable(file: Path, table: Table, skip_bad: bool, remedy: str) -> None:
    """Rejects a file with records that cannot be used, or logs how many are skipped."""
    count, first = table.complaints.count, table.complaints.first[0]
    if not skip_bad:
        more = f" ({count:,} such records; {remedy})" if count > 1 else ""
        raise DataError(f"{file} {first}{more}")
    logger.warning(
        "%s: %s of %s records cannot be used and are skipped; the first: %s",
        file,
        f"{count:,}",
        f"{count + len(table):,}",
        first,
    )


def evenly_spaced(lengths: Sequence[int]) -> Any:
    """Mixes sources of the given lengths so that each is spread evenly over the whole, with its own order kept.

    Row i of a source of n rows is at relative position (i + 1/2) / n. Returns (source, row) pairs: (total, 2) int32.
    """
    source = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    row = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    size = np.repeat(np.asarray(lengths, dtype=np.float64), lengths)
    order = np.lexsort((row, source, (row + 0.5) / size))
    return np.stack([source[order], row[order]], axis=1)


def inside(root: Path, name: str, sample_id: str, allowed: Sequence[Path] = (), remedy: str = "") -> Path:
    """Returns the path of `name`, which is relative to `root` or an absolute path below it.

    `allowed` are further folders into which paths may lead, through symbolic links as well. `remedy` is the
    advice in messages about links that lead elsewhere.

    Raises:
        DataError: A path that leaves the root and the allowed folders, or one that leads nowhere.
    """
    relative = Path(name)
    where = f"sample {named(sample_id)}: image path {quoted(name, PATH_SHOWN)}"
    try:
        path = _real_folder(root / relative.parent) / relative.name
        if path.is_symlink() or relative.name == "..":
            path = path.resolve()
    except (
        OSError,
        RuntimeError,
    ) as error:  # a path that is too long, or a link to itself (RuntimeError before Python 3.13)
        reason = getattr(error, "strerror", None) or "a link leads to itself"
        raise DataError(f"{where} cannot be followed: {reason}") from None
    if any(path.is_relative_to(folder) for folder in (root, *allowed)):
        return path
    reason = f"leaves the data root {root}"
    if ".." not in relative.parts:
        if not relative.is_absolute() or relative.is_relative_to(root):
            reason += f" through a link to {named(str(path.parent), PATH_SHOWN)}"
        reason += remedy
    raise DataError(f"{where} {reason}")


@functools.lru_cache(maxsize=4096)
def _real_folder(folder: Path) -> Path:
    """Returns a folder's path without links, remembered because each part of a path costs a disk access."""
    return folder.resolve()
