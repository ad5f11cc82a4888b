"""How the samples of an optimizer step are divided among ranks and passes.

The global batch is part of the method and never changes by itself. The number of ranks and the micro-batch change
nothing but rounding, so they are adapted to the global batch.
"""

from __future__ import annotations

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError


def largest_divisor(number: int, most: int) -> int:
    """Returns the largest divisor of `number` that is at most `most`, which is 1 or more."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


def fit_to_ranks(config: RunConfig, world_size: int) -> RunConfig:
    """Returns the run with the largest micro-batch, up to the recipe's, that divides each rank's samples evenly.

    Raises:
        ConfigError: the global batch is not a multiple of the number of ranks.
    """
    of_rank, rest = divmod(config.global_batch, world_size)
    if rest:
        fewer = largest_divisor(config.global_batch, world_size)
        raise ConfigError(
            f"global_batch={config.global_batch} is not a multiple of micro_batch=1 x {world_size} ranks; start "
            f"{fewer} of them (--ranks {fewer}, or --include), or set global_batch to a multiple of {world_size}."
        )
    micro_batch = largest_divisor(of_rank, config.micro_batch)
    return config if micro_batch == config.micro_batch else config.model_copy(update={"micro_batch": micro_batch})


def describe_batches(config: RunConfig, world_size: int, asked: int | None = None) -> str:
    """Returns one line that says how a step is divided; `config` fits the ranks.

    asked: the recipe's micro-batch, if it may have been another one.
    """
    passes = config.global_batch // (config.micro_batch * world_size)
    changed = "" if asked in (None, config.micro_batch) else f" (the recipe's {asked} does not divide a rank's samples)"
    return (
        f"a step of global_batch={config.global_batch}: {world_size} rank{'s' * (world_size > 1)}, each with {passes} "
        f"pass{'es' * (passes > 1)} of micro_batch={config.micro_batch}{changed}"
    )
