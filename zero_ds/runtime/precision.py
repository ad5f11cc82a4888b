"""The number format that a device computes fast in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zero_ds.runtime.environment import has_cuda

if TYPE_CHECKING:
    import torch

CPU_FLAGS = ("avx512_bf16", "amx_tile")
"""Flags in /proc/cpuinfo of the x86 extensions that multiply bfloat16, each of which is enough."""


def bf16_is_fast() -> bool:
    """Returns whether this machine's device multiplies bfloat16 fast: GPUs since Ampere, CPUs with AVX512-BF16 or AMX.

    Loads torch only where a GPU may be present, or where /proc/cpuinfo does not exist.
    """
    if has_cuda():
        import torch

        return torch.cuda.is_bf16_supported()
    flags = _cpu_flags(Path("/proc/cpuinfo"))
    if flags is not None:
        return any(flag in flags for flag in CPU_FLAGS)
    import torch

    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def _cpu_flags(path: Path) -> set[str] | None:
    """Returns the flags of the first x86 core in a file like /proc/cpuinfo; None if no line lists them."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return set(value.split())
    return None


def fast_dtype() -> torch.dtype:
    """Returns bfloat16 where the device multiplies it fast, float32 elsewhere."""
    import torch

    return torch.bfloat16 if bf16_is_fast() else torch.float32
