"""How the samples of an optimizer step are divided among ranks and passes."""

from __future__ import annotations

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError


def check_batches(config: RunConfig, world_size: int) -> int:
    """Returns the number of micro-batches that each of `world_size` ranks accumulates in one optimizer step.

    Raises:
        ConfigError: the global batch is not a multiple of micro-batch x ranks.
    """
    per_pass = config.micro_batch * world_size
    if config.global_batch % per_pass:
        raise ConfigError(
            f"global_batch={config.global_batch} is not a multiple of micro_batch={config.micro_batch} x {world_size} "
            f"ranks; set global_batch to a multiple of {per_pass}."
        )
    return config.global_batch // per_pass
