"""The devices of a run on a single machine: those that nvidia-smi lists, narrowed by CUDA_VISIBLE_DEVICES.

    python -m zero_ds.cluster.devices [RANKS]

prints `cpu RANKS` or `cuda RANKS NAME,NAME,...` for launch/train.sh. DeepSpeed's launcher (0.19) ignores
CUDA_VISIBLE_DEVICES if it is told a number of ranks, and otherwise reads numbers only, while CUDA also knows UUIDs and
MIG names. So the launcher does not get to see the variable, and each rank sets it from ZERO_DS_DEVICES
(`runtime.environment.take_devices`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zero_ds.cluster.probe import gpus
from zero_ds.runtime.errors import ConfigError

VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU_RANKS = 2
"""Number of ranks on a machine without a GPU."""


@dataclass(frozen=True)
class Devices:
    """Devices of a run, one rank each."""

    ranks: int
    names: tuple[str, ...] = ()
    """Names as in CUDA_VISIBLE_DEVICES, in the order of the ranks; empty: the ranks compute on CPUs."""


def devices_here(ranks: int | None, environment: Mapping[str, str], found: Sequence[dict[str, Any]]) -> Devices:
    """Returns the devices of a run on this machine.

    ranks: number of ranks, all visible GPUs if None; found: the machine's GPUs (`probe.gpus`).

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that does not exist, or there are fewer GPUs than ranks.
    """
    names = [] if environment.get("DS_ACCELERATOR") == "cpu" else visible_names(environment, found)
    if not names:
        return Devices(ranks or CPU_RANKS)
    if ranks is not None and ranks > len(names):
        seen = f"{VISIBLE}={environment[VISIBLE]} shows" if VISIBLE in environment else "this machine has"
        raise ConfigError(f"{ranks} ranks need as many GPUs, and {seen} {len(names)}; lower --ranks.")
    chosen = names[: ranks or len(names)]
    return Devices(len(chosen), tuple(chosen))


def visible_names(environment: Mapping[str, str], found: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the names of the GPUs that CUDA shows to a program, in its order.

    Raises:
        ConfigError: CUDA_VISIBLE_DEVICES names a GPU that does not exist, or one of them twice.
    """
    if VISIBLE not in environment:
        return [str(device["index"]) for device in found]
    taken: dict[Any, str] = {}
    for word in environment[VISIBLE].split(","):
        name = word.strip()
        if not name or name.startswith("-") or name == "NoDevFiles":  # CUDA ignores the rest
            break
        device = device_of(name, found)
        if device is None and not name.startswith("MIG-"):
            raise ConfigError(
                f"{VISIBLE}={environment[VISIBLE]} names {name}, and nvidia-smi lists {_listed(found)}; name GPUs that "
                "exist."
            )
        key = name if device is None else device["index"]
        if key in taken:
            twice = f"{name} twice" if taken[key] == name else f"GPU {key} twice, as {taken[key]} and {name}"
            raise ConfigError(f"{VISIBLE}={environment[VISIBLE]} names {twice}; name each GPU once.")
        taken[key] = name
    return list(taken.values())


def device_of(name: str, found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Returns the GPU that a number, or the beginning of a UUID, names; None if there is none, or several."""
    if name.isdecimal():
        matching = [device for device in found if device["index"] == int(name)]
    else:
        matching = [device for device in found if name.startswith("GPU-") and device["uuid"].startswith(name)]
    return matching[0] if len(matching) == 1 else None


def seen_as(names: Sequence[str], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the entries of named devices, in their order. For a part of a GPU (MIG), only the name is known."""
    unknown = {"uuid": "", "total": None, "free": None}
    return [device_of(name, found) or {"index": name, "name": name.partition("/")[0], **unknown} for name in names]


def _listed(found: Sequence[dict[str, Any]]) -> str:
    if not found:
        return "no GPU"
    return f"GPU {', '.join(str(device['index']) for device in found)}"


if __name__ == "__main__":
    try:
        asked = int(sys.argv[1]) if len(sys.argv) > 1 else 0
        here = devices_here(asked or None, os.environ, gpus())
    except ConfigError as error:
        sys.exit(f"zero-ds: {error}")
    sys.stdout.write(f"cuda {here.ranks} {','.join(here.names)}\n" if here.names else f"cpu {here.ranks}\n")
