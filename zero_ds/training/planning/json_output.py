"""Converts a plan to plain values for JSON, in bytes, seconds and hours. The keys are a file format: keep them."""

from __future__ import annotations

from typing import Any

from zero_ds.training.planning.cluster import Cluster
from zero_ds.training.planning.data import AverageSample
from zero_ds.training.planning.memory import PLACES
from zero_ds.training.planning.model_size import ActivationBytes, DecoderSize
from zero_ds.training.planning.offline import offline_cost
from zero_ds.training.planning.plan import RecipePlan
from zero_ds.training.planning.recipe import Option, RunPlan
from zero_ds.training.planning.route import PAPER_GROUP, PAPER_HOURS, Leg, group_sizes, paper_cluster, shard_groups
from zero_ds.training.planning.speed import Step
from zero_ds.training.planning.tables import assumptions


def as_json(plan: RecipePlan) -> dict[str, Any]:
    """Returns the plan as nested dictionaries that `json.dumps` accepts."""
    run = plan.run
    comparison = paper_cluster(plan.routes, run.cluster, plan.target) if plan.routes else None
    groups = [shard_groups(run, run.cluster, ranks) for ranks in group_sizes(run.cluster)]
    trained = {part: sum(group) for part, group in run.size.groups.items()}
    routes = {}
    for route in plan.routes:
        routes[route.name] = {leg.name: _leg(leg, comparison, run.cluster) for leg in route.legs}
    return {
        "recipe": plan.recipe,
        "config": run.config.model_dump(mode="json"),
        "cluster": dict(vars(run.cluster)),
        "sources": list(run.size.sources),
        "parameters": {"frozen": sum(run.size.frozen), "trained": trained, **_decoder(run.size.decoder)},
        "average_sample": _sample(run.sample),
        "longest_sample": run.longest,
        "kept_of_one_sample": _activations(run.activations),
        "micro_batch": run.micro_batch,
        "options": {option.zero: _option(run, option) for option in run.options},
        "refused": run.refused,
        "image_tokens": [
            {
                "factor": one.factor,
                "tokens_per_image": one.image_tokens,
                "average_sample": one.length,
                "step": _step(one.step),
                "hours": run.hours(one.step.seconds),
            }
            for one in run.merging
        ],
        "steps": run.steps,
        "fastest": run.fitting[0].zero if run.fitting else None,
        "groups": [{**vars(group), "step": _step(group.step)} for group in groups],
        "routes": routes,
        "offline_translators": dict(vars(offline)) if (offline := offline_cost(plan.routes, run.cluster)) else None,
        "fitted_between": comparison.between if comparison else None,
        "paper_hours": PAPER_HOURS.get(plan.target),
        "assumptions": assumptions(plan),
    }


def _decoder(size: DecoderSize) -> dict[str, int]:
    active = {} if size.active is None else {"active": size.active}
    return {"decoder": size.parameters, **active}


def _sample(sample: AverageSample) -> dict[str, float]:
    return {
        "words": sample.text_tokens,
        "supervised": sample.supervised,
        "pictures": sample.images,
        "length": sample.length,
    }


def _activations(activations: ActivationBytes) -> dict[str, Any]:
    return {
        "outside": activations.outside,
        "layers": activations.layers,
        "again": activations.second_pass,
        "input": activations.layer_input,
        "scores": activations.scores,
        "slice": activations.loss_slice,
        "masked": activations.mask,
        "whole": activations.whole,
        "checkpointed": activations.checkpointed,
        "logits": activations.logits,
    }


def _option(run: RunPlan, option: Option) -> dict[str, Any]:
    no_layer_recomputed, every_layer_recomputed = option.bounds
    return {
        "bytes": {place: option.memory.by_cause[place] for place in PLACES},
        "peak": option.memory.peak,
        "layers_recomputed": option.recomputed,
        "peak_recomputing_none": no_layer_recomputed.peak,
        "peak_recomputing_all": every_layer_recomputed.peak,
        "fits": option.fits,
        "micro_batch": option.micro_batch if option.fits else None,
        "step": {**_step(option.step), "layers_recomputed": option.step_recomputed},
        "hours": run.hours(option.step.seconds),
    }


def _step(step: Step) -> dict[str, float]:
    return {**vars(step), "seconds": step.seconds, "mfu": step.mfu}


def _leg(leg: Leg, comparison: Cluster | None, cluster: Cluster) -> dict[str, Any]:
    return {
        "zero": leg.plan.fitting[0].zero if leg.plan.fitting else None,
        "steps": leg.plan.steps,
        "hours": leg.hours(),
        "cost": cluster.cost(leg.hours()),
        "hours_in_groups_fitted": leg.hours_in_groups(comparison, PAPER_GROUP) if comparison else None,
    }
