"""Ranks, collectives and signals: the only file that talks to torch.distributed's set-up."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.failure import WATCH
from zero_ds.runtime.ports import free_port

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
"""How long a collective waits for a rank before the job ends; nothing long may stand behind one."""


def initialize() -> None:
    """Joins the process group of the launcher (DeepSpeed's or torchrun's); a lone process becomes rank 0 of 1.

    Raises:
        ConfigError: the ranks cannot meet at the launcher's address and port.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    # DeepSpeed's own calls, which a user cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from transformers.utils.logging import disable_progress_bar

    if int(os.environ["RANK"]):
        disable_progress_bar()  # one bar a job is enough

    if not torch.cuda.is_available():
        # DeepSpeed would compile a shared-memory kernel with a C++ compiler at this point (minutes, and not everybody
        # has one); gloo carries what CPU ranks exchange.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(local_rank())
    _allow_two_models_under_hpz()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    except dist.DistNetworkError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = "another program uses that port" if "EADDRINUSE" in str(error) else str(error).splitlines()[0]
        raise ConfigError(
            f"the ranks cannot meet at {address}: {reason}; choose a free one with --master_port."
        ) from None
    WATCH.start(rank(), world_size(), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))


def _allow_two_models_under_hpz() -> None:
    """Lets ZeRO-3's hpZ groups be asked for twice.

    DeepSpeed (0.19) makes them anew for every model that is loaded, and trips over the second: decoder and encoder.
    """
    from deepspeed.utils import groups

    make = groups._create_zero_param_parallel_group
    made: dict[int, bool] = {}

    def make_once(group_size: int) -> None:
        if group_size not in made:
            make(group_size)
            made[group_size] = True

    groups._create_zero_param_parallel_group = make_once


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Ranks on this machine, as DeepSpeed's launcher or torchrun says; all of them if neither does."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_rank_zero() -> bool:
    return rank() == 0


def device() -> torch.device:
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def device_bytes() -> float:
    """Memory that this rank computes in: its GPU's, or without one its share of the machine's.

    Of a GPU without what others have taken. A container, or a job of Slurm's, counts as a machine of its own.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return min([psutil.virtual_memory().total, *memory_limits(Path("/proc/self/cgroup"))]) / local_world_size()


def memory_limits(groups: Path, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Limits of the control groups that a process is in, and of those around them, in bytes.

    groups: /proc/PID/cgroup, a line `number:controllers:/path` each; without controllers it is version 2.
    """
    found: list[int] = []
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = root / "memory" if controllers else root
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            parts = Path(path).parts[1:]
            for depth in range(len(parts) + 1):
                with contextlib.suppress(OSError, ValueError):  # not to be seen from inside, or `max`
                    found.append(int(folder.joinpath(*parts[:depth], name).read_text()))
    return found


def sum_over_ranks(*values: float) -> list[float]:
    """Sums each value over all ranks (float64, one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def max_over_ranks(*values: float) -> list[float]:
    """The largest of each value over all ranks (float64, one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


def add_to_rank_zero(tensor: torch.Tensor) -> None:
    """Sums a tensor over all ranks in place, on rank 0; what the others then hold is undefined. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.reduce(tensor, dst=0)


def memory_gib() -> dict[str, float]:
    """Peak memory since the start, of the rank that needs most: of its process and of its accelerator. A collective."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    accelerator = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    names = ("memory_gib/host", "memory_gib/accelerator") if accelerator else ("memory_gib/host",)
    return dict(zip(names, max_over_ranks(host, accelerator), strict=False))


def barrier() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def shutdown() -> None:
    WATCH.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


_turns = itertools.count()


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Rank 0 runs the block before the others, for caches that one process writes and all read.

    The others ask the store now and then instead of waiting in a collective, whose time limit long work would exceed;
    if rank 0 fails, the watch (failure.py) ends them.
    """
    if world_size() == 1 or not dist.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, key = _get_default_store(), f"zero_ds/turn/{next(_turns)}"
    while not is_rank_zero() and not store.check([key]):
        time.sleep(0.1)
    try:
        yield
    finally:
        if is_rank_zero():
            store.set(key, "done")


class StopSignal:
    """Set by SIGTERM, SIGINT or SIGUSR1, so that the loop can commit and stop between two steps."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
    TWICE = 5.0
    """Seconds after which another signal is another request; a launcher hands one on that a terminal has sent, too."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._at = 0.0
        for name in self.NAMES:
            signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._at > self.TWICE:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        if not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
