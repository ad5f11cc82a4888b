"""Runs a decoder that is larger than its device: layers in host memory or on disk are copied in when they run.

accelerate's hooks do the copying. Only decoder layers, which hold nearly all weights, are offloaded; embeddings, norm,
head and the vision encoder stay on the device.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError, did_you_mean

DEVICE_MAPS = ("auto", "cpu", "disk")
RESERVE = 0.2
"""Share of a GPU's free memory that `auto` leaves for caches and activations."""


def check_device_map(device_map: str | None, folder: Path | None) -> None:
    """Raises ConfigError for an unknown device map, or for an offload folder that does not go with it."""
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise ConfigError(f"--device-map {device_map} is unknown{did_you_mean(device_map, list(DEVICE_MAPS))}")
    if device_map == "disk" and folder is None:
        raise ConfigError("--device-map disk needs a folder for the layers; name it with --offload-folder.")
    if folder is not None and device_map != "disk":
        raise ConfigError("--offload-folder is for --device-map disk; leave it out or choose that device map.")


def spread_(
    model: VisionLanguageModel, device_map: str, device: torch.device, folder: Path | None = None
) -> VisionLanguageModel:
    """Moves a model from host memory to a device, except for decoder layers that stay there or go to disk.

    device_map: auto puts as many layers on the device as fit (all of them if the device is the CPU); cpu puts none on
    it; disk keeps none in memory and writes all of them to a folder of their own inside `folder`, which is deleted when
    the process ends.

    Raises:
        ConfigError: as `check_device_map`.
    """
    from accelerate import cpu_offload, disk_offload

    check_device_map(device_map, folder)
    layers = model.family.layers(model.decoder)
    model.family.replace_layers_(model.decoder, torch.nn.ModuleList())
    model.to(device)
    model.family.replace_layers_(model.decoder, layers)
    resident = _number_that_fit(layers, device) if device_map == "auto" else 0
    for layer in layers[:resident]:
        layer.to(device)
    scratch = _make_scratch(folder) if device_map == "disk" and folder is not None else None
    for number, layer in enumerate(layers[resident:], resident):
        if scratch is not None:
            disk_offload(layer, str(scratch / str(number)), execution_device=device, offload_buffers=True)
        elif device.type != "cpu":
            cpu_offload(layer, execution_device=device, offload_buffers=True)
    return model


def _number_that_fit(layers: torch.nn.ModuleList, device: torch.device) -> int:
    """Returns how many of the layers, first to last, fit into the device's free memory."""
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


def _make_scratch(folder: Path) -> Path:
    """Makes a folder inside `folder` that is deleted when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="layers-", dir=folder))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch
