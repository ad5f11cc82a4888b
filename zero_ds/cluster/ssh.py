"""Runs the probe on all machines at the same time, over ssh with the options that DeepSpeed's launcher uses."""

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
"""Seconds within which a machine must accept the connection."""
PATIENCE = float(os.environ.get("ZERO_DS_NODE_PATIENCE", "25"))
"""Seconds within which it must have answered the request."""
PDSH_OPTIONS = "PDSH_SSH_ARGS_APPEND"
"""Variable with options for ssh; pdsh reads it, so this module does as well."""
FAN_OUT = 128
"""Largest number of machines that are asked at the same time."""


@dataclass(frozen=True)
class Answer:
    """Answer of a machine, or the reason for which there is none."""

    host: str
    content: dict[str, Any] | None
    """Answer of its probe; None if there is none."""
    trouble: str = ""
    """Reason for a missing answer, in the words of ssh or the remote shell."""
    reached: bool = True
    """True if ssh reached the machine."""
    clock_offset: float = 0.0
    """Seconds by which its clock is certainly ahead of this machine's, given the time that request and answer took."""


@dataclass(frozen=True)
class Ssh:
    """Access to machines, and the interpreter and folder that a run uses on each of them."""

    port: int | None = None
    python: str = sys.executable
    folder: str = field(default_factory=lambda: str(Path.cwd()))
    local: bool = False
    """True if the probe runs on this machine, without ssh."""

    def command(self, host: str, remote: str) -> list[str]:
        """Returns the ssh command for a remote command line; the user's own options come first, and win."""
        own = shlex.split(os.environ.get(PDSH_OPTIONS, ""))
        port = ["-p", str(self.port)] if self.port is not None else []
        ours = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT}", "-o", "LogLevel=ERROR"]
        # an existing shared connection may be used; a new one would outlive the command and keep its pipes open
        ours += ["-o", "ControlMaster=no"]
        return ["ssh", *own, *port, *ours, host, remote]

    def ask(self, hosts: Sequence[str], request: dict[str, Any], timeout: float | None = None) -> list[Answer]:
        """Runs the probe (probe.py) on all machines at the same time; returns their answers in the order of `hosts`.

        The probe's source and the request travel through standard input. So they are in no process list, and a machine
        without the project can still say that it lacks the project.
        """
        source = Path(probe.__file__).read_text(encoding="utf-8")

        def ask(host: str) -> Answer:
            words = json.dumps({"folder": self.folder, "name": host, **request})
            return self._ask(host, f"{source}\n_main({words!r})\n".encode(), timeout or PATIENCE)

        with ThreadPoolExecutor(min(FAN_OUT, len(hosts)) or 1) as pool:
            return list(pool.map(ask, hosts))

    def _ask(self, host: str, program: bytes, timeout: float) -> Answer:
        # the launcher sets it in the same way for the ranks, so the probe finds the same packages
        own_path = os.environ.get("PYTHONPATH")
        path = f"{self.folder}:{own_path}" if own_path else self.folder
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
        messages = done.stderr.decode(errors="replace").strip().splitlines()
        trouble = messages[-1] if messages else f"exit status {done.returncode}"
        if done.returncode == 255 and not self.local:
            return Answer(host, None, trouble, reached=False)
        try:
            content = json.loads(done.stdout.decode(errors="replace").rsplit(probe.MARK, 1)[1])
        except (IndexError, ValueError):
            return Answer(host, None, trouble)
        # its clock was read at some time between sending and receiving
        offset = content["time"] - min(max(content["time"], sent), received)
        return Answer(host, content, clock_offset=offset)
