"""Finds images in archives (zip, tar): each is indexed once, and its members are read where they lie.

The index is a table of hashes in the cache of the `datasets` library. Ranks and workers map it, so a million members
cost none of them memory of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from zero_ds.data.formats import DataError, named, quoted
from zero_ds.data.stored import Span, StoredImage
from zero_ds.runtime.files import open_regular

LAYOUT = 1
"""Version of the index; a new one keeps old indices from being read."""
ENDINGS = (".zip", ".tar")
"""Ends of the names of archives that are read."""
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
"""Ends of the names of archives in which nothing can be read without reading all that comes before it."""
_FIELDS = [("hash", "<u8"), ("offset", "<i8"), ("length", "<i8"), ("size", "<i8"), ("kind", "<i1")]
LARGEST = 1 << 28
"""Bytes of the largest member that is decompressed."""
STORED, DEFLATED, LINK, ENCRYPTED, UNKNOWN, LARGE = range(6)
"""Kinds of members: as they are, compressed with deflate, links, encrypted, compressed otherwise, and too large."""
_REASONS = {
    LINK: "is a link there, which is not followed; store the file itself",
    ENCRYPTED: "is encrypted there; store it without a password",
    LARGE: f"has more than {LARGEST:,} bytes when it is decompressed",
    UNKNOWN: "is compressed there by a method other than deflate; store it as it is",
}


class Member(NamedTuple):
    """A file in an archive."""

    name: str
    offset: int
    """First byte of its content in the archive."""
    length: int
    """Number of bytes there."""
    size: int
    """Number of bytes after decompression."""
    kind: int
    """One of the kinds above."""


def split_root(root: str) -> tuple[str, str] | None:
    """Returns the archive (or pattern of archives) and the folder inside that a source's root names; None if neither.

    `images.zip/train` is the folder `train` inside of `images.zip`.
    """
    parts = Path(root).expanduser().parts
    for number, part in enumerate(parts, 1):
        if part.endswith((*ENDINGS, *COMPRESSED)):
            archive = Path(*parts[:number])
            if not archive.is_dir():
                return str(archive), "/".join(parts[number:])
    return None


class Archives:
    """The members of one archive, or of several that belong together."""

    def __init__(self, root: str, cache: Path, folder: str = "") -> None:
        """Opens archives and indexes new ones.

        root: a path, or a pattern such as `images/*.tar`. folder: folder inside, below which names are looked for.

        Raises:
            DataError: An archive that is missing, damaged, or whose members leave it.
        """
        self.root = root
        self.folder = folder
        path = Path(root)
        files = [path] if path.exists() else sorted(path.parent.glob(path.name))
        if not files:
            raise DataError(f"archive {named(root, 1000)} does not exist")
        self._indices = [(str(file), _index(file, cache)) for file in files]

    def find(self, name: str, sample: str) -> StoredImage:
        """Returns a member; `sample` says in messages whose image it is.

        Raises:
            DataError: A name that no member has or that leaves the archive, or a member that cannot be read.
        """
        where = f"sample {named(sample)}: image {quoted(name, 300)}"
        plain = plain_name(name)
        if plain is None:
            raise DataError(f"{where} leaves {self.root}; write names as the archive has them")
        key = np.uint64(_hash(f"{self.folder}/{plain}" if self.folder else plain))
        for file, index in self._indices:
            row = int(np.searchsorted(index["hash"], key))
            if row < len(index) and index["hash"][row] == key:
                _, offset, length, size, kind = index[row].item()
                if kind in _REASONS:
                    raise DataError(f"{where} {_REASONS[kind]} ({file})")
                codec = ("deflate", size, 0, size) if kind == DEFLATED else ()
                return StoredImage(file, Span(offset, length, 0, *codec), name)
        inside = f", folder {self.folder}" if self.folder else "; a folder inside is named by root: ARCHIVE/FOLDER"
        raise DataError(f"{where} is not in {self.root}{inside}")


def plain_name(name: str) -> str | None:
    """Returns a member's name without `.` in it; None if it leaves the archive."""
    path = PurePosixPath(name)
    parts = [part for part in path.parts if part != "."]
    return None if path.is_absolute() or ".." in parts or not parts else "/".join(parts)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def _index(path: Path, cache: Path) -> Any:
    """Returns the mapped index of an archive, made if it has none yet."""
    if path.name.endswith(COMPRESSED):
        raise DataError(
            f"archive {path} is compressed as a whole, so no image can be read by itself; unpack it to a .tar"
        )
    try:
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            seen = f"{LAYOUT} {path.resolve()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
            known = cache / f"members-{hashlib.sha256(seen.encode()).hexdigest()[:24]}.npy"
            with contextlib.suppress(OSError, ValueError):
                return np.load(known, mmap_mode="r", allow_pickle=False)
            members = _zip_members(path, file) if path.name.endswith(".zip") else tar_members(path, file)
            index = _table(path, members)
    except (OSError, zipfile.BadZipFile, tarfile.TarError, struct.error, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"archive {path} cannot be read: {reason or type(error).__name__}") from None
    cache.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=".members.", dir=cache)
    try:
        with os.fdopen(descriptor, "wb") as out:
            np.save(out, index)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(known)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return np.load(known, mmap_mode="r", allow_pickle=False)


def _table(path: Path, members: Iterator[Member]) -> Any:
    """Returns the index: sorted by hash, the last member of each name."""
    rows = []
    for member in members:
        plain = plain_name(member.name)
        if plain is None:
            raise DataError(
                f"archive {path} is refused: its member {quoted(member.name, 300)} leaves the archive's folder; pack "
                "it again with relative names"
            )
        rows.append((_hash(plain), *member[1:]))
    if not rows:
        raise DataError(f"archive {path} holds no file")
    table = np.array(rows, dtype=_FIELDS)[::-1]  # of equal names, the last member is the one that unpacking leaves
    _, first = np.unique(table["hash"], return_index=True)
    return table[first]


def _zip_members(path: Path, file: BinaryIO) -> Iterator[Member]:
    kinds = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    size = path.stat().st_size
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = kinds.get(info.compress_type, UNKNOWN)
            if kind == DEFLATED and info.file_size > LARGEST:
                kind = LARGE
            if info.flag_bits & 1:
                kind = ENCRYPTED
            if (info.external_attr >> 28) == 0xA:  # a symbolic link, in the bits of Unix
                kind = LINK
            head = os.pread(file.fileno(), 30, info.header_offset)
            name, extra = struct.unpack_from("<HH", head, 26)
            start = info.header_offset + 30 + name + extra
            if start + info.compress_size > size:
                raise zipfile.BadZipFile(f"it ends before its member {quoted(info.filename)} does")
            yield Member(info.filename, start, info.compress_size, info.file_size, kind)


def tar_members(path: Path, file: BinaryIO) -> Iterator[Member]:
    """Yields the files and links of a tar file, in their order.

    Raises:
        OSError, tarfile.TarError, EOFError: A file that is damaged, or truncated.
    """
    size = path.stat().st_size
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            end = max(end, info.offset_data + (info.size if info.isreg() else 0))
            if end > size:
                raise tarfile.ReadError(f"it ends before its member {quoted(info.name)} does; it is truncated")
            if info.issym() or info.islnk():
                yield Member(info.name, 0, 0, 0, LINK)
            elif info.isreg():
                kind = UNKNOWN if info.issparse() else STORED
                yield Member(info.name, info.offset_data, info.size, info.size, kind)
            archive.members = []  # type: ignore[attr-defined]  # or it would keep an object for every member
    padded = -(-end // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    mark = os.pread(file.fileno(), 2 * tarfile.BLOCKSIZE, padded)
    if len(mark) < 2 * tarfile.BLOCKSIZE or any(mark):
        raise tarfile.ReadError("it has no end mark after its last member; it is truncated")
