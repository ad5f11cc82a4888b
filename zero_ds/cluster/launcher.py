"""Around DeepSpeed's launcher: hands signals to the ranks, says last why a run failed, and starts it again.

    python -m zero_ds.cluster.launcher [--max-restarts N] [--forward NAME ...] RECIPE [key=value ...] -- deepspeed ...

DeepSpeed's launcher (0.19) dies of a signal and leaves its ranks running, or, where the signal reaches all processes,
gives them half a minute; on other machines it looks for them by their command line. Here the first signal asks the
ranks, on all machines, to commit and stop after the step they are in; the second one ends everything at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import psutil

from zero_ds.cluster.environment import told
from zero_ds.cluster.hostfile import node_of_rank
from zero_ds.cluster.machines import Cluster, deepspeed_command, files_of
from zero_ds.config.loading import load_run
from zero_ds.runtime import failure
from zero_ds.runtime.errors import ConfigError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 12.0
"""Seconds that ranks get to end by themselves after one of them has failed; longer than failure.LEAVE."""
COMING_BACK = 600.0
"""Seconds for which a restart waits for a machine that does not answer."""
PAUSE = 2.0
"""Seconds between an attempt and the next."""
STOPPED_OR_REFUSED = (1, 2)
"""Exit statuses of ranks that end by themselves: asked to stop by a signal of their own, or a mistake of the user's."""


def say(text: str) -> None:
    print(f"zero-ds: {text}", file=sys.stderr, flush=True)


class Job:
    """A launched command and the processes below it, here and on other machines."""

    def __init__(
        self, command: list[str], cluster: Cluster | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.asked = False
        self.cluster = cluster
        self._started = False
        # before it starts: whoever asks in between is heard as soon as there is something to end
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        # a session of its own: a Ctrl-C of the terminal comes here alone, and is handed on in an orderly way
        self.process = subprocess.Popen(command, start_new_session=True, env=environment)
        self._started = True
        if self.asked:
            self.process.terminate()

    def release(self) -> None:
        """Hands signals back; what the job has left is gone by now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, out: Path) -> int:
        """Exit status of the command; 128 + n if a signal n ended it.

        Ranks of this machine that are still there PATIENCE seconds after the run in `out` has failed are killed: they
        hang, or were stopped, and DeepSpeed would wait half a minute for them. Those on other machines are, too.
        """
        failed_at = None
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self.process.wait(1.0)
                return status if status >= 0 else 128 - status
            if failed_at is None and failure.read(out):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
                if self.cluster is not None:
                    self.cluster.end(patience=0.0)
                for process in self._ranks():
                    with contextlib.suppress(psutil.Error):
                        process.kill()
                failed_at = time.monotonic()

    def _ranks(self) -> list[psutil.Process]:
        return [process for process in self._below() if any("--local_rank" in word for word in _words(process))]

    def _below(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def _asked(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if not self._started:
            return
        if self.cluster is not None:  # by ssh, which takes longer than a signal handler should
            threading.Thread(target=self._end_cluster if again else self._stop_cluster, daemon=True).start()
            return
        ranks = self._ranks()
        if again:
            self._kill_here()
        elif ranks:
            say("the ranks commit and stop after this step; ask again to stop at once.")
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGUSR1)
        elif self.process.poll() is None:  # not there yet
            self.process.terminate()

    def _stop_cluster(self) -> None:
        assert self.cluster is not None
        if self.cluster.ask_to_stop():
            say("the ranks commit and stop after this step; ask again to stop at once.")
        else:  # not there yet
            self._end_cluster()

    def _end_cluster(self) -> None:
        assert self.cluster is not None
        self._kill_here()  # first, or it would start more
        self.cluster.end(patience=0.0)

    def sweep(self) -> None:
        """Kills what a launcher that was itself killed has left here: all of the command's session."""
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid:
                    process.kill()

    def _kill_here(self) -> None:
        for process in [*self._below(), self.process]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # gone in between
        return []


class Launch:
    """A run, attempt after attempt."""

    def __init__(
        self, command: list[str], out: Path, restarts: int, named: list[str], files: tuple[str, ...] = ()
    ) -> None:
        self.out, self.restarts = out, restarts
        split = command.index("--module")
        self.options, self.module, self.words = command[1:split], command[split + 1], command[split + 2 :]
        self.command = command
        self.cluster = Cluster.of(self.options, named, files)

    def run(self) -> int:
        """Exit status of the last attempt.

        Raises:
            ConfigError: machines that do not answer, or on which the run cannot start.
        """
        attempt = 0
        try:
            while True:
                failure.clear(self.out)
                status, asked = self._attempt(attempt)
                if status == 0 or asked or attempt == self.restarts or not self._mendable(status):
                    return status
                attempt += 1
                say(f"restart {attempt} of {self.restarts}, from the last commit")
                time.sleep(PAUSE)
        finally:
            if self.cluster is not None:
                self.cluster.forget()

    def _attempt(self, attempt: int) -> tuple[int, bool]:
        """Exit status, and whether somebody has asked the run to stop."""
        if self.cluster is None:
            job = Job(self.command if "/dev/null" in self.options else self._on_this_machine())
            status = job.wait(self.out)
            job.sweep()
        else:
            more, environment, what = self.cluster.prepare(wait=COMING_BACK if attempt else 0.0)
            say(told(what))
            command = deepspeed_command(self.options, more, self.module, self.words)
            print(f"+ {shlex.join(command)}", flush=True)
            job = Job(command, self.cluster, environment)
            status = job.wait(self.out)
            if job.asked:
                time.sleep(1.0)  # a shell that was just starting there
            found, silent = self.cluster.end()
            if silent:
                say(f"{', '.join(silent)} does not answer; ranks may still run there.")
            # DeepSpeed's launcher may be killed, and says 0
            status = status or (1 if found else 0)
        if status and (reason := failure.read(self.out)):
            say(f"the run failed: {reason}{self._where(reason)}")
        job.release()
        return status, job.asked

    def _on_this_machine(self) -> list[str]:
        """The command for a hostfile that names this machine alone."""
        from zero_ds.runtime.ports import free_port

        more = ["--no_ssh_check"]
        for name, value in (("--master_addr", "127.0.0.1"), ("--master_port", str(free_port()))):
            more += [] if name in self.options else [name, value]
        command = ["deepspeed", *self.options, *more, "--module", self.module, *self.words]
        print(f"+ {shlex.join(command)}", flush=True)
        return command

    def _where(self, reason: str) -> str:
        """The machine of the rank that a reason names."""
        found = re.match(r"rank (\d+) (is|has) ", reason)
        node = node_of_rank(self.cluster.nodes, int(found[1])) if found and self.cluster else None
        return f" (rank {found[1]} runs on {node})" if found and node else ""

    def _mendable(self, status: int) -> bool:
        """Whether the next attempt may fare better: not after a mistake, nor a stop that somebody asked a rank for."""
        if failure.read(self.out):
            return not failure.is_final(self.out)
        return status not in STOPPED_OR_REFUSED


def main(arguments: list[str]) -> int:
    """Runs the command behind `--`; what stands before it says which run that is."""
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="launch/train.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--forward", action="append", default=[])
    parser.add_argument("run", nargs="+")
    options = parser.parse_args(arguments[:split])
    before = {number: signal.signal(number, _interrupted) for number in SIGNALS}
    try:
        recipe, *overrides = options.run
        run = load_run(recipe, overrides)
        command = arguments[split + 1 :]
        return Launch(command, Path(run.out), options.max_restarts, options.forward, files_of(recipe, run)).run()
    except ConfigError as error:
        say(str(error))
        return 2
    except KeyboardInterrupt:  # before the first attempt, or between two
        say("stopped before the ranks were started.")
        return 128 + signal.SIGINT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
