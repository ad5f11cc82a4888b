"""A chain of public commands that can be interrupted anywhere and continues where it stopped.

Every step is a command that anyone could type. A step whose commands have finished is not run again. A step that was
interrupted is run again, and its commands resume or start over by themselves.
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
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from zero_ds.cluster.output import Output
from zero_ds.cluster.story import Outcome, told
from zero_ds.runtime.console import duration
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)

Command = tuple[str, ...]

MODULES = ("zero_ds.cli", "zero_ds")
"""Modules that `python -m` has run for `zero-ds`, the present one first. Records of finished steps may name any."""

PATIENCE = float(os.environ.get("ZERO_DS_STOP_PATIENCE", "20"))
"""Seconds that a command gets to end by itself, with a checkpoint, after it was asked to stop."""


def zero_ds_command(*words: str) -> Command:
    """Returns the command that runs `zero-ds WORDS` with the interpreter of this process."""
    return (sys.executable, "-m", MODULES[0], *words)


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: commands that may run at the same time."""

    name: str
    commands: tuple[Command, ...]
    expected_seconds: float
    """Expected duration on two idle CPU cores, from which the time left is estimated; a finished step's measured
    duration replaces it."""
    produces: tuple[Path, ...] = ()
    """Files that must exist for the step to count as finished."""
    same: tuple[Command, ...] | None = None
    """Commands without the options that may differ from one attempt to the next, such as machines. None: `commands`."""
    patience: float | None = None
    """Seconds that the commands get to end by themselves. None: PATIENCE."""
    purpose: str = ""
    """Words about the step that follow its name on the console."""
    outcome: Outcome | None = None
    """Function that returns a line about the result."""

    def fingerprint(self) -> str:
        """Returns the text by which a finished step recognises its commands, whichever Python runs them."""
        return _fingerprint(self.commands if self.same is None else self.same)


def _fingerprint(commands: Sequence[Sequence[str]]) -> str:
    return json.dumps([_without_interpreter(command) for command in commands])


def _without_interpreter(command: Sequence[str]) -> list[str]:
    """Returns a command with `PYTHON -m zero_ds.cli` replaced by `zero-ds`; any other command as it is."""
    if len(command) >= 3 and command[1] == "-m" and command[2] in MODULES:
        return ["zero-ds", *command[3:]]
    return list(command)


def _recorded_fingerprint(text: str) -> str:
    """Returns a stored fingerprint in the present form; earlier versions stored interpreter and module as well."""
    try:
        content: Any = json.loads(text)
    except (TypeError, ValueError):
        return text
    is_commands = isinstance(content, list) and all(isinstance(command, list) for command in content)
    return _fingerprint(content) if is_commands else text


@dataclass(frozen=True)
class StepRecord:
    """Record of a finished step."""

    seconds: float
    fingerprint: str


class StepError(ConfigError):
    """A command of a step failed."""


class Pipeline:
    """Runs steps in order and records the finished ones in `out`/steps."""

    def __init__(self, out: Path, steps: Sequence[Step], *, verbose: bool = False) -> None:
        """Reads nothing yet. verbose: whether the commands write to the console, and not into files in `out`/logs."""
        self.out, self.verbose = out, verbose
        self.steps = list(steps)
        self._records = out / "steps"

    def run(self) -> None:
        """Runs every step that is not finished.

        Raises:
            ConfigError: the folder holds steps with other settings.
            StepError: a command failed; running again continues from there.
        """
        self._records.mkdir(parents=True, exist_ok=True)
        for step in self.steps:  # refuses other settings before anything runs
            self.record(step)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            # also where the parent shell ignores SIGINT, as shells do for background commands
            signal.signal(number, _interrupts)
        for index, step in enumerate(self.steps):
            head = f"[{index + 1}/{len(self.steps)}] {step.name}"
            record = self.record(step)
            if record is not None and all(path.exists() for path in step.produces):
                logger.info("%s: done before, in %s", head, duration(record.seconds))
                continue
            _interrupts.wait(0.0)
            purpose = f" {step.purpose}" if step.purpose else ""
            logger.info("%s%s  (about %s left)", head, purpose, duration(self.seconds_left(index)))
            seconds = self._run_and_record(step)
            if not self.verbose:
                print(f"       {'; '.join(filter(None, (told(step.outcome), duration(seconds))))}", flush=True)

    def seconds_left(self, done: int) -> float:
        """Estimates the seconds that all steps after the first `done` take.

        Expected durations are scaled by the ratio of measured to expected time over the finished steps.
        """
        measured = expected = 0.0
        for step in self.steps[:done]:
            record = self.record(step)
            if record is not None:
                measured += record.seconds
                expected += step.expected_seconds
        scale = measured / expected if expected else 1.0
        return scale * sum(step.expected_seconds for step in self.steps[done:])

    def record(self, step: Step) -> StepRecord | None:
        """Returns the record of a finished step; None if it is not finished.

        Raises:
            ConfigError: the step was finished with other commands.
        """
        path = self._records / f"{step.name}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = StepRecord(content["seconds"], content["fingerprint"])
        except (OSError, ValueError, KeyError):
            return None
        if _recorded_fingerprint(record.fingerprint) != step.fingerprint():
            raise ConfigError(
                f"{self.out} holds a run with other settings (step {step.name} differs); "
                "choose another --out, or --fresh."
            )
        return record

    def seconds(self) -> dict[str, float]:
        """Returns the measured seconds of every finished step, by name."""
        records = {step.name: self.record(step) for step in self.steps}
        return {name: record.seconds for name, record in records.items() if record is not None}

    def _run_and_record(self, step: Step) -> float:
        """Runs a step, records that it is finished, and returns the seconds that it took."""
        started = time.monotonic()
        output = None if self.verbose else Output(self.out / "logs" / f"{step.name}.log")
        _run(step, output)
        seconds = time.monotonic() - started
        missing = [path for path in step.produces if not path.exists()]
        if missing:
            raise StepError(f"step {step.name} ended without {missing[0]}; see its output {_where(output)}.")
        content = {"seconds": seconds, "fingerprint": step.fingerprint()}
        write_atomically(self._records / f"{step.name}.json", json.dumps(content) + "\n")
        return seconds


def _run(step: Step, output: Output | None) -> None:
    """Runs the commands of a step at the same time, and ends all of them as soon as one fails.

    output: where they write to; None: the console.
    """
    processes: list[subprocess.Popen[bytes]] = []
    environment = dict(os.environ)
    if len(step.commands) > 1:
        cores = os.cpu_count() or 1
        environment["OMP_NUM_THREADS"] = str(max(1, cores // len(step.commands)))
    try:
        for command in step.commands:
            processes.append(_started(command, environment, output))
        while any(process.poll() is None for process in processes):
            if any(process.poll() not in (None, 0) for process in processes):
                break
            _interrupts.wait(0.2)
            if output is not None:
                output.follow()
    finally:
        _end(processes, step.patience or PATIENCE)
        if output is not None:
            output.clear()
    for command, process in zip(step.commands, processes, strict=True):
        if process.returncode != 0:
            reason = None if output is None else output.reason()
            if output is not None and reason is None:
                print(output.last_lines(), file=sys.stderr)
            raise StepError(
                f"step {step.name} failed (exit status {process.returncode}): {reason or shlex.join(command)}; "
                f"its output is {_where(output)}. Finished steps are kept, run the same command again to continue."
            )


def _started(command: Command, environment: dict[str, str], output: Output | None) -> subprocess.Popen[bytes]:
    """Starts a command, whose own text goes before its output."""
    said = f"+ {shlex.join(command)}"
    if output is None:
        print(said, flush=True)
        return subprocess.Popen(command, env=environment, start_new_session=True)
    with output.open() as file:
        file.write(f"{said}\n".encode())
        file.flush()
        return subprocess.Popen(command, env=environment, start_new_session=True, stdout=file, stderr=subprocess.STDOUT)


def _where(output: Output | None) -> str:
    return "above" if output is None else f"in {output.path}"


class _Interrupts:
    """Signal handler that interrupts this module's waits and nothing else.

    An exception raised inside Popen may leave Popen's lock taken, and the next call would wait for it for ever.
    """

    def __init__(self) -> None:
        self._asked = self._waiting = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        if self._waiting:
            self._end()

    def wait(self, seconds: float) -> None:
        """Sleeps for `seconds`.

        Raises:
            KeyboardInterrupt: A signal has arrived since the last wait, or arrives during this one.
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


def _end(processes: Sequence[subprocess.Popen[bytes]], patience: float) -> None:
    """Asks running processes to stop, waits, then kills them: no process outlives its pipeline.

    A second interrupt is passed on as well, and shortens the rest of the wait to PATIENCE.
    """
    _ask_to_stop(processes)
    deadline = time.monotonic() + patience
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        try:
            _interrupts.wait(0.1)
        except KeyboardInterrupt:
            _ask_to_stop(processes)
            deadline = min(deadline, time.monotonic() + PATIENCE)
    for process in processes:
        if process.poll() is None:
            # one by one rather than by process group: ranks have a session of their own
            for descendant in [*psutil.Process(process.pid).children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    descendant.kill()
            process.wait()


def _ask_to_stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


def start_fresh(out: Path) -> None:
    """Removes the folder of an earlier pipeline.

    Raises:
        ConfigError: the folder holds something else.
    """
    if not out.exists():
        return
    if not (out / "steps").is_dir():
        raise ConfigError(f"{out} does not look like a run of this command; remove it yourself if you mean it.")
    shutil.rmtree(out)
