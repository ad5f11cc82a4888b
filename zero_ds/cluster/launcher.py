"""Runs DeepSpeed's launcher: passes signals on to the ranks, prints why a run failed, and restarts it.

    python -m zero_ds.cluster.launcher [--max-restarts N] [--forward NAME ...] RECIPE [key=value ...] -- deepspeed ...

DeepSpeed's launcher (0.19) dies of a signal and leaves its ranks running, or gives them half a minute if the signal
reaches all processes; on other machines it looks for them by their command line. Here the first signal asks the ranks
on all machines to write a checkpoint and stop after the current step; the second one ends everything at once.
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

from zero_ds.cluster.environment import describe_forwarded
from zero_ds.cluster.hostfile import node_of_rank
from zero_ds.cluster.machines import Cluster, deepspeed_command, files_of
from zero_ds.config.loading import load_run
from zero_ds.runtime import failure, lock
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.options import fallback

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 12.0
"""Seconds that ranks get to end by themselves after one of them has failed; more than failure.LEAVE."""
COMING_BACK = 600.0
"""Seconds for which a restart waits for machines that do not answer."""
GOING = 10.0
"""Seconds that a killed rank may take to be gone."""
PAUSE = 2.0
"""Seconds between two attempts."""
STOPPED_OR_REFUSED = (1, 2)
"""Exit statuses of ranks that ended by themselves: after a signal to a single rank, and after a mistake of the user."""


STOPPING = "the ranks write a checkpoint and stop after this step; ask again to stop at once."


def say(text: str) -> None:
    """Prints a line for people on stderr."""
    print(f"zero-ds: {text}", file=sys.stderr, flush=True)


class Job:
    """A launched command and the processes below it, on this machine and on others."""

    def __init__(
        self, command: list[str], cluster: Cluster | None = None, environment: dict[str, str] | None = None
    ) -> None:
        self.asked = False
        self.cluster = cluster
        self._started = False
        # the handlers come first: a signal during the start is obeyed as soon as there is something to end
        self._before = {number: signal.signal(number, self._asked) for number in SIGNALS}
        # a session of its own: the terminal's Ctrl-C reaches this process alone, which passes it on in order
        self.process = subprocess.Popen(command, start_new_session=True, env=environment)
        self._started = True
        if self.asked:
            self.process.terminate()

    def release(self) -> None:
        """Restores the signal handlers, once nothing of the job is left."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wait(self, out: Path) -> int:
        """Waits for the command and returns its exit status; 128 + n if signal n ended it.

        Kills all ranks that are still running PATIENCE seconds after the run in `out` has failed: they hang, or were
        stopped, and DeepSpeed would wait half a minute for them.
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
        if self.cluster is not None:  # through ssh, which takes longer than a signal handler should
            threading.Thread(target=self._end_cluster if again else self._stop_cluster, daemon=True).start()
            return
        ranks = self._ranks()
        if again:
            self._kill_here()
        elif ranks:
            say(STOPPING)
            for process in ranks:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGUSR1)
        elif self.process.poll() is None:  # the ranks have not started yet
            self.process.terminate()

    def _stop_cluster(self) -> None:
        assert self.cluster is not None
        if self.cluster.ask_to_stop():
            say(STOPPING)
        else:  # the ranks have not started yet
            self._end_cluster()

    def _end_cluster(self) -> None:
        assert self.cluster is not None
        self._kill_here()  # comes first, because the launcher might start more
        self.cluster.end(patience=0.0)

    def sweep(self) -> None:
        """Kills all processes of the command's session, which a launcher that was killed leaves running."""
        killed = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.process.pid:
                    process.kill()
                    killed.append(process)
        deadline = time.monotonic() + GOING  # the next attempt would find the run folder locked by one that still goes
        while any(map(_runs, killed)) and time.monotonic() < deadline:
            time.sleep(0.1)

    def _kill_here(self) -> None:
        for process in [*self._below(), self.process]:
            with contextlib.suppress(psutil.Error):
                process.kill()


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:  # ended in between
        return []


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


class Launch:
    """A run with all its attempts."""

    def __init__(
        self, command: list[str], out: Path, restarts: int, named: list[str], files: tuple[str, ...] = ()
    ) -> None:
        self.out, self.restarts = out, restarts
        split = command.index("--module")
        self.options, self.module, self.words = command[1:split], command[split + 1], command[split + 2 :]
        self.command = command
        self.cluster = Cluster.of(self.options, named, files)

    def run(self) -> int:
        """Starts the run, restarts it as long as that may help, and returns the exit status of the last attempt.

        Raises:
            ConfigError: machines do not answer, or the run cannot start on them.
        """
        attempt, before = 0, None
        lock.refuse_if_in_use(self.out)
        try:
            while True:
                failure.clear(self.out)
                note = fallback.read_note(self.out)
                status, asked = self._attempt(attempt)
                if status and not asked and fallback.read_note(self.out) not in (None, note):
                    say("the run starts again from its last checkpoint, and recomputes more to need less memory")
                    continue
                if status == 0 or asked or attempt == self.restarts or not self._mendable(status):
                    return status
                now = self._failed_at()
                if now is not None and now == before:
                    reason = failure.read(self.out)
                    say(f"not restarting, because this came twice with no checkpoint in between: {reason}")
                    return status
                attempt, before = attempt + 1, now
                say(f"restart {attempt} of {self.restarts}, from the last checkpoint")
                time.sleep(PAUSE)
        finally:
            if self.cluster is not None:
                self.cluster.forget()

    def _attempt(self, attempt: int) -> tuple[int, bool]:
        """Runs once; returns the exit status, and whether the run was asked to stop."""
        if self.cluster is None:
            job = Job(self.command if "/dev/null" in self.options else self._on_this_machine())
            status = job.wait(self.out)
            job.sweep()
            if (self.out / lock.FILE).exists() and not lock.is_held(self.out):
                status = self._abandoned(status, job)
        else:
            more, environment, sent = self.cluster.prepare(wait=COMING_BACK if attempt else 0.0)
            say(describe_forwarded(sent))
            command = deepspeed_command(self.options, more, self.module, self.words)
            print(f"+ {shlex.join(command)}", flush=True)
            job = Job(command, self.cluster, environment)
            status = job.wait(self.out)
            if job.asked:
                time.sleep(1.0)  # for a shell that was just starting on a machine
            found, silent = self.cluster.end()
            if silent:
                say(f"{', '.join(silent)} does not answer; ranks may still run there.")
            if found:
                status = self._abandoned(status, job)
        if status:
            self._say_why(status, job.asked)
        job.release()
        return status, job.asked

    def _say_why(self, status: int, asked: bool) -> None:
        """Prints why an attempt failed, as the last line of its output, and records it if the ranks could not.

        asked: whether somebody asked the run to stop, which explains that no rank has a reason.
        """
        reason = failure.read(self.out)
        if reason:
            say(f"the run failed: {reason}{self._where(reason)}")
        elif asked:
            return
        elif status in STOPPED_OR_REFUSED:
            say(f"the run ended with exit status {status}; the ranks say why in the lines above.")
        else:
            self._record(f"{failure.UNKNOWN} (exit status {status})")
            say(f"the run failed: {failure.UNKNOWN} (exit status {status})")

    def _failed_at(self) -> tuple[str, str] | None:
        """Returns why the last attempt failed, without its numbers, and the newest checkpoint at that time.

        None if a rank, a machine or the network was lost, which may happen anywhere and any number of times.
        """
        reason = failure.read(self.out)
        if reason is None or failure.is_lost(reason):
            return None
        try:
            newest = (self.out / "latest").read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            newest = ""
        return re.sub(r"\d+(\.\d+)?", "N", reason), newest

    def _abandoned(self, status: int, job: Job) -> int:
        """Returns the exit status of an attempt whose ranks had not ended when its command had.

        DeepSpeed's launcher returns 0 also when it was killed.
        """
        if status == 0 and not job.asked:
            self._record(failure.LAUNCHER_GONE)
        return status or 1

    def _record(self, reason: str) -> None:
        """Records why this job failed, unless another job has the folder by now, which would take it for its own."""
        if not lock.is_held(self.out):
            failure.record(self.out, reason)

    def _on_this_machine(self) -> list[str]:
        """Returns the command for a hostfile that names this machine alone, and prints it."""
        from zero_ds.runtime.ports import free_port

        more = ["--no_ssh_check"]
        for name, value in (("--master_addr", "127.0.0.1"), ("--master_port", str(free_port()))):
            if name not in self.options:
                more += [name, value]
        command = ["deepspeed", *self.options, *more, "--module", self.module, *self.words]
        print(f"+ {shlex.join(command)}", flush=True)
        return command

    def _where(self, reason: str) -> str:
        """Returns a note on the machine of the rank that a reason names; empty if it names none."""
        found = re.match(r"rank (\d+) (is|has) ", reason)
        if found is None or self.cluster is None:
            return ""
        node = node_of_rank(self.cluster.nodes, int(found[1]))
        return f" (rank {found[1]} runs on {node})" if node else ""

    def _mendable(self, status: int) -> bool:
        """Returns whether another attempt may succeed: not after a mistake of the user or a signal to a single rank."""
        if failure.read(self.out):
            return not failure.is_final(self.out)
        return status not in STOPPED_OR_REFUSED


def main(arguments: list[str]) -> int:
    """Runs the command that follows `--`; the arguments before it name the run."""
    split = arguments.index("--")
    parser = argparse.ArgumentParser(prog="launch/train.sh", add_help=False, allow_abbrev=False)
    parser.add_argument("--max-restarts", type=int, default=0)
    parser.add_argument("--forward", action="append", default=[])
    parser.add_argument("run", nargs="+")
    options = parser.parse_args(arguments[:split])
    before = {number: signal.signal(number, _interrupted) for number in SIGNALS}
    try:
        if options.max_restarts < 0:
            raise ConfigError(f"--max-restarts {options.max_restarts}: write how often to restart at most, 0 or more.")
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
