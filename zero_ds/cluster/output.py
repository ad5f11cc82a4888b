"""The output of a pipeline's commands: kept in a file for each step, with a line of progress on the console.

The commands write into the file themselves, so a pipeline that is killed does not take the reader of their output away.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import IO

PROGRESS = re.compile(r"\bstep (\d+)/(\d+)  \S+ < (\S+) left(?:  loss (\S+))?")
"""Line of a training run, as the monitor writes it."""
PAUSE = 30.0
"""Seconds between two lines of progress where they cannot replace each other."""
LAST = 12
"""Number of lines that are shown of the output of a command that failed."""
REASON = re.compile(r"^zero-ds: (?:the run failed: )?(.+)$", re.MULTILINE)


class Output:
    """The file that a step's commands write into, and the console that follows it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._start = path.stat().st_size if path.exists() else 0  # of an attempt that was interrupted
        self._read = self._start
        self._shown, self._at = "", time.monotonic()
        self._replaces = sys.stdout.isatty()

    def open(self) -> IO[bytes]:
        """Opens the file for a command to append to."""
        return self.path.open("ab")

    def follow(self) -> None:
        """Shows the progress of a training run, if there is something new."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            text = file.read().decode(errors="replace")
            self._read = file.tell()
        found = list(PROGRESS.finditer(text))
        if not found:
            return
        step, steps, left, loss = found[-1].groups()
        line = f"step {step} of {steps}, {left} left" + (f", loss {loss}" if loss else "")
        if line == self._shown or not (self._replaces or time.monotonic() - self._at >= PAUSE):
            return
        self._shown, self._at = line, time.monotonic()
        print(f"\r\x1b[K       {line}" if self._replaces else f"       {line}", end="" if self._replaces else "\n")
        sys.stdout.flush()

    def clear(self) -> None:
        """Removes the line of progress from a terminal."""
        if self._replaces and self._shown:
            print("\r\x1b[K", end="", flush=True)

    def of_this_attempt(self) -> str:
        """Returns the output of the commands."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            return file.read().decode(errors="replace").replace("\r", "\n")

    def reason(self) -> str | None:
        """Returns the last sentence in which a command says why it failed."""
        found = REASON.findall(self.of_this_attempt())
        return found[-1].rstrip(".") if found else None

    def last_lines(self) -> str:
        """Returns the end of the output."""
        lines = [line for line in self.of_this_attempt().splitlines() if line.strip()]
        return "\n".join(lines[-LAST:])
