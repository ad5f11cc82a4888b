"""The machines of a run: a hostfile in DeepSpeed's form, narrowed by --include or --exclude."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path

from zero_ds.runtime.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Node:
    """One machine and the devices of it that a run uses."""

    host: str
    """Name or address by which ssh reaches it."""
    slots: tuple[int, ...]
    """Numbers of its devices, one rank each."""


THIS_MACHINE = "localhost"
MOST = 1024
"""Devices of one machine; more is a slip of the hand."""


def read_hostfile(path: Path, include: str = "", exclude: str = "") -> list[Node]:
    """Machines in the order of the file, which is that of the ranks; one line a machine: `node1 slots=8`.

    `include` and `exclude` are DeepSpeed's: `node1@node2:0,2` names all devices of node1, and 0 and 2 of node2.

    Raises:
        ConfigError: no such file, a line of another form, a machine twice, an unknown machine or device, nothing left.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"the hostfile {path} is no text in UTF-8; see launch/hostfile.example.") from None
    except OSError as error:
        raise ConfigError(
            f"there is no hostfile {path} ({type(error).__name__}); see launch/hostfile.example."
        ) from None
    slots: dict[str, tuple[int, ...]] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = re.match(r"(\w[\w.-]*)\s+slots=(\d+)(\s|$)", text)
        if not found or not 1 <= int(found[2]) <= MOST:
            raise ConfigError(f"{path}, line {number}: {text!r} is no machine; {_advice(text)}.")
        if found[1] in slots:
            raise ConfigError(f"{path}, line {number}: {found[1]} stands there twice; give it one line.")
        slots[found[1]] = tuple(range(int(found[2])))
    if not slots:
        raise ConfigError(f"{path} names no machine; write for instance: node1 slots=8.")
    if include and exclude:
        raise ConfigError("--include and --exclude cannot be used together; give one of them.")
    named = _named(include or exclude, slots, path)
    if include:
        slots = {host: tuple(s for s in all_ if s in named[host]) for host, all_ in slots.items() if host in named}
    elif exclude:
        slots = {host: tuple(s for s in all_ if s not in named.get(host, ())) for host, all_ in slots.items()}
    nodes = [Node(host, left) for host, left in slots.items() if left]
    if not nodes:
        raise ConfigError(f"--exclude {exclude} leaves no device of {path}; leave one.")
    return nodes


def _advice(line: str) -> str:
    host, *rest = line.split()
    if "@" in host:  # DeepSpeed's filters end a machine's name there
        return "the name of a user stands in ssh's configuration (User), not here"
    if host.count(":") > 1:  # and there
        return "give an address of IPv6 a name, in /etc/hosts or ssh's configuration (HostName)"
    if "[" in host or "," in host:
        return "write every machine on a line of its own"
    if not rest:
        return f"say how many devices it has: {host} slots=8"
    return "write for instance: node1 slots=8"


def _named(words: str, slots: dict[str, tuple[int, ...]], path: Path) -> dict[str, set[int]]:
    """Machine -> devices that a filter names."""
    named: dict[str, set[int]] = {}
    for word in words.split("@") if words else []:
        host, colon, numbers = word.partition(":")
        if host not in slots:
            raise ConfigError(f"{path} has no machine '{host}'{did_you_mean(host, list(slots))}")
        try:
            chosen = {int(number) for number in numbers.split(",")} if colon else set(slots[host])
        except ValueError:
            raise ConfigError(f"'{word}' names no devices; write for instance: {host}:0,1.") from None
        if missing := chosen - set(slots[host]):
            raise ConfigError(f"{host} has devices 0 to {len(slots[host]) - 1}, and no {min(missing)}.")
        named.setdefault(host, set()).update(chosen)
    return named


def is_this_machine(host: str) -> bool:
    """Whether a name in a hostfile surely means the machine that this runs on."""
    return host in (THIS_MACHINE, "127.0.0.1", "::1", socket.gethostname())


def node_of_rank(nodes: list[Node], rank: int) -> str | None:
    """The machine on which a rank runs; None for a rank that there is not."""
    for node in nodes:
        if rank < len(node.slots):
            return node.host
        rank -= len(node.slots)
    return None
