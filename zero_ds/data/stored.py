"""Images that lie inside other files: in tables (Parquet, Arrow) and archives (zip, tar), read where they lie.

A span says where the bytes of an image are. Records hold it as a text that no data file can hold itself, so a path in
somebody's data is never taken for a span.
"""

from __future__ import annotations

import base64
import functools
import os
import zlib
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from zero_ds.data.read_image import embedded, is_embedded
from zero_ds.runtime.files import open_regular

MARK = "\0"
"""First character of a span as text. `formats.parse` refuses names with this character."""
LARGEST_PAGE = 12 << 20
"""Bytes of a compressed part of a file up to which an image is read from it; a worker holds it twice."""
REMEMBERED_PAGE = 8 << 20
"""Bytes up to which the last decompressed part of a file is kept, because the next image may be in it as well."""


@dataclass(frozen=True)
class Span:
    """Place of an image's bytes in a file."""

    offset: int
    """First byte in the file."""
    length: int
    """Number of bytes in the file."""
    is_base64: int = 0
    """1 if the bytes are a text in base64, or a `data:` address."""
    codec: str = ""
    """Compression of these bytes, as pyarrow calls it, or `deflate` as in zip files; empty: none."""
    size: int = 0
    """Number of bytes after decompression."""
    start: int = 0
    """First byte of the image among the decompressed ones."""
    count: int = 0
    """Number of bytes of the image there."""

    def text(self) -> str:
        """Returns the span as records hold it."""
        fields = astuple(self) if self.codec else astuple(self)[:3]
        return MARK + ":".join(map(str, fields))

    @classmethod
    def parse(cls, text: str) -> Span:
        """Returns the span that `text` has written."""
        offset, length, is_base64, *rest = text.removeprefix(MARK).split(":")
        if not rest:
            return cls(int(offset), int(length), int(is_base64))
        codec, size, start, count = rest
        return cls(int(offset), int(length), int(is_base64), codec, int(size), int(start), int(count))


def is_span(name: str) -> bool:
    """Returns whether an image's name in a record is a span."""
    return name.startswith(MARK)


@dataclass(frozen=True)
class StoredImage:
    """An image inside of another file."""

    file: str
    """Path of that file."""
    span: Span
    name: str = ""
    """Name of the image in an archive."""

    def __str__(self) -> str:
        return f"{self.name} in {self.file}" if self.name else f"at byte {self.span.offset} of {self.file}"

    def read(self) -> bytes:
        """Returns the bytes of the image's own file.

        Raises:
            OSError, ValueError: The file cannot be read, or has changed.
        """
        span = self.span
        if not span.codec:
            content = _read(self.file, span.offset, span.length)
        else:
            unpack = _remembered if span.size <= REMEMBERED_PAGE and span.count < span.size else _unpacked
            content = unpack(self.file, span.offset, span.length, span.codec, span.size)
            content = content[span.start : span.start + span.count]
        if not span.is_base64:
            return content
        text = content.decode("ascii")
        return embedded(text) if is_embedded(text) else base64.b64decode("".join(text.split()), validate=True)


ImageFile = str | StoredImage
"""An image of a sample: a path, a `data:` address, or an image inside of another file."""


def _read(file: str, offset: int, length: int) -> bytes:
    with open_regular(Path(file)) as opened:
        content = os.pread(opened.fileno(), length, offset)
        while len(content) < length:
            more = os.pread(opened.fileno(), length - len(content), offset + len(content))
            if not more:
                raise ValueError(f"{file} ends before it; the file has changed since it was first read")
            content += more
    return content


def _unpacked(file: str, offset: int, length: int, codec: str, size: int) -> bytes:
    return decompressed(_read(file, offset, length), codec, size)


_remembered = functools.lru_cache(maxsize=1)(_unpacked)


def decompressed(content: bytes, codec: str, size: int) -> bytes:
    """Returns `size` bytes that were compressed.

    Raises:
        ValueError: Damaged bytes, or more or fewer of them.
    """
    if codec == "deflate":
        unpacker = zlib.decompressobj(-15)
        try:
            plain = unpacker.decompress(content, size + 1)
        except zlib.error as error:
            raise ValueError(f"its compressed bytes are damaged ({error})") from None
        if len(plain) != size:
            raise ValueError(f"it should have {size} bytes after decompression")
        return plain
    import pyarrow

    buffer: Any = pyarrow.Codec(codec).decompress(content, decompressed_size=size)
    return buffer.to_pybytes()
