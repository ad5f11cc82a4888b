"""A decoder larger than its device: layers that lie in host memory or on disk and come when they are run.

The work is done by accelerate's hooks. Only decoder layers, which hold nearly all weights, are moved out; embeddings,
norm, head and the vision encoder stay on the device.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError, did_you_mean

DEVICE_MAPS = ("auto", "cpu", "disk")
RESERVE = 0.2
"""Share of a GPU's free memory that `auto` leaves to caches and activations."""


def check_device_map(device_map: str | None, folder: Path | None) -> None:
    """Raises ConfigError for a map that is none, or a folder that does not go with it."""
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ConfigError(f"--device-map {device_map} is unknown{did_you_mean(device_map, list(DEVICE_MAPS))}")
    if device_map == "disk" and folder is None:
        raise ConfigError("--device-map disk wants a folder for the layers; name it with --offload-folder.")
    if folder is not None and device_map != "disk":
        raise ConfigError("--offload-folder is for --device-map disk.")


def spread_(
    model: VisionLanguageModel, device_map: str, device: torch.device, folder: Path | None = None
) -> VisionLanguageModel:
    """Moves a model in host memory to a device, but for decoder layers that stay in host memory or go to disk.

    device_map: auto, as many layers on the device as fit (all of them where the device is the CPU); cpu, none on it;
    disk, none in memory, all in a folder of their own below `folder`, which ends with the process.

    Raises:
        ConfigError: see `check_device_map`.
    """
    from accelerate import cpu_offload, disk_offload

    check_device_map(device_map, folder)
    layers = model.family.layers(model.decoder)
    owner: Any = getattr(model.decoder, model.family.backbone)
    owner.layers = torch.nn.ModuleList()
    model.to(device)
    owner.layers = layers
    here = _that_fit(layers, device) if device_map == "auto" else 0
    for layer in layers[:here]:
        layer.to(device)
    scratch = _scratch(folder) if device_map == "disk" and folder is not None else None
    for number, layer in enumerate(layers[here:], here):
        if scratch is not None:
            disk_offload(layer, str(scratch / str(number)), execution_device=device, offload_buffers=True)
        elif device.type != "cpu":
            cpu_offload(layer, execution_device=device, offload_buffers=True)
    return model


def _that_fit(layers: torch.nn.ModuleList, device: torch.device) -> int:
    if device.type == "cpu":
        return len(layers)
    free = (1 - RESERVE) * torch.cuda.mem_get_info(device)[0]
    count = 0
    for layer in layers:
        free -= sum(tensor.nbytes for tensor in layer.state_dict().values())
        if free < 0:
            break
        count += 1
    return count


def _scratch(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="layers-", dir=folder))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch
