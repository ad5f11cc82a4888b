"""A chain of public commands that can be interrupted anywhere and goes on where it stopped.

Every step is a command anyone could type. A step whose command finished is not run again; a step that was interrupted
is, and its command resumes or starts over by itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from zero_ds.config import ConfigError
from zero_ds.console import duration
from zero_ds.files import write_atomically

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """One step: commands that may run side by side."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    expected_seconds: float
    """On two quiet CPU cores, for the estimate of the time left; a finished step's own time replaces it."""
    produces: tuple[Path, ...] = ()
    """Files that must exist for the step to count as done."""
    same: tuple[tuple[str, ...], ...] | None = None
    """The commands without what may differ from one attempt to the next, such as machines; None: the commands."""
    patience: float | None = None
    """Seconds that its commands get to end by themselves; None: PATIENCE."""

    def fingerprint(self) -> str:
        return json.dumps(self.commands if self.same is None else self.same)


@dataclass(frozen=True)
class StepRecord:
    """What is known of a finished step."""

    seconds: float
    fingerprint: str


class StepError(ConfigError):
    """A command of a step ended with an error, which it has printed itself."""


class Pipeline:
    """Runs steps in order and remembers the finished ones in `out`/steps."""

    def __init__(self, out: Path, steps: Sequence[Step]) -> None:
        self.out, self.steps = out, list(steps)
        self._records = out / "steps"

    def run(self) -> None:
        """Runs what is not finished.

        Raises:
            ConfigError: the folder holds steps with other settings.
            StepError: a command failed; running again goes on from there.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        for step in self.steps:  # before anything runs
            self.record(step)
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # also where the shell that started us ignores SIGINT, as it does for what it runs in the background
            signal.signal(name, _interrupts)
        for number, step in enumerate(self.steps, 1):
            record = self.record(step)
            head = f"[{number}/{len(self.steps)}] {step.name}"
            if record is not None and all(path.exists() for path in step.produces):
                logger.info("%s: done before, in %s", head, duration(record.seconds))
                continue
            _interrupts.wait(0.0)
            logger.info("%s  (about %s left)", head, duration(self.seconds_left(number - 1)))
            started = time.monotonic()
            self._run(step)
            seconds = time.monotonic() - started
            missing = [str(path) for path in step.produces if not path.exists()]
            if missing:
                raise StepError(f"step {step.name} ended without {missing[0]}; see its output above.")
            content = {"seconds": seconds, "fingerprint": step.fingerprint()}
            write_atomically(self._records / f"{step.name}.json", json.dumps(content) + "\n")

    def seconds_left(self, done: int) -> float:
        """Estimate from the expected times, stretched by how long the finished steps took against theirs."""
        finished = [(self.record(step), step) for step in self.steps[:done]]
        measured = [(r.seconds, s.expected_seconds) for r, s in finished if r is not None]
        expected = sum(e for _, e in measured)
        stretch = sum(m for m, _ in measured) / expected if expected else 1.0
        return stretch * sum(step.expected_seconds for step in self.steps[done:])

    def record(self, step: Step) -> StepRecord | None:
        """What is known of a finished step, None if it is not finished.

        Raises:
            ConfigError: it was run with another command.
        """
        path = self._records / f"{step.name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = StepRecord(content["seconds"], content["fingerprint"])
        except (OSError, ValueError, KeyError):
            return None
        if record.fingerprint != step.fingerprint():
            raise ConfigError(
                f"{self.out} holds a run with other settings (step {step.name} differs); "
                "choose another --out, or --fresh."
            )
        return record

    def seconds(self) -> dict[str, float]:
        """Measured seconds of every finished step."""
        records = {step.name: self.record(step) for step in self.steps}
        return {name: record.seconds for name, record in records.items() if record is not None}

    def _run(self, step: Step) -> None:
        processes: list[subprocess.Popen[bytes]] = []
        environment = dict(os.environ)
        if len(step.commands) > 1:
            cores = os.cpu_count() or 1
            environment["OMP_NUM_THREADS"] = str(max(1, cores // len(step.commands)))
        try:
            for command in step.commands:
                print(f"+ {shlex.join(command)}", flush=True)
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            while any(process.poll() is None for process in processes):
                if any(process.poll() not in (None, 0) for process in processes):
                    break
                _interrupts.wait(0.2)
        finally:
            _end(processes, step.patience or PATIENCE)
        for command, process in zip(step.commands, processes, strict=True):
            if process.returncode != 0:
                raise StepError(
                    f"step {step.name} failed (exit status {process.returncode}): {shlex.join(command)}; "
                    "what is finished is kept, run again to go on."
                )


class _Interrupts:
    """Handler of signals that ends a wait, and comes to nothing else.

    Raised inside of Popen, an exception may leave its lock taken, for which the next call would wait for ever.
    """

    def __init__(self) -> None:
        self._asked = self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._waiting:
            self._end()

    def wait(self, seconds: float) -> None:
        """Sleeps, unless a signal has come since the last time.

        Raises:
            KeyboardInterrupt: one has, or comes.
        """
        try:
            self._waiting = True
            if self._asked:
                self._end()
            time.sleep(seconds)
        finally:
            self._waiting = False

    def _end(self) -> None:
        self._asked = self._waiting = False
        raise KeyboardInterrupt


_interrupts = _Interrupts()


PATIENCE = float(os.environ.get("ZERO_DS_STOP_PATIENCE", "20"))
"""Seconds that a command gets to end by itself, with a commit, after it was asked to."""


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Asks what still runs to stop, waits, then kills: no process outlives its pipeline.

    Interrupted once more, it hands that on, too, and waits no longer than PATIENCE.
    """
    _ask(processes)
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        try:
            _interrupts.wait(0.1)
        except KeyboardInterrupt:
            _ask(processes)
            deadline = min(deadline, time.monotonic() + PATIENCE)
    for process in processes:
        if process.poll() is None:
            # not by its group: ranks have a session of their own
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    each.kill()
            process.wait()


def _ask(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def start_fresh(out: Path) -> None:
    """Removes an earlier run of a pipeline.

    Raises:
        ConfigError: the folder holds something else.
    """
    if out.exists():
        if not (out / "steps").is_dir():
            raise ConfigError(f"{out} does not look like a run of this command; remove it yourself if you mean it.")
        shutil.rmtree(out)
