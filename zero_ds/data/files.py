"""Data files -> raw records, one at a time, however large the file: JSON lists, JSON lines, Parquet."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from zero_ds.data.formats import DataError, named, quoted
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import open_regular

SUFFIXES = (".json", ".jsonl", ".parquet")
BLOCK = 1 << 22
LONGEST = 1 << 26
"""Characters of a single record at most; a file whose first string is never closed must not fill the memory."""
LONGEST_ESCAPE = 16
"""So near to the end of what was read, an error may come from the rest's not being there yet."""

ROWS = 16
"""Rows of Parquet that are unpacked at a time: a few bytes of a file can stand for a long text in every row."""

Progress = Callable[[int], object]
_ESCAPED = re.compile("[\udc80-\udcff]")
_ID = re.compile(r'"(?:id|idx)"\s*:\s*(?:"((?:[^"\\]|\\.){1,200})"|(\d{1,30}))')


class BrokenLine(NamedTuple):
    """A line that holds no record."""

    number: int
    """Counted from 1."""
    reason: str
    id: str | None
    """Of the sample, where one can be made out."""

    def __str__(self) -> str:
        sample = "" if self.id is None else f" (sample {named(self.id)})"
        return f"line {self.number}{sample}: {self.reason}"


def data_files(path: str, pattern: str | None = None) -> list[Path]:
    """The files behind a source's `path`: itself, those in a folder, or those of a data set on the hub.

    pattern: which files of a folder or hub data set are meant, such as `data/math-*`; all of them if empty.

    Raises:
        DataError: nothing there; ConfigError: a hub id that cannot be fetched, a pattern that leaves the folder.
    """
    if pattern and (Path(pattern).is_absolute() or ".." in Path(pattern).parts):
        raise ConfigError(f"files={quoted(pattern)} must stay below {named(path, 1000)}; write it relative to that.")
    local = Path(path).expanduser()
    try:
        if local.is_file():
            return [local]
        folder = local.is_dir()
    except (OSError, ValueError) as error:
        raise DataError(f"there is no data file {quoted(path)}: {getattr(error, 'strerror', None) or error}") from None
    if not folder:
        if local.exists():
            raise DataError(f"data file {path} is no regular file")
        if local.suffix in SUFFIXES or path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise DataError(f"there is no data file {path}")
        local = _fetched(path, pattern)
    try:
        found = sorted(file for file in local.glob(pattern or "**/*") if file.suffix in SUFFIXES and file.is_file())
    except (ValueError, NotImplementedError) as error:
        raise ConfigError(f"files={quoted(pattern)} is no pattern ({error}); write one such as data/math-*.") from None
    if not found:
        what = f"file that matches {pattern!r}" if pattern else f"file that ends in {', '.join(SUFFIXES)}"
        raise DataError(f"{path} holds no {what}")
    return found


def _fetched(name: str, pattern: str | None) -> Path:
    import huggingface_hub

    wanted = [pattern] if pattern else [f"**{suffix}" for suffix in SUFFIXES] + [f"*{suffix}" for suffix in SUFFIXES]
    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # the hub client raises many kinds; each means that the data are not to be had
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"'{name}' is no local file or folder and could not be fetched from the hub: {reason[:200].rstrip('. ')}; "
            "give a local path, or check the network, the id and your access token."
        ) from None


def raw_records(path: Path, progress: Progress = lambda _: None, tolerant: bool = False) -> Iterator[Any]:
    """Every record of a file; `progress` is told how many more bytes were read.

    tolerant: a broken line of JSON lines comes as a BrokenLine, and bytes that are no UTF-8 stand in the texts as half
    surrogate pairs, which `formats.parse` refuses, sample by sample.

    Raises:
        DataError: missing or unreadable file, invalid JSON or Parquet, no record at all.
    """
    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix, _json_list)
    name = f"data file {path} cannot be read"
    empty = True
    try:
        for record in read(path, progress, tolerant):
            empty = False
            if isinstance(record, BrokenLine) and not tolerant:
                raise DataError(f"{name}: {record}")
            yield record
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}") from None
    except OSError as error:
        raise DataError(f"{name}: {error.strerror or error}") from None
    if empty:
        raise DataError(f"data file {path} must hold a list of samples, and at least one")


def _json_list(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    """Elements of a JSON list, decoded one by one from a buffer that holds little more than one."""
    decoder = json.JSONDecoder()
    with (
        open_regular(path) as raw,
        io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape") as file,  # type: ignore[type-var]
    ):
        buffer, place, passed, size = "", 0, 0, BLOCK
        state = "start"  # -> "value" (or the end, right behind the start) -> "separator" -> "value" ...

        def more() -> bool:
            nonlocal buffer, place, passed
            at = raw.tell()
            block = file.read(size)
            progress(raw.tell() - at)
            if not tolerant and (bad := _ESCAPED.search(block)):
                byte, where = ord(bad.group()) - 0xDC00, passed + len(buffer) + bad.start()
                raise DataError(f"data file {path} cannot be read: byte 0x{byte:02x} is no UTF-8 at character {where}")
            passed += place
            buffer, place = buffer[place:] + block, 0
            return bool(block)

        def broken(what: str) -> DataError:
            return DataError(f"data file {path} cannot be read: {what} at character {passed + place}")

        while True:
            while place < len(buffer) and buffer[place].isspace():
                place += 1
            if place == len(buffer):
                if more():
                    continue
                if state == "end":
                    return
                if state == "start":
                    raise DataError(f"data file {path} must hold a list of samples, and at least one")
                raise broken("it ends in the middle of the list")
            if state == "end":
                raise broken("something stands behind the list")
            if state == "start":
                if buffer[place] != "[":
                    raise DataError(f"data file {path} must hold a list of samples, and at least one")
                state, place = "first", place + 1
            elif state == "separator" or (state == "first" and buffer[place] == "]"):
                if buffer[place] not in ",]":
                    raise broken("a comma is missing")
                state, place = "value" if buffer[place] == "," else "end", place + 1
            else:
                try:
                    record, end = decoder.raw_decode(buffer, place)
                    if len(buffer) - end <= 2:  # a number might go on, as 1 in `1e-`
                        left = len(buffer) - end
                        if more():
                            continue
                        end = len(buffer) - left
                except RecursionError:
                    raise broken("objects nested too deeply") from None
                except json.JSONDecodeError as error:
                    if len(buffer) - place > LONGEST:
                        raise broken(f"a record of more than {LONGEST:,} characters") from None
                    size = max(BLOCK, len(buffer) - place)  # twice as much each time: no record is read over and over
                    cut_off = error.pos > len(buffer) - LONGEST_ESCAPE or error.msg.startswith("Unterminated string")
                    ahead = error.pos - place
                    if cut_off and more():
                        continue
                    place = min(len(buffer), (0 if cut_off else place) + ahead)
                    raise broken(error.msg) from None
                except ValueError:  # int() of thousands of digits
                    raise broken("a number of too many digits") from None
                place, state, size = end, "separator", BLOCK
                yield record


def _json_lines(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            progress(len(line))
            rest = line
            while len(rest) == LONGEST and not rest.endswith(b"\n"):
                progress(len(rest := file.readline(LONGEST)))
            if not line.strip():
                continue
            if rest is not line:
                yield BrokenLine(number, f"a record of more than {LONGEST:,} bytes", _id(line[:10_000]))
                continue
            try:
                text = line.decode("utf-8", "surrogateescape" if tolerant else "strict")
                yield json.loads(text.removeprefix("\ufeff") if number == 1 else text)
            except (ValueError, RecursionError) as error:
                yield BrokenLine(number, str(error).splitlines()[0], _id(line))


def _id(line: bytes) -> str | None:
    found = _ID.search(line.decode("utf-8", "surrogateescape"))
    return (found.group(1) or found.group(2)) if found else None


def _parquet(path: Path, progress: Progress, tolerant: bool) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    with open_regular(path):
        pass
    try:
        with parquet.ParquetFile(path) as file:
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=ROWS):
                yield from batch.to_pylist()
                progress(int(size * len(batch)))
    except pyarrow.ArrowException as error:
        raise DataError(f"data file {path} cannot be read: {str(error).splitlines()[0]}") from None
