"""What a machine says of itself. This file travels over ssh: the standard library alone, and no other file.

Each function answers one kind of request (`what`); `_main` prints the answer as JSON behind a mark, since a login may
print a greeting of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MARK = "zero-ds-probe:"
JOB = "ZERO_DS_JOB"
"""Variable in the environment of every process that a run starts on the nodes."""


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Everything that the checks (checks.py) compare.

    request: folder; name, that of this machine; and where wanted: shared, token (a folder, and a file in it that holds
    its own name), paths, files (of which the content counts), disks, env (names), port, resolve (the first machine's
    name).
    """
    folder = Path(request["folder"])
    answer: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "folder": folder.is_dir(),
        "packages": _packages(),
        "project": (folder / "zero_ds" / "__init__.py").is_file(),
        "code": _code(folder),
        "commit": _commit(folder),
        "devices": gpus(),
        "cores": os.cpu_count() or 1,
        "memory": _free_memory(),
        "paths": {path: (folder / Path(path).expanduser()).exists() for path in request.get("paths", [])},
        "files": {path: _content(folder / Path(path).expanduser()) for path in request.get("files", [])},
        "disks": {path: _free_disk(folder / Path(path).expanduser()) for path in request.get("disks", [])},
        "env": {name: bool(os.environ.get(name)) for name in request.get("env", [])},
        "shared_memory": _free_disk(Path("/dev/shm")),
        "address": _address(request.get("resolve")),
        "addresses": _words("hostname", "-I"),
        "free_port": free_port(),
        "port": _port_trouble(request["port"]) if request.get("port") else "",
    }
    if request.get("shared"):
        answer |= _shared(folder / Path(request["shared"]).expanduser(), request["token"], request["name"])
    return answer


def _packages() -> dict[str, str]:
    """Name -> version of what is installed, by the names of its folders alone: reading all of them takes long."""
    found: dict[str, str] = {}
    for place in sys.path:
        if not place or not Path(place).is_dir():
            continue
        for name in os.listdir(place):  # noqa: PTH208 - a hundred of them, many times
            package, separator, rest = name.partition("-")
            if separator and rest.endswith((".dist-info", ".egg-info")):
                # the first on the path is the one that is imported
                version = rest.removesuffix(".dist-info").removesuffix(".egg-info")
                found.setdefault(package.lower().replace("_", "-"), version)
    return found


def _code(folder: Path) -> str:
    """Hash of the project's files that a run reads."""
    digest = hashlib.sha256()
    for kind in ("zero_ds/**/*.py", "zero_ds/**/*.yaml", "ds_configs/*.json"):
        for path in sorted(folder.glob(kind)):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _content(path: Path) -> str | None:
    """Hash of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return None


def _commit(folder: Path) -> str:
    return " ".join(_words("git", "-C", str(folder), "rev-parse", "--short", "HEAD"))


def gpus() -> list[dict[str, Any]]:
    """Name, and total and free memory in MiB, of every GPU."""
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [[word.strip() for word in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return [{"name": n, "total": int(t), "free": int(f)} for n, t, f in lines if t.isdigit() and f.isdigit()]


def _words(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def _free_memory() -> int:
    """Bytes."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0


def _free_disk(path: Path) -> int | None:
    """Bytes free where a path is, or would be made."""
    place = next((place for place in (path, *path.parents) if place.exists()), None)
    return shutil.disk_usage(place).free if place else None


def _address(name: str | None) -> str | None:
    """What this machine takes the name of another one for."""
    try:
        return socket.gethostbyname(name) if name else None
    except OSError:
        return None


def free_port() -> int:
    """A TCP port that is free here now."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def _port_trouble(port: int) -> str:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
            server.listen()
        except OSError as error:
            return str(error.strerror)
    return ""


def _shared(folder: Path, token: str, name: str) -> dict[str, Any]:
    """Whether another machine's token is seen here; leaves one of this machine behind, for the other to see."""
    try:
        seen = (folder / token).read_text() == token
    except OSError:
        return {"shared": False, "wrote": False}
    try:
        (folder / f"{token}.{name}").write_text(token)
    except OSError:
        return {"shared": seen, "wrote": False}
    return {"shared": seen, "wrote": True}


# -- processes and secrets of a job ------------------------------------------------------------------------------------


def _kept(job: str) -> Path:
    assert job.isalnum()
    return Path.home() / ".cache" / "zero_ds" / "jobs" / job


def keep(request: dict[str, Any]) -> dict[str, Any]:
    """Secrets, values by name, stay here until `end`."""
    keep_secrets(request["job"], request["secrets"])
    return {}


def keep_secrets(job: str, secrets: dict[str, str]) -> None:
    """One file each, for this user alone; the shell that starts the ranks reads them (environment.py)."""
    folder = _kept(job)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, value in secrets.items():
        temporary = folder / f".{name}.{os.getpid()}.{socket.gethostname()}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(value)
        temporary.replace(folder / name)


def processes(job: str) -> list[tuple[int, bool]]:
    """Process id, and whether it is a rank, of everything that the job has started here, the zombies left out."""
    wanted = f"{JOB}={job}".encode()
    found: dict[int, tuple[bool, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            rank = b"--local_rank" in (entry / "cmdline").read_bytes()
        except OSError:  # gone in between, or another user's
            continue
        if state not in "ZX":
            found[int(entry.name)] = (rank, int(parent))
    ranks = {pid for pid, (rank, _) in found.items() if rank}
    return [(pid, rank and parent not in ranks) for pid, (rank, parent) in found.items()]  # loaders' workers look alike


def ask_to_stop(request: dict[str, Any]) -> dict[str, Any]:
    """SIGUSR1 to the job's ranks, which commit and stop."""
    ranks = [pid for pid, rank in processes(request["job"]) if rank]
    for pid in ranks:
        _signal(pid, signal.SIGUSR1)
    return {"ranks": len(ranks)}


def end(request: dict[str, Any]) -> dict[str, Any]:
    """Ends whatever the job has left here, and forgets its secrets."""
    job, patience = request["job"], request.get("patience", 3.0)
    there = processes(job)
    if patience:
        for pid, _ in there:
            _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while processes(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + 10
    while (left := processes(job)) and time.monotonic() < deadline:
        for pid, _ in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
    shutil.rmtree(_kept(job), ignore_errors=True)
    return {"found": len(there), "left": len(left)}


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _main(words: str) -> None:
    request = json.loads(words)
    kinds = {"describe": describe, "keep": keep, "ask_to_stop": ask_to_stop, "end": end}
    answer = kinds[request["what"]](request)
    sys.stdout.write(MARK + json.dumps({**answer, "time": time.time()}) + "\n")
