"""Data files -> memory-mapped records that ranks and workers share.

A file in LLaVA's format is a JSON list of `{"id", "image" (optional), "conversations": [{"from", "value"}, ...]}`. It
is checked and converted once into Arrow beside the library's cache, under a name that follows from its content.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zero_ds.config import ConfigError, SourceConfig
from zero_ds.data.conversations import PLACEHOLDER, Turn

logger = logging.getLogger(__name__)

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
FORMAT = 1
"""Changes when the meaning of the converted records changes, so that old caches are not read."""


class DataError(ValueError):
    """A data file or a sample that cannot be used; the message names file and sample."""


@dataclass(frozen=True)
class Sample:
    """One conversation with its pictures, checked."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths of existing-by-name files inside the source's root."""


class Records(Sequence[Sample]):
    """All samples of the sources, mixed by evenly spaced insertion; item access reads one memory-mapped row."""

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        if not sources:
            raise ConfigError("no data: set data.sources in the recipe to at least one file.")
        self._tables = [_converted(Path(source.path)) for source in sources]
        self._roots = [Path(source.root or Path(source.path).parent).resolve() for source in sources]
        self._rows = [_used_rows(table, source) for table, source in zip(self._tables, sources, strict=True)]
        self._order = evenly_spaced([len(rows) for rows in self._rows])

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Sample:  # type: ignore[override]
        source, record = self._record(index)
        turns = tuple(Turn(role, text) for role, text in zip(record["roles"], record["texts"], strict=True))
        images = tuple(str(inside(self._roots[source], name, record["id"])) for name in record["images"])
        return Sample(record["id"], turns, images)

    def images(self, index: int) -> int:
        """Number of pictures of a sample."""
        return len(self._record(index)[1]["images"])

    def characters(self, index: int) -> int:
        """Length of a sample's texts."""
        return sum(map(len, self._record(index)[1]["texts"]))

    def _record(self, index: int) -> tuple[int, dict[str, Any]]:
        source, row = self._order[index]
        return source, self._tables[source][int(self._rows[source][row])]


def _used_rows(table: Any, source: SourceConfig) -> Sequence[int]:
    """Rows of a file that a source uses, in their order.

    Raises:
        DataError: none is left.
    """
    rows: Sequence[int] = range(len(table))
    if source.images_only:
        import pyarrow.compute as arrow

        rows = arrow.indices_nonzero(arrow.list_value_length(table.data.column("images"))).to_numpy()
        if not len(rows):
            raise DataError(f"data file {source.path} has no sample with a picture; drop images_only or the file")
    return rows[: source.limit] if source.limit else rows


def evenly_spaced(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Mixes sources so that each is spread evenly over the whole, its own order kept.

    Returns (source, row) pairs: row i of a source of n stands at relative position (i + 1/2) / n.
    """
    placed = [((row + 0.5) / n, source, row) for source, n in enumerate(lengths) for row in range(n)]
    return [(source, row) for _, source, row in sorted(placed)]


def inside(root: Path, name: str, sample_id: str) -> Path:
    """The file `name` below `root`.

    Raises:
        DataError: an absolute path, or one that leaves the root, also through a symbolic link.
    """
    path = (root / name).resolve()
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise DataError(f"sample {sample_id}: image path {name!r} leaves the data root {root}")
    return path


def parse(record: Any, where: str) -> dict[str, Any]:
    """Checks one record of LLaVA's format and returns its row: id, roles, texts, images.

    Raises:
        DataError: a missing key, an unknown role, an empty turn, no question or answer, placeholders that do not match
            the images.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(record).__name__}")
    sample = f"{where}: sample {record.get('id', '?')}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{sample} has no 'conversations'")
    roles, texts = [], []
    for number, turn in enumerate(turns):
        role = turn.get("from") if isinstance(turn, dict) else None
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise DataError(f"{sample}, turn {number}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{sample}, turn {number}: the text is empty")
        if not _writable(text):
            raise DataError(f"{sample}, turn {number}: the text is no valid Unicode (half a surrogate pair)")
        roles.append(ROLES[role])
        texts.append(text)
    for role, what in (("user", "question"), ("assistant", "answer to learn from")):
        if role not in roles:
            raise DataError(f"{sample} has no {what}")
    if not _writable(str(record.get("id"))):
        raise DataError(f"{sample}: the id is no valid text")
    image = record.get("image", [])
    images = [image] if isinstance(image, str) else image or []
    if not isinstance(images, list) or not all(isinstance(name, str) and _is_path(name) for name in images):
        raise DataError(f"{sample}: 'image' must be a path or a list of paths")
    placeholders = sum(t.count(PLACEHOLDER) for t, role in zip(texts, roles, strict=True) if role == "user")
    if images and placeholders == 0:
        first = roles.index("user")
        texts[first] = f"{PLACEHOLDER}\n{texts[first]}"
        placeholders = 1
    if placeholders != len(images):
        raise DataError(f"{sample} has {len(images)} images for {placeholders} {PLACEHOLDER} placeholders")
    return {"id": str(record.get("id", where)), "roles": roles, "texts": texts, "images": images}


def _is_path(name: str) -> bool:
    return bool(name) and "\0" not in name and _writable(name)


def _writable(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON can hold half a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> list[Any]:
    """Reads a JSON list.

    Raises:
        DataError: missing or unreadable file, invalid JSON, something other than a list.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"data file {path} cannot be read: {error}") from None
    if not isinstance(content, list) or not content:
        raise DataError(f"data file {path} must hold a list of samples, and at least one")
    return content


def _converted(path: Path) -> Any:
    """The file's records as a memory-mapped Arrow data set, made now unless an earlier run did."""
    import datasets

    if not path.is_file():
        raise DataError(f"there is no data file {path}")
    digest = hashlib.sha256(f"{FORMAT}".encode())
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "zero_ds" / digest.hexdigest()[:24]
    if not folder.is_dir():
        rows = [parse(record, f"{path} #{number}") for number, record in enumerate(read_json(path))]
        features = datasets.Features(
            id=datasets.Value("string"),
            roles=datasets.List(datasets.Value("string")),
            texts=datasets.List(datasets.Value("string")),
            images=datasets.List(datasets.Value("string")),
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent))
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows, features=features).save_to_disk(temporary / "data")
        try:
            (temporary / "data").rename(folder)
        except OSError:  # another process was faster; its folder has the same content
            logger.debug("%s was converted by another process", path)
        shutil.rmtree(temporary, ignore_errors=True)
    return datasets.load_from_disk(str(folder))
