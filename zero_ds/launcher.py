"""Around DeepSpeed's launcher: hands signals to the ranks, and says last why a run failed.

    python -m zero_ds.launcher RECIPE [key=value ...] -- COMMAND ...

DeepSpeed's launcher (0.19) dies of a signal and leaves its ranks running, or, where the signal reaches all processes,
gives them half a minute. Here the first signal asks the ranks to commit and stop after the step they are in; the second
one ends everything at once.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import psutil

from zero_ds import failure
from zero_ds.config import ConfigError, load_run

PATIENCE = 12.0
"""Seconds that ranks get to end by themselves after one of them has failed; longer than failure.LEAVE."""


class Job:
    """A launched command and the processes below it."""

    def __init__(self, command: list[str]) -> None:
        self.asked = False
        # a session of its own: a Ctrl-C of the terminal comes here alone, and is handed on in an orderly way
        self.process = subprocess.Popen(command, start_new_session=True)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            signal.signal(getattr(signal, name), self._asked)

    def wait(self, out: Path) -> int:
        """Exit status of the command; 128 + n if a signal n ended it.

        Ranks of this machine that are still there PATIENCE seconds after the run in `out` has failed are killed: they
        hang, or were stopped, and DeepSpeed would wait half a minute for them.
        """
        failed_at = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(1.0)
                return status if status >= 0 else 128 - status
            if failed_at is None and failure.read(out):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                for process in self._ranks():
                    with contextlib.suppress(psutil.Error):
                        process.kill()

    def _ranks(self) -> list[psutil.Process]:
        return [process for process in self._below() if any("--local_rank" in word for word in _words(process))]

    def _below(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def _asked(self, number: int, frame: FrameType | None) -> None:
        ranks = self._ranks()
        if self.asked:
            for process in [*self._below(), self.process]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        elif ranks:
            print("zero-ds: the ranks commit and stop after this step; ask again to stop at once.", file=sys.stderr)
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGUSR1)
        elif self.process.poll() is None:  # on other machines, or not there yet
            self.process.terminate()
        self.asked = True


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # gone in between
        return []


def main(arguments: list[str]) -> int:
    """Runs the command behind `--`; what stands before it says which run that is."""
    (recipe, *overrides), command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    try:
        out = Path(load_run(recipe, overrides).out)
    except ConfigError as error:
        print(f"zero-ds: {error}", file=sys.stderr)
        return 2
    failure.clear(out)
    status = Job(command).wait(out)
    if status and (reason := failure.read(out)):
        print(f"zero-ds: the run failed: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
