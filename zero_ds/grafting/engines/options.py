"""Options of a command that say who runs a model, in which precision, and on which devices.

Nothing heavy is imported before it is needed, because commands import this module to check their options first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zero_ds.runtime.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    import torch

    from zero_ds.grafting.named_model import LoadedModel, NamedModel


def precision(dtype: str) -> torch.dtype:
    """Returns the torch dtype of a --dtype: auto, float32 or bfloat16.

    Raises:
        ConfigError: an unknown name.
    """
    import torch

    from zero_ds.runtime.precision import fast_dtype

    kinds = {"auto": fast_dtype(), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype} is not known; choose {' or '.join(kinds)}.")
    return kinds[dtype]


@dataclass(frozen=True)
class DeviceOptions:
    """Engine that runs a model, and devices that hold its layers."""

    engine: str = "transformers"
    """Name in `vllm.ENGINES`."""
    tensor_parallel: int = 1
    """Number of GPUs that share the model, with vLLM."""
    device_map: str | None = None
    """Name in `offload.DEVICE_MAPS`; None keeps the whole model on one device."""
    offload_folder: Path | None = None
    """Folder for layers on disk, with the device map `disk`."""
    max_model_len: int | None = None
    """Longest prompt with its answer in tokens, with vLLM; None takes the length that fits."""
    gpu_memory_share: float | None = None
    """Share of each GPU's memory that vLLM may use; None takes `Served.memory_share`."""

    def check(self) -> None:
        """Checks the options, alone and together, before anything is loaded.

        Raises:
            ConfigError: an unknown value, an engine that is not installed, or options that exclude each other.
        """
        from zero_ds.grafting.engines.offload import check_device_map
        from zero_ds.grafting.engines.vllm import ENGINES, check_installed
        from zero_ds.runtime import distributed

        if self.engine not in ENGINES:
            raise ConfigError(f"--engine {self.engine} is unknown{did_you_mean(self.engine, list(ENGINES))}")
        if self.tensor_parallel < 1:
            raise ConfigError(f"--tensor-parallel must be at least 1, not {self.tensor_parallel}.")
        check_device_map(self.device_map, self.offload_folder)
        if self.engine == "transformers" and self.tensor_parallel > 1:
            raise ConfigError("--tensor-parallel is for --engine vllm; leave it out or choose that engine.")
        for name, value in (("max-model-len", self.max_model_len), ("gpu-memory-share", self.gpu_memory_share)):
            if self.engine == "transformers" and value is not None:
                raise ConfigError(f"--{name} is for --engine vllm; leave it out or choose that engine.")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ConfigError(f"--max-model-len must be at least 1, not {self.max_model_len}.")
        if self.gpu_memory_share is not None and not 0 < self.gpu_memory_share <= 1:
            raise ConfigError(f"--gpu-memory-share must be above 0 and at most 1, not {self.gpu_memory_share:g}.")
        if distributed.world_size() > 1 and (self.engine == "vllm" or self.device_map):
            option = "--engine vllm" if self.engine == "vllm" else "--device-map"
            raise ConfigError(f"{option} uses this machine's devices in one process; start it without a launcher.")
        if self.engine == "vllm":
            if self.device_map is not None:
                raise ConfigError("--device-map is for --engine transformers, because vLLM places layers itself.")
            check_installed()


def load(named: NamedModel, dtype: str, options: DeviceOptions) -> LoadedModel:
    """Loads a model on this rank's device, or as `options` say.

    Raises:
        ConfigError, CheckpointError: as `load_model`, `load_served` and `precision`.
    """
    from zero_ds.runtime import distributed

    torch_dtype, device = precision(dtype), distributed.device()
    if options.engine == "vllm":
        from zero_ds.grafting.engines.vllm import load_served

        share = {} if options.gpu_memory_share is None else {"memory_share": options.gpu_memory_share}
        return load_served(
            named,
            dtype=torch_dtype,
            device=device,
            tensor_parallel=options.tensor_parallel,
            max_length=options.max_model_len,
            **share,
        )
    from zero_ds.grafting.named_model import load_model

    return load_model(
        named,
        dtype=torch_dtype,
        device=device,
        device_map=options.device_map,
        offload_folder=options.offload_folder,
    )
