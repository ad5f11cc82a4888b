"""Reads tables with images inside (Parquet, Arrow): their records, with a span in the place of each image's bytes.

A table's own library reads the records. Places of values are found separately: in Arrow from the addresses of mapped
buffers, in Parquet by walking over the pages of a column, whose values lie there one after the other, each after its
length. A place counts only if the file has exactly the bytes there that the library has read, so a layout that is not
known yet costs room in the cache, where the image is then copied to, and never shows a wrong image.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zero_ds.data.formats import DataError, is_base64, is_image_key
from zero_ds.data.read_image import is_embedded
from zero_ds.data.stored import LARGEST_PAGE, Span, decompressed
from zero_ds.runtime.files import open_regular

logger = logging.getLogger(__name__)

Progress = Callable[[int], object]
"""Called with the number of further bytes that have been read."""
Keys = tuple[str, ...]
"""Names of a value in a record, from the outside in; lists have no name."""

ROWS = 16
"""Rows that are unpacked at a time: a few bytes of a Parquet file can stand for a long text in every row."""
CODECS = {
    "SNAPPY": "snappy",
    "GZIP": "gzip",
    "BROTLI": "brotli",
    "ZSTD": "zstd",
    "LZ4": "lz4_raw",
    "LZ4_RAW": "lz4_raw",
}
"""Names of the compressions of Parquet pages as pyarrow calls its codecs. It calls `LZ4_RAW` of a file `LZ4`."""
_END_OF_STREAM = (b"\xff\xff\xff\xff\0\0\0\0",)
"""Last bytes of an Arrow stream."""
_PLAIN, _PLAIN_DICTIONARY = 0, 2
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3


def read_parquet(path: Path, progress: Progress, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields the records of a Parquet file; `columns` are names of columns with images, besides the usual ones.

    Raises:
        DataError: A file that is damaged.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with _mapped(path) as memory, parquet.ParquetFile(path, memory_map=True) as file:
            leaves = _leaves(file.schema_arrow)
            tracked = _tracked(leaves, columns) if len(leaves) == len(file.schema) else {}
            bytes_per_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for group in range(file.metadata.num_row_groups):
                places = {}
                for number in tracked:
                    values = _pages(memory, file, group, number)
                    places[leaves[number].keys] = _Places(memory, values, leaves[number].is_text)
                for batch in file.iter_batches(batch_size=ROWS, row_groups=[group]):
                    yield from _with_spans(batch, places)
                    progress(int(bytes_per_row * len(batch)))
                _warn_about_copies(path, places)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def read_arrow(path: Path, progress: Progress, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yields the records of an Arrow file, as the library `datasets` saves them; `columns` as for `read_parquet`.

    Raises:
        DataError: A file that is damaged.
    """
    import pyarrow

    try:
        with _mapped(path) as memory:
            buffer = pyarrow.py_buffer(memory)
            try:
                reader: Any = pyarrow.ipc.open_stream(buffer)
                if memory[-8:] not in _END_OF_STREAM:
                    raise DataError(f"data file {path} cannot be read: it has no end mark; it is truncated")
            except pyarrow.ArrowInvalid:
                file = pyarrow.ipc.open_file(buffer)
                reader = (file.get_batch(number) for number in range(file.num_record_batches))
            for batch in reader:
                batch.validate(full=True)  # offsets that lead out of the file would end the process
                yield from _arrow_batch(path, batch, memory, buffer.address, columns)
                progress(batch.nbytes)
                del batch
            del reader, buffer
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _arrow_batch(path: Path, batch: Any, memory: mmap.mmap, start: int, columns: Sequence[str]) -> Iterator[Any]:
    leaves = _leaves(batch.schema)
    arrays = [array for column in batch.columns for array in _leaf_arrays(column)]
    places = {}
    for number in _tracked(leaves, columns):
        values = _addresses(arrays[number], start, len(memory))
        places[leaves[number].keys] = _Places(memory, values, leaves[number].is_text)
    for first in range(0, batch.num_rows, ROWS):
        yield from _with_spans(batch.slice(first, ROWS), places)
    _warn_about_copies(path, places)


@contextlib.contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """Maps a file into memory.

    Raises:
        DataError: An empty file.
    """
    with open_regular(path) as file:
        if not path.stat().st_size:
            raise DataError(f"data file {path} cannot be read: it is empty")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        yield memory
    finally:
        with contextlib.suppress(BufferError):  # arrays of an unfinished reader still point into it
            memory.close()


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, DataError):
        return error
    if isinstance(error, FileNotFoundError):
        return DataError(f"data file {path} does not exist")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"data file {path} cannot be read: {(reason or type(error).__name__).splitlines()[0]}")


def _warn_about_copies(path: Path, places: dict[Keys, _Places]) -> None:
    for keys, found in places.items():
        if found.copied:
            logger.warning(
                "%s: %d images of column %s are copied into the cache, because they are in compressed pages of more "
                "than 12 MB, or its encoding does not show where; write the file again to read them in place, with "
                "smaller pages and without delta encodings",
                path,
                found.copied,
                ".".join(keys),
            )


# -- values of a record ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """A column without inner columns."""

    keys: Keys
    is_binary: bool
    is_text: bool


def _leaves(schema: Any) -> list[_Leaf]:
    """Returns the innermost columns of an Arrow schema, in the order in which Parquet stores them."""
    found: list[_Leaf] = []
    for field in schema:
        _add_leaves(field.type, (field.name,), found)
    return found


def _add_leaves(kind: Any, keys: Keys, found: list[_Leaf]) -> None:
    from pyarrow import types

    kind = getattr(kind, "storage_type", kind)
    if types.is_struct(kind):
        for field in kind:
            _add_leaves(field.type, (*keys, field.name), found)
    elif types.is_map(kind):
        _add_leaves(kind.key_type, (*keys, "key"), found)
        _add_leaves(kind.item_type, (*keys, "value"), found)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        _add_leaves(kind.value_type, keys, found)
    else:
        binary = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        found.append(_Leaf(keys, binary, text))


def _tracked(leaves: Sequence[_Leaf], columns: Sequence[str]) -> dict[int, _Leaf]:
    """Returns the columns that may hold images, by their numbers: binary ones, and texts with the name of an image."""
    tracked = {}
    for number, leaf in enumerate(leaves):
        image = any(is_image_key(key) or key in columns for key in leaf.keys)
        if leaf.is_binary or (leaf.is_text and image):
            tracked[number] = leaf
    return tracked


class _Places:
    """The places of a column's values, which are asked for in the order of the records."""

    def __init__(self, memory: mmap.mmap, values: Iterator[_Value], is_text: bool) -> None:
        self.memory = memory
        self.is_text = is_text
        self.copied = 0
        """Number of images whose place was not found."""
        self._values = values
        self._next: _Value | None = None
        self._shared: dict[bytes, Span] = {}
        """Values that several rows may share."""

    def replaced(self, value: Any) -> Any:
        """Returns the span in the place of an image's bytes or base64; any other value as it is."""
        content = value.encode("utf-8", "surrogatepass") if self.is_text else value
        span = self._find(content)
        if self.is_text and not (is_embedded(value) or is_base64(value)):
            return value
        if span is None:
            self.copied += 1
            return value
        return replace(span, is_base64=1) if self.is_text else span

    def _find(self, content: bytes) -> Span | None:
        if self._next is None:
            self._advance()
        if self._next is not None and self._next.holds(self.memory, content):
            span = self._next.span
            self._next = None
            return span
        return self._shared.get(content)

    def _advance(self) -> None:
        for value in self._values:
            if not value.shared:
                self._next = value
                return
            self._shared[value.content(self.memory)] = value.span


@dataclass(frozen=True)
class _Value:
    """A value as it is in the file."""

    span: Span
    page: bytes | None = None
    """Decompressed bytes that hold it; None if it is not compressed."""
    shared: bool = False
    """True if the value is in a dictionary, to which rows refer."""

    def content(self, memory: mmap.mmap) -> bytes:
        """Returns its bytes."""
        if self.page is not None:
            return self.page[self.span.start : self.span.start + self.span.count]
        return memory[self.span.offset : self.span.offset + self.span.length]

    def holds(self, memory: mmap.mmap, content: bytes) -> bool:
        """Returns whether it is `content`."""
        length = self.span.length if self.page is None else self.span.count
        return length == len(content) and self.content(memory) == content


def _with_spans(batch: Any, places: dict[Keys, _Places]) -> Iterator[dict[str, Any]]:
    """Yields the records of a batch, with spans in the place of images."""
    columns = {keys[0] for keys in places}
    for record in batch.to_pylist():
        for name in columns:
            record[name] = _inner(record[name], (name,), places)
        yield record


def _inner(value: Any, keys: Keys, places: dict[Keys, _Places]) -> Any:
    if isinstance(value, dict):
        return {key: _inner(each, (*keys, key), places) for key, each in value.items()}
    if isinstance(value, list):
        return [_inner(each, keys, places) for each in value]
    if value is not None and keys in places:
        return places[keys].replaced(value)
    return value


# -- Arrow -------------------------------------------------------------------------------------------------------------


def _leaf_arrays(array: Any) -> Iterator[Any]:
    """Yields the arrays of the innermost columns, in the order of `_leaves`."""
    from pyarrow import types

    kind = array.type
    if hasattr(kind, "storage_type"):
        yield from _leaf_arrays(array.storage)
    elif types.is_struct(kind):
        for inner in array.flatten():
            yield from _leaf_arrays(inner)
    elif types.is_map(kind):
        yield from _leaf_arrays(array.keys)
        yield from _leaf_arrays(array.items)
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _leaf_arrays(array.flatten())
    else:
        yield array


def _addresses(array: Any, start: int, size: int) -> Iterator[_Value]:
    """Yields the values of a binary or text array in memory that is mapped at the address `start`."""
    import numpy as np
    from pyarrow import types

    if types.is_binary_view(array.type) or types.is_string_view(array.type):
        return
    _, offsets, content = array.buffers()
    if content is None or not start <= content.address < start + size:
        return  # compressed, or without any value
    wide = types.is_large_binary(array.type) or types.is_large_string(array.type)
    ends = np.frombuffer(offsets, np.int64 if wide else np.int32)[array.offset : array.offset + len(array) + 1]
    first = content.address - start
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    for number in range(len(array)):
        if valid[number]:
            yield _Value(Span(first + int(ends[number]), int(ends[number + 1] - ends[number])))


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _pages(memory: mmap.mmap, file: Any, group: int, number: int) -> Iterator[_Value]:
    """Yields the values of a column of a row group as its pages hold them; none if their layout is not known."""
    column = file.metadata.row_group(group).column(number)
    levels = file.schema.column(number)
    if column.file_path or column.physical_type != "BYTE_ARRAY":
        return
    codec = CODECS.get(column.compression, "" if column.compression == "UNCOMPRESSED" else None)
    if codec is None:
        return
    starts = (column.data_page_offset, column.dictionary_page_offset)
    place = min(start for start in starts if start)
    end = place + column.total_compressed_size
    unknown = (IndexError, KeyError, TypeError, struct.error, ValueError, OSError, RecursionError)
    with contextlib.suppress(*unknown):  # pyarrow has read the page, so it is only of another layout
        while place < end:
            header, place = _Thrift(memory, place).struct()
            if header[3] < 0:
                return
            page = _Page(place, header[3], header[2], codec)
            shared = header[1] == _DICTIONARY
            if header[1] == _DATA:
                page.depth = (levels.max_repetition_level > 0) + (levels.max_definition_level > 0)
                plain = header[5][2] == _PLAIN
            elif header[1] == _DATA_V2:
                inner = header[8]
                page.skip(inner[5] + inner[6], inner.get(7, True))
                plain = inner[4] == _PLAIN
            else:
                plain = shared and header[7][2] in (_PLAIN, _PLAIN_DICTIONARY)
            if plain:
                yield from page.values(memory, shared)
            place += header[3]


class _Page:
    """A page of a column."""

    def __init__(self, offset: int, length: int, size: int, codec: str) -> None:
        self.offset, self.length, self.size, self.codec = offset, length, size, codec
        self.depth = 0
        """Number of lists of levels before the values, each after its length."""

    def skip(self, levels: int, compressed: bool) -> None:
        """Leaves out the levels of a page of the second version, which precede the compressed part."""
        self.offset, self.length, self.size = self.offset + levels, self.length - levels, self.size - levels
        if not compressed:
            self.codec = ""

    def values(self, memory: mmap.mmap, shared: bool) -> Iterator[_Value]:
        """Yields the values."""
        if self.codec and self.size > LARGEST_PAGE:
            return  # a worker's memory must not depend on how a file was written
        content = memory[self.offset : self.offset + self.length]
        if self.codec:
            content = decompressed(content, self.codec, self.size)
        place = 0
        for _ in range(self.depth):
            place += 4 + struct.unpack_from("<I", content, place)[0]
        while place + 4 <= len(content):
            count = struct.unpack_from("<I", content, place)[0]
            place += 4
            if place + count > len(content):
                return
            if self.codec:
                span = Span(self.offset, self.length, 0, self.codec, self.size, place, count)
                yield _Value(span, content, shared)
            else:
                yield _Value(Span(self.offset + place, count), None, shared)
            place += count


class _Thrift:
    """Reads one object in Thrift's compact protocol, in which Parquet writes the headers of pages."""

    def __init__(self, memory: mmap.mmap, place: int) -> None:
        self.memory, self.place = memory, place

    def struct(self) -> tuple[dict[int, Any], int]:
        """Returns the fields of an object by number, and the place after it."""
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            fields[number] = self._value(head & 15)
        return fields, self.place

    def _byte(self) -> int:
        self.place += 1
        return self.memory[self.place - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of too many bytes")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 12:
            return self.struct()[0]
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            return [self._value(head & 15) for _ in range(min(count, 1 << 16))]
        lengths = {3: 1, 7: 8}
        length = self._varint() if kind == 8 else lengths[kind]
        self.place += length
        return self.memory[self.place - length : self.place]
