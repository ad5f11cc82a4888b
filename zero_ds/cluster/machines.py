"""Runs on the machines of a hostfile: checks before a launch, requests to stop, and the end of remaining processes."""

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
"""Number of signs of life that an ssh connection may miss before it ends and its machine is named as lost."""
ASK_AGAIN = 5.0
"""Seconds between two attempts to reach a machine that may be restarting."""


class UnreachableError(ConfigError):
    """Machines do not answer now, but may answer later."""


@dataclass
class Cluster:
    """The machines of one `deepspeed --hostfile` command."""

    nodes: list[Node]
    ssh: Ssh
    address: str | None = None
    """Address where the ranks meet. None: the first machine, by a name or address that all machines can resolve."""
    port: int | None = None
    """Port where the ranks meet. None: one that is free on the first machine."""
    named: tuple[str, ...] = ()
    """Names of variables to forward in addition to the list of environment.py."""
    files: tuple[str, ...] = ()
    """Files outside of the package that define the run, and have to be the same on all machines."""
    job: str = field(default_factory=lambda: uuid.uuid4().hex[:16])
    """Name by which the processes of this run are found on the machines."""
    _private: str | None = None
    """Folder on this machine for the environment file, once there is one."""
    _secrets_out: bool = False
    """True while secrets may be on the machines."""

    @classmethod
    def of(cls, options: Sequence[str], named: Sequence[str] = (), files: Sequence[str] = ()) -> Cluster | None:
        """Returns the machines that options of `deepspeed` name; None if they mean this machine alone.

        Raises:
            ConfigError: the hostfile or a filter cannot be read.
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
        """Returns the answers of this machine and of each machine of the hostfile to `probe.describe`."""
        request = {"what": "describe", "resolve": self.hosts[0], "port": self.port, "files": self.files, **request}
        here = Ssh(python=self.ssh.python, folder=self.ssh.folder, local=True)
        with ThreadPoolExecutor(1) as thread:
            # this machine is asked for less: ports and paths matter on the machines of the hostfile alone
            mine = thread.submit(here.ask, ["this machine"], {"what": "describe", "files": self.files})
            answers = self.ssh.ask(self.hosts, request)
            return mine.result()[0], answers

    def prepare(self, wait: float = 0.0) -> tuple[list[str], dict[str, str], Forwarded]:
        """Checks all machines, and returns the launch's options of `deepspeed`, environment and forwarded variables.

        wait: seconds for which machines that do not answer are asked again.

        Raises:
            UnreachableError: machines do not answer.
            ConfigError: the run cannot start on some machine: another Python, other packages, another project.
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
        if what.secret:  # only after all machines have passed the checks
            self._secrets_out = True
            kept = self.ssh.ask(self.hosts, {"what": "keep", "job": self.job, "secrets": what.secret})
            troubles = [f"{answer.host}: {answer.trouble}" for answer in kept if answer.content is None]
            if troubles:
                raise UnreachableError(f"secrets could not be brought to {troubles[0]}; see its home folder.")
        return options, environment, what

    def _environment(self, what: Forwarded) -> dict[str, str]:
        """Writes DeepSpeed's environment file, and returns the environment of the launcher that names it."""
        from zero_ds.runtime.failure import SILENCE

        if self._private is None:
            self._private = tempfile.mkdtemp(prefix="zero_ds-")
        path = Path(self._private) / "deepspeed_env"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(what.file(self.job))
        # a lost machine ends its connection before the other ranks miss its ranks
        interval = max(1, round(SILENCE * 2 / 3 / KEEPALIVE))
        ours = f"-o BatchMode=yes -o ServerAliveInterval={interval} -o ServerAliveCountMax={KEEPALIVE}"
        users = os.environ.get(PDSH_OPTIONS, "")
        return {**without_secrets(os.environ), "DS_ENV_FILE": str(path), PDSH_OPTIONS: f"{users} {ours}".strip()}

    def ask_to_stop(self) -> int:
        """Asks all ranks to write a checkpoint and stop; returns their number."""
        answers = self.ssh.ask(self.hosts, {"what": "ask_to_stop", "job": self.job})
        return sum(answer.content["ranks"] for answer in answers if answer.content)

    def end(self, patience: float = 3.0) -> tuple[int, list[str]]:
        """Ends all processes of the run on the machines.

        patience: seconds between SIGTERM and SIGKILL. Returns the number of processes that were found, and the machines
        that did not answer.
        """
        request = {"what": "end", "job": self.job, "patience": patience}
        answers = self.ssh.ask(self.hosts, request, timeout=patience + PATIENCE)
        self._secrets_out = False
        silent = [answer.host for answer in answers if answer.content is None]
        return sum(answer.content["found"] for answer in answers if answer.content), silent

    def forget(self) -> None:
        """Removes what `prepare` wrote on this machine, and the secrets on others unless `end` has removed them."""
        if self._secrets_out:
            self.end(patience=0.0)
        if self._private is not None:
            with contextlib.suppress(OSError):
                shutil.rmtree(self._private)
            self._private = None


def files_of(recipe: str, run: RunConfig) -> tuple[str, ...]:
    """Returns the files outside of the package that define a run, which every rank reads itself."""
    return tuple(name for name in (recipe, run.zero) if Path(name).suffix in (".yaml", ".yml", ".json"))


def meeting_point(host: str, answers: list[Answer]) -> str:
    """Returns a name or address of the first machine that all machines can resolve, as far as one is known.

    It is the name in the hostfile if all machines resolve it; the name may be an alias that only ssh's configuration
    knows. Otherwise it is the machine's first address, which is DeepSpeed's choice.
    """
    seen = {answer.host: (answer.content or {}).get("address") or "" for answer in answers}
    # a machine may resolve its own name to its loopback address, but no machine may resolve another's name to one
    loopback = any(address.startswith("127.") and address != host and other != host for other, address in seen.items())
    means_every_machine = host in ("localhost", "127.0.0.1") and len(answers) > 1
    if all(seen.values()) and not loopback and not means_every_machine:
        return host
    content = answers[0].content or {}
    return str((content.get("addresses") or [host])[0])


def deepspeed_command(options: Sequence[str], more: Sequence[str], module: str, words: Sequence[str]) -> list[str]:
    """Returns the command of `deepspeed` on the machines of a cluster; `words` are the arguments of the module."""
    return ["deepspeed", *options, *more, "--module", module, *(argument(word) for word in words)]
