"""Data files -> raw records, one at a time, however large the file: JSON lists, JSON lines, Parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from zero_ds.config import ConfigError
from zero_ds.data.formats import DataError

SUFFIXES = (".json", ".jsonl", ".parquet")
BLOCK = 1 << 22
LONGEST = 1 << 26
"""Characters of a single record at most; a file whose first string is never closed must not fill the memory."""
LONGEST_ESCAPE = 16
"""So near to the end of what was read, an error may come from the rest's not being there yet."""

Progress = Callable[[int], object]


def data_files(path: str, pattern: str | None = None) -> list[Path]:
    """The files behind a source's `path`: itself, those in a folder, or those of a data set on the hub.

    pattern: which files of a folder or hub data set are meant, such as `data/math-*`; all of them if empty.

    Raises:
        DataError: nothing there; ConfigError: a hub id that cannot be fetched.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return [local]
    if not local.is_dir():
        if local.suffix in SUFFIXES or path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise DataError(f"there is no data file {path}")
        local = _fetched(path, pattern)
    found = sorted(file for file in local.glob(pattern or "**/*") if file.suffix in SUFFIXES and file.is_file())
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
            f"'{name}' is no local file or folder and could not be fetched from the hub: {reason[:200]} "
            "Give a local path, or check the network, the id and your access token."
        ) from None


def raw_records(path: Path, progress: Progress = lambda _: None) -> Iterator[Any]:
    """Every record of a file; `progress` is told how many more bytes were read.

    Raises:
        DataError: missing or unreadable file, invalid JSON or Parquet, no record at all.
    """
    read = {".jsonl": _json_lines, ".parquet": _parquet}.get(path.suffix, _json_list)
    empty = True
    try:
        for record in read(path, progress):
            empty = False
            yield record
    except FileNotFoundError:
        raise DataError(f"there is no data file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data file {path} cannot be read: {error}") from None
    if empty:
        raise DataError(f"data file {path} must hold a list of samples, and at least one")


def _json_list(path: Path, progress: Progress) -> Iterator[Any]:
    """Elements of a JSON list, decoded one by one from a buffer that holds little more than one."""
    decoder = json.JSONDecoder()
    with path.open("rb") as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as file:
        buffer, place, passed, size = "", 0, 0, BLOCK
        state = "start"  # -> "value" (or the end, right behind the start) -> "separator" -> "value" ...

        def more() -> bool:
            nonlocal buffer, place, passed
            at = raw.tell()
            block = file.read(size)
            progress(raw.tell() - at)
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
                place, state, size = end, "separator", BLOCK
                yield record


def _json_lines(path: Path, progress: Progress) -> Iterator[Any]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            progress(len(line))
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error).splitlines()[0]
                raise DataError(f"data file {path} cannot be read: line {number}: {reason}") from None


def _parquet(path: Path, progress: Progress) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            size = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
                progress(int(size * len(batch)))
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"data file {path} cannot be read: {str(error).splitlines()[0]}") from None
