"""What commands share that take a MODEL: finding it, the precision, the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zero_ds.config import ConfigError

if TYPE_CHECKING:
    import torch

    from zero_ds.named_model import LoadedModel, NamedModel


def precision(dtype: str) -> torch.dtype:
    """The torch dtype of a --dtype.

    Raises:
        ConfigError: none that is known.
    """
    import torch

    from zero_ds.deepspeed_config import fast_dtype

    kinds = {"auto": fast_dtype(), "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype} is not known; choose {' or '.join(kinds)}.")
    return kinds[dtype]


def loaded(model: str, target: str | None, dtype: str) -> tuple[NamedModel, LoadedModel]:
    """The model of that name, on this rank's device.

    Raises:
        ConfigError, CheckpointError: see `find_model` and `load_model`.
    """
    from zero_ds import distributed
    from zero_ds.named_model import find_model, load_model

    kind = precision(dtype)
    named = find_model(model, target)
    return named, load_model(named, dtype=kind, device=distributed.device())
