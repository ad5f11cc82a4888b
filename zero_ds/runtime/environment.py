"""Facts about this process and its machine, found without loading torch where that is possible.

Commands that compute nothing (`zero-ds train --dry-run`, `zero-ds recipes`) answer in a fraction of a second this way;
importing torch alone takes longer.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from zero_ds.runtime.errors import ConfigError

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


def may_have_gpu() -> bool:
    """Returns False where torch cannot find a GPU, because the machine has none of the devices through which it may."""
    possible = has_nvidia_driver() or any(Path(device).exists() for device in _OTHER_DEVICES)
    return possible or sys.platform != "linux"


def accelerator() -> str:
    """Returns the kind of device that this process computes on, `cuda` or `cpu`: the one that DeepSpeed computes on.

    This is the only place that decides it. DeepSpeed takes what DS_ACCELERATOR names, or else looks for devices; once
    it has chosen, that choice counts. torch is not loaded on a machine that cannot have a GPU.

    Raises:
        ConfigError: DS_ACCELERATOR names something else, or a GPU that torch does not see.
    """
    module = sys.modules.get("deepspeed.accelerator.real_accelerator")
    chosen = getattr(module, "ds_accelerator", None)
    named = chosen.device_name() if chosen is not None else os.environ.get("DS_ACCELERATOR")
    if named == "cpu":
        return "cpu"
    if named not in (None, "cuda"):
        raise ConfigError(f"DS_ACCELERATOR={named} is not supported; set it to cuda or cpu, or unset it.")
    if _cuda_is_available():
        return "cuda"
    if named == "cuda":
        raise ConfigError(
            "DS_ACCELERATOR=cuda, but torch sees no GPU; look at nvidia-smi, CUDA_VISIBLE_DEVICES and torch's build, "
            "or set DS_ACCELERATOR=cpu."
        )
    return "cpu"


def has_cuda() -> bool:
    """Returns whether this process computes on a GPU (see `accelerator`)."""
    return accelerator() == "cuda"


def _cuda_is_available() -> bool:
    """Returns what `torch.cuda.is_available()` returns, without loading torch on a machine that cannot have a GPU."""
    if not may_have_gpu():
        return False
    import torch

    return torch.cuda.is_available()
