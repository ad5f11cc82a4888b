"""Finds data files (JSON lists, JSON lines, Parquet, Arrow) and reads their raw records one at a time, at any size."""

from __future__ import annotations

import glob
import io
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from zero_ds.config.schema import SourceConfig
from zero_ds.data import webdataset
from zero_ds.data.archives import split_root
from zero_ds.data.embedded_images import read_arrow, read_parquet
from zero_ds.data.formats import FORMATS, TWICE, DataError, json_object, named, quoted
from zero_ds.data.layout import check_shards, chosen
from zero_ds.data.webdataset import read_webdataset
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path, open_regular

logger = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".parquet", ".arrow")
"""Endings of the names of data files."""
BLOCK = 1 << 22
"""Characters of a JSON list that are read at a time."""
LONGEST = 1 << 26
"""Characters that a single record has at most: a file whose first string is never closed must not fill the memory."""
LONGEST_ESCAPE = 16
"""A parse error this close to the end of the buffer may only mean that more input is needed."""
SHARD = ".tar"
"""Ending of the names of WebDataset shards, which are data files where there are no others."""
IMAGES = tuple(f".{ending}" for ending in webdataset.IMAGES)
"""Endings of the names of images, which are fetched with the data files of a hub data set."""

Progress = Callable[[int], object]
"""Called with the number of further bytes that have been read."""

_UNDECODED_BYTE = re.compile("[\udc80-\udcff]")
_ID = re.compile(r'"(?:id|idx)"\s*:\s*(?:"((?:[^"\\]|\\.){1,200})"|(\d{1,30}))')


class BrokenLine(NamedTuple):
    """A line that does not hold a record."""

    number: int
    """Number of the line, counted from 1."""
    reason: str
    id: str | None
    """Id of the sample, if the line shows one."""

    def __str__(self) -> str:
        sample = "" if self.id is None else f" (sample {named(self.id)})"
        return f"line {self.number}{sample}: {self.reason}"


class DataFiles(NamedTuple):
    """The files that a source stands for."""

    files: list[Path]
    companions: list[Path]
    """Files of the same folder that hold no samples, such as dataset_info.json."""
    folder: Path
    """Folder of the data set, or of its only file."""
    fetched: bool = False
    """True if the folder is in the cache of the hub's client."""


def data_files(source: SourceConfig) -> DataFiles:
    """Returns the files that a source's `path` stands for: itself, those of a folder, or those of a hub data set.

    `files` selects files of a folder or hub data set, such as `data/math-*`, and so do `subset` and `split`; without
    them, all files are taken, but for hidden files and those that describe the others.

    Raises:
        DataError: Nothing is there, or a shard is missing.
        ConfigError: A hub id that cannot be fetched, or a pattern that leaves the folder.
    """
    path, pattern = source.path, source.files
    if pattern and (Path(pattern).is_absolute() or ".." in Path(pattern).parts):
        raise ConfigError(f"files={quoted(pattern)} must stay below {named(path, 1000)}; write it relative to that.")
    local = home_path(path)
    try:
        if local.is_file():
            return DataFiles([local], [], local.parent)
        folder = local.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(
            f"data file {quoted(path)} cannot be found: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not folder:
        if path.startswith(("http://", "https://")):
            raise DataError(f"{path} is an address; fetch it first, for example with `curl -LO {path}`")
        if local.exists():
            raise DataError(f"data file {path} is not a regular file")
        if local.suffix in (*SUFFIXES, SHARD) or path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise DataError(f"data file {path} does not exist")
        local = _fetched(source)
    try:
        inside = sorted(file for file in local.glob(pattern or "**/*") if file.is_file())
        found = [file for file in inside if file.suffix in SUFFIXES]
        shards = [file for file in inside if file.suffix == SHARD]
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"files={quoted(pattern)} is not a valid pattern ({error}); write one such as data/math-*."
        ) from None
    if shards and all(_is_companion(file, local) for file in found):  # such as sizes.json
        found = sorted([*found, *shards])
    if found and (source.subset or source.split):
        found = _chosen(source, local, found)
    if not found:
        what = f"file that matches {pattern!r}" if pattern else f"file that ends in {', '.join((*SUFFIXES, SHARD))}"
        raise DataError(f"{path} holds no {what}")
    companions = {file: None for file in found if _is_companion(file, local)}  # in the order of the files
    if len(companions) == len(found):
        raise DataError(f"{path} holds no samples: {named(found[0].name)} holds one object, not a list of samples")
    for file in companions:
        logger.warning("%s is skipped: it is hidden or describes other files, and holds no samples", file)
    files = [file for file in found if file not in companions]
    if pattern is None:
        check_shards(path, [file.relative_to(local).as_posix() for file in files])
    return DataFiles(files, [*companions], local, fetched=not folder)


def _chosen(source: SourceConfig, folder: Path, files: list[Path]) -> list[Path]:
    """Returns the files of the source's subset and split."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    names = [file.relative_to(folder).as_posix() for file in files]
    return [folder / name for name in chosen(source.path, text, names, source.subset, source.split)]


def _is_companion(file: Path, folder: Path) -> bool:
    """Returns whether a file of a folder holds no samples: a hidden one, or one with a single object about the others.

    Raises:
        DataError: A file that cannot be read.
    """
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return True
    if file.suffix == ".arrow" and file.name.startswith("cache-"):  # as `datasets` leaves behind
        return True
    return file.suffix == ".json" and file.stat().st_size <= LONGEST and _single_object(file) is not None


def _single_object(path: Path) -> dict[str, Any] | None:
    """Returns the content of a file that holds one JSON object without turns; None for any other file."""
    if _first_character(path) != "{":
        return None
    try:
        with open_regular(path) as file:
            content = json.loads(file.read(LONGEST).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return None if any(content.get(key) for key in FORMATS) else content


def _first_character(path: Path) -> str:
    """Returns the first character of a text file that is not white space; "" if there is none.

    Raises:
        DataError: A file that cannot be read.
    """
    try:
        with open_regular(path) as file:
            while block := file.read(1 << 16):
                if text := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                    return text[:1].decode("ascii", "replace")
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"data file {path} cannot be read: {error.strerror or error}") from None
    return ""


def _fetched(source: SourceConfig) -> Path:
    """Returns the folder of a hub data set, fetched as far as it is not in the cache."""
    import huggingface_hub

    name = source.path
    options: dict[str, Any] = {"repo_type": "dataset", "revision": source.revision}
    try:
        if source.files:
            wanted = [source.files]
        elif source.subset or source.split:
            wanted = _fetched_part(source, options)
        else:
            endings = SUFFIXES if source.root else SUFFIXES + IMAGES
            wanted = [f"**{suffix}" for suffix in endings] + [f"*{suffix}" for suffix in endings]
        if source.root and not Path(source.root).is_absolute():  # it may be in the data set
            archive = split_root(source.root)
            wanted += [archive[0] if archive else source.root, f"{source.root.rstrip('/')}/**"]
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted, **options))
    except DataError:
        raise
    except Exception as error:  # the hub client raises many kinds; each means that the data cannot be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"'{name}' is not a local file or folder and could not be fetched from the hub: "
            f"{reason[:200].rstrip('. ')}; give a local path, or check the network, the id and your access token."
        ) from None


def _fetched_part(source: SourceConfig, options: dict[str, Any]) -> list[str]:
    """Returns patterns of the files of a subset and split, so that no others are fetched."""
    import huggingface_hub

    folder = Path(huggingface_hub.snapshot_download(source.path, allow_patterns=["README.md"], **options))
    try:
        names = huggingface_hub.list_repo_files(source.path, **options)
    except Exception:  # without the network, the cache has what there is
        names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    files = sorted(name for name in names if name.endswith(SUFFIXES))
    found = _chosen(source, folder, [folder / name for name in files])
    return ["README.md", *(glob.escape(file.relative_to(folder).as_posix()) for file in found)]


def raw_records(
    path: Path, progress: Progress = lambda _: None, tolerant: bool = False, columns: Sequence[str] = ()
) -> Iterator[Any]:
    """Yields every record of a file.

    In tables, a span takes the place of an image; `columns` are names of columns with images, besides the usual
    ones.

    If `tolerant`, a broken line of JSON lines comes as a BrokenLine, and bytes that are not UTF-8 come as lone
    surrogates in the texts, which `formats.parse` rejects sample by sample.

    Raises:
        DataError: A missing or unreadable file, invalid JSON or Parquet, or no record at all.
    """
    tables = {".parquet": read_parquet, ".arrow": read_arrow, SHARD: read_webdataset}
    name = f"data file {path} cannot be read"
    empty = True
    try:
        if path.suffix in tables:
            records = tables[path.suffix](path, progress, columns)
        else:
            records = _reader(path)(path, progress, tolerant)
        for record in records:
            empty = False
            if isinstance(record, BrokenLine) and not tolerant:
                raise DataError(f"{name}: {record}")
            yield record
    except FileNotFoundError:
        raise DataError(f"data file {path} does not exist") from None
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None
    if empty:
        raise _not_a_list(path)


def _reader(path: Path) -> Callable[[Path, Progress, bool], Iterator[Any]]:
    """Returns the reader of a file's format. Lists of JSON and lines of JSON are told apart by the first character.

    Raises:
        DataError: A file that cannot be read, or one with a single object that is not a sample.
    """
    first = _first_character(path)
    if path.suffix == ".jsonl":
        return _json_list if first == "[" else _json_lines
    if first != "{":
        return _json_list
    if (content := _single_object(path)) is not None:
        if content and all(isinstance(value, dict) for value in content.values()):
            return _records_by_id
        raise _not_a_list(path, f"; it holds one object with the keys {quoted(list(content))}")
    return _json_lines


def _records_by_id(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    """Yields the records of one object that holds them by their ids, as visual question answering sets often do."""
    with open_regular(path) as file:
        content = file.read(LONGEST)
    progress(len(content))
    text = content.decode("utf-8-sig", "surrogateescape" if tolerant else "strict")
    for key, record in json.loads(text, object_pairs_hook=json_object).items():
        if key == TWICE:
            raise DataError(f"data file {path} has two records with the id {named(str(record))}; remove one")
        yield record if "id" in record else {"id": key, **record}


def _not_a_list(path: Path, detail: str = "") -> DataError:
    return DataError(f"data file {path} must hold a list of samples, and at least one{detail}")


def _json_list(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    with (
        open_regular(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape") as text,  # type: ignore[type-var]
    ):
        yield from _JsonList(path, file, text, progress, tolerant).elements()


class _JsonList:
    """Decodes the elements of a JSON list one by one, from a buffer that holds little more than one element.

    No library does this under the conditions of training data; docs/decisions.md lists those that were tried.
    """

    def __init__(self, path: Path, file: BinaryIO, text: TextIO, progress: Progress, tolerant: bool) -> None:
        self._path = path
        self._file = file
        self._text = text
        """Decoded content of the file. Bytes that are not UTF-8 become lone surrogates."""
        self._progress = progress
        self._tolerant = tolerant
        self._decoder = json.JSONDecoder(object_pairs_hook=json_object)
        self._buffer = ""
        self._place = 0
        """Index into the buffer of the next character."""
        self._passed = 0
        """Number of the file's characters before the buffer."""
        self._block = BLOCK
        """Number of characters to read next."""

    def elements(self) -> Iterator[Any]:
        """Yields each element.

        Raises:
            DataError: Text that is not a list in JSON, with the position of the error in characters.
        """
        if self._next_character() != "[":
            raise _not_a_list(self._path)
        self._place += 1
        separator = ","
        if self._next_character() == "]":
            self._place += 1
            separator = "]"
        while separator == ",":
            self._inside()
            yield self._element()
            separator = self._inside()
            if separator not in (",", "]"):
                raise self._broken("a comma is missing")
            self._place += 1
        if self._next_character():
            raise self._broken("text follows the end of the list")

    def _inside(self) -> str:
        """Returns the next character of a list that has not ended."""
        character = self._next_character()
        if not character:
            raise self._broken("it ends in the middle of the list")
        return character

    def _next_character(self) -> str:
        """Skips white space and returns the character after it, without passing it; "" at the end of the file."""
        while True:
            while self._place < len(self._buffer) and self._buffer[self._place].isspace():
                self._place += 1
            if self._place < len(self._buffer):
                return self._buffer[self._place]
            if not self._read_more():
                return ""

    def _element(self) -> Any:
        """Decodes the element at the current place and passes it, reading as much of the file as it takes."""
        while True:
            try:
                element, end = self._decoder.raw_decode(self._buffer, self._place)
            except RecursionError:
                raise self._broken("objects nested too deeply") from None
            except json.JSONDecodeError as error:
                position = self._passed + error.pos
                if self._may_go_on(error) and self._read_more():
                    continue
                raise self._broken(error.msg, min(position, self._passed + len(self._buffer))) from None
            except ValueError:  # int() of thousands of digits
                raise self._broken("a number of too many digits") from None
            length = end - self._place
            near_end = len(self._buffer) - end <= 2
            if near_end and self._read_more():  # a number may go on, as 1 in `1e-`
                continue
            self._place += length
            self._block = BLOCK
            return element

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Returns whether an error may only mean that the element is not in the buffer as a whole."""
        pending = len(self._buffer) - self._place
        if pending > LONGEST:
            raise self._broken(f"a record of more than {LONGEST:,} characters")
        self._block = max(BLOCK, pending)  # doubles the buffer each time, so that no element is decoded over and over
        return error.pos > len(self._buffer) - LONGEST_ESCAPE or error.msg.startswith("Unterminated string")

    def _read_more(self) -> bool:
        """Drops what has been passed from the buffer and appends a block; returns False at the end of the file."""
        before = self._file.tell()
        block = self._text.read(self._block)
        self._progress(self._file.tell() - before)
        if not self._tolerant and (undecoded := _UNDECODED_BYTE.search(block)):
            byte = ord(undecoded.group()) - 0xDC00
            position = self._passed + len(self._buffer) + undecoded.start()
            raise DataError(
                f"data file {self._path} cannot be read: byte 0x{byte:02x} is not valid UTF-8 at character {position}"
            )
        self._passed += self._place
        self._buffer = self._buffer[self._place :] + block
        self._place = 0
        return bool(block)

    def _broken(self, what: str, position: int | None = None) -> DataError:
        """Returns the error for a position in characters, which is the current one if not given."""
        if position is None:
            position = self._passed + self._place
        return DataError(f"data file {self._path} cannot be read: {what} at character {position}")


def _json_lines(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            progress(len(line))
            whole = len(line) < LONGEST or line.endswith(b"\n")
            if not whole:
                _skip_line(file, progress)
            if not line.strip():
                continue
            if whole:
                yield _decoded(line, number, tolerant)
            else:
                yield BrokenLine(number, f"a record of more than {LONGEST:,} bytes", _id(line[:10_000]))


def _skip_line(file: BinaryIO, progress: Progress) -> None:
    """Reads up to the end of the line."""
    while rest := file.readline(LONGEST):
        progress(len(rest))
        if rest.endswith(b"\n"):
            return


def _decoded(line: bytes, number: int, tolerant: bool) -> Any:
    """Returns the record of a line, or a BrokenLine."""
    try:
        text = line.decode("utf-8", "surrogateescape" if tolerant else "strict")
        return json.loads(text.removeprefix("\ufeff") if number == 1 else text, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        return BrokenLine(number, str(error).splitlines()[0], _id(line))


def _id(line: bytes) -> str | None:
    """Returns what looks like the id of a sample in a line that is not JSON."""
    found = _ID.search(line.decode("utf-8", "surrogateescape"))
    return (found.group(1) or found.group(2)) if found else None
