"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from zero_ds.runtime.errors import ConfigError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk that has no room left for this user or this file."""
FULL_IN_WORDS = ("No space left on device", "Disk quota exceeded")
"""Words of the same errors, for writers that are not Python (safetensors, Arrow) and raise types of their own."""
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Errors of a place that cannot be written."""


def disk_sentence(error: BaseException) -> str | None:
    """Returns a sentence about a full disk or a place that cannot be written; None for any other error."""
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.strerror}: {error.filename or 'while writing'}; free some space and run again."
    if isinstance(error, OSError) and error.errno in CLOSED:
        return f"{error.strerror}: {error.filename or 'while writing'}; choose another place."
    for words in FULL_IN_WORDS:
        if words in str(error):
            return f"{words}; free some space and run again."
    return None


def home_path(text: str | Path) -> Path:
    """Returns a path with `~` or `~user` at its beginning replaced by that home folder.

    Raises:
        ConfigError: there is no such user. A shell would take the name as it is, and a folder `~user` would be made.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{Path(text).parts[0]} is not the home folder of a user here; write the whole path."
        ) from None


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file in one step: readers see the old content or the new one, even if others write it as well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading in binary mode; refuses pipes and devices, which may block for ever.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is not a regular file")
    return os.fdopen(descriptor, "rb")


def check_vacant(out: Path) -> None:
    """Refuses an output folder that is not empty.

    Raises:
        ConfigError: `out` is a file, a symbolic link, or a folder that is not empty.
    """
    if out.is_symlink():
        raise ConfigError(f"{out} is a symbolic link; name the folder itself.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists; choose another --out or remove it.")


@contextmanager
def new_folder(out: Path, need: int = 0) -> Iterator[Path]:
    """Yields a temporary folder, which becomes `out` when the block ends and is removed when the block fails.

    need: number of bytes that will be written, if known; the free space is checked first.

    Raises:
        ConfigError: `out` is not empty, its parent cannot be made, or fewer than `need` bytes are free.
    """
    try:
        check_vacant(out)
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be made: {error.strerror}; choose another.") from None
    if shutil.disk_usage(out.parent).free < need:
        raise ConfigError(
            f"{out.parent} does not have the {need / 1e6:,.0f} MB free that {out.name} needs; free some space."
        )
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name[:100]}.", dir=out.parent))
    except OSError as error:
        raise ConfigError(
            f"nothing can be written into {out.parent} ({error.strerror}); choose another --out."
        ) from None
    try:
        yield temporary
        temporary.chmod(0o755)
        check_vacant(out)
        temporary.rename(out)  # `out` does not exist or is an empty folder
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
