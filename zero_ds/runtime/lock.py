"""A lock on a run folder, so that two jobs never write into one: a file with the holder's host, process and job.

A holder that was killed leaves the file. A job on the same machine knows at once whether the holder still lives. A job
on another machine watches the file for a while, because a living holder touches it every few seconds. Clocks are not
compared.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

FILE = "lock.json"
"""Name of the lock in a folder."""
BEAT = 4.0
"""Seconds between two touches of the file by its holder."""
LOOK = 30.0
"""Seconds after which an untouched file of a holder on another machine counts as abandoned; as long as a rank may be
silent (failure.py), for the same reason."""
GOING = 5.0
"""Seconds that a holder on this machine gets to end, if it was killed just now."""
FRESH = 60.0
"""Seconds since its last touch in which another machine's lock seems to be in use, for those who only want to know."""
SETTLE = 1.0
"""Seconds after which two jobs that take over an abandoned lock at the same time see which of them has it."""
BOOT = Path("/proc/sys/kernel/random/boot_id")
"""File with a number that is drawn whenever the machine starts."""
JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "KUBEFLOW_JOB_NAME")
"""Variables in which schedulers give the id of a job."""


class InUseError(ConfigError):
    """A folder is in use by another job."""


class FolderLock:
    """The lock of this process on a folder, held while a `with` block runs; meanwhile a thread touches it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FILE
        self.taken: str | None = None
        """Sentence about another job that has the folder, if the last touch found one."""
        self._content = _this_process()
        self._stopped = threading.Event()

    def __enter__(self) -> FolderLock:
        self.take()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def take(self) -> None:
        """Takes the lock, also from a holder that is gone.

        Raises:
            InUseError: a living holder has it. ConfigError: the folder cannot be written.
        """
        try:
            if not self._create():
                refuse_if_in_use(self.folder)
                self._take_over()
        except InUseError:
            raise
        except OSError as error:
            raise ConfigError(
                f"{self.folder} cannot be written ({error.strerror or error}); free some space, or choose another out="
                "FOLDER."
            ) from None
        _held[self.folder.resolve()] = self
        threading.Thread(target=self._touch, daemon=True).start()

    def release(self) -> None:
        """Removes the lock if this process has it."""
        self._stopped.set()
        _held.pop(self.folder.resolve(), None)
        if os.getpid() == self._content["pid"] and self.is_ours():
            self.path.unlink(missing_ok=True)

    def is_ours(self) -> bool:
        """Returns whether this process has the lock, as far as the file tells."""
        return self.made(_read(self.path) or {})

    def made(self, found: dict[str, Any]) -> bool:
        """Returns whether this process wrote the content of a lock."""
        return bool(found.get("id") == self._content["id"])

    def _create(self) -> bool:
        """Writes the file unless there is one; returns whether it did."""
        written = self._written()
        try:
            os.link(written, self.path)  # complete or not at all, and never over another
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            try:
                with self.path.open("x", encoding="utf-8") as file:
                    file.write(json.dumps(self._content))
            except FileExistsError:
                return False
        finally:
            written.unlink(missing_ok=True)
        return True

    def _take_over(self) -> None:
        """Replaces the file of a holder that is gone.

        Raises:
            InUseError: another job took it over at the same time.
        """
        self._written().replace(self.path)
        time.sleep(SETTLE)
        if not self.is_ours():
            raise InUseError(_in_use(self.folder, _read(self.path) or {}))

    def _written(self) -> Path:
        path = self.path.with_name(f".{FILE}.{self._content['id']}.tmp")
        try:
            path.write_text(json.dumps(self._content, indent=2) + "\n", encoding="utf-8")
        except OSError:
            path.unlink(missing_ok=True)
            raise
        return path

    def lost_to(self, found: dict[str, Any] | None) -> str | None:
        """Returns a sentence if the content of the file is another job's, or the file is gone; else None.

        A lock that cannot be read is not lost: a file server may fail for a moment, and a job that takes a lock over
        writes it whole.
        """
        if found is None:
            return f"{self.path} was removed while this job was using the folder."
        return _in_use(self.folder, found) if found and not self.made(found) else None

    def _touch(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):
                found = _read(self.path)
                self.taken = self.lost_to(found)
                if found and self.taken is None:
                    os.utime(self.path)


_held: dict[Path, FolderLock] = {}
"""Locks of this process, by folder."""


def lost(folder: Path) -> str | None:
    """Returns a sentence if this process had locked the folder, and another job has taken the lock over; else None."""
    lock = _held.get(folder.resolve())
    return lock.lost_to(_read(lock.path)) if lock is not None else None


def seen_lost(folder: Path) -> str | None:
    """Returns what `lost` would have returned a few seconds ago, without asking a file server."""
    return next((lock.taken for lock in _held.values() if lock.folder == folder), None)


def refuse_if_in_use(folder: Path) -> None:
    """Refuses a folder that a living job has locked; says so if the holder of a lock is gone.

    Raises:
        InUseError: as stated.
    """
    path = folder / FILE
    found = _read(path)
    if found is None:
        return
    deadline = time.monotonic() + GOING
    alive = _lives_here(found)
    while alive and time.monotonic() < deadline:
        time.sleep(0.1)
        alive = _lives_here(found)
    if alive is None:
        alive = _is_touched(path)
    if alive:
        raise InUseError(_in_use(folder, found))
    if found.get("id") is not None:
        logger.warning("%s was left locked by %s, which is gone", folder, _name(found))


def is_free(folder: Path) -> bool:
    """Returns whether it is certain, without looking for long, that no other job uses the folder."""
    found = _read(folder / FILE)
    return found is None or _lives_here(found) is False


def is_held(folder: Path) -> bool:
    """Returns whether it is certain that a living process has locked the folder."""
    found = _read(folder / FILE)
    return found is not None and _lives_here(found) is True


def seems_held(folder: Path) -> bool:
    """Returns whether a job seems to be using a folder, without looking for long.

    A lock of another machine counts if it was touched within the last minute, by the clocks of both.
    """
    found = _read(folder / FILE)
    if found is None:
        return False
    alive = _lives_here(found)
    if alive is None:
        with contextlib.suppress(OSError):
            return abs(time.time() - (folder / FILE).stat().st_mtime) < FRESH
    return alive is True


def holder(folder: Path) -> str | None:
    """Returns the id of the lock on a folder; None if there is none."""
    identity = (_read(folder / FILE) or {}).get("id")
    return None if identity is None else str(identity)


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": process.pid,
        "job": next((f"{name}={os.environ[name]}" for name in JOB_VARIABLES if name in os.environ), None),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "started": process.create_time(),
        "ticks": _ticks(process.pid),
        "machine": _machine(),
    }


def _machine() -> str:
    """Returns a name of this machine since its start; where names are equal, process ids can be compared."""
    with contextlib.suppress(OSError):
        boot = BOOT.read_text(encoding="ascii").strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {uuid.getnode()}"  # containers may share the name, but not the network address


def _ticks(pid: int) -> int | None:
    """Returns when a process started, in ticks since the machine did; None if unknown.

    Clocks may be set while a process runs, and then its start by the clock changes.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        # the second field is the program's name in brackets, which may hold anything
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    return None


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a lock: None without a file, and empty if the file cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lives_here(found: dict[str, Any]) -> bool | None:
    """Returns whether the holder of a lock is a living process of this machine; None if it is of another one."""
    if found.get("machine") != _machine():
        return None
    try:
        process = psutil.Process(int(found["pid"]))
        ticks = _ticks(process.pid)
        if ticks is not None and found.get("ticks") is not None:
            same = ticks == found["ticks"]
        else:  # locks of older versions have none
            same = abs(process.create_time() - float(found["started"])) < 2.0
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _is_touched(path: Path) -> bool:
    """Looks at a lock of another machine until it is touched, or has not been for LOOK seconds.

    A lock that cannot be looked at in the end says nothing about its holder, so it counts as touched.
    """
    stamps: set[int] = set()
    deadline = time.monotonic() + LOOK
    logger.warning("%s belongs to another machine; looking for %.0f s whether its job is alive", path, LOOK)
    while True:
        try:
            stamps.add(_stamp(path))
            seen = True
        except FileNotFoundError:
            return False
        except OSError:  # its server does not answer
            seen = False
        if len(stamps) > 1:
            return True
        if time.monotonic() > deadline:
            return not seen
        time.sleep(0.2)


def _stamp(path: Path) -> int:
    """Returns when a file was touched last, by the clock of whoever did.

    Raises:
        OSError: it is gone, or its server does not answer.
    """
    try:
        with path.open("rb") as file:  # opened, because network file systems then ask their server
            return os.fstat(file.fileno()).st_mtime_ns
    except PermissionError:  # a file that only another user may read
        return path.stat().st_mtime_ns


def _name(found: dict[str, Any]) -> str:
    job = f", {found['job']}" if found.get("job") else ""
    return f"process {found.get('pid', '?')} on {found.get('host', 'an unknown machine')}{job}"


def _in_use(folder: Path, found: dict[str, Any]) -> str:
    return (
        f"{folder} is in use by {_name(found)} since {found.get('since', '?')}; wait for that job or end it, or choose "
        f"another out=FOLDER. If it is certain that it is gone, remove {folder / FILE}."
    )
