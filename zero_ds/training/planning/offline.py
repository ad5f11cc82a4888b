"""Prices translators that are trained offline (`zero-ds translate`), next to the stage that trains them in the loop.

One GPU runs the target forward once over all texts, and the surrogate's late layers forward and backward in several
passes. Per token, of matrix products (attention scores are not counted):

    target        2 FLOPs per parameter of its layers
    late layers   2 forward and 2 backward per parameter, 2 more per parameter of a translator
    head          forward and backward of the surrogate's, forward of the target's, at a share of the positions

What stage 1 trains besides, the adapter, is left to train then; its cost is not in these figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from zero_ds.training.planning.cluster import ASSUMED, Cluster
from zero_ds.training.planning.recipe import RunPlan
from zero_ds.training.planning.route import Route

TOKENS = 5_000_000
"""Number of tokens of the texts, where the recipe has no `translate.tokens`."""
PASSES = 4
"""Number of passes over them."""


@dataclass(frozen=True)
class OfflineCost:
    """Cost of `zero-ds translate`. The fields are keys of the plan's JSON file."""

    tokens: int
    passes: int
    read_seconds: float
    """Seconds in which the target's weights are read from a disk, once."""
    target_hours: float
    """Hours of one GPU for the target's forward pass."""
    train_hours: float
    """Hours of one GPU for all passes of training."""
    disk_gb: float
    """GB of hidden states on disk: those that are kept, and one layer in between."""
    stage_gpu_hours: float | None
    """GPU-hours of the stage that trains translator and adapter in the loop, in the same plan."""

    @property
    def gpu_hours(self) -> float:
        return self.read_seconds / 3600 + self.target_hours + self.train_hours


def offline_cost(routes: list[Route], cluster: Cluster) -> OfflineCost | None:
    """Returns the cost for the surrogate of a route; None if its first stage trains no translator."""
    if not routes:
        return None
    leg, target = routes[0].legs[0], routes[1].legs[0].plan
    trained = sum(leg.plan.size.groups.get("translator", []))
    if not trained:
        return None
    settings = leg.plan.config.translate
    tokens = settings.tokens or TOKENS
    cost, speed = leg.plan.size.cost, cluster.peak * cluster.mfu
    backward = cost.text_decoder.per_token - cost.text_decoder.forward_token
    late = backward + (backward - 2.0 * trained)  # backward reaches just the late layers; forward costs the same less
    head = 1.5 * cost.per_supervised_text * settings.positions
    parameters = sum(target.size.frozen) + sum(target.size.trained)
    hours = leg.hours()
    return OfflineCost(
        tokens=tokens,
        passes=PASSES,
        read_seconds=parameters * target.size.itemsize / (ASSUMED["disk"] * 1e9),
        target_hours=target.size.cost.decoder.forward_token * tokens / speed / 3600,
        train_hours=(late + head) * tokens * PASSES / speed / 3600,
        disk_gb=_states(leg.plan) * tokens / 1e9,
        stage_gpu_hours=None if hours is None else hours * cluster.gpus,
    )


def _states(plan: RunPlan) -> float:
    """Returns the bytes of hidden states of a token: before and after a range, after the last layer, and one more."""
    return 4 * plan.activations.layer_input / plan.longest
