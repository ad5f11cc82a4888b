"""Checks of machines: what has to be the same on all of them, and what each of them needs for a run.

Every check reads the machines' descriptions of themselves (`probe.describe`) and returns one line of a table with a
verdict, the finding, and a remedy if something needs mending.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from zero_ds.cluster.environment import Forwarded
from zero_ds.cluster.hostfile import Node
from zero_ds.cluster.ssh import Answer, Ssh

OK, WARN, FAIL = "ok", "warn", "FAIL"

CLOCK_TOLERANCE = 5.0
"""Seconds by which the clocks of two machines may differ."""
FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free."""
GIB = 2**30
SHOWN = 4
"""Number of machines, or of packages, that a finding names."""
FIRST_PACKAGES = ("torch ", "deepspeed ", "transformers ")
"""Packages that a finding names before all others."""
PLAIN_PATH = re.compile(r"[\w@+=:,./-]*")
"""Paths that DeepSpeed (0.19) can paste into a shell's command line as they are."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    """Subject of the check."""
    status: str
    """OK, WARN or FAIL."""
    found: str
    """Finding, or the value that was expected and found."""
    remedy: str = ""


@dataclass(frozen=True)
class Wanted:
    """Needs of a run on every machine."""

    shared: str
    """Folder that all machines must see: the run's, or one above it."""
    token: str
    """Name and content of a file that this machine has written into the shared folder."""
    paths: tuple[str, ...] = ()
    """Files and folders that the run reads."""
    disk: float = 10.0
    """GiB that must be free in the shared folder."""
    env: tuple[str, ...] = ()
    """Names of variables that must be set."""
    port: int | None = None
    """Port on which the ranks meet; None for any free one."""
    missing_tokens: tuple[str, ...] = ()
    """Machines whose own files in the shared folder are not seen on this machine."""


@dataclass(frozen=True)
class Machine:
    """A machine that answered."""

    host: str
    facts: dict[str, Any]
    """Result of `probe.describe` on that machine."""
    clock_offset: float
    """Seconds by which its clock is ahead of this machine's."""


def _answered(answers: Sequence[Answer]) -> list[Machine]:
    return [Machine(a.host, a.content, a.clock_offset) for a in answers if a.content is not None]


def _check(what: str, trouble: str, remedy: str, fine: str, status: str = FAIL) -> Check:
    """Returns a check that fails if there is a trouble, and says `fine` if there is none."""
    return Check(what, status, trouble, remedy) if trouble else Check(what, OK, fine)


def _troubles(machines: Sequence[Machine], trouble_of: Callable[[dict[str, Any]], str]) -> str:
    """Returns `host: trouble; host: trouble; and 3 more` for the machines that have one."""
    found = [(machine.host, trouble_of(machine.facts)) for machine in machines]
    lines = [f"{host}: {trouble}" for host, trouble in found if trouble]
    if len(lines) > SHOWN:
        lines = [*lines[:SHOWN], f"and {len(lines) - SHOWN} more"]
    return "; ".join(lines)


# -- before every launch: the machines answer, and would run the same program ------------------------------------------


def before_launch(here: Answer, answers: list[Answer], ssh: Ssh) -> list[Check]:
    """Returns the checks that every launch makes: all machines answer and would run the same program.

    here: the answer of this machine, with which all others are compared.
    """
    if here.content is None:
        return [Check("this machine", FAIL, f"this machine: {here.trouble}", "check its Python")]
    mine = here.content
    machines = _answered(answers)
    checks = [] if ssh.local else [_pdsh()]
    checks += [
        _reached(answers, len(machines)),
        _interpreter(answers, ssh),
        _folder(machines, ssh),
        _plain_path(ssh),
        _same_python(machines, mine),
        _same_packages(machines, mine),
        _same_project(machines, mine, ssh),
    ]
    if mine["files"]:
        checks.append(_same_recipe(machines, mine))
    return checks


def _pdsh() -> Check:
    """Checks for pdsh, which DeepSpeed's launcher needs on this machine alone."""
    trouble = "" if shutil.which("pdsh") else "this machine: pdsh is not installed"
    return _check("pdsh", trouble, "install it here (Debian: apt-get install pdsh)", "installed")


def _reached(answers: Sequence[Answer], answered: int) -> Check:
    trouble = "; ".join(f"{a.host} does not answer: {a.trouble}" for a in answers if not a.reached)
    fine = "1 machine" if answered == 1 else f"{answered} machines"
    if answered < len(answers):
        fine = f"{answered} of {len(answers)} machines"
    remedy = "make `ssh HOST true` work without a password, or leave HOST out (--exclude)"
    return _check("ssh", trouble, remedy, fine)


def _interpreter(answers: Sequence[Answer], ssh: Ssh) -> Check:
    failed = [answer for answer in answers if answer.reached and not answer.content]
    trouble = "; ".join(f"{a.host}: {ssh.python} cannot be run ({a.trouble})" for a in failed)
    return _check(
        "interpreter", trouble, "install the project's .venv under the same path on every machine", ssh.python
    )


def _folder(machines: Sequence[Machine], ssh: Ssh) -> Check:
    trouble = _troubles(machines, lambda facts: "" if facts["folder"] else f"folder {ssh.folder} does not exist")
    return _check("folder", trouble, "put the project under the same path on every machine", ssh.folder)


def _plain_path(ssh: Ssh) -> Check:
    trouble = ""
    if not ssh.local:
        odd = [path for path in (ssh.folder, ssh.python) if not PLAIN_PATH.fullmatch(path)]
        trouble = odd[0] if odd else ""
    remedy = "move the project to a path without spaces and special characters, which DeepSpeed cannot start"
    return _check("path", trouble, remedy, "plain")


def _same_python(machines: Sequence[Machine], mine: dict[str, Any]) -> Check:
    def differs(facts: dict[str, Any]) -> str:
        same = facts["python"] == mine["python"]
        return "" if same else f"Python {facts['python']}, here {mine['python']}"

    remedy = "make .venv with the same Python on every machine"
    return _check("Python", _troubles(machines, differs), remedy, mine["python"])


def _same_packages(machines: Sequence[Machine], mine: dict[str, Any]) -> Check:
    ours: dict[str, str] = mine["packages"]
    return _check(
        "packages",
        _troubles(machines, lambda facts: _other_packages(facts["packages"], ours)),
        "install the same on every machine: pip install -c constraints.txt -e .",
        f"the same {len(ours)}, torch {ours.get('torch')}, deepspeed {ours.get('deepspeed')}",
    )


def _other_packages(theirs: dict[str, str], ours: dict[str, str]) -> str:
    """Names the packages that a machine lacks or has in another version; packages that only it has do not matter."""
    other = [
        f"{name} {theirs.get(name, 'missing')}, here {version}"
        for name, version in sorted(ours.items())
        if theirs.get(name) != version
    ]
    other.sort(key=lambda text: not text.startswith(FIRST_PACKAGES))
    rest = f" and {len(other) - SHOWN} more" if len(other) > SHOWN else ""
    return ", ".join(other[:SHOWN]) + rest


def _same_project(machines: Sequence[Machine], mine: dict[str, Any], ssh: Ssh) -> Check:
    if not mine["project"]:
        return Check("project", FAIL, f"{ssh.folder} is not the folder of the project", "go there first (cd)")
    return _check(
        "project",
        _troubles(machines, lambda facts: _other_project(facts, mine)),
        "bring every machine to the same git commit, without changed files",
        f"{mine['commit'] or 'no git'}, files {mine['code']}",
    )


def _other_project(theirs: dict[str, Any], mine: dict[str, Any]) -> str:
    if theirs["code"] == mine["code"] or not theirs["folder"]:  # a missing folder is a finding of its own
        return ""
    commit, here = theirs["commit"] or "unknown", mine["commit"] or "unknown"
    if theirs["commit"] != mine["commit"]:
        return f"commit {commit}, here {here}"
    return f"commit {commit} as here, but its files differ"


def _same_recipe(machines: Sequence[Machine], mine: dict[str, Any]) -> Check:
    """Compares recipe and DeepSpeed JSON, which every rank reads itself."""
    ours: dict[str, str | None] = mine["files"]

    def differs(facts: dict[str, Any]) -> str:
        theirs: dict[str, str | None] = facts["files"]
        words = []
        for path, content in theirs.items():
            if content is None:
                words.append(f"{path} is not there")
            elif content != ours[path]:
                words.append(f"{path} differs")
        return ", ".join(words)

    return _check(
        "recipe", _troubles(machines, differs), "copy it to every machine under the same path", ", ".join(ours)
    )


# -- before a run: the needs of the run on each machine ----------------------------------------------------------------


def of_machines(nodes: list[Node], answers: list[Answer], wanted: Wanted, sent: Forwarded) -> list[Check]:
    """Returns the checks of what each machine needs for a run.

    Machines that did not answer are left to `before_launch`; if none answered, nothing is checked.
    """
    machines = _answered(answers)
    if not machines:
        return []
    checks = [
        *_devices(nodes, machines),
        _memory(machines),
        _shared_folder(machines, wanted),
        _paths(machines, wanted),
        _disk(machines, wanted),
        _master_port(answers[0], wanted),
        _clocks(machines),
        _environment(machines, wanted, sent),
    ]
    if sent.withheld:
        names = ", ".join(sent.withheld)
        checks.append(Check("secrets", WARN, f"{names} set here, not forwarded", "add --forward NAME if needed"))
    return checks


def _devices(nodes: Sequence[Node], machines: Sequence[Machine]) -> list[Check]:
    slots = {node.host: node.slots for node in nodes}
    ranks = ", ".join(f"{machine.host} {len(slots[machine.host])}" for machine in machines[:SHOWN])
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return [Check("devices", OK, f"CPU ranks: {ranks}")]
    kinds = sorted({device["name"] for machine in machines for device in machine.facts["devices"]})
    if not kinds:
        remedy = "see nvidia-smi, or set DS_ACCELERATOR=cpu"
        return [Check("devices", WARN, f"no GPU is seen, CPU ranks: {ranks}", remedy)]
    troubles = [_device_trouble(machine, slots[machine.host]) for machine in machines]
    return [
        _check(
            "devices",
            "; ".join([trouble for trouble in troubles if trouble][:SHOWN]),
            "end other jobs, or name free devices (--include)",
            ", ".join(kinds),
        ),
        _check("kinds", ", ".join(kinds) if len(kinds) > 1 else "", "the slowest sets the pace", "one kind", WARN),
        _check(
            "/dev/shm",
            _troubles(machines, _shared_memory_trouble),
            "give containers more (--shm-size), which NCCL needs",
            "1 GiB or more",
            WARN,
        ),
    ]


def _device_trouble(machine: Machine, slots: tuple[int, ...]) -> str:
    devices = machine.facts["devices"]
    highest = max(slots, default=0)
    if len(devices) <= highest:
        return f"{machine.host}: {len(devices)} GPUs, device {highest} is needed"
    for number in slots:
        device = devices[number]
        if device["free"] < FREE_SHARE * device["total"]:
            return f"{machine.host}: GPU {number} has {device['free']} of {device['total']} MiB free"
    return ""


def _shared_memory_trouble(facts: dict[str, Any]) -> str:
    """Finds too little shared memory, through which NCCL connects several GPUs of a machine."""
    free = facts["shared_memory"] or 0
    if len(facts["devices"]) <= 1 or free >= GIB:
        return ""
    return f"{free / GIB:.1f} GiB free, /dev/shm"


def _memory(machines: Sequence[Machine]) -> Check:
    def low(facts: dict[str, Any]) -> str:
        free = facts["memory"]
        return "" if free >= GIB else f"{free / GIB:.1f} GiB free, {facts['cores']} cores"

    least = min(machine.facts["memory"] for machine in machines)
    remedy = "end the programs that fill the memory of that machine"
    return _check("memory", _troubles(machines, low), remedy, f"{least / GIB:.0f} GiB free at least")


def _shared_folder(machines: Sequence[Machine], wanted: Wanted) -> Check:
    def trouble_of(facts: dict[str, Any]) -> str:
        if not facts["shared"]:
            return f"does not see what this machine has written into {wanted.shared}"
        return "" if facts["wrote"] else f"cannot write into {wanted.shared}"

    unseen = [f"{host}: files that it wrote are not seen here" for host in wanted.missing_tokens]
    trouble = _troubles(machines, trouble_of) or "; ".join(unseen[:SHOWN])
    return _check("shared folder", trouble, f"mount {wanted.shared} on every machine, writable", wanted.shared)


def _paths(machines: Sequence[Machine], wanted: Wanted) -> Check:
    def missing(facts: dict[str, Any]) -> str:
        paths = [path for path, exists in facts["paths"].items() if not exists]
        return f"not found: {', '.join(paths[:SHOWN])}" if paths else ""

    return _check(
        "paths",
        _troubles(machines, missing),
        "make the files that the run reads visible on every machine under the same path",
        f"{len(wanted.paths)} that the run reads",
    )


def _disk(machines: Sequence[Machine], wanted: Wanted) -> Check:
    def full(facts: dict[str, Any]) -> str:
        for path, free in facts["disks"].items():
            need = wanted.disk if path == wanted.shared else 1.0
            if free is not None and free < need * GIB:
                return f"{free / GIB:.1f} GiB free in {path}, {need:g} are needed"
        return ""

    free_of_each = [free for machine in machines for free in machine.facts["disks"].values() if free]
    return _check(
        "disk",
        _troubles(machines, full),
        "free some space, or choose another place (out=, TMPDIR)",
        f"{min(free_of_each, default=0) / GIB:.0f} GiB free at least",
    )


def _master_port(first: Answer, wanted: Wanted) -> Check:
    """Checks the port on which the ranks meet; they meet on the first machine."""
    facts = first.content
    trouble, fine = "", "a free one is taken"
    if facts is not None and facts["port"]:
        trouble = f"{first.host}: port {wanted.port} cannot be used: {facts['port']}"
    elif facts is not None and wanted.port:
        fine = f"{wanted.port} is free on {first.host}"
    return _check("master port", trouble, "choose another one with --master_port, or leave the option out", fine)


def _clocks(machines: Sequence[Machine]) -> Check:
    troubles = []
    for machine in machines:
        if abs(machine.clock_offset) > CLOCK_TOLERANCE:
            side = "ahead" if machine.clock_offset > 0 else "behind"
            troubles.append(f"{machine.host}: {abs(machine.clock_offset):.0f} s {side}")
    largest = max(abs(machine.clock_offset) for machine in machines)
    return _check("clocks", "; ".join(troubles), "set the clock by NTP (chrony)", f"within {largest:.1f} s")


def _environment(machines: Sequence[Machine], wanted: Wanted, sent: Forwarded) -> Check:
    forwarded = sent.names()

    def unset(facts: dict[str, Any]) -> str:
        names = [name for name, is_set in facts["env"].items() if not is_set and name not in forwarded]
        return f"{', '.join(names)} not set" if names else ""

    set_everywhere = f", {' '.join(wanted.env)} set" if wanted.env else ""
    return _check(
        "environment",
        _troubles(machines, unset),
        "set it where the run is launched, and add --forward NAME if it is not on the list (docs/multi-node.md)",
        f"{len(forwarded)} variables forwarded{set_everywhere}",
    )
