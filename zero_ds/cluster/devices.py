"""The devices of this machine that a run uses, for launch/train.sh and `zero-ds doctor`.

    python -m zero_ds.cluster.devices RECIPE [key=value ...]

prints the kind of device (`cuda` or `cpu`), the number of ranks, their GPUs if not all are visible (else `-`), and a
free port. All devices take part unless they cannot share the global batch evenly; then as many as can.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from zero_ds.config.batches import largest_divisor
from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.ports import free_port

CPU_RANKS = 2
"""Number of ranks on a machine without a GPU."""


@dataclass(frozen=True)
class Devices:
    """Devices of this machine for a run."""

    kind: str
    """`cuda`, or `cpu`."""
    ranks: int
    """Number of ranks, one a GPU."""
    numbers: tuple[int, ...] = ()
    """Numbers of the GPUs, where CUDA_VISIBLE_DEVICES names some; empty: the first ones."""


def available() -> Devices:
    """Returns all devices of this machine that a run may use.

    DS_ACCELERATOR=cpu leaves the GPUs out, and CUDA_VISIBLE_DEVICES those that it does not name.
    """
    count = 0 if os.environ.get("DS_ACCELERATOR") == "cpu" else _count_gpus()
    numbers = visible(os.environ.get("CUDA_VISIBLE_DEVICES"), count)
    if numbers is not None:
        count = len(numbers)
    return Devices("cuda", count, numbers or ()) if count else Devices("cpu", CPU_RANKS)


def visible(variable: str | None, count: int) -> tuple[int, ...] | None:
    """Returns the GPUs, of `count`, that CUDA_VISIBLE_DEVICES names by number; None if it is not set or has names.

    CUDA ignores everything from the first number on that is not a GPU's.
    """
    if variable is None:
        return None
    found: list[int] = []
    for word in variable.split(","):
        if word.strip() and not word.strip().lstrip("-").isdigit():
            return None
        number = int(word) if word.strip() else -1
        if not 0 <= number < count:
            break
        found.append(number)
    return tuple(found)


def for_batch(devices: Devices, global_batch: int) -> tuple[Devices, str | None]:
    """Returns as many of the devices as can share the global batch evenly, and a sentence if these are not all."""
    ranks = largest_divisor(global_batch, devices.ranks)
    if ranks == devices.ranks:
        return devices, None
    what = "GPUs" if devices.kind == "cuda" else "CPU ranks"
    sentence = (
        f"{ranks} of {devices.ranks} {what} train, because global_batch={global_batch} is not a multiple of "
        f"{devices.ranks}; set global_batch to a multiple of it to use all."
    )
    return Devices(devices.kind, ranks, devices.numbers[:ranks]), sentence


def _count_gpus() -> int:
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def main(arguments: Sequence[str]) -> None:
    """Prints the devices for a run: all of them for a recipe that cannot be read, of which the launcher complains."""
    recipe, *overrides = arguments
    devices = available()
    try:
        devices, sentence = for_batch(devices, load_run(recipe, overrides).global_batch)
    except ConfigError:
        sentence = None
    if sentence:
        print(f"zero-ds: {sentence}", file=sys.stderr)
    print(devices.kind, devices.ranks, ",".join(map(str, devices.numbers)) or "-", free_port())


if __name__ == "__main__":
    main(sys.argv[1:])
