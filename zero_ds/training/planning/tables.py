"""A plan as aligned text and as plain values for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zero_ds.training.planning import data, speed
from zero_ds.training.planning.memory import CAUSES, GIB, PLACES
from zero_ds.training.planning.recipe import Option, RunPlan
from zero_ds.training.planning.route import (
    DECODER_SHARE,
    PAPER_GROUP,
    PAPER_HOURS,
    PAPER_STEP,
    Groups,
    Route,
    fitted,
    group_sizes,
    groups,
    total,
)
from zero_ds.training.planning.speed import Cluster

HEADINGS = {"trained": "trained", "activations": "activat."}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, all others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = []
    for first, *others in (header, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Three digits or so; `-` for nothing, `?` for what is not known."""
    if value is None:
        return "?"
    if value == 0:
        return "-"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def gib(size: float) -> str:
    return number(size / GIB)


def count(parameters: float) -> str:
    """70600000000 -> `70.6 B`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.{2 if parameters < 100 * unit else 1}f} {name}"
    return f"{parameters:.0f}"


# -- sections ----------------------------------------------------------------------------------------------------------


def heading(recipe: str, plan: RunPlan) -> str:
    """What is planned, and on what."""
    cluster, parts = plan.cluster, plan.parts
    trained = ", ".join(f"{part} {count(sum(p.numel() for _, p in group))}" for part, group in parts.groups.items())
    lines = [
        f"{recipe} on {cluster.gpus} GPUs ({cluster.name}, {cluster.memory_gib:g} GiB each, {cluster.ranks_per_node} a "
        "node)",
        *(f"  {sentence}" for sentence in parts.sources),
        f"  trains {trained}; frozen {count(sum(parts.frozen))}; {str(parts.dtype).removeprefix('torch.')}",
        f"  global batch {plan.config.global_batch}, longest sample {plan.longest} tokens; average sample "
        f"{plan.sample.length:.0f} tokens, {plan.sample.supervised:.0f} of them with loss (assumed)",
    ]
    return "\n".join(lines)


def gpu_table(plan: RunPlan) -> str:
    """GPU memory of a rank by cause."""
    used = [cause for cause in CAUSES if any(o.memory.by_cause["gpu"].get(cause) for o in plan.options)]
    header = ["config", *(HEADINGS.get(cause, cause) for cause in used)]
    header += ["peak", "recomputed", "none", "all", "fits", "micro batch"]
    rows = [
        [
            option.zero,
            *(gib(option.memory.by_cause["gpu"].get(cause, 0.0)) for cause in used),
            gib(option.memory.peak["gpu"]),
            str(option.recomputed),
            *(gib(memory.peak["gpu"]) for memory in option.bounds),
            "yes" if option.fits else "no",
            str(option.micro_batch) if option.fits else "-",
        ]
        for option in plan.options
    ]
    setting = str(plan.config.activation_checkpointing).lower()
    lines = [
        f"GPU memory of a rank in GiB at micro_batch={plan.micro_batch} and activation_checkpointing={setting}; "
        f"`recomputed`: of {len(plan.kept.layers)} decoder layers, and the peak with `none` and `all` of them; "
        f"{plan.cluster.reserve_gib:g} GiB more stay free; `micro batch`: the fastest that fits",
        table(header, rows),
        *(f"{name}: {reason}" for name, reason in plan.refused.items()),
    ]
    return "\n".join(lines)


def host_table(plan: RunPlan) -> str:
    """Host memory of a rank by cause, where a config puts something there; empty if none does."""
    rows = []
    for option in plan.options:
        host, disk = option.memory.by_cause["host"], option.memory.by_cause["disk"]
        if not any(size for cause, size in host.items() if cause != "save"):
            continue
        node = plan.cluster.ranks_per_node * (option.memory.peak["host"] / GIB + plan.cluster.process_gib)
        cells = [gib(host.get(cause, 0.0)) for cause in ("frozen", "trained", "gradients", "optimizer", "buckets")]
        rows.append([option.zero, *cells, gib(option.memory.peak["host"]), number(node), gib(sum(disk.values()))])
    if not rows:
        return ""
    header = ["config", "frozen", "trained", "gradients", "optimizer", "buckets", "peak", "a node", "disk"]
    return (
        "Host memory of a rank in GiB, where something is offloaded (all others: 0.047 in a commit); `a node`: with "
        f"{plan.cluster.process_gib:g} GiB a process\n" + table(header, rows)
    )


def speed_table(plan: RunPlan) -> str:
    """Seconds of a step for every config that fits, the fastest first."""
    rows = [
        [
            option.zero,
            str(option.micro_batch),
            str(option.again),
            number(option.step.computing),
            number(option.step.communication),
            number(option.step.update),
            number(option.step.seconds),
            f"{100 * option.step.mfu:.1f} %",
            number(plan.hours(option.step.seconds)),
        ]
        for option in plan.fitting
    ]
    header = ["config", "micro batch", "recomputed", "computing", "communication", "update", "step", "MFU", "hours"]
    steps = "their number is not known: give --samples" if plan.steps is None else f"{plan.steps} steps"
    best = plan.fitting[0]
    return (
        f"Seconds of a step at the fastest micro-batch that fits ({steps}); `recomputed`: decoder layers\n"
        + table(header, rows)
        + f"\nFastest that fits: zero={best.zero} micro_batch={best.micro_batch}"
    )


def group_table(plan: RunPlan) -> str:
    """Everything sharded over groups of ranks, the paper's layout."""
    found = [groups(plan, plan.cluster, ranks) for ranks in group_sizes(plan.cluster)]
    rows = [_group_row(group) for group in found]
    fitting = [group.ranks for group in found if group.fits]
    header = ["shards x replicas", "state", "peak", "fits", "micro batch", "step"]
    verdict = (
        f"The smallest groups that fit: {min(fitting)} ranks." if fitting else "Not even all ranks together are enough."
    )
    return (
        "Everything sharded over groups of ranks, with replicas (FSDP's hybrid shards, the paper's layout; no config "
        "in ds_configs/ does this), 16 bytes a trained parameter, all decoder layers recomputed unless "
        "activation_checkpointing=false; GiB and seconds\n" + table(header, rows) + "\n" + verdict
    )


def _group_row(group: Groups) -> list[str]:
    fits = "yes" if group.fits else "no"
    micro_batch, seconds = (str(group.micro_batch), number(group.step.seconds)) if group.fits else ("-", "-")
    return [f"{group.ranks} x {group.replicas}", gib(group.state), gib(group.peak), fits, micro_batch, seconds]


def route_table(found: list[Route], cluster: Cluster, target: str) -> str:
    """Hours of every stage on both routes, the saving, and beside them the paper's where it has them."""
    if not found:
        return "The route: there are no recipes `pretrain`, `encoder` and `decoder` beside this one."
    paper = PAPER_HOURS.get(target)
    comparison = paper_cluster(found, cluster, target)
    header = ["hours", "config", "micro batch", "steps", "step, s", "as assumed"]
    header += [f"{PAPER_GROUP}-way, fitted"] if comparison else []
    header += ["paper"] if paper else []
    rows: list[list[str]] = []
    sums: dict[str, list[float | None]] = {}
    for route in found:
        columns: list[list[float | None]] = [[leg.hours() for leg in route.legs]]
        if comparison:
            columns.append([leg.hours_in_groups(comparison, PAPER_GROUP) for leg in route.legs])
        if paper:
            columns.append([paper[route.name][leg.name] for leg in route.legs])
        for position, leg in enumerate(route.legs):
            fitting = leg.plan.fitting
            best = [fitting[0].zero, str(fitting[0].micro_batch)] if fitting else ["none fits", "-"]
            steps = "?" if leg.plan.steps is None else str(leg.plan.steps)
            seconds = number(fitting[0].step.seconds) if fitting else "-"
            rows.append([f"  {leg.name}", *best, steps, seconds, *(number(column[position]) for column in columns)])
        sums[route.name] = [total(column) for column in columns]
        rows.append([f"{route.name}, all", "", "", "", "", *(number(value) for value in sums[route.name])])
    saved = [
        f"{100 * (1 - ours / full):.0f} %" if ours is not None and full else "?"
        for ours, full in zip(sums["surrogate"], sums["baseline"], strict=True)
    ]
    rows.append(["saved", "", "", "", "", *saved])
    lines = ["Surrogate's route and baseline (Table 9), hours without loading and saving", table(header, rows)]
    if comparison:
        lines.append(
            f"Fitted: with {comparison.between:.1f} GB/s between nodes (instead of {cluster.between:g}) and everything "
            f"sharded over {PAPER_GROUP} ranks, a step of `baseline-decoder` takes the {PAPER_STEP} s of A.4; this one "
            "number is fitted, all others of its column follow from it."
        )
    return "\n".join(lines)


def paper_cluster(found: list[Route], cluster: Cluster, target: str) -> Cluster | None:
    """The cluster fitted to the paper's step, for the model and the number of GPUs that it was measured with."""
    if target not in PAPER_HOURS or cluster.gpus != 128:
        return None
    return fitted(found[1].legs[-1].plan, cluster)


def assumptions(plan: RunPlan, decoder_share: float = DECODER_SHARE) -> list[str]:
    """What the numbers rest on and no file says, a sentence each."""
    cluster = plan.cluster
    return [
        f"computing reaches {100 * cluster.mfu:g} % of {cluster.peak / 1e12:g} TFLOP/s (--mfu), recomputed passes "
        "counted as work",
        f"collectives reach {cluster.inside:g} GB/s a GPU inside a node and {cluster.between:g} GB/s a node to others "
        "(--bandwidth), and run wholly beside the passes",
        f"offloaded data moves at {speed.PCIE:g} GB/s a GPU; {speed.ASSUMED['gpu_memory']:g} GB/s a GPU's memory, "
        f"{speed.ASSUMED['host_memory']:g} GB/s a node's host memory, {speed.ASSUMED['disk']:g} GB/s a node's disk",
        f"a sample with a picture has {data.WITH_PICTURE_WORDS} text tokens, {data.WITH_PICTURE_ANSWERS} with loss; "
        f"one of text alone {data.TEXT_WORDS} and {data.TEXT_ANSWERS} (--tokens, --supervised)",
        "GenQA-500K has 500,000 samples, LLaVA-1.5-665K 625,000 with a picture and 40,000 without (--samples)",
        f"of a GPU {cluster.reserve_gib:g} GiB stay free (--reserve); a node has {cluster.host_gib:g} GiB of host "
        "memory (--host-memory)",
        f"the surrogate's route trains its decoder on {100 * decoder_share:g} % of the data (--decoder-share; 20 % in "
        "the paper), and the baseline's adapter sees no data set of text alone",
        "no padding, no stragglers, no waiting for data, no loading, no commits",
    ]


# -- JSON --------------------------------------------------------------------------------------------------------------


def as_json(recipe: str, plan: RunPlan, found: list[Route]) -> dict[str, Any]:
    """The whole plan as plain values: bytes, seconds, hours."""
    comparison = paper_cluster(found, plan.cluster, plan_target(plan)) if found else None
    return {
        "recipe": recipe,
        "config": plan.config.model_dump(mode="json"),
        "cluster": dict(vars(plan.cluster)),
        "sources": list(plan.parts.sources),
        "parameters": {
            "frozen": sum(plan.parts.frozen),
            "trained": {part: sum(p.numel() for _, p in group) for part, group in plan.parts.groups.items()},
        },
        "average_sample": dict(vars(plan.sample)),
        "longest_sample": plan.longest,
        "kept_of_one_sample": {
            **vars(plan.kept),
            **{name: getattr(plan.kept, name) for name in ("whole", "checkpointed", "logits")},
        },
        "micro_batch": plan.micro_batch,
        "options": {option.zero: _option(plan, option) for option in plan.options},
        "refused": plan.refused,
        "steps": plan.steps,
        "fastest": plan.fitting[0].zero if plan.fitting else None,
        "groups": [
            {**vars(group), "step": _step(group.step)}
            for group in (groups(plan, plan.cluster, ranks) for ranks in group_sizes(plan.cluster))
        ],
        "routes": {
            route.name: {
                leg.name: {
                    "zero": leg.plan.fitting[0].zero if leg.plan.fitting else None,
                    "steps": leg.plan.steps,
                    "hours": leg.hours(),
                    "hours_in_groups_fitted": leg.hours_in_groups(comparison, PAPER_GROUP) if comparison else None,
                }
                for leg in route.legs
            }
            for route in found
        },
        "fitted_between": comparison.between if comparison else None,
        "paper_hours": PAPER_HOURS.get(plan_target(plan)),
        "assumptions": assumptions(plan),
    }


def plan_target(plan: RunPlan) -> str:
    """Name of the target without its owner or folder."""
    return plan.config.target.rstrip("/").rsplit("/", 1)[-1]


def _option(plan: RunPlan, option: Option) -> dict[str, Any]:
    return {
        "bytes": {place: option.memory.by_cause[place] for place in PLACES},
        "peak": option.memory.peak,
        "layers_recomputed": option.recomputed,
        "peak_recomputing_none": option.bounds[0].peak,
        "peak_recomputing_all": option.bounds[1].peak,
        "fits": option.fits,
        "micro_batch": option.micro_batch if option.fits else None,
        "step": {**_step(option.step), "layers_recomputed": option.again},
        "hours": plan.hours(option.step.seconds),
    }


def _step(step: speed.Step) -> dict[str, float]:
    return {**vars(step), "seconds": step.seconds, "mfu": step.mfu}
