"""Starts groups of ranks for tests: processes that use gloo on the CPU, with a time limit that ends all of them.

Ranks come from a fork server that has imported the heavy libraries once, so that a group starts in well under a second.
Output of a rank goes into a file, and is shown if the rank fails.
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
"""Default time limit of a group of ranks in seconds of pace 1; a quiet machine needs a tenth of it."""
_STACKS = signal.SIGUSR2
"""Signal that makes a rank write the stacks of its threads."""


class RankError(AssertionError):
    """Raised if a rank failed, died or did not finish; the message contains the first traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = TIMEOUT) -> list[Any]:
    """Runs `function(*arguments)` in `world_size` ranks and returns what each of them returned.

    `function` must be importable (a function at the top level of a test module); arguments and results are pickled. The
    ranks have not joined a process group; `zero_ds.runtime.distributed.initialize` does that, as in a real run.
    timeout: seconds of pace 1 (pace.py) after all ranks have been started.

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
    """Waits for all ranks; returns a description of the first failure, or None."""
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
                # the others are probably in a collective with the dead rank; give them a moment to report that
                connection.wait([other.sentinel for other in alive], timeout=2)
                return f"{rank.name} ended with exit code {rank.exitcode}"
    return None


def _ask_for_stacks(ranks: list[BaseProcess], folder: Path) -> None:
    """Makes ranks write their stacks, and waits until they have, but not for long."""
    written = []
    for rank in ranks:
        assert rank.pid is not None
        os.kill(rank.pid, _STACKS)
        written.append(folder / f"{rank.name.removeprefix('rank ')}.stacks")
    patience = time.monotonic() + scaled(10)
    while time.monotonic() < patience and not all(path.is_file() and path.stat().st_size for path in written):
        time.sleep(0.05)
    time.sleep(0.1)  # lets the last of them be written completely


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
    gc.freeze()  # keeps imported objects out of the garbage collection that DeepSpeed starts for every engine
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
            # rank 0 holds the store, and ranks fail without it; if another rank fails, the helper ends this one
            others = [files.with_name(f"{r}.result") for r in range(int(environment["WORLD_SIZE"]))]
            while not all(other.exists() for other in others):
                time.sleep(0.02)
        except BaseException:
            Path(f"{files}.error").write_text(traceback.format_exc())
            status = 1
        faulthandler.unregister(_STACKS)
    sys.stdout.flush()
    sys.stderr.flush()
    # without clean-up of process groups, which could only hang here
    os._exit(status)


def alive(pid: int) -> bool:
    """Returns whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def whole_state(engine: Any, parameter: Any, key: str) -> Any:
    """Returns one whole tensor of the optimizer's state, on every rank. Every rank must call it."""
    import torch
    import torch.distributed as dist

    from zero_ds.runtime.zero3 import parameter_shape
    from zero_ds.training.checkpoint.exchange import exchanged
    from zero_ds.training.checkpoint.shares import Shares

    named = {"": parameter}
    whole = torch.zeros(parameter_shape(parameter).numel())
    for piece in exchanged(engine.state, named, Shares.of_rank_zero(named)):
        if piece.cut.key == key:
            whole[piece.cut.start : piece.cut.stop] = piece.values
    dist.broadcast(whole, 0)
    return whole.view(parameter_shape(parameter))


def train_all(configs: list[Any]) -> list[str]:
    """Trains one run after another; returns, for each, the name of its last checkpoint or its error message."""
    from zero_ds.training.train import train

    ends = []
    for config in configs:
        try:
            ends.append(train(config).name)
        except (ValueError, FloatingPointError, SystemExit) as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends
