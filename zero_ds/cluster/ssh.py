"""A command on all machines at once, over ssh as DeepSpeed's launcher uses it."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero_ds.cluster import probe

CONNECT = 8
"""Seconds in which a machine must answer."""
PATIENCE = float(os.environ.get("ZERO_DS_NODE_PATIENCE", "25"))
"""Seconds in which it must have done what it was asked."""
PDSH_OPTIONS = "PDSH_SSH_ARGS_APPEND"
"""Variable with options for ssh, which pdsh reads; so do we."""
FAN_OUT = 128


@dataclass(frozen=True)
class Answer:
    """What came back from a machine."""

    host: str
    content: dict[str, Any] | None
    """What its probe said; None if there is none."""
    trouble: str = ""
    """Why not, in ssh's or the shell's own words."""
    reached: bool = True
    """Whether ssh got through at all."""
    clock_offset: float = 0.0
    """Seconds by which its clock is ahead of this machine's, as far as the time on the way lets that be known."""


@dataclass(frozen=True)
class Ssh:
    """How machines are reached, and the interpreter and folder that a run uses on each of them."""

    port: int | None = None
    python: str = sys.executable
    folder: str = field(default_factory=lambda: str(Path.cwd()))
    local: bool = False
    """Run on this machine, without ssh."""

    def command(self, host: str, remote: str) -> list[str]:
        """The ssh command; the user's own options come first, and win."""
        own = shlex.split(os.environ.get(PDSH_OPTIONS, ""))
        port = ["-p", str(self.port)] if self.port is not None else []
        ours = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}", "-o", "LogLevel=ERROR"]
        # a connection that is shared may be used; one that stays behind would keep our pipes open
        ours += ["-o", "ControlMaster=no"]
        return ["ssh", *own, *port, *ours, host, remote]

    def ask(self, hosts: Sequence[str], request: dict[str, Any], timeout: float | None = None) -> list[Answer]:
        """Runs the probe (probe.py) on every machine side by side; answers in the order of `hosts`.

        The probe's source and the request travel on the standard input: nothing of them is in a process list, and a
        machine need not have the project to say so.
        """
        source = Path(probe.__file__).read_text(encoding="utf-8")

        def ask(host: str) -> Answer:
            words = json.dumps({"folder": self.folder, "name": host, **request})
            return self._ask(host, f"{source}\n_main({words!r})\n".encode(), timeout or PATIENCE)

        with ThreadPoolExecutor(min(FAN_OUT, len(hosts)) or 1) as pool:
            return list(pool.map(ask, hosts))

    def _ask(self, host: str, program: bytes, timeout: float) -> Answer:
        # as the launcher sets it for the ranks, so that the same packages are found
        path = ":".join([self.folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        remote = f"PYTHONPATH={shlex.quote(path)} exec {shlex.quote(self.python)} -"
        command = ["/bin/sh", "-c", remote] if self.local else self.command(host, remote)
        sent = time.time()
        try:
            done = subprocess.run(command, input=program, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Answer(host, None, f"no answer in {timeout:.0f} s", reached=False)
        except OSError as error:
            return Answer(host, None, f"{command[0]}: {error.strerror}", reached=False)
        received = time.time()
        said = done.stderr.decode(errors="replace").strip().splitlines()
        trouble = said[-1] if said else f"exit status {done.returncode}"
        if done.returncode == 255 and not self.local:
            return Answer(host, None, trouble, reached=False)
        try:
            content = json.loads(done.stdout.decode(errors="replace").rsplit(probe.MARK, 1)[1])
        except (IndexError, ValueError):
            return Answer(host, None, trouble)
        # the clock was read somewhere between sending and receiving
        offset = content["time"] - min(max(content["time"], sent), received)
        return Answer(host, content, clock_offset=offset)
