"""Emulates two machines on one: a private sshd on 127.0.0.2 and 127.0.0.3, with its own keys and port.

The second address can be given faults that another machine might have (`Machines.fault`).
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
"""Needed programs and their Debian packages."""
SBIN = "/usr/sbin:/usr/local/sbin:/sbin"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:{SBIN}")


def missing() -> str | None:
    """Returns a message that names the packages these tests still need, or None if all are installed."""
    packages = sorted({package for name, package in NEEDED.items() if _program(name) is None})
    return f"two loopback hosts need ssh and pdsh; install {', '.join(packages)} (apt-get)" if packages else None


class Machines:
    """The two machines, from the start of their sshd until `stop`."""

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
        """Options of ssh that reach the two machines, for PDSH_SSH_ARGS_APPEND."""
        return f"-F {self.folder / 'ssh_config'}"

    def _write(self) -> None:
        folder = self.folder
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy(folder / "user.pub", folder / "authorized_keys")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd needs this folder if root starts it (privilege separation)
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
        """Runs bash lines before every command on the second machine.

        The lines may change `command`, and may set `input`, a sed expression that is applied to standard input.
        """
        path = self.folder / "fault"
        path.write_text(lines)
        try:
            yield
        finally:
            path.unlink()

    def processes(self, host: str, *, ssh: bool = False) -> list[int]:
        """Returns the process ids on one of the two machines; with `ssh`, also those of the connections' sshd."""
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
