"""Answers of a machine about itself.

The text of this file travels over ssh and is run there, so it uses nothing but the standard library and no other file
of the project. Every function without an underscore that takes a request answers one kind of request; `_main` prints
the answer as JSON after a mark, because a login shell may print a greeting first.
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
"""Text before the answer."""
JOB = "ZERO_DS_JOB"
"""Name of a variable in the environment of every process that a run starts on the machines."""
KILL_SECONDS = 10.0
"""Seconds for which processes that ignore SIGTERM are killed again and again."""


# -- the state of a machine --------------------------------------------------------------------------------------------


def describe(request: dict[str, Any]) -> dict[str, Any]:
    """Returns everything that checks.py compares.

    request: `folder` of the project and `name` of this machine; optionally `shared` and `token` (a folder, and the name
    of a file in it that holds its own name), `paths` (looked for), `files` (whose content is hashed), `disks`, `env`
    (names of variables), `port`, and `resolve` (name of the first machine).
    """
    folder = Path(request["folder"])
    answer: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "folder": folder.is_dir(),
        "packages": _packages(),
        "project": (folder / "zero_ds" / "__init__.py").is_file(),
        "code": _code(folder),
        "commit": _git_commit(folder),
        "devices": gpus(),
        "cores": os.cpu_count() or 1,
        "memory": _free_memory(),
        "paths": {path: _resolved(folder, path).exists() for path in request.get("paths", [])},
        "files": {path: _content(_resolved(folder, path)) for path in request.get("files", [])},
        "disks": {path: _free_disk(_resolved(folder, path)) for path in request.get("disks", [])},
        "env": {name: bool(os.environ.get(name)) for name in request.get("env", [])},
        "shared_memory": _free_disk(Path("/dev/shm")),
        "address": _address(request.get("resolve")),
        "addresses": _words("hostname", "-I"),
        "free_port": free_port(),
        "port": _port_trouble(request["port"]) if request.get("port") else "",
    }
    if request.get("shared"):
        shared = folder / Path(request["shared"]).expanduser()
        answer.update(_shared(shared, request["token"], request["name"]))
    return answer


def _resolved(folder: Path, path: str) -> Path:
    return folder / Path(path).expanduser()


def _packages() -> dict[str, str]:
    """Returns name -> version of the installed packages.

    Only the names of their metadata folders are read: reading the metadata of all packages takes long.
    """
    found: dict[str, str] = {}
    for place in sys.path:
        if not place or not Path(place).is_dir():
            continue
        for name in os.listdir(place):  # noqa: PTH208 - faster than pathlib, and there are hundreds of them
            package, separator, rest = name.partition("-")
            if separator and rest.endswith((".dist-info", ".egg-info")):
                version = rest.removesuffix(".dist-info").removesuffix(".egg-info")
                # the first one on the path is the one that is imported
                found.setdefault(package.lower().replace("_", "-"), version)
    return found


def _code(folder: Path) -> str:
    """Returns a hash of the project's files that a run reads."""
    digest = hashlib.sha256()
    for kind in ("zero_ds/**/*.py", "zero_ds/**/*.yaml", "ds_configs/*.json"):
        for path in sorted(folder.glob(kind)):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def _content(path: Path) -> str | None:
    """Returns a hash of a file; None if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError:
        return None


def _git_commit(folder: Path) -> str:
    return " ".join(_words("git", "-C", str(folder), "rev-parse", "--short", "HEAD"))


def gpus() -> list[dict[str, Any]]:
    """Returns the index, UUID and name of every GPU, and its total and free memory in MiB.

    Memory is None where nvidia-smi does not know it (`[N/A]`), as for GPUs that share the machine's memory.
    """
    query = "--query-gpu=index,uuid,memory.total,memory.free,name"
    try:
        output = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in output.splitlines():
        fields = [field.strip() for field in line.split(",", 4)]
        if len(fields) == 5 and fields[0].isdigit():
            total, free = (int(field) if field.isdigit() else None for field in fields[2:4])
            found.append({"index": int(fields[0]), "uuid": fields[1], "name": fields[4], "total": total, "free": free})
    return found


def _words(*command: str) -> list[str]:
    """Returns the words that a command prints; none if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []


def _free_memory() -> int:
    """Returns the bytes of memory that programs can still get; 0 if that is not known."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    return 0


def _free_disk(path: Path) -> int | None:
    """Returns the free bytes of the file system on which a path is, or would be made."""
    for place in (path, *path.parents):
        if place.exists():
            return shutil.disk_usage(place).free
    return None


def _address(name: str | None) -> str | None:
    """Returns the address to which this machine resolves another machine's name."""
    try:
        return socket.gethostbyname(name) if name else None
    except OSError:
        return None


def free_port() -> int:
    """Returns a TCP port of this machine that is free now."""
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def _port_trouble(port: int) -> str:
    """Returns the reason for which a port cannot be used; empty if it can."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
            server.listen()
        except OSError as error:
            return str(error.strerror)
    return ""


def _shared(folder: Path, token: str, name: str) -> dict[str, Any]:
    """Returns whether another machine's token is seen here, and leaves one of this machine's for the other to see."""
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


def _folder_of_secrets(job: str) -> Path:
    assert job.isalnum()
    return Path.home() / ".cache" / "zero_ds" / "jobs" / job


def keep(request: dict[str, Any]) -> dict[str, Any]:
    """Keeps `secrets`, values by name, on this machine until `end` is asked for the same `job`."""
    keep_secrets(request["job"], request["secrets"])
    return {}


def keep_secrets(job: str, secrets: dict[str, str]) -> None:
    """Writes one file for each secret, readable by this user alone.

    The shell that starts the ranks reads them (environment.py).
    """
    folder = _folder_of_secrets(job)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for name, value in secrets.items():
        temporary = folder / f".{name}.{os.getpid()}.{socket.gethostname()}"
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(value)
        temporary.replace(folder / name)


def processes(job: str) -> list[tuple[int, bool]]:
    """Returns the process id of everything that the job has started here, and whether it is a rank; no zombies."""
    wanted = f"{JOB}={job}".encode()
    found: dict[int, tuple[bool, int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if wanted not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            has_rank = b"--local_rank" in (entry / "cmdline").read_bytes()
        except OSError:  # ended in between, or another user's
            continue
        if state not in "ZX":
            found[int(entry.name)] = (has_rank, int(parent))
    # the loader's worker processes have the command line of their rank, which is their parent
    candidates = {pid for pid, (has_rank, _) in found.items() if has_rank}
    return [(pid, has_rank and parent not in candidates) for pid, (has_rank, parent) in found.items()]


def ask_to_stop(request: dict[str, Any]) -> dict[str, Any]:
    """Sends SIGUSR1 to the ranks of `job`, which then write a checkpoint and stop; returns their number."""
    ranks = [pid for pid, is_rank in processes(request["job"]) if is_rank]
    for pid in ranks:
        _signal(pid, signal.SIGUSR1)
    return {"ranks": len(ranks)}


def end(request: dict[str, Any]) -> dict[str, Any]:
    """Ends every process of `job` on this machine and removes its secrets.

    request: `patience` is the time in seconds between SIGTERM and SIGKILL; with 0 there is only SIGKILL. Returns the
    number of processes that were found, and of those that are left.
    """
    job, patience = request["job"], request.get("patience", 3.0)
    found = processes(job)
    if patience:
        for pid, _ in found:
            _signal(pid, signal.SIGTERM)
    deadline = time.monotonic() + patience
    while processes(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    deadline = time.monotonic() + KILL_SECONDS
    left = processes(job)
    while left and time.monotonic() < deadline:
        for pid, _ in left:
            _signal(pid, signal.SIGKILL)
        time.sleep(0.1)
        left = processes(job)
    shutil.rmtree(_folder_of_secrets(job), ignore_errors=True)
    return {"found": len(found), "left": len(left)}


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(OSError):
        os.kill(pid, number)


def _main(words: str) -> None:
    request = json.loads(words)
    kinds = {"describe": describe, "keep": keep, "ask_to_stop": ask_to_stop, "end": end}
    answer = kinds[request["what"]](request)
    sys.stdout.write(MARK + json.dumps({**answer, "time": time.time()}) + "\n")
