"""Ends all ranks soon after one of them has died, and lets each of them know the reason.

Every rank of a job tells the others that it is alive, and why it fails if it does, through the store of the process
group. A rank that is blocked, in a collective or anywhere else, is ended by its own watching thread. The first reason
is written into the run folder (`failure.txt`), where `launch/train.sh` and `zero-ds why` read it. Reasons of earlier
attempts move to `failures/`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from zero_ds.runtime import lock

if TYPE_CHECKING:  # programs that only start others read reasons as well, and should not load torch for that
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

FILE = "failure.txt"
"""File in the run folder that holds the reason."""
FINAL = "(the same would happen again: this run is not restarted)"
"""Last line of the file if a restart cannot help."""
EARLIER = "failures"
"""Folder in the run folder with a file for each earlier attempt that failed. To move one needs no room on the disk."""
RESERVE = ".failure.reserve"
"""File in the run folder that keeps room for the reason on a disk that becomes full. Its holder is rank 0."""
ROOM = 4096
"""Bytes of that room. Longer reasons are cut off."""
BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = float(os.environ.get("ZERO_DS_SILENCE", "30"))
"""Seconds without a sign of life after which a rank counts as dead. The thread that gives these signs needs Python's
global lock, which some libraries hold for seconds."""
LEAVE = 10.0
"""Seconds that a rank gets to end by itself, with its own message, once it knows that the job has failed."""

UNKNOWN = "a rank ended without a word; was it killed, or did it run out of memory?"
LAUNCHER_GONE = "DeepSpeed's launcher ended before its ranks; was it killed?"
LOST = re.compile(
    r"a rank ended without a word|launcher ended before its ranks|has given no sign of life|has not answered for|"
    r"^rank \d+ is gone|cannot meet"
)
"""Reasons for which ranks, machines or the network are to blame: the next attempt may have better luck."""

_FAILED = "failed"
_PEER = (
    "Connection was likely closed",
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Socket closed",
    "Broken pipe",
    "Application timeout caused pair closure",
    "NCCL communicator was aborted",
)


NEIGHBOURS = 8
"""Number of following ranks that a rank watches, in addition to rank 0. A launcher that has lost one rank of a machine
kills the others one by one, so a single watcher might be dead as well."""


class Watch:
    """One rank's view of a job. `start` begins to watch; `stop` ends it before the rank ends normally."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """Run folder; None until it is known."""
        self.holder: str | None = None
        """Id of this job's lock on the run folder, if known."""
        self.silence = SILENCE
        self._store: Store | None = None
        self._join: Callable[[], Store]
        self._rank, self._world = 0, 1
        self._heard: str | None = None
        self._answers = 0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, rank: int, world: int, host: str, port: int) -> None:
        """Joins the store at host:port through a connection of its own, because others may block theirs."""
        if world == 1 or self._store is not None:
            return
        self._rank, self._world = rank, world
        self._join = partial(_join, host, port)
        self._store = self._join()
        self._stopped.clear()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._run_beside)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stops watching, and waits for the threads to end.

        A thread that is inside of the store when Python shuts down aborts the process (`terminate called without an
        active exception`).
        """
        self._stopped.set()
        self._store = None
        deadline = time.monotonic() + LEAVE
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def fail(self, reason: str, final: bool = False) -> None:
        """Tells the other ranks why this one ends; the first reason of a job is kept.

        Rank 0, which holds the store, then waits for the others to read it. final: whether the next attempt would fail
        in the same way, as after a mistake in the recipe.
        """
        self.record(reason, final)
        if self.folder is not None and read(self.folder):
            give_up_room(self.folder)
        store = self._store
        if store is not None:
            try:
                store.compare_set(_FAILED, "", f"rank {self._rank} failed: {reason}")
                time.sleep(0.0 if self._rank else 2 * BEAT)
            except (RuntimeError, ValueError):  # the store died with its rank
                logger.debug("the store is gone")

    def leave(self, status: int) -> None:
        """Ends this process after LEAVE seconds unless it ends by itself before.

        Destroying a process group may wait for ranks that will never come.
        """
        if self._store is not None:
            timer = threading.Timer(LEAVE, os._exit, (status,))
            timer.daemon = True
            timer.start()

    def heard(self, wait: float) -> str:
        """Returns why another rank ended, waiting up to `wait` seconds for the reason."""
        deadline = time.monotonic() + wait
        while self._heard is None and self._store is not None and time.monotonic() < deadline:
            time.sleep(0.2)
        return self._heard or (read(self.folder) if self.folder else None) or UNKNOWN

    def record(self, reason: str, final: bool = False) -> None:
        """Writes the reason into the run folder, unless another rank has written one or another job has the folder.

        The launcher of the other job would take the reason for its own, and end its ranks.
        """
        if self.folder is not None and (self.holder is None or lock.holder(self.folder) in (None, self.holder)):
            record(self.folder, reason, final)

    def _run(self) -> None:
        """Gives signs of life, and looks for those of others, until the job ends; runs in a thread."""
        neighbours = {(self._rank + step) % self._world for step in range(1, NEIGHBOURS + 1)}
        watched = sorted({0, *neighbours} - {self._rank})
        heard: dict[int, tuple[str, float]] = {}
        beats, awake = 0, AwakeTime()
        while not self._stopped.wait(BEAT):
            now = awake.seconds()
            store = self._store
            if store is None:
                return
            beats += 1
            try:
                store.set(f"beat/{self._rank}", str(beats))
                if store.check([_FAILED]):
                    self._heard = store.get(_FAILED).decode(errors="replace")
                    self._end(self._heard, LEAVE)
                    return
                for rank in watched:  # a rank counts from its first beat on: some machines start late
                    key = f"beat/{rank}"
                    if store.check([key]):
                        beat = store.get(key).decode()
                        if rank not in heard or heard[rank][0] != beat:
                            heard[rank] = (beat, now)
            except (RuntimeError, ValueError):
                if awake.was_suspended() and self._rejoined():
                    continue
                reason = read(self.folder) if self.folder else None
                self._end(f"rank 0 is gone: {reason or UNKNOWN}", LEAVE)
                return
            self._answers += 1
            silent = [rank for rank, (_, since) in heard.items() if now - since > self.silence]
            if silent:
                reason = f"rank {silent[0]} has given no sign of life for {self.silence:.0f} s"
                self.fail(f"{reason}; was it killed, or its machine lost?")
                self._end(reason, 0.0)  # this rank waits for the silent one, so it would not end by itself

    def _rejoined(self) -> bool:
        """Joins the store again: a request that a suspension has interrupted spoils its connection."""
        try:
            self._store = self._join()
        except (RuntimeError, ValueError):
            return False
        return True

    def _run_beside(self) -> None:
        """Ends this rank if rank 0's store does not answer, on which the other thread then waits; runs in a thread."""
        answers, since, awake = -1, 0.0, AwakeTime()
        while not self._stopped.wait(BEAT):
            now = awake.seconds()
            if self._answers != answers:
                answers, since = self._answers, now
            if now - since > self.silence + BEAT:
                self._end(f"rank 0 has not answered for {self.silence:.0f} s; is its machine lost?", 0.0)

    def _end(self, reason: str, leave: float) -> None:
        """Ends this process unless it ends by itself within `leave` seconds."""
        if self._stopped.wait(leave):
            return
        self.record(reason)
        sys.stderr.write(f"zero-ds: rank {self._rank} ends because {reason}\n")
        sys.stderr.flush()
        os._exit(1)


class AwakeTime:
    """Time that passes for a thread which asks for it every BEAT seconds, without the time in which it did not run.

    A scheduler may suspend all ranks of a job (SIGSTOP) and wake them hours later (SIGCONT). The silence of ranks that
    slept at the same time as this one says nothing about them.
    """

    def __init__(self) -> None:
        self._seconds, self._last, self._gap = 0.0, time.monotonic(), 0.0

    def seconds(self) -> float:
        """Returns the seconds awake so far."""
        now = time.monotonic()
        self._gap, self._last = now - self._last, now
        self._seconds += min(self._gap, 2 * BEAT)
        return self._seconds

    def was_suspended(self) -> bool:
        """Returns whether the thread was suspended between the last two calls of `seconds`, or is late for the next."""
        return max(self._gap, time.monotonic() - self._last) > 3 * BEAT


WATCH = Watch()
"""Watch of this process."""


def _join(host: str, port: int) -> Store:
    """Connects to the store of the job, under a name of its own."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
    return PrefixStore(f"zero_ds/watch/{attempt()}", client)


def attempt() -> str:
    """Returns the number of this attempt under torchrun, whose store outlives an attempt; 0 elsewhere."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _one_line(reason: str) -> str:
    """Returns a reason in one line, cut off so that it fits into the reserve."""
    line = " ".join(reason.split())
    return line if len(line.encode()) < ROOM // 2 else f"{line[: ROOM // 8]} ..."


def peer_ended(error: BaseException) -> bool:
    """Returns whether a collective failed because another rank had ended."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PEER)


def record(folder: Path, reason: str, final: bool = False) -> None:
    """Writes why an attempt failed into its run folder, unless a reason is there already.

    final: whether the next attempt would fail in the same way.
    """
    text = f"{_one_line(reason)}\n" + (f"{FINAL}\n" if final else "")
    try:
        with (folder / FILE).open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        logger.debug("there is a reason already")
    except OSError:
        _record_on_a_full_disk(folder, text)


def _record_on_a_full_disk(folder: Path, text: str) -> None:
    path, reserve = folder / FILE, folder / RESERVE
    with contextlib.suppress(OSError):
        if path.is_file() and not path.read_bytes().strip():
            path.unlink()
        with reserve.open("r+b") as file:  # its blocks are there already
            file.write(text.encode().ljust(ROOM))
            file.flush()
            os.fsync(file.fileno())
        if not path.exists():
            reserve.rename(path)


def is_lost(reason: str) -> bool:
    """Returns whether a rank, a machine or the network was lost, which says nothing about the next attempt."""
    return LOST.search(reason) is not None


def keep_room(folder: Path) -> None:
    """Writes the reserve into a run folder, and makes the folder of earlier reasons, before the disk is full.

    Raises:
        OSError: the disk is full already, or cannot be written.
    """
    (folder / EARLIER).mkdir(exist_ok=True)
    with (folder / RESERVE).open("wb") as file:
        file.write(b" " * ROOM)
        file.flush()
        os.fsync(file.fileno())


def give_up_room(folder: Path) -> None:
    """Removes the reserve, at the end of a run, and the folder of earlier reasons if there are none."""
    with contextlib.suppress(OSError):
        (folder / RESERVE).unlink(missing_ok=True)
        (folder / EARLIER).rmdir()  # refused unless it is empty


def clear(folder: Path) -> None:
    """Moves the reason of an earlier attempt, if any, to the folder of earlier ones."""
    path = folder / FILE
    if read(folder):
        with contextlib.suppress(OSError):
            (folder / EARLIER).mkdir(exist_ok=True)
            last = max(map(_number_of, _earlier_files(folder)), default=0)
            path.rename(folder / EARLIER / f"{last + 1:04d}.txt")  # which replaces nothing, if some were removed
    path.unlink(missing_ok=True)


def read(folder: Path) -> str | None:
    """Returns why the last attempt at a run failed; None if it did not."""
    return _text(folder / FILE) or None


def earlier(folder: Path) -> list[str]:
    """Returns when and why each earlier attempt failed, the last one first."""
    found = []
    for path in reversed(_earlier_files(folder)):
        with contextlib.suppress(OSError):
            when = datetime.fromtimestamp(path.stat().st_mtime).astimezone().isoformat(timespec="seconds")
            found.append(f"{when} {_text(path)}")
    return found


def _earlier_files(folder: Path) -> list[Path]:
    return sorted((file for file in (folder / EARLIER).glob("*.txt") if file.stem.isdecimal()), key=_number_of)


def _number_of(file: Path) -> int:
    return int(file.stem)


def is_final(folder: Path) -> bool:
    """Returns whether the last attempt failed in a way in which the next one would fail as well."""
    return _content(folder / FILE).endswith(FINAL)


def _text(path: Path) -> str:
    return _content(path).removesuffix(FINAL).strip()


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
