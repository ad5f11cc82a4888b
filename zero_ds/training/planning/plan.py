"""`plan`: recipe + cluster -> memory and time of the run, and of both routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zero_ds.config.loading import load_run
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.data import DECODER_SHARE, DataOverrides
from zero_ds.training.stages import trains_alone

if TYPE_CHECKING:
    from zero_ds.training.planning.recipe import RunPlan
    from zero_ds.training.planning.route import Route


@dataclass(frozen=True)
class RecipePlan:
    """Everything that `zero-ds plan` prints."""

    recipe: str
    run: RunPlan
    routes: list[Route]
    """The surrogate's route and the baseline's; empty if a recipe of theirs is missing, or no image is seen."""
    decoder_share: float = DECODER_SHARE
    """Share of the data that the surrogate's route trains its decoder on."""

    @property
    def target(self) -> str:
        """Name of the full model without its owner or folder."""
        return self.run.config.target.rstrip("/").rsplit("/", 1)[-1]


def plan(
    recipe: str,
    overrides: list[str] | None,
    cluster: Cluster,
    *,
    replace: list[str] | None = None,
    translators: int = 1,
    dense_width: int | None = None,
    data: DataOverrides | None = None,
    decoder_share: float = DECODER_SHARE,
) -> RecipePlan:
    """Plans a recipe's run, and the routes that its stage belongs to. Loads no weights.

    Args:
        recipe: name of a recipe, or a YAML file.
        overrides: settings as `key=value`.
        replace: ranges `first:last` that the surrogate replaces; by default those that the recipe's surrogate has.
        translators: number of translators for each of these ranges.
        dense_width: units of a dense network in place of every translator's experts; None for copies of layers.
        data: facts about the data, which replace assumptions.
        decoder_share: share of the data that the surrogate's route trains its decoder on.

    Raises:
        ConfigError: something that cannot be planned, or a run that fits the cluster under no config of ds_configs/.
    """
    config = load_run(recipe, overrides)
    cluster.check()
    if not 0 < decoder_share <= 1:
        raise ConfigError(f"--decoder-share {decoder_share:g} is not a share; give more than 0 and at most 1.")
    # torch is loaded only now, so that a mistake is reported at once
    from zero_ds.training.planning.recipe import plan_run
    from zero_ds.training.planning.route import routes

    run = plan_run(config, cluster, replace=replace, translators=translators, dense_width=dense_width, data=data)
    if not run.fitting:
        raise _nothing_fits(run)
    if trains_alone(config):
        return RecipePlan(recipe, run, [], decoder_share)
    found = routes(
        recipe,
        overrides or [],
        cluster,
        replace=replace,
        translators=translators,
        dense_width=dense_width,
        data=data,
        decoder_share=decoder_share,
    )
    return RecipePlan(recipe, run, found, decoder_share)


def _nothing_fits(run: RunPlan) -> ConfigError:
    cluster, smallest = run.cluster, run.smallest
    gpu = smallest.least.peak["gpu"] / 2**30 + cluster.reserve_gib
    host = cluster.ranks_per_node * (smallest.least.peak["host"] / 2**30 + cluster.process_gib)
    return ConfigError(
        f"no config of ds_configs/ fits {cluster.gpus} GPUs of {cluster.memory_gib:g} GiB; the smallest, "
        f"{smallest.zero}, needs {gpu:.1f} GiB per GPU at micro_batch=1 and {host:.0f} GiB of host memory per node."
    )
