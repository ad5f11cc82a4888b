"""Facts about this process and its machine, found without loading torch where that is possible.

Commands that compute nothing (`zero-ds train --dry-run`, `zero-ds recipes`) answer in a fraction of a second this way;
importing torch alone takes longer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_OTHER_DEVICES = ("/dev/kfd", "/dev/dxg")
"""Device files through which torch may offer CUDA without NVIDIA's Linux driver: ROCm's, and that of WSL."""


DEVICES = "ZERO_DS_DEVICES"
"""Variable in which launch/train.sh names the GPUs of a run on one machine, in the order of the ranks."""


def take_devices() -> None:
    """Makes the devices in ZERO_DS_DEVICES the visible ones, in place of those that DeepSpeed's launcher numbers.

    To be called before anything uses CUDA.
    """
    if devices := os.environ.pop(DEVICES, ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices


def launched_ranks() -> int:
    """Returns the number of ranks that the launcher started; 1 for a process that was started alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_ranks_here() -> int:
    """Returns the number of ranks on this machine, as DeepSpeed's launcher or torchrun says; else all ranks."""
    return int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or launched_ranks())


def has_nvidia_driver() -> bool:
    """Returns whether NVIDIA's driver is loaded on this machine."""
    return Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists()


def has_cuda() -> bool:
    """Returns what `torch.cuda.is_available()` returns, without loading torch on a machine that has no such device."""
    possible = has_nvidia_driver() or any(Path(device).exists() for device in _OTHER_DEVICES)
    if sys.platform == "linux" and not possible:
        return False
    import torch

    return torch.cuda.is_available()
