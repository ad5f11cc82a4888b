"""The folder of a run while it is in use: locked, with room for the reason of a failure, and without old remains."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from zero_ds.runtime import failure
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import disk_sentence
from zero_ds.runtime.lock import FolderLock, is_free

logger = logging.getLogger(__name__)

REMAINS = ".*.tmp"
"""Checkpoints and files that a killed process was writing."""


@contextlib.contextmanager
def use_folder(out: Path) -> Iterator[None]:
    """Makes a run folder and keeps it for this job while the block runs. Rank 0 holds the lock for all ranks.

    Ranks have not met yet, so that even a meeting that fails leaves its reason in the folder.

    Raises:
        ConfigError: a file is in its place, it cannot be made or written, or another job uses it.
    """
    make_folder(out)
    failure.WATCH.holder = None  # of an earlier run of this process
    if os.environ.get("RANK", "0") != "0":
        failure.WATCH.folder = None  # it learns the folder when it agrees with rank 0 on it
        yield
        return
    # a reason for which the folder cannot be used belongs into it, unless another job may be using it
    failure.WATCH.folder = out if is_free(out) else None
    with FolderLock(out):
        failure.WATCH.folder = out
        _tidy(out)
        try:
            yield
        except Exception:
            raise  # its reason is written when it has left all blocks, and may need the room
        except BaseException:
            failure.give_up_room(out)
            raise
        failure.give_up_room(out)


def make_folder(out: Path) -> None:
    """Makes the run folder, which also records errors that end a run before its first step.

    Raises:
        ConfigError: a file is in its place, or it cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is not a folder; choose another out=FOLDER.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out} cannot be made: {error.strerror}; choose another out=FOLDER.") from None


def _tidy(out: Path) -> None:
    """Removes half-written files of a killed attempt, puts its reason away, and keeps room for a new one."""
    remains = sorted(out.glob(REMAINS))
    for path in remains:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    if remains:
        logger.info("removed half-written files from %s: %s", out, ", ".join(path.name for path in remains))
    failure.clear(out)
    try:
        failure.keep_room(out)
    except OSError as error:
        raise ConfigError(disk_sentence(error) or f"{out} cannot be written: {error.strerror or error}.") from None
