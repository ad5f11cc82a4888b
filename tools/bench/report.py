"""Functions that all benchmarks share: a description of the machine, medians, tables and JSON files."""

from __future__ import annotations

import functools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

GIB = 2**30
LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate", "safetensors")


def machine(*, limits: bool = True) -> dict[str, Any]:
    """Returns processor, memory, devices and versions; with `limits`, also rates, measured in about three seconds."""
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name in LIBRARIES if (version := _version(name))},
        "load": os.getloadavg()[0],
    }
    return {**found, "limits": measured_limits()} if limits else found


@functools.cache
def measured_limits(folder: Path | None = None) -> dict[str, float]:
    """Measures matrix products of one thread, and memory and disk rates: the limits of a benchmark's figures."""
    import torch

    from zero_ds.training.planning.flops import peak_flops

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        limits = {
            f"{name}_gflops": peak_flops(device, dtype) / 1e9
            for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
        }
        source = torch.ones(64 << 20, device=device)
        copy = torch.empty_like(source)
        limits["memory_gb_per_s"] = 2 * source.nbytes / 1e9 / min(seconds_of(lambda: copy.copy_(source)) for _ in "123")
    finally:
        torch.set_num_threads(threads)
    with tempfile.TemporaryFile(dir=folder) as file:
        content = bytes(64 << 20)

        def write() -> None:
            for _ in range(4):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())

        limits["disk_write_gb_per_s"] = 4 * len(content) / 1e9 / seconds_of(write)
    return limits


def seconds_of(work: Any) -> float:
    """Returns the seconds that a call takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident(field: str = "VmHWM") -> float:
    """Returns the resident GiB of this process: `VmHWM`, the peak since its start, or `VmRSS`, the current size."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 2**20
    raise OSError(f"/proc/self/status has no {field}")


def median(values: Sequence[float]) -> float:
    """Returns the median of at least one value."""
    return statistics.median(values)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns `median (least to most)` as text."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Returns a Markdown table with aligned columns; floats have three significant digits."""
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write(out: Path | None, found: dict[str, Any], *, limits: bool = True) -> None:
    """Writes results as JSON, with a description of the machine. Does nothing if `out` is None."""
    if out is not None:
        content = {"machine": machine(limits=limits), **found}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
