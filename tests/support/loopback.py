"""Two machines on one: a private sshd on 127.0.0.2 and 127.0.0.3, with keys and a port of its own.

The second address can be given faults, as another machine might have them (`Machines.fault`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from pace import scaled

HOSTS = ("127.0.0.2", "127.0.0.3")
NEEDED = {"sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
"""Program -> Debian package."""
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def missing() -> str | None:
    """What must be installed before these tests can run; None if nothing."""
    packages = sorted({package for name, package in NEEDED.items() if _program(name) is None})
    return f"two loopback hosts need ssh and pdsh; install {', '.join(packages)} (apt-get)" if packages else None


class Machines:
    """The two, while their sshd runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind((HOSTS[0], 0))
            self.port = int(free.getsockname()[1])
        self._write()
        self.process = subprocess.Popen([str(_program("sshd")), "-D", "-e", "-f", folder / "sshd_config"])
        deadline = time.monotonic() + scaled(60)
        while any(socket.socket().connect_ex((host, self.port)) for host in HOSTS):
            assert self.process.poll() is None and time.monotonic() < deadline, "sshd does not start"
            time.sleep(0.05)
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{host} slots=1\n" for host in HOSTS))

    @property
    def ssh_options(self) -> str:
        """For PDSH_SSH_ARGS_APPEND."""
        return f"-F {self.folder / 'ssh_config'}"

    def _write(self) -> None:
        folder = self.folder
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where sshd, started by root, wants to lock itself in
        (folder / "sshd_config").write_text(
            f"Port {self.port}\n"
            + "".join(f"ListenAddress {host}\n" for host in HOSTS)
            + f"HostKey {folder}/host\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
            "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            "PermitRootLogin yes\nMaxStartups 100\nLogLevel ERROR\n"
            f"Match LocalAddress {HOSTS[0]}\n    SetEnv ZERO_DS_TEST_ON_ONE=yes\n"
            f"Match LocalAddress {HOSTS[1]}\n    ForceCommand /bin/bash {folder}/second\n"
        )
        (folder / "ssh_config").write_text(
            f"Host *\n    Port {self.port}\n    IdentityFile {folder}/user\n    IdentitiesOnly yes\n"
            "    UserKnownHostsFile /dev/null\n    StrictHostKeyChecking no\n    LogLevel ERROR\n"
        )
        (folder / "second").write_text(
            f'command="$SSH_ORIGINAL_COMMAND" input=""\n[ ! -e {folder}/fault ] || . {folder}/fault\n'
            '[ -z "$input" ] || { sed "$input" | bash -c "$command"; exit; }\nexec bash -c "$command"\n'
        )

    @contextlib.contextmanager
    def fault(self, lines: str) -> Iterator[None]:
        """On the second machine, bash lines before a command: they may change `command` and set `input`, a sed
        expression for what comes in."""
        path = self.folder / "fault"
        path.write_text(lines)
        try:
            yield
        finally:
            path.unlink()

    def processes(self, host: str, *, ssh: bool = False) -> list[int]:
        """What runs on one of the two; with `ssh` also the sshd that holds the connection."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and f" {host} {self.port}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        if ssh:
            parents = {_parent(pid) for pid in found} - set(found)
            found += [pid for pid in parents if pid != self.process.pid and pid > 1]
        return found

    def stop(self) -> None:
        for host in HOSTS:
            for pid in self.processes(host):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
        self.process.terminate()
        self.process.wait(scaled(60))


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0
