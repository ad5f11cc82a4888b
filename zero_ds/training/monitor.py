"""Records each step of a run: in TensorBoard through DeepSpeed's monitor, in metrics.jsonl, and on the console."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zero_ds.runtime import distributed
from zero_ds.runtime.console import duration
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)


class Clock:
    """Elapsed and remaining time, from the steps of this process."""

    def __init__(self, first: int, total: int) -> None:
        self.first, self.total = first, total
        self.started = time.monotonic()

    def line(self, step: int) -> str:
        """Returns a line with step, elapsed and remaining time."""
        elapsed = time.monotonic() - self.started
        done = step - self.first
        left = elapsed / done * (self.total - step) if done else 0.0
        return f"step {step}/{self.total}  {duration(elapsed)} < {duration(left)} left"


class Monitor:
    """Writes the scalars of each step. Only rank 0 writes; every rank may call."""

    def __init__(self, out: Path, engine_monitor: Any, log_every: int, first: int, total: int) -> None:
        self.engine_monitor = engine_monitor
        self.log_every = log_every
        self.clock = Clock(first, total)
        self.path = out / "metrics.jsonl"
        self._file = None
        if distributed.is_rank_zero():
            for path in (self.path, self.path.with_name("answers.jsonl")):
                _truncate(path, first)
            self._file = self.path.open("a", encoding="utf-8")
            if first:
                _forget_events(self._writer(), first + 1)

    def shows(self, step: int) -> bool:
        """Returns whether a step, counted from 1, gets a line on the console; the same on every rank."""
        return step % self.log_every == 0 or step in (1, self.clock.total)

    def step(self, step: int, samples: int, scalars: dict[str, float]) -> None:
        """Records one optimizer step, counted from 1; `samples` is the number of samples so far."""
        if self._file is None:
            return
        counts = {"step": step, "steps": self.clock.total, "samples": samples}
        record = {**counts, **{name: float(value) for name, value in scalars.items()}}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        events = []
        for name, value in scalars.items():
            events.append((name if name.startswith("validation/") else f"train/{name}", value, step))
        if self.engine_monitor is not None and self.engine_monitor.enabled:
            self.engine_monitor.write_events(events)
        if self.shows(step):
            rates = [name for name in scalars if name.startswith("learning_rate/")]
            names = ("loss", *rates, "grad_norm", "tokens_per_second")
            names += tuple(name for name in scalars if name == "validation/loss")
            shown = "  ".join(f"{name} {scalars[name]:.4g}" for name in names)
            logger.info("%s  %s", self.clock.line(step), shown)

    def answers(self, step: int, records: list[dict[str, Any]], figure: Callable[[], Any]) -> None:
        """Records the model's answers after a step: one line each in answers.jsonl, and a figure in TensorBoard."""
        if self._file is None:
            return
        with self.path.with_name("answers.jsonl").open("a", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")
        if (writer := self._writer()) is not None:
            writer.add_figure("answers", figure(), step)

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None:
            self._file.close()
        if (writer := self._writer()) is not None:
            writer.close()

    def _writer(self) -> Any:
        """Returns DeepSpeed's TensorBoard writer; None on ranks other than 0."""
        return getattr(getattr(self.engine_monitor, "tb_monitor", None), "summary_writer", None)


def _forget_events(writer: Any, step: int) -> None:
    """Tells readers of the event files to forget the steps from `step` on, because they come again."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    if writer is not None:
        start = SessionLog(status=SessionLog.SessionStatus.Value("START"))
        writer.file_writer.add_event(Event(session_log=start), step)


def _truncate(path: Path, steps: int) -> None:
    """Deletes the records of later steps than `steps`, which a resumed run repeats because no checkpoint has them."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= steps:
                kept.append(line)
        except (ValueError, KeyError):
            continue  # a line cut off by a kill
    write_atomically(path, "".join(line + "\n" for line in kept))


def read_metrics(run: Path) -> list[dict[str, float]]:
    """Returns the records in a run's metrics.jsonl; an empty list without that file.

    A line that a kill has cut off, or that is being written, is left out.
    """
    path = run / "metrics.jsonl"
    records = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append(record)
    return records
