"""The engine's numbers: gradients, clipping and updates are those of plain PyTorch on the whole batch, however split.

One process without DeepSpeed computes them from the definition (the mean over all supervised tokens of the global
batch); one and two ranks must arrive there with every ZeRO stage.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helper import RankError, run_ranks, whole_state
from places import GATHERED, PAIRS

from zero_ds.config.schema import RunConfig
from zero_ds.data.batches import Batch
from zero_ds.model.losses import count_supervised, with_token_weights
from zero_ds.training import stages
from zero_ds.training.checkpoint import KEYS
from zero_ds.training.deepspeed import ds_config, ds_config_names, resolve_precision
from zero_ds.training.engine import Engine, schedule
from zero_ds.training.options.recompute import checkpoint_activations_

STEPS = 2
"""ZeRO-3 that gathers every parameter when it is used: the tiny models' are all below the usual threshold."""

Tensors = dict[str, torch.Tensor]


def plain(config: RunConfig, micro_batch: int) -> dict[str, Any]:
    """Returns gradients, norm and loss of every step, and the final weights, of a loop in plain PyTorch."""
    from zero_ds.training.setup import load_model, make_loader, seed_everything

    seed_everything(config.seed)
    config = config.model_copy(update={"micro_batch": micro_batch})
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    groups = stages.freeze_(model, config)
    model.train()
    named = {n: p for group in groups.values() for n, p in group}
    start = {n: p.detach().clone() for n, p in named.items()}
    optimizer = torch.optim.AdamW(
        [{"params": [p for _, p in g], "lr": stages.learning_rate(config, part)} for part, g in groups.items()],
        weight_decay=config.optimizer.weight_decay,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = []
    for step, batches in enumerate(loader.steps(0, STEPS)):
        labelled = sum(count_supervised(batch.labels) for batch in batches)
        optimizer.zero_grad()
        total = 0.0
        if config.dynamic_loss.order:
            batches = weigh_plainly(batches, config.dynamic_loss.order)
        for batch in batches:
            loss = model(**batch.inputs()).total / labelled
            loss.backward()
            total += float(loss.detach())
        gradients = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule(config, STEPS)(step)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), config.optimizer.max_grad_norm)
        optimizer.step()
        steps.append({"gradients": gradients, "norm": float(norm), "loss": total})
    return {"steps": steps, "start": start, "weights": {n: p.detach().clone() for n, p in named.items()}}


def weigh_plainly(batches: list[Batch], order: float) -> list[Batch]:
    """Dynamic loss weights from their definition, one response after the other, scaled to keep the mean over tokens."""
    found = []
    batches = [replace(batch, token_weights=torch.zeros(batch.labels.shape)) for batch in batches]
    for batch in batches:
        for number in range(int(batch.responses.max()) + 1):
            places = (batch.responses == number) & (batch.labels != -100)
            found.append((batch, places, int(places.sum())))
    longest = max(length for _, _, length in found)
    raw = [(longest / math.log(max(length, 2))) ** order for _, _, length in found]
    scale = sum(length for _, _, length in found) / sum(w * n for w, (_, _, n) in zip(raw, found, strict=True))
    for weight, (batch, places, _) in zip(raw, found, strict=True):
        batch.token_weights[places] = weight * scale  # type: ignore[index]
    return batches


def engine_run(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Makes the same steps through the Engine under each configuration; returns a rank's observations of each."""
    from zero_ds.runtime import distributed

    distributed.initialize()
    return [_engine_run(config) for config in configs]


def _engine_run(config: RunConfig) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    from zero_ds.runtime import distributed
    from zero_ds.training.setup import load_model, make_loader, seed_everything

    seed_everything(config.seed)
    world_size = distributed.world_size()
    ds = ds_config(config, world_size)
    model = load_model(config, ds)
    loader = make_loader(config, model, world_size)
    groups = stages.freeze_(model, config)
    checkpoint_activations_(model, config, ds)
    model.train()
    engine = Engine(config, model, groups, STEPS, ds)
    gc.freeze()  # this case stays in memory until the ranks end; DeepSpeed collects garbage for every new engine
    start = {name: whole_state(engine, p, "master") for name, p in engine.named.items()}
    learned = {
        f"{key} of {name}"
        for name, p in engine.named.items()
        for key in KEYS
        if key != "master" and bool(engine.state.held(p, key).any())
    }
    caught: list[Tensors] = []
    step_of_deepspeed = engine.engine.step

    def step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            full = {name: safe_get_full_grad(p) for name, p in engine.named.items()}
            caught.append({name: gradient.clone() for name, gradient in full.items() if gradient is not None})
        step_of_deepspeed()

    engine.engine.step = step
    steps = []
    released: set[str] = set()
    for number, micro in enumerate(loader.steps(0, STEPS)):
        if number == 1:
            note_releases(model, released)
        labelled = distributed.sum_over_ranks(sum(count_supervised(b.labels) for b in micro))[0]
        if config.dynamic_loss.order:
            micro = with_token_weights(micro, config.dynamic_loss)
        result = engine.step(micro, number, labelled)
        loss = distributed.sum_over_ranks(result.share)[0]
        steps.append({"gradients": caught[-1], "norm": result.grad_norm, "loss": loss})
    assert len(caught) == STEPS
    weights = {name: whole_state(engine, p, "master").view_as(caught[0][name]) for name, p in engine.named.items()}
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None}
    whole = {
        n for n, p in model.named_parameters() if getattr(getattr(p, "ds_status", None), "name", "") == "AVAILABLE"
    }
    return {
        "steps": steps,
        "start": start,
        "learned_at_start": learned,
        "weights": weights,
        "frozen_with_gradient": frozen,
        "whole": whole,
        "released": released,
    }


def note_releases(model: Any, released: set[str]) -> None:
    """Records in `released` the names of frozen parameters that ZeRO-3 releases from now on."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not hasattr(parameter, "partition"):
            continue

        def partition(*arguments: Any, name: str = name, inner: Any = parameter.partition, **options: Any) -> Any:
            released.add(name)
            return inner(*arguments, **options)

        parameter.partition = partition


CASES = [
    (stage, zero, again)
    for stage in ("pretrain", "decoder")
    for zero in ("zero0", "zero1", "zero2", "zero3")
    for again in ((True, False) if zero in ("zero2", "zero3") else (False,))
] + [(stage, zero, True) for stage in ("encoder", "encoder, all options") for zero in ("zero2", "zero3")]
CASES += [
    (stage, zero, again)
    for stage in ("pretrain", "encoder", "decoder")
    for zero, again in (("zero3_resident", False), (GATHERED, False), (GATHERED, True))
]
CASES += [("pretrain", zero, True) for zero in ("zero2_offload", "zero3_offload", "zero3_offload_params", "zero3_hpz")]
CASES += [("encoder, all options", GATHERED, True)]  # boundary embeddings, empty outside of their module
CASES += [(stage, zero, True) for stage in ("decoder, weights", "decoder, lora") for zero in ("zero2", "zero3")]
"""Stage, DeepSpeed config, activation checkpointing. `pretrain` trains amid frozen layers, `encoder` before them (no
layer of the decoder has a gradient, yet it must pass through), `decoder` everything."""


def settings(run_config: Callable[..., RunConfig], stage: str, zero: str = "zero2", again: bool = False) -> RunConfig:
    stage, *options = stage.split(", ")
    changes: dict[str, Any] = {}
    if "weights" in options:
        changes["dynamic_loss"] = {"order": 0.5, "normalize": "mean"}
    if "lora" in options:
        changes["lora"] = {"rank": 4, "alpha": 8, "layers": [1, 4]}
    if "all options" in options:
        path = run_config(stage).encoder.path  # type: ignore[union-attr]
        changes["encoder"] = {"path": path, "patch_norm": True, "feature_layer": -2, "train_last_layers": 1}
        changes["adapter"] = {"boundary_tokens": True}
    return run_config(
        stage,
        **changes,
        zero=zero,
        activation_checkpointing=again,
        optimizer={
            "learning_rate": 1e-2,
            "learning_rates": {"adapter": 3e-3},
            "weight_decay": 0.01,
            "warmup_ratio": 0.5,
        },
    )


ALONE = [case for case in CASES if case[1] in ("zero0", "zero2", "zero3") and case[2] != (case[0] == "pretrain")]
"""Runs of one rank: ZeRO has nothing to divide, and four passes have to add up."""


@pytest.fixture(scope="module")
def expected(run_config: Callable[..., RunConfig]) -> dict[str, Any]:
    names = dict.fromkeys(stage for stage, _, _ in CASES)
    return {(name, size): plain(settings(run_config, name), size) for name in names for size in (1, 4)}


@pytest.fixture(scope="module")
def measured(run_config: Callable[..., RunConfig]) -> dict[int, dict[tuple[Any, ...], list[dict[str, Any]]]]:
    """Maps world size and case to each rank's observations. The ranks start once for all cases."""
    result = {}
    for world_size, cases in ((1, ALONE), (2, CASES)):
        ranks = run_ranks(engine_run, world_size, [settings(run_config, *case) for case in cases])
        result[world_size] = {case: [rank[number] for rank in ranks] for number, case in enumerate(cases)}
    return result


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """Returns the norm of the difference, relative to the norm."""
    return float((left.double() - right.double()).norm() / right.double().norm().clamp_min(1e-12))


def test_hybrid_shards_on_four_ranks(expected: dict[str, Any], run_config: Callable[..., RunConfig]) -> None:
    """hpZ: optimizer over all four ranks, parameters gathered within pairs. Two steps, because the second one reads the
    weights that the first one has updated."""
    config = settings(run_config, "pretrain", PAIRS)
    theirs = expected["pretrain", 1]
    for rank in run_ranks(engine_run, 4, [config]):
        for mine, plainly in zip(rank[0]["steps"], theirs["steps"], strict=True):
            ours, right = (
                torch.cat([g[n].flatten() for n in plainly["gradients"]])
                for g in (mine["gradients"], plainly["gradients"])
            )
            assert apart(ours, right) < (1e-6 if plainly is theirs["steps"][0] else 1e-3)
            assert mine["loss"] == pytest.approx(plainly["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("world_size", "stage", "zero", "again"), [*((1, *case) for case in ALONE), *((2, *case) for case in CASES)]
)
def test_gradients_and_updates_are_those_of_plain_pytorch(
    expected: dict[str, Any], measured: dict[int, Any], world_size: int, stage: str, zero: str, again: bool
) -> None:
    theirs, first = expected[stage, 1], expected[stage, 1]["steps"][0]["gradients"]
    at_once = expected[stage, 4]["steps"][0]["gradients"]
    norm = torch.cat([gradient.flatten() for gradient in first.values()]).norm()
    assert norm > 1, "clipping has something to do"
    # a key's bias has no effect on a softmax: its gradient is rounding, which Adam would blow up; A of LoRA has none
    # as long as B is zero
    zero_by_nature = {name for name, gradient in first.items() if gradient.norm() < 1e-6 * norm}
    assert all(name.endswith(("k_proj.bias", "lora_A.weight")) for name in zero_by_nature)
    for rank in measured[world_size][(stage, zero, again)]:
        for name, weight in theirs["start"].items():
            assert torch.equal(rank["start"][name].view_as(weight), weight), "the same seed, the same start"
        assert not rank["learned_at_start"]
        ours = rank["steps"][0]["gradients"]
        assert set(ours) == set(first)
        whole, right, padded = (torch.cat([g[name].flatten() for name in first]) for g in (ours, first, at_once))
        assert apart(whole, right) < 1e-6
        assert apart(whole, padded) < 5e-6, "samples of unequal length side by side: other shapes, other rounding"
        for name in set(first) - zero_by_nature:
            assert apart(ours[name], first[name]) < 1e-5, name
        for mine, plainly in zip(rank["steps"], theirs["steps"], strict=True):
            assert mine["loss"] == pytest.approx(plainly["loss"], rel=1e-5)
            assert mine["norm"] == pytest.approx(plainly["norm"], rel=1e-4)
        for name in first:
            if not name.endswith("k_proj.bias"):
                assert apart(rank["weights"][name], theirs["weights"][name]) < 1e-3, name
        assert not rank["frozen_with_gradient"]


# -- the first update --------------------------------------------------------------------------------------------------


def first_updates(configs: list[RunConfig]) -> list[dict[str, Any]]:
    """Makes the first step of each run; returns how far it is from AdamW's own on the same gradient."""
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    from zero_ds.runtime import distributed

    CPU_Accelerator.is_fp16_supported = lambda self: True
    CPU_Accelerator.supported_dtypes = lambda self: [torch.float32, torch.bfloat16, torch.float16]
    distributed.initialize()
    return [_first_update(config) for config in configs]


def _first_update(config: RunConfig) -> dict[str, Any]:
    from deepspeed.utils import safe_get_full_grad

    from zero_ds.training.setup import load_model, make_loader, seed_everything

    seed_everything(config.seed)
    ds = ds_config(config, 2)
    if ds["fp16"]["enabled"]:
        ds["fp16"]["initial_scale_power"] = 4  # nothing overflows, so that the first step is made
    model = load_model(config, ds)
    loader = make_loader(config, model)
    groups = stages.freeze_(model, config)
    model.train()
    given = {name: whole_weights(p).float() for group in groups.values() for name, p in group}
    engine = Engine(config, model, groups, STEPS, ds)
    gc.freeze()
    started = {name: whole_state(engine, p, "master").view_as(given[name]) for name, p in engine.named.items()}
    caught: Tensors = {}
    step_of_deepspeed = engine.engine.step

    def step() -> None:
        if engine.engine.is_gradient_accumulation_boundary():
            full = {name: safe_get_full_grad(p) for name, p in engine.named.items()}
            caught.update({name: g.detach().float().clone() for name, g in full.items() if g is not None})
        step_of_deepspeed()

    engine.engine.step = step
    engine.step(next(iter(loader.steps(0, 1))), 0, 10.0)
    expected = {name: torch.nn.Parameter(given[name].clone()) for name in caught}
    for name, parameter in expected.items():
        parameter.grad = caught[name]
    torch.nn.utils.clip_grad_norm_(expected.values(), config.optimizer.max_grad_norm)
    rate = config.optimizer.learning_rate * schedule(config, STEPS)(0)
    torch.optim.AdamW(expected.values(), lr=rate, weight_decay=config.optimizer.weight_decay).step()
    apart = 0.0
    for name, parameter in expected.items():
        ours = whole_state(engine, engine.named[name], "master").view_as(parameter)
        settled = caught[name].abs() > 1e-5  # where a gradient is not small against Adam's eps
        difference = ((ours - parameter.detach()).abs() * settled).max()
        apart = max(apart, float(difference) / rate)
    return {
        "changed before": [name for name in given if not torch.equal(started[name], given[name])],
        "gradients": len(caught),
        "apart": apart,
        "counts": set(engine.state.steps().values()),
        "live": [name for name, p in engine.named.items() if not engine.state.equals_live(p)],
    }


def whole_weights(parameter: torch.nn.Parameter) -> torch.Tensor:
    from zero_ds.runtime.zero3 import gathered

    with gathered([parameter]):
        return parameter.detach().clone()


def first_cases(slow: bool) -> list[tuple[str, str]]:
    """DeepSpeed configs with precisions; by default one for each of DeepSpeed's optimizers, else all others."""
    names = [name for name in ds_config_names() if name != "zero3_nvme"]  # swapping needs a compiler and libaio
    every = [(name, p) for name in names for p in ("fp32", "bf16", "fp16") if (name, p) != ("zero0", "fp16")]
    chosen = [("zero0", "fp32"), ("zero0", "bf16"), ("zero1", "bf16"), ("zero2", "fp16"), ("zero3", "bf16")]
    return [case for case in every if (case in chosen) != slow]


@pytest.mark.parametrize(
    "slow",
    [
        False,
        pytest.param(True, marks=pytest.mark.slow(reason="every other ds_config and precision: 20 more engines")),
    ],
)
def test_the_first_update_is_that_of_plain_pytorch(run_config: Callable[..., RunConfig], slow: bool) -> None:
    """Adam counts from one, and weight decay is applied once. DeepSpeed's optimizer without ZeRO made a step before."""
    cases = first_cases(slow)
    optimizer = {"learning_rate": 1e-2, "weight_decay": 0.1}
    configs = [run_config("pretrain", zero=zero, precision=precision, optimizer=optimizer) for zero, precision in cases]
    for rank in run_ranks(first_updates, 2, configs):
        for case, found in zip(cases, rank, strict=True):
            assert not found["changed before"] and found["gradients"] > 5, (case, found)
            assert found["counts"] == {1}, (case, found)
            assert found["apart"] < 0.01, (case, found)  # in learning rates; the step before made it 0.26
            assert not found["live"], (case, found)


def test_frozen_parameters_stay_whole_between_steps_where_they_are_persistent(measured: dict[int, Any]) -> None:
    for rank in measured[2][("pretrain", "zero3_resident", False)]:
        assert rank["whole"] and not rank["released"]
    for rank in measured[2][("pretrain", GATHERED, False)]:
        assert not rank["whole"]
        assert any(name.startswith("decoder.") for name in rank["released"])


def test_one_step_mixed_a_text_batch_and_an_image_batch(measured: dict[int, Any], data: Path) -> None:
    """Sample 0 is text alone: rank 0 begins with it while rank 1 begins with an image."""
    import json

    records = json.loads(data.read_text())
    assert ["image" in record for record in records[:4]] == [False, True, True, True]
    assert len({len(str(record)) for record in records[:4]}) > 1, "lengths differ"


# -- a single engine ---------------------------------------------------------------------------------------------------


def not_finite(config: RunConfig) -> tuple[str, bool]:
    """Returns the error of a step with an infinite loss, and whether the weights are as before."""
    from zero_ds.runtime import distributed
    from zero_ds.training.setup import load_model, make_loader

    distributed.initialize()
    ds = ds_config(config, 1)
    model = load_model(config, ds)
    loader = make_loader(config, model, 1)
    engine = Engine(config, model, stages.freeze_(model, config), STEPS, ds)
    before = {n: p.detach().clone() for n, p in engine.named.items()}
    (micro,) = loader.steps(0, 1)
    micro[2].pixel_values[:] = float("inf")
    try:
        engine.step(micro, 0, 10)
    except FloatingPointError as error:
        return str(error), all(torch.equal(before[n], p) for n, p in engine.named.items())
    raise AssertionError("an infinite loss went through")


def test_a_loss_that_is_not_finite_stops_before_the_update(run_config: Callable[..., RunConfig]) -> None:
    ((message, same),) = run_ranks(not_finite, 1, settings(run_config, "pretrain"))
    assert same and "the loss of step 1 is nan; samples: image-1. Nothing was updated." in message


def one_loss_not_finite(config: RunConfig) -> None:
    """Makes a step in which the last of two ranks has an infinite loss."""
    from zero_ds.runtime import distributed
    from zero_ds.training.setup import load_model, make_loader

    distributed.initialize()
    ds = ds_config(config, 2)
    model = load_model(config, ds)
    loader = make_loader(config, model, 2)
    engine = Engine(config, model, stages.freeze_(model, config), STEPS, ds)
    (micro,) = loader.steps(0, 1)
    if distributed.rank() == 1:
        micro[-1].pixel_values[:] = float("inf")
    engine.step(micro, 0, 10)


@pytest.mark.parametrize("zero", ["zero0", "zero2", GATHERED], ids=["zero0", "zero2", "zero3"])
def test_the_rank_with_the_loss_that_is_not_finite_is_the_one_that_says_so(
    run_config: Callable[..., RunConfig], zero: str
) -> None:
    """The other rank sees a gradient that is not finite, and leaves the report to this one."""
    with pytest.raises(RankError) as found:
        run_ranks(one_loss_not_finite, 2, settings(run_config, "encoder", zero=zero))
    assert "the loss of step 1 is nan; samples: " in str(found.value)
    assert "though the loss is" not in str(found.value)


def test_schedule_rises_and_falls_along_a_cosine(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("pretrain", optimizer={"warmup_ratio": 0.1})
    factor = schedule(config, 100)
    assert [factor(s) for s in range(10)] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert factor(10) == 1 and factor(55) == pytest.approx(0.5) and factor(100) == pytest.approx(0)
    assert factor(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    none = schedule(run_config("pretrain", optimizer={"warmup_ratio": 0}), 10)
    assert none(0) == 1
    assert all(0 <= schedule(config, n)(s) <= 1 for n in (1, 2, 3) for s in range(n + 2))


@pytest.mark.parametrize(
    ("word", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision(run_config: Callable[..., RunConfig], word: str, dtype: torch.dtype) -> None:
    config = run_config("pretrain", precision=word)
    assert resolve_precision(config) is dtype
    ds = ds_config(config, 1)
    assert (ds["bf16"]["enabled"], ds["fp16"]["enabled"]) == (word == "bf16", word == "fp16")
    assert resolve_precision(run_config("pretrain", precision="auto")) in (torch.float32, torch.bfloat16)


# -- the helper itself -------------------------------------------------------------------------------------------------


def fails_on_rank_one() -> None:
    from zero_ds.runtime import distributed

    distributed.initialize()
    if distributed.rank() == 1:
        raise ValueError("this is the first error")
    distributed.barrier()


def hangs() -> None:
    import time

    time.sleep(600)


def test_a_failing_rank_is_reported_and_the_others_end() -> None:
    with pytest.raises(RankError, match=r"first error, of rank 1(.|\n)*this is the first error"):
        run_ranks(fails_on_rank_one, 2)


def test_ranks_that_hang_are_ended_with_their_stacks() -> None:
    with pytest.raises(RankError, match=r"did not finish in time(.|\n)*stacks of rank 0(.|\n)*in hangs"):
        run_ranks(hangs, 1, timeout=3)
