"""Shared parts of commands that take a MODEL: options, finding and loading it, precision and device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from zero_ds.grafting.named_model import LoadedModel, NamedModel

EngineOption = Annotated[str, typer.Option("--engine", help="Engine that runs the model: transformers or vllm.")]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel", help="With vllm: number of GPUs that share the model.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option("--device-map", help="Place of the decoder layers: auto (the device, then host memory), cpu or disk."),
]
OffloadOption = Annotated[
    Path | None, typer.Option("--offload-folder", help="With --device-map disk: folder for the layers.")
]


def precision(dtype: str) -> torch.dtype:
    """Returns the torch dtype of a --dtype option.

    Raises:
        ConfigError: the value is unknown.
    """
    import torch

    from zero_ds.runtime.precision import fast_dtype

    kinds = {"auto": fast_dtype(), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype} is not known; choose {' or '.join(kinds)}.")
    return kinds[dtype]


@dataclass(frozen=True)
class Placing:
    """Options that say which engine runs a model, and where its layers are."""

    engine: str = "transformers"
    tensor_parallel: int = 1
    device_map: str | None = None
    offload_folder: Path | None = None

    def check(self) -> None:
        """Raises ConfigError for values that are unknown, not installed, or cannot be combined."""
        from zero_ds.grafting.engines.offload import check_device_map
        from zero_ds.grafting.engines.vllm import ENGINES, check_installed
        from zero_ds.runtime import distributed

        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine} is unknown{did_you_mean(self.engine, list(ENGINES))}")
        if self.tensor_parallel < 1:
            raise ConfigError(f"--tensor-parallel {self.tensor_parallel}: at least 1.")
        check_device_map(self.device_map, self.offload_folder)
        if self.engine == "transformers" and self.tensor_parallel > 1:
            raise ConfigError("--tensor-parallel is for --engine vllm.")
        alone = "--engine vllm" if self.engine == "vllm" else "--device-map" if self.device_map else None
        if alone and distributed.world_size() > 1:
            raise ConfigError(f"{alone} is for one process, which uses this machine's devices; leave out the launcher.")
        if self.engine == "vllm":
            if self.device_map is not None:
                raise ConfigError("--device-map is for --engine transformers; vLLM places layers itself.")
            check_installed()


def loaded(model: str, target: str | None, dtype: str, placing: Placing) -> tuple[NamedModel, LoadedModel]:
    """Finds and loads a model onto this rank's device, or as `placing` says.

    Raises:
        ConfigError, CheckpointError: see `find_model`, `load_model` and `Placing.check`.
    """
    from zero_ds.grafting.named_model import find_model

    named = find_model(model, target)
    return named, load(named, dtype, placing)


def load(named: NamedModel, dtype: str, placing: Placing) -> LoadedModel:
    """Loads a model that was found; see `loaded`."""
    from zero_ds.grafting.named_model import load_model
    from zero_ds.runtime import distributed

    kind, device = precision(dtype), distributed.device()
    if placing.engine == "vllm":
        from zero_ds.grafting.engines.vllm import load_served

        return load_served(named, dtype=kind, device=device, tensor_parallel=placing.tensor_parallel)
    spread, folder = placing.device_map, placing.offload_folder
    return load_model(named, dtype=kind, device=device, device_map=spread, offload_folder=folder)
