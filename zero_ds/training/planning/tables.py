"""Prints a plan as aligned tables."""

from __future__ import annotations

from collections.abc import Sequence

from zero_ds.training.planning import data
from zero_ds.training.planning.cluster import ASSUMED, PCIE, Cluster
from zero_ds.training.planning.memory import CAUSES, GIB
from zero_ds.training.planning.model_size import DecoderSize
from zero_ds.training.planning.offline import OfflineCost, offline_cost
from zero_ds.training.planning.plan import RecipePlan
from zero_ds.training.planning.recipe import Option, RunPlan
from zero_ds.training.planning.route import (
    PAPER_GROUP,
    PAPER_HOURS,
    PAPER_STEP,
    Leg,
    ShardGroups,
    group_sizes,
    paper_cluster,
    shard_groups,
    total,
)
from zero_ds.training.stages import trains_alone

HEADINGS = {"activations": "activat."}
"""Headings of the causes whose name is too long."""

HOST_CAUSES = ("frozen", "trained", "gradients", "optimizer", "buckets")
"""Causes of the table of host memory."""


# -- cells -------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns aligned columns: the first to the left, all others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Returns a number with about three digits; `-` for 0 and `?` for None, which is not known."""
    if value is None:
        return "?"
    if value == 0:
        return "-"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    if abs(value) >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}"


def gib(size: float) -> str:
    """Returns bytes in GiB, as `number` does."""
    return number(size / GIB)


def count(parameters: float) -> str:
    """Returns a number of parameters with a unit: `70.55 B` for 70553706496."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= 100 * unit:
            return f"{parameters / unit:.1f} {name}"
        if parameters >= unit:
            return f"{parameters / unit:.2f} {name}"
    return f"{parameters:.0f}"


# -- sections ----------------------------------------------------------------------------------------------------------


def as_text(plan: RecipePlan) -> str:
    """Returns the whole plan: its sections, and the assumptions last."""
    run = plan.run
    sections = [
        heading(plan.recipe, run),
        gpu_table(run),
        host_table(run),
        speed_table(run),
        image_table(run),
        group_table(run),
        route_table(plan),
        "Assumed:\n" + "\n".join(f"  {sentence}" for sentence in assumptions(plan)),
    ]
    return "\n\n".join(section for section in sections if section)


def heading(recipe: str, plan: RunPlan) -> str:
    """Returns the recipe, the machines, the sources of the architectures, and the sizes."""
    cluster, size = plan.cluster, plan.size
    trained = ", ".join(f"{part} {count(sum(group))}" for part, group in size.groups.items())
    lines = [
        f"{recipe} on {cluster.gpus} GPUs "
        f"({cluster.name}, {cluster.memory_gib:g} GiB each, {cluster.ranks_per_node} per node)"
    ]
    lines += [f"  {sentence}" for sentence in size.sources]
    lines.append(f"  trains {trained}; frozen {count(sum(size.frozen))}; {size.dtype}")
    flops = plan.options[0].step.flops / plan.config.global_batch
    lines.append(f"  {_decoder_sentence(size.decoder)}; an average sample needs {flops / 1e12:.3g} TFLOP")
    lines.append(
        f"  global batch {plan.config.global_batch}, longest sample {plan.longest} tokens; average sample "
        f"{plan.sample.length:.0f} tokens, {plan.sample.supervised:.0f} of them with loss (assumed)"
    )
    return "\n".join(lines)


def _decoder_sentence(size: DecoderSize) -> str:
    """Returns the parameters of the run's decoder, and of a mixture of experts those that compute a token."""
    sentence = f"decoder {count(size.parameters)} parameters"
    if size.active is None:
        return sentence
    return (
        f"{sentence}, of which {count(size.active)} compute a token (experts that are not chosen do not, nor does the "
        "table of embeddings)"
    )


def gpu_table(plan: RunPlan) -> str:
    """Returns the GPU memory of a rank by cause, for every config."""
    used = [cause for cause in CAUSES if any(option.memory.by_cause["gpu"].get(cause) for option in plan.options)]
    header = ["config", *(HEADINGS.get(cause, cause) for cause in used)]
    header += ["peak", "recomputed", "none", "all", "fits", "micro batch"]
    rows = [_gpu_row(option, used) for option in plan.options]
    setting = str(plan.config.activation_checkpointing).lower()
    lines = [
        f"GPU memory of a rank in GiB at micro_batch={plan.micro_batch} and activation_checkpointing={setting}; "
        f"`recomputed`: of {len(plan.activations.layers)} decoder layers, and the peak with `none` and `all` of them; "
        f"{plan.cluster.reserve_gib:g} GiB more stay free; `micro batch`: the fastest that fits",
        table(header, rows),
    ]
    lines += [f"{name}: {reason}" for name, reason in plan.refused.items()]
    return "\n".join(lines)


def _gpu_row(option: Option, used: list[str]) -> list[str]:
    none, every = option.bounds
    cells = [gib(option.memory.by_cause["gpu"].get(cause, 0.0)) for cause in used]
    return [
        option.zero,
        *cells,
        gib(option.memory.peak["gpu"]),
        str(option.recomputed),
        gib(none.peak["gpu"]),
        gib(every.peak["gpu"]),
        "yes" if option.fits else "no",
        str(option.micro_batch) if option.fits else "-",
    ]


def host_table(plan: RunPlan) -> str:
    """Returns a table of a rank's host memory by cause under configs with offloading; empty if none offloads."""
    rows = []
    for option in plan.options:
        host, disk = option.memory.by_cause["host"], option.memory.by_cause["disk"]
        if not any(size for cause, size in host.items() if cause != "save"):
            continue
        node = plan.cluster.ranks_per_node * (option.memory.peak["host"] / GIB + plan.cluster.process_gib)
        cells = [gib(host.get(cause, 0.0)) for cause in HOST_CAUSES]
        rows.append([option.zero, *cells, gib(option.memory.peak["host"]), number(node), gib(sum(disk.values()))])
    if not rows:
        return ""
    title = (
        "Host memory of a rank in GiB, where something is offloaded (all others: 0.047 while saving a checkpoint); "
        f"`node`: with {plan.cluster.process_gib:g} GiB per process"
    )
    return title + "\n" + table(["config", *HOST_CAUSES, "peak", "node", "disk"], rows)


def speed_table(plan: RunPlan) -> str:
    """Returns the seconds of a step for every config that fits, the fastest first."""
    rows = []
    for option in plan.fitting:
        step = option.step
        times = (step.computing, step.communication, step.exposed, step.update, step.seconds)
        seconds = [number(value) for value in times]
        rows.append(
            [
                option.zero,
                str(option.micro_batch),
                str(option.step_recomputed),
                *seconds,
                f"{100 * step.mfu:.1f} %",
                number(plan.hours(step.seconds)),
            ]
        )
    header = ["config", "micro batch", "recomputed", "computing", "communication", "exposed", "update", "step"]
    header += ["MFU", "hours"]
    steps = "their number is not known: give --samples" if plan.steps is None else f"{plan.steps} steps"
    best = plan.fitting[0]
    lines = [
        f"Seconds of a step at the fastest micro-batch that fits ({steps}); `recomputed`: decoder layers",
        table(header, rows),
        f"Fastest that fits: zero={best.zero} micro_batch={best.micro_batch}",
    ]
    return "\n".join(lines)


def image_table(plan: RunPlan) -> str:
    """Returns the seconds of a step by the number of image tokens; empty for a run without images."""
    if not plan.merging:
        return ""
    whole = plan.merging[0].step.seconds
    rows = []
    for one in plan.merging:
        own = " (this run)" if one.factor == plan.config.adapter.square else ""
        saved = f"{100 * (1 - one.step.seconds / whole):.0f} %" if one.factor > 1 else "-"
        hours = number(plan.hours(one.step.seconds))
        seconds = [number(value) for value in (one.step.computing, one.step.communication, one.step.seconds)]
        rows.append([f"{one.factor}{own}", str(one.image_tokens), f"{one.length:.0f}", *seconds, hours, saved])
    header = ["adapter.factor", "tokens per image", "average sample", "computing", "communication", "step", "hours"]
    lines = [
        "Image tokens: seconds of a step at that config and micro-batch with squares of patches merged into one token "
        "(adapter.kind=pooling or pixel_shuffle)",
        table([*header, "saved"], rows),
    ]
    return "\n".join(lines)


def group_table(plan: RunPlan) -> str:
    """Returns the memory and speed with everything sharded over groups of ranks, the paper's layout."""
    found = [shard_groups(plan, plan.cluster, ranks) for ranks in group_sizes(plan.cluster)]
    fitting = [group.ranks for group in found if group.fits]
    verdict = "Not even all ranks together are enough."
    if fitting:
        verdict = f"The smallest groups that fit: {min(fitting)} ranks."
    header = ["shards x replicas", "state", "peak", "fits", "micro batch", "step"]
    lines = [
        "Everything sharded over groups of ranks, with replicas (FSDP's hybrid shards, the paper's layout; no config "
        "in ds_configs/ does this), 16 bytes per trained parameter, all decoder layers recomputed unless "
        "activation_checkpointing=false; GiB and seconds",
        table(header, [_group_row(group) for group in found]),
        verdict,
    ]
    return "\n".join(lines)


def _group_row(group: ShardGroups) -> list[str]:
    memory = [f"{group.ranks} x {group.replicas}", gib(group.state), gib(group.peak)]
    if not group.fits:
        return [*memory, "no", "-", "-"]
    return [*memory, "yes", str(group.micro_batch), number(group.step.seconds)]


def route_table(plan: RecipePlan) -> str:
    """Returns the hours of every stage on both routes and the saving, next to the paper's hours where it has them."""
    if trains_alone(plan.run.config):
        return "The route: none, because a language model trains alone."
    if not plan.routes:
        return "The route: the recipes `pretrain`, `encoder` and `decoder` are missing next to this one."
    cluster = plan.run.cluster
    paper = PAPER_HOURS.get(plan.target)
    comparison = paper_cluster(plan.routes, cluster, plan.target)
    header = ["hours", "config", "micro batch", "steps", "step, s", "as assumed"]
    if comparison:
        header.append(f"{PAPER_GROUP}-way, fitted")
    if paper:
        header.append("paper")
    if cluster.price is not None:
        header.append("cost")
    rows: list[list[str]] = []
    sums: dict[str, list[float | None]] = {}
    for route in plan.routes:
        columns = [[leg.hours() for leg in route.legs]]
        if comparison:
            columns.append([leg.hours_in_groups(comparison, PAPER_GROUP) for leg in route.legs])
        if paper:
            columns.append([paper[route.name][leg.name] for leg in route.legs])
        if cluster.price is not None:
            columns.append([cluster.cost(hours) for hours in columns[0]])
        for position, leg in enumerate(route.legs):
            rows.append(_leg_row(leg, [column[position] for column in columns]))
        sums[route.name] = [total(column) for column in columns]
        rows.append([f"{route.name}, all", "", "", "", "", *(number(value) for value in sums[route.name])])
    saved = [_saved(ours, full) for ours, full in zip(sums["surrogate"], sums["baseline"], strict=True)]
    rows.append(["saved", "", "", "", "", *saved])
    lines = ["Surrogate's route and baseline (Table 9), hours without loading and saving", table(header, rows)]
    if (sentence := _saving_sentence(cluster, sums["surrogate"][0], sums["baseline"][0])) is not None:
        lines.append(sentence)
    if comparison:
        lines.append(_fit_sentence(cluster, comparison))
    offline = offline_cost(plan.routes, cluster)
    if offline:
        lines.append(_offline_sentence(offline))
    return "\n".join(lines)


def _offline_sentence(cost: OfflineCost) -> str:
    """Returns what translators cost that are trained offline, in words."""
    stage = "" if cost.stage_gpu_hours is None else f", where `pretrain` takes {number(cost.stage_gpu_hours)} GPU-hours"
    return (
        f"Beyond the paper: `zero-ds translate` on one GPU takes {number(cost.gpu_hours)} hours for {cost.tokens:,} "
        f"tokens ({number(cost.target_hours)} for the target's forward pass, {number(cost.train_hours)} for "
        f"{cost.passes} passes of training) and {cost.disk_gb:.0f} GB of disk{stage}; the adapter is then still to be "
        "trained."
    )


def _leg_row(leg: Leg, hours: list[float | None]) -> list[str]:
    """Returns the row of a stage: the fastest config that fits, its step, and the hours of every column."""
    config, micro_batch, seconds = "none fits", "-", "-"
    if leg.plan.fitting:
        best = leg.plan.fitting[0]
        config, micro_batch, seconds = best.zero, str(best.micro_batch), number(best.step.seconds)
    steps = "?" if leg.plan.steps is None else str(leg.plan.steps)
    return [f"  {leg.name}", config, micro_batch, steps, seconds, *(number(value) for value in hours)]


def _saved(ours: float | None, full: float | None) -> str:
    """Returns the share of the baseline's hours that the surrogate's route saves."""
    return f"{100 * (1 - ours / full):.0f} %" if ours is not None and full else "?"


def _saving_sentence(cluster: Cluster, ours: float | None, full: float | None) -> str | None:
    """Returns the savings of the surrogate's route in hours and at the given price; None where hours are not known."""
    if ours is None or full is None:
        return None
    saved = full - ours
    verb = "saves" if saved >= 0 else "takes longer by"
    sentence = f"The surrogate's route {verb} {abs(saved):.1f} hours, {abs(saved) * cluster.gpus:,.0f} GPU-hours"
    if (cost := cluster.cost(saved)) is not None:
        sentence += f", and {'saves' if saved >= 0 else 'adds'} {abs(cost):,.0f} at {cluster.price:g} for a GPU-hour"
    return sentence + "."


def _fit_sentence(cluster: Cluster, comparison: Cluster) -> str:
    return (
        f"Fitted: with {comparison.between:.1f} GB/s between nodes (instead of {cluster.between:g}) and everything "
        f"sharded over {PAPER_GROUP} ranks, a step of `baseline-decoder` takes the {PAPER_STEP} s of A.4; this one "
        "number is fitted, and all others in its column follow from it."
    )


def assumptions(plan: RecipePlan) -> list[str]:
    """Returns the assumptions that no file states, one sentence each."""
    cluster = plan.run.cluster
    return [
        f"computing reaches {100 * cluster.mfu:g} % of {cluster.peak / 1e12:g} TFLOP/s (--mfu), recomputed passes "
        "counted as work",
        f"collectives reach {cluster.inside:g} GB/s per GPU inside a node and {cluster.between:g} GB/s per node to "
        "other nodes (--bandwidth), and overlap fully with the passes, apart from `exposed` ones",
        f"offloaded data moves at {PCIE:g} GB/s per GPU; {ASSUMED['gpu_memory']:g} GB/s for a GPU's memory, "
        f"{ASSUMED['host_memory']:g} GB/s for a node's host memory, {ASSUMED['disk']:g} GB/s for a node's disk",
        f"a sample with an image has {data.IMAGE_SAMPLE_TOKENS} text tokens, {data.IMAGE_SAMPLE_SUPERVISED} with loss; "
        f"a text-only sample has {data.TEXT_SAMPLE_TOKENS} and {data.TEXT_SAMPLE_SUPERVISED} "
        "(--tokens, --supervised)",
        "GenQA-500K has 500,000 samples, LLaVA-1.5-665K 625,000 with an image and 40,000 without (--samples)",
        f"{cluster.reserve_gib:g} GiB of a GPU stay free (--reserve); a node has {cluster.host_gib:g} GiB of host "
        "memory (--host-memory)",
        f"the surrogate's route trains its decoder on {100 * plan.decoder_share:g} % of the data (--decoder-share; "
        "20 % in the paper), and the baseline's adapter sees no text-only data set",
        "no padding, no stragglers, no waiting for data, no loading, no saving of checkpoints",
    ]
