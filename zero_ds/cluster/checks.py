"""What must be alike on all machines, and what each of them must have: findings with a remedy."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from zero_ds.cluster.environment import Forwarded
from zero_ds.cluster.hostfile import Node
from zero_ds.cluster.ssh import Answer, Ssh

OK, WARN, FAIL = "ok", "warn", "FAIL"
CLOCK = 5.0
"""Seconds by which clocks may differ."""
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free."""
GIB = 2**30
SHOWN = 4
"""Machines, or packages, that a finding names."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    status: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """What a run needs of every machine."""

    shared: str
    """Folder of the run, or the one above it, which all machines must see."""
    token: str
    """Name and content of a file that lies there."""
    paths: tuple[str, ...] = ()
    """Files and folders that the run reads."""
    disk: float = 10.0
    """GiB free in the shared folder."""
    env: tuple[str, ...] = ()
    """Variables that must be set."""
    port: int | None = None
    missing_tokens: tuple[str, ...] = field(default=())
    """Machines whose own file in the shared folder is not seen here."""


def _each(answers: Sequence[Answer], of: Callable[[dict[str, Any]], str]) -> str:
    """`host: finding; host: finding` of the machines of which there is a finding."""
    found = [(answer.host, of(answer.content)) for answer in answers if answer.content is not None]
    told = [f"{host}: {text}" for host, text in found if text]
    return "; ".join(told[:SHOWN]) + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "")


def _check(what: str, trouble: str, remedy: str, fine: str, status: str = FAIL) -> Check:
    return Check(what, status, trouble, remedy) if trouble else Check(what, OK, fine)


def before_launch(here: Answer, answers: list[Answer], ssh: Ssh) -> list[Check]:
    """What every launch looks at: machines answer, and would run the same program."""
    if here.content is None:
        return [Check("this machine", FAIL, f"this machine: {here.trouble}", "look at its Python")]
    mine = here.content
    silent = "; ".join(f"{a.host} does not answer: {a.trouble}" for a in answers if not a.reached)
    lost = "; ".join(
        f"{a.host}: {ssh.python} cannot be run ({a.trouble})" for a in answers if a.reached and not a.content
    )
    known = [answer for answer in answers if answer.content is not None]
    everywhere = f"{len(known)} of {len(answers)} machines" if len(known) < len(answers) else _count(len(known))
    odd = [path for path in (ssh.folder, ssh.python) if not ssh.local and not re.fullmatch(r"[\w@+=:,./-]*", path)]
    return [
        *_pdsh(ssh),
        _check(
            "ssh", silent, "make `ssh HOST true` work without a password, or leave HOST out (--exclude)", everywhere
        ),
        _check("interpreter", lost, "install the project's .venv under the same path on every machine", ssh.python),
        _check(
            "folder",
            _each(known, lambda c: "" if c["folder"] else f"there is no folder {ssh.folder}"),
            "put the project under the same path on every machine",
            ssh.folder,
        ),
        # DeepSpeed (0.19) pastes both into a shell's line as they are
        _check("path", "".join(odd[:1]), "move the project to a path without spaces and signs, for DeepSpeed", "plain"),
        _check(
            "Python",
            _each(known, lambda c: _differs("Python", c["python"], mine["python"])),
            "make .venv with the same Python on every machine",
            mine["python"],
        ),
        _check(
            "packages",
            _each(known, lambda c: _other_packages(c["packages"], mine["packages"])),
            "install the same on every machine: pip install -c constraints.txt -e .",
            f"{len(mine['packages'])} alike, torch {mine['packages'].get('torch')}, "
            f"deepspeed {mine['packages'].get('deepspeed')}",
        ),
        _check(
            "project",
            _each(known, lambda c: "" if c["code"] == mine["code"] or not c["folder"] else _other_code(c, mine)),
            "bring every machine to the same commit, without changed files",
            f"{mine['commit'] or 'no git'}, files {mine['code']}",
        )
        if mine["project"]
        else Check("project", FAIL, f"{ssh.folder} is not the folder of the project", "go there first (cd)"),
        *_recipe(known, mine["files"]),
    ]


def _pdsh(ssh: Ssh) -> list[Check]:
    """DeepSpeed's launcher needs it on this machine alone."""
    if ssh.local:
        return []
    trouble = "" if shutil.which("pdsh") else "this machine: there is no pdsh"
    return [_check("pdsh", trouble, "install it here (Debian: apt-get install pdsh)", "here")]


def _recipe(known: list[Answer], mine: dict[str, str | None]) -> list[Check]:
    """Every rank reads these files itself."""
    if not mine:
        return []

    def of(content: dict[str, Any]) -> str:
        other = [path for path, hash_ in content["files"].items() if hash_ is None or hash_ != mine[path]]
        return ", ".join(f"{p} {'differs' if content['files'][p] else 'is not there'}" for p in other)

    return [_check("recipe", _each(known, of), "copy it to every machine under the same path", ", ".join(mine))]


def _count(machines: int) -> str:
    return "1 machine" if machines == 1 else f"{machines} machines"


def _differs(what: str, there: str, here: str) -> str:
    return "" if there == here else f"{what} {there}, here {here}"


def _other_packages(there: dict[str, str], here: dict[str, str]) -> str:
    """Packages that are missing or of another version; what a machine has besides is its own affair."""
    other = [
        f"{name} {there.get(name, 'missing')}, here {v}" for name, v in sorted(here.items()) if there.get(name) != v
    ]
    first = sorted(other, key=lambda text: not text.startswith(("torch ", "deepspeed ", "transformers ")))
    return ", ".join(first[:SHOWN]) + (f" and {len(other) - SHOWN} more" if len(other) > SHOWN else "")


def _other_code(there: dict[str, Any], here: dict[str, Any]) -> str:
    if there["commit"] != here["commit"]:
        return f"commit {there['commit'] or 'unknown'}, here {here['commit'] or 'unknown'}"
    return f"commit {there['commit'] or 'unknown'} as here, but its files differ"


def of_machines(nodes: list[Node], answers: list[Answer], wanted: Wanted, sent: Forwarded) -> list[Check]:
    """What each machine must have for a run. Machines without an answer are left to `before_launch`; of none there is
    nothing to be said."""
    slots = {node.host: node.slots for node in nodes}
    known = [answer for answer in answers if answer.content is not None]
    contents = [(answer.host, answer.content) for answer in known if answer.content is not None]
    if not known:
        return []
    first = answers[0]  # where the ranks meet
    return [
        *_devices(slots, known, contents),
        _check(
            "memory",
            _each(known, lambda c: _low(c["memory"], 1.0, f"{c['cores']} cores")),
            "end what fills the memory of that machine",
            f"{min((c['memory'] for _, c in contents), default=0) / GIB:.0f} GiB free at least",
        ),
        _check(
            "shared folder", _shared(known, wanted), f"mount {wanted.shared} on every machine, writable", wanted.shared
        ),
        _check(
            "paths",
            _each(known, lambda c: _missing([path for path, there in c["paths"].items() if not there])),
            "make what the run reads visible on every machine under the same path",
            f"{len(wanted.paths)} that the run reads",
        ),
        _check(
            "disk",
            _each(known, lambda c: _full(c["disks"], wanted)),
            "free some space, or choose another place (out=, TMPDIR)",
            f"{min((free for _, c in contents for free in c['disks'].values() if free), default=0) / GIB:.0f} GiB free "
            "at least",
        ),
        _check(
            "master port",
            f"{first.host}: port {wanted.port} cannot be used: {first.content['port']}"
            if first.content and first.content["port"]
            else "",
            "choose another one with --master_port, or leave the option out",
            f"{wanted.port} is free on {first.host}" if wanted.port and first.content else "a free one is taken",
        ),
        _check(
            "clocks",
            "; ".join(
                f"{a.host}: {abs(a.clock_offset):.0f} s {_side(a)}" for a in known if abs(a.clock_offset) > CLOCK
            ),
            "set the clock by NTP (chrony)",
            f"within {max((abs(a.clock_offset) for a in known), default=0.0):.1f} s",
        ),
        _check(
            "environment",
            _each(known, lambda c: _unset([n for n, there in c["env"].items() if not there and n not in sent.names()])),
            "set it where the launch is made, and add --forward NAME if it is not on the list (docs/multi-node.md)",
            f"{len(sent.names())} variables forwarded" + (f", {' '.join(wanted.env)} set" if wanted.env else ""),
        ),
        *_withheld(known, sent),
    ]


def _devices(
    slots: dict[str, tuple[int, ...]], known: list[Answer], contents: list[tuple[str, dict[str, Any]]]
) -> list[Check]:
    on_cpus = "CPU ranks: " + ", ".join(f"{host} {len(slots[host])}" for host, _ in contents[:SHOWN])
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return [Check("devices", OK, on_cpus)]
    if not any(c["devices"] for _, c in contents):
        return [Check("devices", WARN, f"no GPU is seen, {on_cpus}", "see nvidia-smi, or set DS_ACCELERATOR=cpu")]
    kinds = sorted({device["name"] for _, c in contents for device in c["devices"]})
    troubles = []
    for host, content in contents:
        devices = content["devices"]
        if len(devices) <= max(slots[host], default=0):
            troubles.append(f"{host}: {len(devices)} GPUs, device {max(slots[host])} is wanted")
            continue
        used = [n for n in slots[host] if devices[n]["free"] < FREE_SHARE * devices[n]["total"]]
        if used:
            free = devices[used[0]]
            troubles.append(f"{host}: GPU {used[0]} has {free['free']} of {free['total']} MiB free")
    few = _each(known, lambda c: _low(c["shared_memory"] or 0, 1.0, "/dev/shm") if len(c["devices"]) > 1 else "")
    return [
        _check(
            "devices", "; ".join(troubles[:SHOWN]), "end other jobs, or name free devices (--include)", ", ".join(kinds)
        ),
        _check("kinds", ", ".join(kinds) if len(kinds) > 1 else "", "the slowest sets the pace", "one kind", WARN),
        _check("/dev/shm", few, "give containers more (--shm-size), for NCCL", "1 GiB or more", WARN),
    ]


def _low(free: float, gib: float, what: str) -> str:
    return f"{free / GIB:.1f} GiB free, {what}" if free < gib * GIB else ""


def _shared(known: list[Answer], wanted: Wanted) -> str:
    def of(content: dict[str, Any]) -> str:
        if not content["shared"]:
            return f"does not see what this machine has written into {wanted.shared}"
        return "" if content["wrote"] else f"cannot write into {wanted.shared}"

    back = [f"{host}: what it wrote is not seen here" for host in wanted.missing_tokens]
    return _each(known, of) or "; ".join(back[:SHOWN])


def _missing(paths: list[str]) -> str:
    return f"there is no {', '.join(paths[:SHOWN])}" if paths else ""


def _full(disks: dict[str, int | None], wanted: Wanted) -> str:
    for path, free in disks.items():
        need = wanted.disk if path == wanted.shared else 1.0
        if free is not None and free < need * GIB:
            return f"{free / GIB:.1f} GiB free in {path}, {need:g} are wanted"
    return ""


def _unset(names: list[str]) -> str:
    return f"{', '.join(names)} not set" if names else ""


def _side(answer: Answer) -> str:
    return "ahead" if answer.clock_offset > 0 else "behind"


def _withheld(known: list[Answer], sent: Forwarded) -> list[Check]:
    """Secrets that are set here and would be missing there."""
    if not sent.withheld:
        return []
    return [
        Check("secrets", WARN, f"{', '.join(sent.withheld)} set here, not forwarded", "add --forward NAME if needed")
    ]
