"""Groups of ranks that are alive together and work in turns, so that contestants meet the machine in the same state.

A rank's function gets a `Turn` and calls `turn.step()` before every step; between turns it waits there without load.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

from report import resident

_context = multiprocessing.get_context("spawn")


@dataclass
class Turn:
    """A rank's side of the turns."""

    connection: Connection
    counted: dict[str, float] = field(default_factory=dict)
    """Sums of the numbers that were given to `count` since the rank began."""
    _left: int = 0
    _started: float | None = None

    def step(self) -> None:
        """Waits for the next turn if this one is over, and ends the process after the last one.

        Ranks call it before every step.
        """
        if self._left == 0:
            if self._started is not None:
                seconds = time.perf_counter() - self._started
                self.connection.send({"seconds": seconds, "peak_gib": resident(), "counted": dict(self.counted)})
            self._left = self.connection.recv()
            if self._left == 0:
                os._exit(0)  # without clean-up of process groups, in which ranks would wait for each other
            self._started = time.perf_counter()
        self._left -= 1

    def count(self, **numbers: float) -> None:
        """Adds numbers to those counted so far."""
        for name, number in numbers.items():
            self.counted[name] = self.counted.get(name, 0.0) + number


class Group:
    """Ranks of one contestant. A context manager that kills them at its end."""

    def __init__(
        self,
        name: str,
        function: Callable[..., None],
        ranks: int,
        folder: Path,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        """Starts the ranks, whose logs are in `folder`.

        function: importable; every rank calls function(turn, **arguments).
        """
        self.name = name
        self.found: list[dict[str, Any]] = []
        """Results of each turn: seconds, peak_gib (of the rank that needs most), counted (sums over ranks)."""
        self.logs = [folder / f"{name.replace(' ', '-').replace('/', '-')}-{rank}.log" for rank in range(ranks)]
        environment = {
            **(environment or {}),
            "WORLD_SIZE": str(ranks),
            "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        }
        pipes = [_context.Pipe() for _ in range(ranks)]
        self._ours = [ours for ours, _ in pipes]
        self._processes = []
        for rank, (_, theirs) in enumerate(pipes):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            given = (function, arguments, own, self.logs[rank], theirs)
            self._processes.append(_context.Process(target=_rank, args=given, name=f"{name} {rank}", daemon=True))
        # libraries read the number of threads when they are imported, which is before the child's own code runs
        before = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            for process in self._processes:
                process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        for _, theirs in pipes:
            theirs.close()

    def turn(self, steps: int, timeout: float = 1800.0) -> dict[str, Any]:
        """Lets the ranks make `steps` steps; returns their results, and adds them to `found`.

        Raises:
            RuntimeError: a rank failed or took too long.
        """
        for connection in self._ours:
            try:
                connection.send(steps)
            except OSError:
                self._fail("a rank is gone")
        answers: dict[Any, dict[str, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < len(self._ours):
            ready = wait([c for c in self._ours if c not in answers], max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail("a rank took too long")
            for connection in ready:
                try:
                    answers[connection] = connection.recv()  # type: ignore[index,union-attr]
                except (EOFError, OSError):
                    self._fail("a rank ended")
        ranks = list(answers.values())
        names = {name for rank in ranks for name in rank["counted"]}
        found = {
            "steps": steps,
            "seconds": max(rank["seconds"] for rank in ranks),
            "peak_gib": max(rank["peak_gib"] for rank in ranks),
            "counted": {name: sum(rank["counted"].get(name, 0.0) for rank in ranks) for name in names},
        }
        self.found.append(found)
        return found

    def _fail(self, what: str) -> None:
        logs = "\n".join(
            f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs if log.is_file()
        )
        raise RuntimeError(f"{self.name}: {what}\n{logs}")

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _rank(
    function: Callable[..., None], arguments: dict[str, Any], environment: dict[str, str], log: Path, pipe: Connection
) -> None:
    os.environ.update(environment)
    file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        function(Turn(pipe), **arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _free_port() -> int:
    from zero_ds.runtime.distributed import free_port

    return free_port()
