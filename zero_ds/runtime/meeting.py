"""Ranks meet before they join the process group, and compare their settings before the first step.

torch's own rendezvous waits as long as a collective may take, logs nothing, and ignores signals. Here rank 0 names the
missing ranks, and ends the job if one does not come.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.failure import attempt

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

logger = logging.getLogger(__name__)

PATIENCE = float(os.environ.get("ZERO_DS_MEET", "60"))
"""Seconds for which ranks wait for each other at the start. Their libraries are loaded by then, so one machine may be
late by as much as it took longer to load them."""
FIRST_WORD = 10.0
"""Seconds after which rank 0 names the ranks that it is waiting for."""
LINGER = 3.0
"""Seconds for which rank 0 stays after it has given up, so that the others hear why."""
AGREE = timedelta(minutes=30)
"""Time within which every rank must have sent its settings. The watch ends the job earlier if a rank died."""

_FEW = 8
"""Largest number of missing ranks that a message names."""


class MeetingError(ConfigError):
    """The ranks of a job cannot meet."""

    may_pass = True  # a machine may be late, or come back


def meet(rank: int, world: int, host: str, port: int, device: str = "cpu") -> Store | None:
    """Waits until every rank is there, and returns the store at which they met; None for a single rank.

    The caller must hold the store until it has joined the process group.

    device: kind of device that the rank computes on, as `environment.accelerator` returns it. Ranks on different kinds
    would wait for each other without end, each with communication of its own.

    Raises:
        MeetingError: on every rank; names the address that cannot be reached or the ranks that did not come.
    """
    if not 0 <= rank < world:
        raise MeetingError(
            f"the ranks cannot meet: this one is rank {rank} of {world}; set RANK to 0 up to {world - 1}."
        )
    if world == 1:
        return None
    deadline = time.monotonic() + PATIENCE
    store = _open(rank, world, host, port, deadline)
    key = f"zero_ds/meeting/{attempt()}"
    try:
        store.set(f"{key}/{rank}/device", device)  # by itself, so that another version of this code is named later on
        store.set(f"{key}/{rank}", json.dumps([socket.gethostname(), world]))
        if store.add(f"{key}/{rank}/times", 1) > 1:
            raise MeetingError(
                f"the ranks cannot meet at {host}:{port}: more than one process is rank {rank} of {world}; start each "
                "rank once."
            )
        if rank == 0:
            verdict = _count(store, key, world, f"{host}:{port}", deadline)
            verdict = verdict or _difference_of_ranks(store, key, world, f"{host}:{port}", device)
            store.set(f"{key}/verdict", verdict)
            if verdict:
                time.sleep(LINGER)
        else:
            verdict = _verdict(store, key, rank, world, f"{host}:{port}", deadline)
    except RuntimeError as error:  # the store is gone, and rank 0 with it
        verdict = (
            f"rank {rank} of {world} cannot meet the others at {host}:{port}: rank 0 answered and then ended "
            f"({str(error).splitlines()[0][:100]})."
        )
    if verdict:
        raise MeetingError(verdict)
    return store


def no_server(host: str, port: int, error: Exception) -> MeetingError:
    """Returns the error about an address at which rank 0 cannot open the store, from torch's own."""
    in_use = "another program uses that port; choose a free one with --master_port."
    reason = in_use if "EADDRINUSE" in str(error) else f"{str(error).splitlines()[0].rstrip('.')}."
    return MeetingError(f"the ranks cannot meet at {host}:{port}: {reason}")


def _open(rank: int, world: int, host: str, port: int, deadline: float) -> Store:
    """Opens the store on rank 0, and connects to it on the others, in short attempts that signals can interrupt."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    seconds = timedelta(seconds=10)
    if rank == 0 and not agent:
        try:
            served = TCPStore(
                "localhost", port, world, True, timeout=seconds, wait_for_workers=False, multi_tenant=True
            )
        except RuntimeError as error:
            raise no_server(host, port, error) from None
        deadline = min(deadline, time.monotonic() + 5.0)  # it is there already, if the address is right
        _reach(rank, world, host, port, deadline)
        return served
    _reach(rank, world, host, port, deadline)
    try:
        return TCPStore(host, port, world, False, timeout=seconds, wait_for_workers=False)
    except RuntimeError as error:
        raise MeetingError(
            f"rank {rank} of {world} cannot meet the others: at {host}:{port} there is something other than rank 0 "
            f"({str(error).splitlines()[0][:100]}); choose a free port with --master_port."
        ) from None


def _reach(rank: int, world: int, host: str, port: int, deadline: float) -> None:
    """Waits until something listens at the address."""
    while True:
        try:
            socket.create_connection((host, port), timeout=2.0).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:  # a name may become known while a service starts
                remedy = (
                    f"rank 0 runs on {socket.gethostname()}; is --master_addr an address of that machine?"
                    if rank == 0
                    else "did rank 0 start, is --master_addr its machine, and is the port open between the machines?"
                )
                raise MeetingError(
                    f"rank {rank} of {world} on {socket.gethostname()} cannot meet the others: rank 0 is missing at "
                    f"{host}:{port} ({error.strerror or error}); {remedy}"
                ) from None
        time.sleep(0.2)


def _count(store: Store, key: str, world: int, address: str, deadline: float) -> str:
    """Waits on rank 0 for all ranks; returns a sentence if they cannot meet, otherwise an empty text."""
    spoken = time.monotonic() + FIRST_WORD
    missing = list(range(world))
    while True:
        missing = [rank for rank in missing if not store.check([f"{key}/{rank}"])]
        if not missing:
            break
        now = time.monotonic()
        if now > deadline:
            return (
                f"the ranks cannot meet at {address}: {_names(missing)} of {world} did not come within "
                f"{PATIENCE:.0f} s; start them, or set ZERO_DS_MEET to more seconds if their machines need longer."
            )
        if now > spoken:
            logger.warning("waiting for %s of %d at %s", _names(missing), world, address)
            spoken = now + FIRST_WORD
        time.sleep(0.05)
    return ""


def _difference_of_ranks(store: Store, key: str, world: int, address: str, device: str) -> str:
    """Returns on rank 0 a sentence about a rank that was started otherwise; an empty text if there is none."""
    for rank in range(world):
        name, stated = json.loads(store.get(f"{key}/{rank}"))
        if stated != world:
            return (
                f"the ranks cannot meet at {address}: rank {rank} on {name} was started as one of {stated} ranks, and "
                f"rank 0 as one of {world}."
            )
        if not store.check([f"{key}/{rank}/device"]):
            continue
        if (other := store.get(f"{key}/{rank}/device").decode()) != device:
            return (
                f"the ranks cannot meet at {address}: rank {rank} on {name} computes on {other}, and rank 0 on "
                f"{device}; see what torch finds there (nvidia-smi, CUDA_VISIBLE_DEVICES), or set DS_ACCELERATOR=cpu "
                "for all of them."
            )
    return ""


def _verdict(store: Store, key: str, rank: int, world: int, address: str, deadline: float) -> str:
    """Waits until rank 0 has counted all ranks; returns a sentence if they cannot meet, otherwise an empty text."""
    while not store.check([f"{key}/verdict"]):
        if time.monotonic() > deadline + LINGER + PATIENCE:  # rank 0 may have begun to count later
            return f"rank {rank} of {world} cannot meet the others at {address}: rank 0 does not answer."
        time.sleep(0.05)
    return str(store.get(f"{key}/verdict").decode())


def _names(ranks: list[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:_FEW])
    more = f" and {len(ranks) - _FEW} more" if len(ranks) > _FEW else ""
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}{more}"


# -- agreement ---------------------------------------------------------------------------------------------------------

_comparisons = itertools.count()


def require_agreement(entries: Mapping[str, Any], remedy: str) -> None:
    """Compares named values over all ranks. A collective, through the store of the process group.

    entries: name -> value that JSON can hold, the most telling ones first. remedy: what to do if one differs.

    Raises:
        ConfigError: on every rank; names the first entry that differs, with both values.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, rank, world = _get_default_store(), dist.get_rank(), dist.get_world_size()
    key = f"zero_ds/agreement/{attempt()}/{next(_comparisons)}"
    ours = {name: json.dumps(value, sort_keys=True, default=str) for name, value in entries.items()}
    store.set(f"{key}/{rank}", json.dumps(ours))
    if rank == 0:
        verdict = ""
        for other in range(1, world):
            theirs = json.loads(_await(store, f"{key}/{other}"))
            verdict = verdict or _difference(ours, theirs, other)
        store.set(f"{key}/verdict", verdict)
    else:
        verdict = _await(store, f"{key}/verdict")
    if verdict:
        raise ConfigError(f"the ranks do not agree: {verdict}; {remedy}")


def _await(store: Store, key: str) -> str:
    deadline = time.monotonic() + AGREE.total_seconds()
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise ConfigError(f"the ranks do not agree: one of them has sent nothing for {AGREE}.")
        time.sleep(0.02)
    return str(store.get(key).decode())


def _difference(ours: dict[str, str], theirs: dict[str, str], other: int) -> str:
    """Returns the first entry in which another rank differs from rank 0; empty if there is none."""
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if ours.get(name) != theirs.get(name):
            values = [_shown(entries.get(name)) for entries in (ours, theirs)]
            return f"{name} is {values[0]} on rank 0 and {values[1]} on rank {other}"
    return ""


def _shown(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= 100 else f"{value[:100]}..."
