"""Runs a decoder that is larger than its device: its layers are shared over all GPUs, or copied in when they run.

accelerate's hooks do the copying: of hidden states to the GPU of a layer and back, and of the weights of layers in host
memory or on disk. Only decoder layers, which hold nearly all weights, are placed elsewhere; embeddings, norm, head and
the vision encoder stay on the first device, and a layer's part of the cache on the layer's own.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError, did_you_mean

logger = logging.getLogger(__name__)

DEVICE_MAPS = ("auto", "cpu", "disk")
RESERVE = 0.2
"""Share of a GPU's free memory that `auto` leaves for caches and activations."""
CACHE = "past_key_values"
"""Argument of a decoder layer that stays where it is: each layer's part of the cache is on its own device."""


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
    """Moves a model from host memory to a device; decoder layers may go to other devices or to disk, or stay there.

    device_map: auto fills the device with layers, then the other GPUs of this machine, and leaves the rest in host
    memory (if the device is the CPU, all are there); cpu puts none on it; disk keeps none in memory and writes all of
    them to a folder of their own inside `folder`, which is deleted when the process ends.

    Raises:
        ConfigError: as `check_device_map`.
    """
    from accelerate import cpu_offload, disk_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    check_device_map(device_map, folder)
    device = with_number(device)
    layers = model.family.layers(model.decoder)
    model.family.replace_layers_(model.decoder, torch.nn.ModuleList())
    model.to(device)
    model.family.replace_layers_(model.decoder, layers)
    places: list[torch.device | None] = [None] * len(layers)
    if device_map == "auto":
        room = _room(device)
        places = place([_bytes(layer) for layer in layers], room)
        logger.info("%s", describe(places))
    scratch = _make_scratch(folder) if device_map == "disk" and folder is not None else None
    for number, (layer, where) in enumerate(zip(layers, places, strict=True)):
        if where is not None:
            layer.to(where)
            if where != device:
                # the hidden states come back after each layer, so that everything around it sees one device
                hook = AlignDevicesHook(execution_device=where, io_same_device=True, skip_keys=CACHE)
                add_hook_to_module(layer, hook)
        elif scratch is not None:
            disk_offload(layer, str(scratch / str(number)), execution_device=device, offload_buffers=True)
        elif device.type != "cpu":
            cpu_offload(layer, execution_device=device, offload_buffers=True)
    return model


def place(sizes: Sequence[float], room: Sequence[tuple[torch.device, float]]) -> list[torch.device | None]:
    """Returns a device for each layer, None for one in host memory.

    Devices are filled one after the other, so that few hidden states change their device.

    sizes: bytes of the layers, first to last. room: devices, and the bytes that may be used of each.
    """
    places: list[torch.device | None] = []
    devices = list(room)
    left = devices[0][1] if devices else 0.0
    for size in sizes:
        while devices and size > left:
            devices.pop(0)
            left = devices[0][1] if devices else 0.0
        left -= size
        places.append(devices[0][0] if devices else None)
    return places


def with_number(device: torch.device) -> torch.device:
    """Returns a device with its number: `cuda` alone is not equal to the GPU that it stands for."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def describe(places: Sequence[torch.device | None]) -> str:
    """Returns a sentence about the number of layers on each device."""
    names = ["host memory" if where is None else str(where) for where in places]
    counts = [f"{names.count(name)} on {name}" for name in dict.fromkeys(names)]
    return f"decoder layers: {', '.join(counts).replace('on host memory', 'in host memory')}"


def _room(device: torch.device) -> list[tuple[torch.device, float]]:
    """Returns the devices for layers, `device` first, and the bytes of each that layers may use.

    Memory that other processes have taken is not counted.
    """
    if device.type == "cpu":
        return [(device, float("inf"))]
    others = [torch.device("cuda", number) for number in range(torch.cuda.device_count()) if number != device.index]
    return [(gpu, (1 - RESERVE) * torch.cuda.mem_get_info(gpu)[0]) for gpu in (device, *others)]


def _bytes(layer: torch.nn.Module) -> int:
    """Returns the bytes of a layer's tensors."""
    return sum(tensor.nbytes for tensor in layer.state_dict().values())


def _make_scratch(folder: Path) -> Path:
    """Makes a folder inside `folder` that is deleted when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="layers-", dir=folder))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch
