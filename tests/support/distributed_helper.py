"""The one way in which tests start processes: ranks over gloo on the CPU, with a time limit that ends all of them.

Children come from a fork server that has imported the heavy libraries once, so that a group of ranks starts in well
under a second. What a rank prints goes into a file and is shown when it fails.
"""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
from pace import scaled

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "zero_ds.training.train",
        "zero_ds.grafting.load",
        "deepspeed",
        "torch.utils.tensorboard",
        "datasets",
        "transformers.integrations.deepspeed",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.clip.modeling_clip",
        "transformers.models.clip.image_processing_clip",
    ]
)

TIMEOUT = 240.0
"""Seconds of pace 1 that a group of ranks may take unless a test says otherwise; a quiet machine needs a tenth."""
_STACKS = signal.SIGUSR2
"""Makes a rank write its threads' stacks."""


class RankError(AssertionError):
    """A rank failed, died or did not finish; the message holds the first traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Runs `function(*arguments)` in `world_size` ranks and returns what each of them returned.

    `function` must be importable (a function of a test module's top level); arguments and results are pickled. The
    process group is not joined yet: `zero_ds.distributed.initialize` does that, as in a real run. timeout: in seconds
    of pace 1 (pace.py), from when all ranks have been started.

    Raises:
        RankError: a rank raised, died or hung; every other rank has been killed.
    """
    from zero_ds.runtime.ports import free_port

    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = [
            _context.Process(
                target=_rank,
                args=(
                    function,
                    arguments,
                    {**environment, "RANK": str(r), "LOCAL_RANK": str(r)},
                    folder / str(r),
                ),
                name=f"rank {r}",
                daemon=True,
            )
            for r in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        try:
            failed = _wait(ranks, time.monotonic() + scaled(timeout), folder)
        finally:
            for rank in ranks:
                if rank.is_alive():
                    rank.kill()
                rank.join()
        if failed is not None:
            raise RankError(_story(function, failed, folder, world_size))
        return [pickle.loads((folder / f"{r}.result").read_bytes()) for r in range(world_size)]


def _wait(ranks: list[BaseProcess], deadline: float, folder: Path) -> str | None:
    """Waits for all ranks; what went wrong, if anything did."""
    alive = list(ranks)
    while alive:
        ready = connection.wait([rank.sentinel for rank in alive], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            _ask_for_stacks(alive, folder)
            return f"{', '.join(rank.name for rank in alive)} did not finish in time"
        for rank in [rank for rank in alive if rank.sentinel in ready]:
            rank.join()
            alive.remove(rank)
            if rank.exitcode != 0:
                # the others are probably in a collective with the dead one; let them say so, but not for long
                connection.wait([other.sentinel for other in alive], timeout=2)
                return f"{rank.name} ended with exit code {rank.exitcode}"
    return None


def _ask_for_stacks(ranks: list[BaseProcess], folder: Path) -> None:
    """Waits until all of these have written theirs, but not for long."""
    written = []
    for rank in ranks:
        assert rank.pid is not None
        os.kill(rank.pid, _STACKS)
        written.append(folder / f"{rank.name.removeprefix('rank ')}.stacks")
    patience = time.monotonic() + scaled(10)
    while time.monotonic() < patience and not all(path.is_file() and path.stat().st_size for path in written):
        time.sleep(0.05)
    time.sleep(0.1)  # a stack has several lines


def _story(function: Callable[..., Any], failed: str, folder: Path, world_size: int) -> str:
    lines = [f"{function.__name__}: {failed}"]
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        lines.append(f"first error, of rank {errors[0].stem}:\n{errors[0].read_text()}")
    for r in range(world_size):
        for kind in ("log", "stacks"):
            path = folder / f"{r}.{kind}"
            text = path.read_text(errors="replace").strip() if path.is_file() else ""
            if text:
                lines.append(f"--- {kind} of rank {r}\n{text[-2000:]}")
    return "\n".join(lines)


def _rank(function: Callable[..., Any], arguments: tuple[Any, ...], environment: dict[str, str], files: Path) -> None:
    gc.freeze()  # what the fork server has imported stays; DeepSpeed collects whenever an engine is made
    os.environ.update(environment)
    os.chdir(files.parent)
    log = os.open(f"{files}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with Path(f"{files}.stacks").open("w") as stacks:
        faulthandler.register(_STACKS, file=stacks)
        status = 0
        try:
            result = pickle.dumps(function(*arguments))
            Path(f"{files}.written").write_bytes(result)
            Path(f"{files}.written").rename(f"{files}.result")
            # the store is rank 0's, and a rank without it counts as lost; if another fails, the helper ends this one
            others = [files.with_name(f"{r}.result") for r in range(int(environment["WORLD_SIZE"]))]
            while not all(other.exists() for other in others):
                time.sleep(0.02)
        except BaseException:
            Path(f"{files}.error").write_text(traceback.format_exc())
            status = 1
        faulthandler.unregister(_STACKS)
    sys.stdout.flush()
    sys.stderr.flush()
    # no clean-up of process groups: at this point it could only hang
    os._exit(status)


def alive(pid: int) -> bool:
    """A zombie, which only waits to be collected, is not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def whole_state(engine: Any, parameter: Any, key: str) -> Any:
    """The whole of one tensor of the optimizer's state, on every rank. A collective."""
    import torch.distributed as dist

    whole = engine.state.whole(parameter, key)
    dist.broadcast(whole, 0)
    return whole


def train_all(configs: list[Any]) -> list[str]:
    """Trains each in turn; what a run ended with: the commit's name, or the sentence of its error."""
    from zero_ds.training.train import train

    ends = []
    for config in configs:
        try:
            ends.append(train(config).name)
        except (ValueError, FloatingPointError, SystemExit) as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends
