"""The machines of a run: a hostfile in DeepSpeed's format, narrowed by --include or --exclude."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from zero_ds.runtime.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Node:
    """One machine, and the devices of it that a run uses."""

    host: str
    """Name or address by which ssh reaches it."""
    slots: tuple[int, ...]
    """Numbers of the devices, one rank each."""


THIS_MACHINE = "localhost"

MAX_SLOTS = 1024
"""Largest number of devices of a machine; a larger number is a typing error."""

LINE = re.compile(r"(\w[\w.-]*)\s+slots=([0-9]{1,8})(\s|$)")


def read_hostfile(path: Path, include: str = "", exclude: str = "") -> list[Node]:
    """Returns the machines in the order of the file, which is the order of the ranks; one line each: `node1 slots=8`.

    include, exclude: filters in DeepSpeed's form; `node1@node2:0,2` names all devices of node1, and 0 and 2 of node2.

    Raises:
        ConfigError: the file cannot be read, a line has another form, a machine is listed twice, a filter names an
            unknown machine or device, or no device is left.
    """
    slots = _parse(path)
    if include and exclude:
        raise ConfigError("--include and --exclude cannot be used together; give one of them.")
    named = _filter(include or exclude, slots, path)
    nodes = []
    for host, numbers in slots.items():
        chosen = named.get(host, set())
        if include:
            numbers = tuple(number for number in numbers if number in chosen)
        elif exclude:
            numbers = tuple(number for number in numbers if number not in chosen)
        if numbers:
            nodes.append(Node(host, numbers))
    if not nodes:
        raise ConfigError(f"--exclude {exclude} leaves no device of {path}; leave one.")
    return nodes


def _parse(path: Path) -> dict[str, tuple[int, ...]]:
    """Returns machine -> numbers of all its devices."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"the hostfile {path} is not UTF-8 text; see launch/hostfile.example.") from None
    except OSError as error:
        raise ConfigError(
            f"hostfile {path} cannot be read ({type(error).__name__}); see launch/hostfile.example."
        ) from None
    if text.startswith("\ufeff"):
        raise ConfigError(
            f"{path} begins with a byte order mark, which DeepSpeed takes for a part of the first machine's name; save "
            "it as UTF-8 without one."
        )
    slots: dict[str, tuple[int, ...]] = {}
    seen: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), 1):  # as DeepSpeed does; splitlines knows more ends of lines
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.match(text)
        if not found or not 1 <= int(found[2]) <= MAX_SLOTS:
            raise ConfigError(f"{path}, line {number}: {text!r} is not a machine; {_advice(text)}.")
        host = found[1]
        machine = THIS_MACHINE if is_this_machine(host) else host.casefold()
        if (other := seen.setdefault(machine, host)) != host or host in slots:
            twice = f"{host} and {other} are the same machine" if other != host else f"{host} is listed twice"
            raise ConfigError(f"{path}, line {number}: {twice}; give it one line.")
        slots[host] = tuple(range(int(found[2])))
    if not slots:
        raise ConfigError(f"{path} names no machine; write for example: node1 slots=8.")
    return slots


def _advice(line: str) -> str:
    """Returns the remedy for a line that is not a machine."""
    host, *rest = line.split()
    if "@" in host:  # a separator in DeepSpeed's filters
        return "the name of a user belongs in ssh's configuration (User), not here"
    if host.count(":") > 1:  # another such separator
        return "give an IPv6 address a name, in /etc/hosts or ssh's configuration (HostName)"
    if "[" in host or "," in host:
        return "write each machine on a line of its own"
    if not rest:
        return f"say how many devices it has: {host} slots=8"
    return "write for example: node1 slots=8"


def _filter(words: str, slots: Mapping[str, Collection[int]], path: Path) -> dict[str, set[int]]:
    """Returns machine -> devices that a filter names."""
    named: dict[str, set[int]] = {}
    for word in words.split("@") if words else []:
        host, colon, numbers = word.partition(":")
        if host not in slots:
            raise ConfigError(f"{path} has no machine '{host}'{did_you_mean(host, list(slots))}")
        try:
            chosen = {int(number) for number in numbers.split(",")} if colon else set(slots[host])
        except ValueError:
            raise ConfigError(f"'{word}' names no devices; write for example: {host}:0,1.") from None
        missing = chosen - set(slots[host])
        if missing:
            raise ConfigError(f"{host} has devices 0 to {len(slots[host]) - 1}, and not {min(missing)}.")
        named.setdefault(host, set()).update(chosen)
    return named


def is_this_machine(host: str) -> bool:
    """Returns whether a name in a hostfile surely means the machine that this process runs on."""
    return host in (THIS_MACHINE, "127.0.0.1", "::1", socket.gethostname())


def node_of_rank(nodes: list[Node], rank: int) -> str | None:
    """Returns the machine on which a rank runs; None if the machines have fewer ranks."""
    for node in nodes:
        if rank < len(node.slots):
            return node.host
        rank -= len(node.slots)
    return None
