"""Provides the samples of a run: the records of its data files, mixed, with image paths that stay below their roots."""

from __future__ import annotations

import copy
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

from zero_ds.config.schema import CAPTION_PROMPT, SourceConfig
from zero_ds.data.archives import Archives, split_root
from zero_ds.data.arrow import Table, cache_folder, load_table
from zero_ds.data.conversations import Turn
from zero_ds.data.files import DataFiles, data_files
from zero_ds.data.formats import DataError, Row, named, quoted
from zero_ds.data.forms import Reading
from zero_ds.data.read_image import is_embedded
from zero_ds.data.shares import Draws, counts_of
from zero_ds.data.stored import ImageFile, Span, StoredImage, is_span
from zero_ds.data.streams import MixedOrder, Shard
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path

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
    images: tuple[ImageFile, ...]
    """Paths below the source's root, or absolute ones that the source allows, whose files may not exist; or images
    inside of other files."""


class Records(Sequence[Sample]):
    """All samples of the sources, mixed by evenly spaced insertion. Indexing reads one memory-mapped row.

    Where sources have shares of their own (`weight`, `repeat` or `count`), an epoch does not take each sample once, and
    the next epoch goes on where this one ends: indices from `len(self)` on are those of later epochs. The same holds
    where a source is streamed.
    """

    in_order: bool
    """True if epochs should take the samples in the order of their indices, because a source is streamed."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        *,
        skip_bad: bool = False,
        permute: int | None = None,
        remedy: str = "data.bad_samples=skip skips them",
        caption_prompt: str = CAPTION_PROMPT,
        share: float = 0.0,
    ) -> None:
        """Opens the data files, converting new ones.

        With `skip_bad`, records that cannot be used are skipped instead of being an error. `permute` is the seed of a
        random order within each source, of which `limit` then takes the first samples. `remedy` is
        the advice in messages about records that cannot be used, and `caption_prompt` the question before captions. A
        `share` of each source is left out at even distances, and is what `held_out` returns.

        Raises:
            ConfigError: No source.
            DataError: A file that cannot be read, or one with a record that cannot be used.
        """
        if not sources:
            raise ConfigError("no data: set data.sources in the recipe to at least one file.")
        self._sources = []
        for number, config in enumerate(sources):
            seed = None if permute is None else [permute, number]
            self._sources.append(_Source(config, seed, skip_bad, remedy, caption_prompt))
        self._held_out = [source.hold_out(share) for source in self._sources]
        self._mix(sources)

    def _mix(self, sources: Sequence[SourceConfig]) -> None:
        lengths = [len(source) for source in self._sources]
        counts = counts_of(sources, lengths)
        self.in_order = any(source.config.stream for source in self._sources)
        orders = [source.order if source.config.stream else None for source in self._sources]
        drawn = self.in_order or counts != lengths
        self._draws = [Draws(*each) for each in zip(lengths, counts, orders, strict=True)] if drawn else None
        self._order = evenly_spaced(counts)
        self._first_places = np.cumsum([0, *lengths])
        """Number of samples of the sources before each."""

    def held_out(self) -> Records | None:
        """Returns the samples that `share` leaves out, each once; None if there are none."""
        pairs = [(source, rows) for source, rows in zip(self._sources, self._held_out, strict=True) if len(rows)]
        if not pairs:
            return None
        rest = copy.copy(self)
        rest._sources = [source.with_rows(rows) for source, rows in pairs]
        rest._held_out = [rows[:0] for _, rows in pairs]
        rest._mix([SourceConfig(path=source.config.path) for source, _ in pairs])
        return rest

    @property
    def epochs_differ(self) -> bool:
        """True if an epoch may take other samples than the one before it."""
        return self._draws is not None

    def names(self) -> list[str]:
        """Returns a name for each source, by its path."""
        stems = [Path(source.config.path).stem or source.config.path for source in self._sources]
        return [stem if stems.count(stem) == 1 else f"{stem}-{number}" for number, stem in enumerate(stems)]

    def source(self, index: int) -> int:
        """Returns the number of a sample's source."""
        return int(self._order[index % len(self)][0])

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
        names: list[Any] = [[table.name for table in source.tables] for source in self._sources]
        return hashlib.sha256(json.dumps([names, len(self)]).encode()).hexdigest()[:16]

    def order(self) -> str:
        """Returns a hash of the rows of each source that are used, in their order."""
        digest = hashlib.sha256()
        for source in self._sources:
            digest.update(np.ascontiguousarray(source.rows, dtype=np.int64).tobytes())
        return digest.hexdigest()[:16]

    @property
    def places(self) -> int:
        """Number of samples of all sources, each counted once."""
        return int(self._first_places[-1])

    def place(self, index: int) -> int:
        """Returns the number of a sample among those of all sources, one source after the other, for any epoch."""
        number, row = self._drawn(index)
        return int(self._first_places[number]) + row

    def at_place(self, place: int) -> Sample:
        """Returns the sample of which `place` is the number."""
        number = int(np.searchsorted(self._first_places, place, side="right")) - 1
        return self._sample(self._sources[number], place - int(self._first_places[number]))

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        number, row = self._drawn(index)
        return self._sample(self._sources[number], row)

    def _sample(self, source: _Source, row: int) -> Sample:
        """Returns the sample of one of the used rows of a source."""
        number, row_of_table = source.locate(row)
        record = source.tables[number][row_of_table]
        parts = zip(record.roles, record.texts, record.learned, strict=True)
        turns = tuple(Turn(role, text, learned) for role, text, learned in parts)
        return Sample(record.id, turns, source.paths(record, number))

    def images(self, index: int) -> int:
        """Returns the number of images of a sample."""
        source, number, row = self._locate(index)
        return source.tables[number].images(row)

    def size(self, index: int) -> int:
        """Returns the number of bytes of a sample's texts."""
        source, number, row = self._locate(index)
        return source.tables[number].size(row)

    def _locate(self, index: int) -> tuple[_Source, int, int]:
        """Returns the source of a sample, the number of its table there and its row in the table."""
        number, row = self._drawn(index)
        source = self._sources[number]
        table, row_of_table = source.locate(row)
        return source, table, row_of_table

    def _drawn(self, index: int) -> tuple[int, int]:
        """Returns the number of a sample's source, and which of its used rows the sample is."""
        epoch = 0
        if self._draws is not None and index >= len(self):
            epoch, index = divmod(index, len(self))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number, row = (int(each) for each in self._order[index])
        if self._draws is not None:
            row = self._draws[number].row(epoch, row)
        return number, row


class _Source:
    """The files of one source, one after the other, and the rows of them that are used."""

    def __init__(
        self, config: SourceConfig, seed: list[int] | None, skip_bad: bool, remedy: str, caption_prompt: str
    ) -> None:
        self.config = config
        found = data_files(config)
        self.files, self.companions = found.files, found.companions
        root, self.allowed = _roots(config, found)
        self.root = root.resolve()
        # links of the hub's cache lead to names without an ending, so the archive is known by the link's own name
        archive = split_root(str(root))
        self.archives = Archives(archive[0], cache_folder(), archive[1]) if archive else None
        reading = Reading(tuple(config.columns.items()), caption_prompt)
        self._seed = seed or [0, 0]
        opened = Shard if config.stream else load_table
        self.tables: Sequence[Table | Shard] = [opened(file, reading) for file in self.files]
        for file, table in zip(self.files, self.tables, strict=True):
            if table.complaints.count:
                _report_unusable(file, table, skip_bad, remedy)
        self._starts = np.cumsum([0, *(len(table) for table in self.tables)])
        rows: Any = np.arange(self._starts[-1])
        if config.images_only:
            pairs = zip(self._starts, self.tables, strict=False)
            indexed = [(start, table) for start, table in pairs if isinstance(table, Table)]
            rows = np.concatenate([start + table.with_images() for start, table in indexed])
        if seed is not None and not config.stream:
            rows = np.random.default_rng(seed).permutation(rows)
        self._rows = rows[: config.limit]
        if not len(self._rows):
            what = "sample with an image; drop images_only or the file" if config.images_only else "usable sample"
            raise DataError(f"data file {config.path} has no {what}")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def rows(self) -> Any:
        """The rows that are used, in their order: (n,)."""
        return self._rows

    def order(self, number: int) -> MixedOrder:
        """Returns the order of the used rows in a pass over a streamed source, counted from 0, as indices."""
        return MixedOrder(self._shares(), [*self._seed, number], self._read_ahead)

    def _shares(self) -> Any:
        """Returns the number of used rows of each table: (tables,)."""
        return np.diff(np.searchsorted(self._rows, self._starts))

    def _read_ahead(self, number: int) -> None:
        """Reads the shard whose turn is next, in a worker, which can do so while it waits."""
        from torch.utils.data import get_worker_info

        table = self.tables[number]
        if isinstance(table, Shard) and get_worker_info() is not None:
            table.read_ahead()

    def hold_out(self, share: float) -> Any:
        """Removes a share of the rows, at even distances, and returns them."""
        number = np.arange(len(self._rows) + 1)
        taken = np.diff(np.floor(number * share)) > 0
        rows = self._rows[taken]
        self._rows = self._rows[~taken]
        return rows

    def with_rows(self, rows: Any) -> _Source:
        """Returns the source with other rows."""
        other = copy.copy(self)
        other._rows = rows
        return other

    def locate(self, row: int) -> tuple[int, int]:
        """Returns the number of the table of one of the used rows, and its row there."""
        row_of_source = self._rows[row]
        number = int(np.searchsorted(self._starts, row_of_source, side="right")) - 1
        return number, int(row_of_source - self._starts[number])

    def paths(self, record: Row, number: int) -> tuple[ImageFile, ...]:
        """Returns the images of a record of one of the tables, which may be opened.

        Raises:
            DataError: A path that leaves the root, unless record and source both allow it.
        """
        if not record.full_path:
            return tuple(self._image(name, record, number) for name in record.images)
        if not self.config.full_path:
            raise DataError(
                f"sample {named(record.id)} names images by full_path, outside of the data root; allow that for this "
                "source with full_path: true"
            )
        for name in record.images:
            if not (is_embedded(name) or is_span(name) or Path(name).is_absolute()):
                raise DataError(
                    f"sample {named(record.id)}: full_path {quoted(name, PATH_SHOWN)} is not an absolute path"
                )
        return tuple(self._image(n, record, number) if is_span(n) else n for n in record.images)

    def _image(self, name: str, record: Row, number: int) -> ImageFile:
        if is_embedded(name):
            return name
        if is_span(name):
            return StoredImage(str(self.files[number]), Span.parse(name))
        if self.archives is not None:
            return self.archives.find(name, record.id)
        return str(inside(self.root, name, record.id, self.allowed, LINKS))


def _roots(config: SourceConfig, found: DataFiles) -> tuple[Path, tuple[Path, ...]]:
    """Returns the folder (or archive) of a source's images, and further folders into which their paths may lead."""
    own_folder = found.files[0].parent if len(found.files) == 1 else found.folder
    allowed = [home_path(folder).resolve() for folder in config.allowed_roots]
    root = home_path(config.root or own_folder)
    if found.fetched:
        if config.root and not root.is_absolute() and not root.exists():
            root = found.folder / config.root
        allowed.append((found.folder.parent.parent / "blobs").resolve())  # where the cache has the files themselves
    return root, tuple(allowed)


def _report_unusable(file: Path, table: Table | Shard, skip_bad: bool, remedy: str) -> None:
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
