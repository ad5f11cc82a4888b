"""Ranks, collectives and stop signals. No other file sets up torch.distributed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from zero_ds.runtime import meeting
from zero_ds.runtime.environment import accelerator, has_cuda
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.failure import WATCH, attempt
from zero_ds.runtime.ports import free_port
from zero_ds.runtime.zero3 import allow_two_models_under_hpz

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)
"""Time that a collective waits for a rank before the job ends. While the others wait, no rank may do longer work."""


def initialize() -> None:
    """Joins the process group of the launcher (DeepSpeed's or torchrun's); a single process becomes rank 0 of 1.

    Raises:
        ConfigError: DS_ACCELERATOR names no device here.
        MeetingError: the ranks cannot meet at the launcher's address and port, or one of them does not come.
    """
    if dist.is_initialized():
        return
    os.environ.setdefault("DS_ACCELERATOR", accelerator())
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    # they come from DeepSpeed's own calls, which a user cannot change
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    from transformers.utils.logging import disable_progress_bar

    if int(os.environ["RANK"]):
        disable_progress_bar()  # one progress bar per job is enough

    if not has_cuda():
        # DeepSpeed would now compile a shared-memory kernel, which takes minutes and a C++ compiler that not everybody
        # has; CPU ranks communicate through gloo instead
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        if local_rank() >= torch.cuda.device_count():
            raise ConfigError(
                f"rank {os.environ['RANK']} wants GPU {local_rank()} of its machine, and {torch.cuda.device_count()} "
                "can be seen; start fewer ranks, or let every rank see all GPUs (CUDA_VISIBLE_DEVICES)."
            )
        torch.cuda.set_device(device())
    allow_two_models_under_hpz()
    backend = "nccl" if has_cuda() else "gloo"
    number, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    met = meeting.meet(number, count, host, port, accelerator())
    WATCH.start(number, count, host, port)  # first, because joining waits for a rank that dies now
    try:
        deepspeed.init_distributed(dist_backend=backend, timeout=TIMEOUT, verbose=False)
    except dist.DistNetworkError as error:
        raise meeting.no_server(host, port, error) from None
    del met  # it kept the server; now the process group does


def rank() -> int:
    """Returns this rank's number in the job."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Returns this rank's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Returns the number of ranks of the job."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Returns the number of ranks on this machine as told by DeepSpeed's launcher or torchrun, or else all ranks."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or world_size())


def is_rank_zero() -> bool:
    """Returns whether this is rank 0."""
    return rank() == 0


def device() -> torch.device:
    """Returns the device that this rank computes on, as DeepSpeed does: its GPU, or the CPU."""
    return torch.device("cuda", local_rank()) if has_cuda() else torch.device("cpu")


def device_bytes() -> float:
    """Returns the bytes of memory that this rank can use: of its GPU, or without a GPU its share of the machine's.

    Memory that other processes have taken on the GPU is not counted. The memory limit of a container or a Slurm job
    counts as the machine's memory.
    """
    if has_cuda():
        return float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    return min([psutil.virtual_memory().total, *memory_limits(Path("/proc/self/cgroup"))]) / local_world_size()


def free_host_bytes() -> float:
    """Returns the bytes of host memory that this rank can still take: its share of what its machine has free.

    In a container or a Slurm job, that is at most the room below the memory limit; cached files do not fill it.
    """
    rooms = [limit - used for limit, used in memory_use(Path("/proc/self/cgroup"))]
    return max(0.0, min([psutil.virtual_memory().available, *rooms]) / local_world_size())


def memory_limits(groups: Path, root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Returns the memory limits, in bytes, of the control groups that a process is in and of the groups around them.

    groups: /proc/PID/cgroup, with a line `number:controllers:/path` per group; version 2 lists no controllers.
    """
    return [limit for limit, _ in memory_use(groups, root)]


def memory_use(groups: Path, root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Returns limit and used bytes, without cached files, of the control groups around a process that have a limit.

    groups: as in `memory_limits`. Where the use is not known, it is 0.
    """
    found: list[tuple[int, int]] = []
    with contextlib.suppress(OSError):
        for line in groups.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            folder = root / "memory" if controllers else root
            limit = "memory.limit_in_bytes" if controllers else "memory.max"
            parts = Path(path).parts[1:]
            for depth in range(len(parts) + 1):
                group = folder.joinpath(*parts[:depth])
                with contextlib.suppress(OSError, ValueError):  # not visible from inside a container, or `max`
                    found.append((int((group / limit).read_text()), _used(group)))
    return found


def _used(group: Path) -> int:
    """Returns the bytes of memory in use by a control group, without cached files."""
    try:
        current = next(file for name in ("memory.current", "memory.usage_in_bytes") if (file := group / name).is_file())
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))
        return max(0, int(current.read_text()) - cached)
    except (OSError, ValueError, StopIteration):
        return 0


def sum_over_ranks(*values: float) -> list[float]:
    """Returns the sum of each value over all ranks (float64, one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def sum_and_compare(values: Sequence[float], mark: int) -> tuple[list[float], bool]:
    """Sums each value over all ranks and returns whether all ranks passed the same mark, in one collective.

    mark: a number from 0 to 2**64 - 1. n numbers are equal exactly if n times the sum of their squares is the square of
    their sum, and sums are all that this collective has. The mark is split into digits of 16 bits, whose sums are exact
    in float64 on up to 2**21 ranks.
    """
    assert 0 <= mark < 1 << 64, f"{mark} does not fit into 64 bits"
    digits = [mark >> shift & 0xFFFF for shift in (0, 16, 32, 48)]
    squares = [digit**2 for digit in digits]
    summed = sum_over_ranks(*values, *digits, *squares)
    first, last = len(values), len(values) + len(digits)
    pairs = zip(summed[first:last], summed[last:], strict=True)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    return summed[:first], all(ranks * int(square) == int(total) ** 2 for total, square in pairs)


def same_on_all_ranks(mark: int) -> bool:
    """Returns whether all ranks passed the same number, from 0 to 2**64 - 1. A collective."""
    return sum_and_compare((), mark)[1]


def sum_integers(values: Sequence[int]) -> list[int]:
    """Returns the sum of each value over all ranks, modulo 2**64 as a signed integer. A collective."""
    return _reduced_integers(values, dist.ReduceOp.SUM)


def max_integers(values: Sequence[int]) -> list[int]:
    """Returns the largest of each value, a signed integer of 64 bits, over all ranks. A collective."""
    return _reduced_integers(values, dist.ReduceOp.MAX)


def _reduced_integers(values: Sequence[int], operation: dist.ReduceOp.RedOpType) -> list[int]:
    tensor = torch.tensor(values, dtype=torch.int64, device=device())
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=operation)
    return [int(value) for value in tensor.tolist()]


def max_over_ranks(*values: float) -> list[float]:
    """Returns the largest of each value over all ranks (float64, one collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [float(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return [float(value) for value in tensor.tolist()]


def integers_of_all_ranks(values: Sequence[int]) -> torch.Tensor:
    """Returns the values of every rank, of which each passes equally many: (ranks, values), int64. A collective."""
    mine = torch.tensor(values, dtype=torch.int64, device=device())
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine.cpu()[None]
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return torch.stack(found).cpu()


def exchange(sent: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Sends a float32 tensor to every rank and returns those that arrive, one after the other. A collective.

    Bits stay as they are. sent: a flat tensor for rank 0, 1, ..., on this rank's device. counts: number of elements
    that come from rank 0, 1, ...; empty if nothing comes from any.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return sent[0]
    outgoing, sizes = torch.cat(list(sent)), [len(tensor) for tensor in sent]
    coming = list(counts) or [0] * len(sizes)
    got = torch.empty(sum(coming), device=outgoing.device)
    dist.all_to_all_single(got.view(torch.int32), outgoing.view(torch.int32), coming, sizes)
    return got


def memory_gib() -> dict[str, float]:
    """Returns the peak memory since the start, in GiB, of the process and accelerator that need most. A collective."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    accelerator = torch.cuda.max_memory_allocated() / 2**30 if has_cuda() else 0.0
    names = ("memory_gib/host", "memory_gib/accelerator") if accelerator else ("memory_gib/host",)
    return dict(zip(names, max_over_ranks(host, accelerator), strict=False))


def barrier() -> None:
    """Waits until all ranks have called this. A collective."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def shutdown() -> None:
    """Leaves the process group."""
    WATCH.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


_turns = itertools.count()


def wait_for_all() -> None:
    """Waits until all ranks have called this, for as long as it takes. A collective.

    Ranks poll the store instead of waiting in a collective, which has a time limit. If a rank fails before it gets
    here, the watch (failure.py) ends the others.
    """
    if world_size() == 1 or not dist.is_initialized():
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, key = _get_default_store(), f"zero_ds/all/{attempt()}/{next(_turns)}"
    store.add(key, 1)
    _poll(lambda: store.add(key, 0) >= world_size())


def _poll(is_ready: Callable[[], bool]) -> None:
    """Waits until a question to the store is answered with yes: soon in short waits, and rarely asked in long ones."""
    pause = 0.002
    while not is_ready():
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


@contextlib.contextmanager
def rank_zero_first() -> Iterator[None]:
    """Runs the block on rank 0 before the other ranks, for caches that one process writes and all read.

    The others poll the store instead of waiting in a collective, because long work would exceed a collective's time
    limit. If rank 0 fails, the watch (failure.py) ends them.
    """
    if world_size() == 1 or not dist.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, key = _get_default_store(), f"zero_ds/turn/{attempt()}/{next(_turns)}"
    if not is_rank_zero():
        _poll(lambda: store.check([key]))
    try:
        yield
    finally:
        if is_rank_zero():
            store.set(key, "done")


@contextlib.contextmanager
def one_rank_at_a_time() -> Iterator[None]:
    """Runs the block on the ranks of each machine one after another, for work that needs much memory or disk on each.

    All ranks leave it together, because together their turns may take longer than a collective waits. Ranks that wait
    poll the store, as in `rank_zero_first`. A rank that fails lets the next one go on, and the watch ends them all.
    """
    if world_size() == 1 or not dist.is_initialized():
        yield
        return
    from torch.distributed.distributed_c10d import _get_default_store

    store, turn = _get_default_store(), f"zero_ds/machine/{attempt()}/{next(_turns)}"
    if local_rank():
        _poll(lambda: store.check([f"{turn}/{rank() - 1}"]))
    try:
        yield
    finally:
        store.set(f"{turn}/{rank()}", "done")
    wait_for_all()


class StopSignal:
    """Flag that SIGTERM, SIGINT or SIGUSR1 sets, so that the loop can save a checkpoint and stop between two steps."""

    NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
    TWICE = 5.0
    """Seconds after which a second signal counts as a second request. A terminal sends its signal to the ranks and to
    the launcher, which passes it on, so two may come at once."""

    def __init__(self) -> None:
        self.received: str | None = None  # name of the signal
        self._at = 0.0
        for name in self.NAMES:
            signal.signal(getattr(signal, name), self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received and time.monotonic() - self._at > self.TWICE:
            raise KeyboardInterrupt  # the second request: do not wait for the step
        if not self.received:
            self.received, self._at = signal.Signals(number).name, time.monotonic()
