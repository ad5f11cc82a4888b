"""Ends all ranks soon after one of them has died, and lets each of them know the reason.

Every rank of a job tells the others that it is alive, and why it fails if it does, through the store of the process
group. A rank that is blocked, in a collective or anywhere else, is ended by its own watching thread. The first reason
is written into the run folder (`failure.txt`), where `launch/train.sh` and `zero-ds why` read it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # programs that only start others read reasons as well, and should not load torch for that
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

FILE = "failure.txt"
"""File in the run folder that holds the reason."""
FINAL = "(the same would happen again: this run is not restarted)"
"""Last line of the file if a restart cannot help."""
BEAT = 2.0
"""Seconds between two signs of life."""
SILENCE = float(os.environ.get("ZERO_DS_SILENCE", "30"))
"""Seconds without a sign of life after which a rank counts as dead. The thread that gives these signs needs Python's
global lock, which some libraries hold for seconds."""
LEAVE = 10.0
"""Seconds that a rank gets to end by itself, with its own message, once it knows that the job has failed."""

UNKNOWN = "a rank ended without a word; was it killed, or did it run out of memory?"

_FAILED = "failed"
_PEER = (
    "Connection was likely closed",
    "Connection closed by peer",
    "Connection reset by peer",
    "remote process exited",
    "Socket closed",
    "Broken pipe",
)


NEIGHBOURS = 8
"""Number of following ranks that a rank watches, in addition to rank 0. A launcher that has lost one rank of a machine
kills the others one by one, so a single watcher might be dead as well."""


class Watch:
    """One rank's view of a job. `start` begins to watch; `stop` ends it before the rank ends normally."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        """Run folder; None until it is known."""
        self.silence = SILENCE
        self._store: Store | None = None
        self._rank, self._world = 0, 1
        self._heard: str | None = None
        self._answered = 0.0
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, rank: int, world: int, host: str, port: int) -> None:
        """Joins the store at host:port through a connection of its own, because others may block theirs."""
        if world == 1 or self._store is not None:
            return
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        self._rank, self._world = rank, world
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an elastic agent's store outlives an attempt
        self._store = PrefixStore(f"zero_ds/watch/{attempt}", client)
        self._stopped.clear()
        self._answered = time.monotonic()
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
        """Writes the reason into the run folder unless another rank has written one."""
        if self.folder is None:
            return
        try:
            with (self.folder / FILE).open("x", encoding="utf-8") as file:
                file.write(reason.strip() + "\n" + (FINAL + "\n" if final else ""))
        except OSError:
            logger.debug("there is a reason already, or the file cannot be written")

    def _run(self) -> None:
        """Gives signs of life, and looks for those of others, until the job ends; runs in a thread."""
        neighbours = {(self._rank + step) % self._world for step in range(1, NEIGHBOURS + 1)}
        watched = sorted({0, *neighbours} - {self._rank})
        heard: dict[int, tuple[str, float]] = {}
        beats = 0
        while not self._stopped.wait(BEAT):
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
                        now = store.get(key).decode()
                        if rank not in heard or heard[rank][0] != now:
                            heard[rank] = (now, time.monotonic())
            except (RuntimeError, ValueError):
                reason = read(self.folder) if self.folder else None
                self._end(f"rank 0 is gone: {reason or UNKNOWN}", LEAVE)
                return
            self._answered = time.monotonic()
            silent = [rank for rank, (_, since) in heard.items() if time.monotonic() - since > self.silence]
            if silent:
                reason = f"rank {silent[0]} has given no sign of life for {self.silence:.0f} s"
                self.fail(f"{reason}; was it killed, or its machine lost?")
                self._end(reason, 0.0)  # this rank waits for the silent one, so it would not end by itself

    def _run_beside(self) -> None:
        """Ends this rank if rank 0's store does not answer, on which the other thread then waits; runs in a thread."""
        while not self._stopped.wait(BEAT):
            if time.monotonic() - self._answered > self.silence + BEAT:
                self._end(f"rank 0 has not answered for {self.silence:.0f} s; is its machine lost?", 0.0)

    def _end(self, reason: str, leave: float) -> None:
        """Ends this process unless it ends by itself within `leave` seconds."""
        if self._stopped.wait(leave):
            return
        self.record(reason)
        sys.stderr.write(f"zero-ds: rank {self._rank} ends because {reason}\n")
        sys.stderr.flush()
        os._exit(1)


WATCH = Watch()
"""Watch of this process."""


def peer_ended(error: BaseException) -> bool:
    """Returns whether a collective failed because another rank had ended."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _PEER)


def clear(folder: Path) -> None:
    """Removes the reason of an earlier attempt."""
    (folder / FILE).unlink(missing_ok=True)


def read(folder: Path) -> str | None:
    """Returns why the last attempt at a run failed; None if it did not."""
    try:
        return (folder / FILE).read_text(encoding="utf-8").strip().removesuffix(FINAL).strip()
    except OSError:
        return None


def is_final(folder: Path) -> bool:
    """Returns whether the last attempt failed in a way in which the next one would fail as well."""
    try:
        return (folder / FILE).read_text(encoding="utf-8").strip().endswith(FINAL)
    except OSError:
        return False
