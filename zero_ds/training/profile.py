"""Measures where the time of a step goes, with torch's profiler over a few steps of rank 0.

The phases of a step follow each other, so their times add up to the step's. Kinds of operations are sorted by the time
that each spent in itself: on the device where there is one, otherwise on the cores, whose threads run side by side.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from zero_ds.config.schema import ProfileConfig
from zero_ds.runtime import distributed
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)

FOLDER = "profile"
TRACE, TABLE = "trace.json.gz", "profile.json"

PHASES = ("data", "inputs", "forward", "backward", "update")
"""Parts of a step that are marked by `phase`; the rest of the step is called other."""

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "flash", "sdpa", "fmha"),
    "matrix products": ("mm", "linear", "matmul", "conv", "gemm", "einsum", "cutlass", "cublas"),
    "communication": ("nccl", "gloo", "c10d", "all_reduce", "allreduce", "all_gather", "allgather", "reduce_scatter"),
    "optimizer": ("adam", "optimizer", "_foreach_"),
    "copies": ("copy", "memcpy", "memset", "_to_copy", "aten::to", "aten::cat", "clone", "zero_", "fill_", "index"),
    "waiting for the device": ("synchronize", "local_scalar_dense", "aten::item"),
}
"""Kinds of operations by parts of their names, of which the first that is found counts; all others are elementwise."""
ELEMENTWISE = "norms, activations, elementwise"


def phase(name: str) -> record_function:
    """Marks a phase of the step in the profile; costs a microsecond where nothing is recorded."""
    assert name in PHASES
    return record_function(f"zero_ds::{name}")


@dataclass(frozen=True)
class Profile:
    """Seconds of a step by phase and by kind of operation; the content of profile.json."""

    steps: int
    seconds: float
    """Seconds of a step by the clock."""
    phases: dict[str, float]
    """Seconds by phase, `other` included."""
    kinds: dict[str, float]
    """Seconds by kind of operation; on several threads or streams at once, together more than a step's."""
    device: str
    """Device on which kinds were measured: cpu or cuda."""

    def table(self) -> str:
        """Returns both lists as text, the longest first."""
        lines = [f"a step takes {self.seconds:.3f} s (mean of {self.steps}, with the profiler on)", ""]
        lines += _rows("phase of a step", self.phases, self.seconds)
        lines += ["", *_rows(f"kind of operation ({self.device})", self.kinds, sum(self.kinds.values()))]
        return "\n".join(lines)


def read_profile(out: Path) -> Profile:
    """Reads the profile that a run has left in its folder.

    Raises:
        OSError: there is none.
    """
    return Profile(**json.loads((out / FOLDER / TABLE).read_text()))


def _rows(title: str, seconds: dict[str, float], whole: float) -> list[str]:
    rows = [f"{title:<34} {'ms a step':>10} {'share':>7}"]
    for name, value in sorted(seconds.items(), key=lambda entry: -entry[1]):
        rows.append(f"{name:<34} {value * 1000:>10.1f} {value / whole if whole else 0.0:>7.1%}")
    return rows


class Profiler:
    """Records some steps of rank 0 and writes RUN/profile; does nothing on other ranks, or where none is asked for.

    `with Profiler(...) as profiler: for each step: ...; profiler.step()`
    """

    def __init__(self, config: ProfileConfig, out: Path) -> None:
        self.config = config
        self.folder = out / FOLDER
        self._done = 0
        self._torch: profile | None = None
        if config.steps and distributed.is_rank_zero():
            activities = [ProfilerActivity.CPU]
            if distributed.device().type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            plan = schedule(wait=config.skip - 1, warmup=1, active=config.steps, repeat=1)
            self._torch = profile(activities=activities, schedule=plan, on_trace_ready=self._write)

    def __enter__(self) -> Profiler:
        if self._torch is not None:
            self._torch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._torch is not None and self._done < self.config.skip + self.config.steps:
            logger.warning("no profile, because the run ended before step %d", self.config.skip + self.config.steps)
            self._torch.on_trace_ready = None
            self._torch.stop()

    def step(self) -> bool:
        """Ends a step of the profile; returns whether the run should end here, on every rank."""
        if not self.config.steps:
            return False
        self._done += 1
        if self._torch is not None and self._done <= self.config.skip + self.config.steps:
            self._torch.step()
            if self._done == self.config.skip + self.config.steps:
                self._torch.stop()
        return self.config.stop and self._done == self.config.skip + self.config.steps

    def _write(self, recorded: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self.folder / TRACE))
        result = summarize(recorded.key_averages(), self.config.steps)
        write_atomically(self.folder / TABLE, json.dumps(vars(result), indent=2) + "\n")
        logger.info("profile of %d steps in %s; open %s in chrome://tracing", self.config.steps, self.folder, TRACE)
        for line in result.table().splitlines():
            logger.info("%s", line)


def summarize(events: Iterable[Any], steps: int) -> Profile:
    """Sorts the averaged events of torch's profiler (`key_averages`) into phases and kinds."""
    events = list(events)
    on_device = any(event.device_type != DeviceType.CPU for event in events)
    phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
    kinds: dict[str, float] = defaultdict(float)
    seconds = 0.0
    for event in events:
        if event.key.startswith("ProfilerStep"):
            if event.device_type == DeviceType.CPU:
                seconds += event.cpu_time_total / 1e6 / steps
        elif event.key.startswith("zero_ds::"):
            if event.device_type == DeviceType.CPU:
                phases[event.key.removeprefix("zero_ds::")] += event.cpu_time_total / 1e6 / steps
        elif on_device and event.device_type != DeviceType.CPU:
            kinds[kind_of(event.key)] += event.self_device_time_total / 1e6 / steps
        elif not on_device:
            kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e6 / steps
    phases["other"] = max(0.0, seconds - sum(phases.values()))
    return Profile(steps, seconds, phases, dict(kinds), "cuda" if on_device else "cpu")


def kind_of(operation: str) -> str:
    """Returns the kind of an operation or kernel by its name."""
    name = operation.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), ELEMENTWISE)
