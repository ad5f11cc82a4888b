"""The state of runs as their folders show it: steps, loss, time left, last checkpoint, reason of the last failure.

Only small files are read, so a run can be looked at while it trains, from any machine that sees its folder. Loads no
torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from zero_ds.runtime import failure, lock
from zero_ds.runtime.errors import ConfigError

State = Literal["running", "finished", "failed", "stopped", "not started"]

TAIL = 256 << 10
"""Bytes at the end of metrics.jsonl that are read."""
RECENT = 50
"""Number of last steps whose median duration tells the time left."""
DEPTH = 3
"""Levels of folders below a given one in which runs are looked for."""


@dataclass(frozen=True)
class Status:
    """State of a run, as far as it is known."""

    run: str
    """Folder of the run."""
    state: State
    step: int = 0
    """Last step that was recorded."""
    steps: int | None = None
    """Number of steps of the whole run; None if it is not recorded."""
    loss: float | None = None
    """Training loss of the last step."""
    validation_loss: float | None = None
    """Held-out loss that was measured last."""
    seconds_left: float | None = None
    """Estimated seconds until the last step, if the run is going on."""
    checkpoint: str | None = None
    """Name of the folder from which the run would resume."""
    checkpoint_age: float | None = None
    """Seconds since that checkpoint was published, by the clock of its file system and this machine's."""
    best: str | None = None
    """Name of the checkpoint with the lowest held-out loss."""
    reason: str | None = None
    """Why the last attempt failed."""

    def to_json(self) -> dict[str, Any]:
        """Returns the entries that are known, for a machine to read."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def statuses(folders: Sequence[Path]) -> list[Status]:
    """Returns the status of each run in the given folders or below them, in the order of their names.

    Raises:
        ConfigError: a folder is missing, or holds no run.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; name the folder of a run, or one above it.")
        runs = list(_runs(folder, DEPTH))
        if not runs:
            raise ConfigError(f"no run is in {folder}; a run's folder is what out=FOLDER names when it is started.")
        found.update(dict.fromkeys(runs))
    return [status(run) for run in found]


def status(run: Path) -> Status:
    """Returns the status of the run in a folder."""
    records = recorded_steps(run, TAIL)
    last = records[-1] if records else {}
    step, steps = int(last.get("step", 0)), last.get("steps")
    reason = failure.read(run)
    state = _state(run, step, steps, reason)
    checkpoint = _latest(run)
    return Status(
        run=str(run),
        state=state,
        step=step,
        steps=None if steps is None else int(steps),
        loss=last.get("loss"),
        validation_loss=next((one["validation/loss"] for one in reversed(records) if "validation/loss" in one), None),
        seconds_left=_seconds_left(records, step, steps) if state == "running" else None,
        checkpoint=None if checkpoint is None else checkpoint.name,
        checkpoint_age=None if checkpoint is None else max(0.0, time.time() - checkpoint.stat().st_mtime),
        best=_best(run),
        reason=reason,
    )


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    """Yields the run folders at and below a folder, by name. A run's own folders hold no other runs."""
    if (folder / "config.yaml").is_file() and (folder / "deepspeed.json").is_file():
        yield folder
    elif depth:
        with contextlib.suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
                    yield from _runs(path, depth - 1)


def _state(run: Path, step: int, steps: Any, reason: str | None) -> State:
    if lock.seems_held(run):
        return "running"
    if steps is not None and step >= steps and _latest(run) is not None:
        return "finished"
    if reason is not None:
        return "failed"
    return "stopped" if step else "not started"


def recorded_steps(run: Path, tail: int | None = None) -> list[dict[str, float]]:
    """Returns the records in a run's metrics.jsonl, one for each step; an empty list without that file.

    Lines that are cut off, and values that are not numbers, are left out. tail: bytes at the end to read; None: all.
    """
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            if tail is not None:
                file.seek(max(0, file.seek(0, os.SEEK_END) - tail))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append({name: value for name, value in record.items() if isinstance(value, int | float)})
    return records


def _seconds_left(records: Sequence[dict[str, float]], step: int, steps: Any) -> float | None:
    durations = [record["seconds"] for record in records[-RECENT:] if "seconds" in record]
    return None if steps is None or not durations else statistics.median(durations) * (steps - step)


def _latest(run: Path) -> Path | None:
    """Returns the folder that `latest` names, if it is there."""
    with contextlib.suppress(OSError):
        name = (run / "latest").read_text(encoding="utf-8", errors="replace").strip()
        if name and Path(name).name == name and (run / name / "manifest.json").is_file():
            return run / name
    return None


def _best(run: Path) -> str | None:
    with contextlib.suppress(OSError):
        return (run / "best").readlink().name
    return None
