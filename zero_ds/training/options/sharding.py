"""Options of a run that the DeepSpeed JSON rules out, also for a run that is only planned. Loads no torch."""

from __future__ import annotations

from typing import Any

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError


def check_sharding(config: RunConfig, zero: dict[str, Any], name: str) -> None:
    """Refuses options that need whole weights on every rank under a DeepSpeed JSON that shards them.

    zero: `zero_optimization` of the JSON `name`. Compiled code would keep gathered parameters until its backward pass.

    Raises:
        ConfigError: `frozen_weights=int8` or `compile=true` under ZeRO stage 3; compiling is possible if it keeps all
            matrices whole.
    """
    if zero["stage"] != 3:
        return
    if config.frozen_weights == "int8":
        raise ConfigError(
            f"frozen_weights=int8 keeps whole weights on each rank, which {name} shards; set zero=zero2, or "
            "frozen_weights=native."
        )
    largest_kept = zero.get("stage3_param_persistence_threshold", 100_000)
    if config.compile and isinstance(largest_kept, int | float) and largest_kept < 1_000_000:
        # any language model has larger matrices
        raise ConfigError(
            f"compile=true would keep all that {name} gathers; set zero=zero3_resident or zero=zero2, where "
            "parameters are whole on every rank, or compile=false."
        )
