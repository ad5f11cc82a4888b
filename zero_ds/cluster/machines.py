"""A run on the machines of a hostfile: looked at before each launch, asked to stop, ended without a trace."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zero_ds.cluster import checks
from zero_ds.cluster.environment import Forwarded, argument, forwarded, without_secrets
from zero_ds.cluster.hostfile import Node, is_this_machine, read_hostfile
from zero_ds.cluster.ssh import PATIENCE, PDSH_OPTIONS, Answer, Ssh
from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError

logger = logging.getLogger(__name__)

KEEPALIVE = 4
"""Signs of life that an ssh connection may miss before it ends, and names its machine."""
ASK_AGAIN = 5.0
"""Seconds between two attempts at a machine that may be coming back."""


class UnreachableError(ConfigError):
    """Machines do not answer; they may later."""


@dataclass
class Cluster:
    """The machines of one `deepspeed --hostfile` command."""

    nodes: list[Node]
    ssh: Ssh
    address: str | None = None
    """Where the ranks meet; None: the first machine, by the name or address that all others understand."""
    port: int | None = None
    named: tuple[str, ...] = ()
    """Variables to be forwarded besides the list of environment.py."""
    files: tuple[str, ...] = ()
    """Files outside of the package that say what the run is: alike on all machines."""
    job: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    _private: str | None = None
    _secrets_out: bool = False

    @classmethod
    def of(cls, options: Sequence[str], named: Sequence[str] = (), files: Sequence[str] = ()) -> Cluster | None:
        """The machines that options of `deepspeed` name; None where they mean this machine alone.

        Raises:
            ConfigError: a hostfile or filter that cannot be read.
        """
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for name in ("hostfile", "include", "exclude", "master_addr"):
            parser.add_argument(f"--{name}", default="")
        for name in ("ssh_port", "master_port"):
            parser.add_argument(f"--{name}", type=int)
        known, _ = parser.parse_known_args(list(options))
        if not known.hostfile or known.hostfile == os.devnull:
            return None
        nodes = read_hostfile(Path(known.hostfile), known.include, known.exclude)
        if len(nodes) == 1 and is_this_machine(nodes[0].host):
            return None
        return cls(nodes, Ssh(known.ssh_port), known.master_addr or None, known.master_port, tuple(named), tuple(files))

    @property
    def hosts(self) -> list[str]:
        return [node.host for node in self.nodes]

    def look(self, **request: Any) -> tuple[Answer, list[Answer]]:
        """What this machine, and each of the nodes, says of itself (probe.describe)."""
        request = {"what": "describe", "resolve": self.hosts[0], "port": self.port, "files": self.files, **request}
        here = Ssh(python=self.ssh.python, folder=self.ssh.folder, local=True)
        with ThreadPoolExecutor(1) as beside:
            # its own port and files are asked of the nodes alone, of which this machine may be one
            mine = beside.submit(here.ask, ["this machine"], {"what": "describe", "files": self.files})
            answers = self.ssh.ask(self.hosts, request)
            return mine.result()[0], answers

    def prepare(self, wait: float = 0.0) -> tuple[list[str], dict[str, str], Forwarded]:
        """Looks at all machines, and makes what the launch needs: options of `deepspeed`, environment, what is told.

        Machines that do not answer are asked again for `wait` seconds.

        Raises:
            UnreachableError: machines that do not answer.
            ConfigError: machines on which the run cannot start: another Python, other packages, another project.
        """
        what = forwarded(os.environ, self.named)
        deadline = time.monotonic() + wait
        while True:
            here, answers = self.look()
            bad = [check for check in checks.before_launch(here, answers, self.ssh) if check.status == checks.FAIL]
            if not bad:
                break
            if all(answer.reached for answer in answers):
                raise ConfigError(f"{bad[0].found}; {bad[0].remedy}.")
            if time.monotonic() > deadline:
                raise UnreachableError(f"{bad[0].found}; {bad[0].remedy}.")
            logger.warning("%s; asking again", bad[0].found)
            time.sleep(ASK_AGAIN)
        address = self.address or meeting_point(self.hosts[0], answers)
        content = answers[0].content
        assert content is not None
        port = self.port or int(content["free_port"])
        options = ["--master_addr", address, "--master_port", str(port), "--no_ssh_check"]
        if len(self.nodes) == 1:
            options.append("--force_multi")  # DeepSpeed would start the ranks here
        environment = self._environment(what)
        if what.secret:  # only now, when all machines would run them
            self._secrets_out = True
            kept = self.ssh.ask(self.hosts, {"what": "keep", "job": self.job, "secrets": what.secret})
            if trouble := [f"{a.host}: {a.trouble}" for a in kept if a.content is None]:
                raise UnreachableError(f"secrets could not be brought to {trouble[0]}; see its home folder.")
        return options, environment, what

    def _environment(self, what: Forwarded) -> dict[str, str]:
        from zero_ds.runtime.failure import SILENCE

        if self._private is None:
            self._private = tempfile.mkdtemp(prefix="zero_ds-")
        path = Path(self._private) / "deepspeed_env"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(what.file(self.job))
        every = max(1, round(SILENCE * 2 / 3 / KEEPALIVE))
        alive = f"-o BatchMode=yes -o ServerAliveInterval={every} -o ServerAliveCountMax={KEEPALIVE}"
        own = os.environ.get(PDSH_OPTIONS, "")
        return {**without_secrets(os.environ), "DS_ENV_FILE": str(path), PDSH_OPTIONS: f"{own} {alive}".strip()}

    def ask_to_stop(self) -> int:
        """Asks all ranks to commit and stop; how many were asked."""
        answers = self.ssh.ask(self.hosts, {"what": "ask_to_stop", "job": self.job})
        return sum(answer.content["ranks"] for answer in answers if answer.content)

    def end(self, patience: float = 3.0) -> tuple[int, list[str]]:
        """Ends whatever is left of the run on the machines; how many processes there were, and machines that did not
        answer."""
        request = {"what": "end", "job": self.job, "patience": patience}
        answers = self.ssh.ask(self.hosts, request, timeout=patience + PATIENCE)
        self._secrets_out = False
        silent = [answer.host for answer in answers if answer.content is None]
        return sum(answer.content["found"] for answer in answers if answer.content), silent

    def forget(self) -> None:
        """Removes what `prepare` has written, on this machine, and on the others where `end` has not done it."""
        if self._secrets_out:
            self.end(patience=0.0)
        if self._private is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._private)
            self._private = None


def files_of(recipe: str, run: RunConfig) -> tuple[str, ...]:
    """Files outside of the package that every rank of a run reads to know what it is."""
    return tuple(name for name in (recipe, run.zero) if Path(name).suffix in (".yaml", ".yml", ".json"))


def meeting_point(host: str, answers: list[Answer]) -> str:
    """A name or address of the first machine that all machines understand, as far as one is known.

    Its name in the hostfile, if all resolve it (it may be an alias in ssh's configuration alone); else its first
    address, as DeepSpeed takes it.
    """
    seen = {answer.host: (answer.content or {}).get("address") or "" for answer in answers}
    # a machine's own name may mean its loopback address there, and nothing else may mean that
    itself = [
        other for other, address in seen.items() if address.startswith("127.") and address != host and other != host
    ]
    everybodys = host in ("localhost", "127.0.0.1") and len(answers) > 1
    if all(seen.values()) and not itself and not everybodys:
        return host
    content = answers[0].content or {}
    return str((content.get("addresses") or [host])[0])


def deepspeed_command(options: Sequence[str], more: Sequence[str], module: str, words: Sequence[str]) -> list[str]:
    """`deepspeed` on the machines of a cluster; `words` are the arguments of the module."""
    return ["deepspeed", *options, *more, "--module", module, *(argument(word) for word in words)]
