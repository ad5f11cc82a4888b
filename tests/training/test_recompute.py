"""Checks activation checkpointing by the plan: the fewest decoder layers are recomputed, and nothing else changes."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed_helper import run_ranks
from hypothesis import given
from hypothesis import strategies as st
from places import GATHERED
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zero_ds.config.loading import load_run
from zero_ds.config.schema import RunConfig
from zero_ds.model.layer_plan import read_surrogate
from zero_ds.runtime import distributed
from zero_ds.training import stages
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.options.recompute import Choice, choose, recompute_
from zero_ds.training.planning.activations import activation_bytes
from zero_ds.training.planning.architecture import architecture
from zero_ds.training.planning.cluster import PROCESS_GIB, Cluster
from zero_ds.training.planning.memory import Memory, recomputed
from zero_ds.training.planning.model_size import ActivationBytes
from zero_ds.training.planning.recipe import plan_run
from zero_ds.training.setup import load_model, make_loader

GIB = 2**30

# -- how many ----------------------------------------------------------------------------------------------------------

sizes = st.floats(1.0, 1e3)
samples = st.builds(
    ActivationBytes,
    outside=sizes,
    layers=st.lists(sizes | st.just(0.0), min_size=1, max_size=9).map(tuple),
    second_pass=st.just(()) | st.lists(sizes, min_size=1, max_size=3).map(tuple),
    layer_input=st.floats(0.1, 1.0),  # no layer keeps less than its input
    scores=sizes,
    loss_slice=sizes,
)


@given(samples, st.floats(0.0, 1e4))
def test_as_few_layers_are_recomputed_as_fit(kept: ActivationBytes, room: float) -> None:
    whole = Memory({"gpu": {"activations": kept.whole}, "host": {}, "disk": {}}, {"gpu": kept.whole})

    def fits(memory: Memory) -> bool:
        return memory.peak["gpu"] <= room

    count, need = recomputed(whole, kept, fits, "auto")
    assert need.peak["gpu"] == kept.recomputing(count) and count in kept.recompute_counts
    fewer = [n for n in kept.recompute_counts if n < count]
    assert all(kept.recomputing(n) > room for n in fewer), "fewer do not fit"
    assert fits(need) or count == len(kept.recomputable), "if nothing fits all are"
    assert recomputed(whole, kept, fits, False) == (0, whole)
    assert recomputed(whole, kept, fits, True)[0] == len(kept.recomputable)


@given(samples, st.integers(1, 64))
def test_micro_batches_keep_their_multiple(kept: ActivationBytes, rows: int) -> None:
    needs = [kept.recomputing(count) for count in kept.recompute_counts]
    assert needs[0] == kept.whole == pytest.approx(kept.outside + sum(kept.layers) + sum(kept.second_pass))
    many = kept.times(rows)
    assert [many.recomputing(count) for count in kept.recompute_counts] == pytest.approx(
        [rows * need for need in needs]
    )
    assert many.scores == pytest.approx(rows * kept.scores)


def test_needs_of_equal_layers_and_of_a_different_one() -> None:
    kept = ActivationBytes(
        outside=100.0, layers=(0.0, 10.0, 10.0, 10.0), second_pass=(), layer_input=1.0, scores=0.0, loss_slice=0.0
    )
    assert [kept.recomputing(count) for count in kept.recompute_counts] == [130.0, 121.0, 112.0, 113.0]
    large = replace(kept, layers=(0.0, 50.0, 10.0, 10.0))
    assert [large.recomputing(count) for count in large.recompute_counts] == [170.0, 151.0, 152.0, 153.0]
    twice = replace(kept, second_pass=(10.0,))
    assert [(count, twice.recomputing(count)) for count in twice.recompute_counts] == [(0, 140.0), (3, 114.0)]
    assert replace(kept, loss_slice=2.0**29).times(8).logits == 3 * 2.0**28, "a GPU's slice of scores grows no further"


def stairs(config: RunConfig, small: Path, world_size: int) -> list[Choice]:
    """Returns the choice with unlimited memory, then with a byte less than that choice needs, and so on."""
    ds = ds_config(config, world_size)
    plan = read_surrogate(small).plan if stages.decoder_kind(config) == "surrogate" else None
    found = [choose(config, ds, world_size, math.inf, plan)]
    while (less := choose(config, ds, world_size, found[-1].need - 1, plan)).fits:
        found.append(less)
    return [*found, less]


@pytest.mark.parametrize("stage", ["translator", "encoder", "decoder"])
def test_a_byte_less_is_a_layer_more(run_config: Callable[..., RunConfig], small: Path, stage: str) -> None:
    *found, too_small = stairs(run_config(stage, activation_checkpointing="auto"), small, 2)
    keeping = {"translator": (1, 2, 3), "encoder": (0, 1, 2, 3), "decoder": tuple(range(6))}[stage]
    assert [choice.layers for choice in found] == [keeping[:count] for count in range(len(keeping))]
    assert not too_small.fits and too_small.layers == keeping


# -- what comes of it --------------------------------------------------------------------------------------------------


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that operations have created and that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.sizes.pop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_the_peak_of_real_passes_falls_as_planned(run_config: Callable[..., RunConfig], stage: str) -> None:
    """Measures on a CPU how much each further recomputed layer saves in forward and backward pass, to 10 %."""
    config = run_config(stage, global_batch=1)
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    stages.freeze_(model, config)
    model.train()
    batch = next(batch for (batch,) in loader.steps(0, 4) if "image" in batch.ids[0])
    length, labels = batch.input_ids.shape[1], int((batch.labels != -100).sum())
    parts = architecture(config, dtype=torch.float32)
    of_one = activation_bytes(parts.model, length=length, supervised=labels, images=1, attention="sdpa")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    peaks = []
    for count in of_one.recompute_counts:
        recompute_(model, of_one.recomputable[:count])
        with Live() as live:
            model(**batch.inputs()).total.backward()
        peaks.append(live.peak)
    *some, _, _ = of_one.recompute_counts
    saved = [peaks[0] - peaks[count] for count in some]
    assert saved == pytest.approx([of_one.whole - of_one.recomputing(count) for count in some], rel=0.1)
    assert len(saved) >= 3 and saved[-1] > 0.25 * peaks[0]


@pytest.mark.parametrize("family", [*tiny.FAMILIES, *tiny.VARIANTS])
def test_partly_recomputed_decoders_have_the_same_gradients(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], family: str
) -> None:
    """Float32; relative difference below 1e-6 of every gradient's norm. The first three layers run twice, no other."""
    config = run_config("decoder", target=str(made(family, tied=True)), micro_batch=2)
    config = config.model_copy(update={"data": config.data.model_copy(update={"system_prompt": None})})
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    stages.freeze_(model, config)
    model.train()
    batch = next(loader.steps(0, 1))[0]
    ran: list[int] = []
    for number, layer in enumerate(model.family.layers(model.decoder)):
        inner: Any = layer.mlp  # a layer's own hooks may run once
        inner.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    found = []
    for layers in ((), (0, 1, 2)):
        recompute_(model, layers)
        model.zero_grad()
        ran.clear()
        model(**batch.inputs()).total.backward()
        assert sorted(ran) == sorted([*range(6), *layers])
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    auto = config.model_copy(update={"activation_checkpointing": "auto"})
    assert [len(choose(auto, ds_config(auto, 1), 1, room).layers) for room in (math.inf, 0.0)] == [0, 6], (
        "it is planned"
    )
    whole, partly = found
    assert whole.keys() == partly.keys() and len(whole) > 50
    for name, gradient in whole.items():
        assert (partly[name] - gradient).norm() <= 1e-6 * gradient.norm(), name


def train_with(configs: list[RunConfig], limits: list[float]) -> list[list[str]]:
    """Returns what runs log about activation checkpointing on devices of so many bytes; rank 1 has twice as many."""
    from zero_ds.runtime import distributed
    from zero_ds.training.train import train

    heard: list[list[str]] = []
    monkeypatch = pytest.MonkeyPatch()
    logger = logging.getLogger("zero_ds.training.options.recompute")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: heard[-1].append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    for config, limit in zip(configs, limits, strict=True):
        heard.append([])
        size = limit * (1 + distributed.rank())
        monkeypatch.setattr(distributed, "device_bytes", lambda size=size: size)
        train(config)
    return heard


@pytest.mark.parametrize("zero", ["zero2", GATHERED])
def test_a_run_chooses_by_its_memory_and_learns_the_same(
    run_config: Callable[..., RunConfig], small: Path, tmp_path: Path, zero: str
) -> None:
    """Two ranks recompute four of six decoder layers, none, or all; their losses in float32 agree within 1e-6."""
    config = run_config("decoder", zero=zero, micro_batch=2, max_steps=3, activation_checkpointing="auto")
    chosen = stairs(config, small, 2)[4]
    assert chosen.layers == (0, 1, 2, 3) and chosen.depth == 6
    limits = [chosen.need + PROCESS_GIB * GIB, 1e15, 1.0]
    runs = [config.model_copy(update={"out": str(tmp_path / str(number))}) for number in range(3)]
    first, second = run_ranks(train_with, 2, runs, limits)
    need = f"{chosen.need / GIB:.2f}"
    assert first[0] == [
        f"activation checkpointing: 4 of 6 decoder layers recomputed; the plan expects {need} GiB of {need}"
    ]
    assert len(first[1]) == 1 and "0 of 6 decoder layers recomputed" in first[1][0]
    assert "6 of 6 decoder layers recomputed" in first[2][0] and "set a smaller micro_batch" in first[2][1]
    assert second == [[], [], []], "one rank says it for all"
    losses = [
        [json.loads(line)["loss"] for line in (Path(run.out) / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    ]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[2] == pytest.approx(losses[1], rel=1e-6)


# -- `zero-ds plan` ----------------------------------------------------------------------------------------------------


def test_a_plan_recomputes_less_the_more_memory_there_is() -> None:
    """Llama-3.2-3B: no config is slower than with all or with no layers recomputed, and some are faster than both."""
    cluster = Cluster(8)
    plans: dict[Any, list[dict[str, Any]]] = {}
    for setting in ("auto", "true", "false"):
        config = load_run("llama-3.2-3b/decoder", [f"activation_checkpointing={setting}"])
        plans[setting] = [
            {option.zero: option for option in plan_run(config, replace(cluster, memory_gib=size)).options}
            for size in (30.0, 50.0, 80.0, 1000.0)
        ]
    better = 0
    for auto, every, none in zip(plans["auto"], plans["true"], plans["false"], strict=True):
        for zero, option in auto.items():
            others = [other[zero] for other in (every, none) if other[zero].fits]
            assert option.fits or not others
            assert all(option.step.seconds <= other.step.seconds for other in others)
            better += option.fits and all(option.step.seconds < other.step.seconds for other in others)
            assert option.bounds[1].peak["gpu"] == every[zero].memory.peak["gpu"]
            assert option.bounds[0].peak["gpu"] == none[zero].memory.peak["gpu"]
    assert better > 0
    for less, more in zip(plans["auto"][:-1], plans["auto"][1:], strict=True):
        assert all(more[zero].recomputed <= option.recomputed for zero, option in less.items())
    assert all(option.recomputed == option.step_recomputed == 0 for option in plans["auto"][-1].values() if option.fits)


def test_limits_of_all_groups_around_a_process_count(tmp_path: Path) -> None:
    """A Slurm job is some folders below the root, and any of them may have a limit."""
    groups = tmp_path / "cgroup"
    root = tmp_path / "fs"
    for name, limit in {"": "max", "slurm": "9000", "slurm/job_7": "max", "slurm/job_7/step_0": "5000"}.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
    groups.write_text("0::/slurm/job_7/step_0\n")
    assert distributed.memory_limits(groups, root) == [9000, 5000]
    old = root / "memory/docker"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("7000")
    groups.write_text("3:cpu,cpuacct:/slurm\n2:memory:/docker\n")
    assert distributed.memory_limits(groups, root) == [7000]
    assert distributed.memory_limits(tmp_path / "none", root) == []
    assert distributed.device_bytes() > 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_a_mask_is_counted(run_config: Callable[..., RunConfig], packed: bool) -> None:
    """Compares sdpa with rows of unequal length, or of several samples, with the tensors saved in a real pass."""
    config = run_config("encoder", attention="sdpa", micro_batch=2, global_batch=4)
    config = config.model_copy(update={"data": config.data.model_copy(update={"packing": packed})})
    model = load_model(config, {"zero_optimization": {}})
    loader = make_loader(config, model, 1)
    stages.freeze_(model, config)
    model.train()
    batches = [batch for step in loader.steps(0, 6) for batch in step]
    batch = max(batches, key=lambda batch: len(batch.pixel_values) * (int((batch.attention_mask == 0).sum()) > 0))
    rows, length = batch.input_ids.shape
    parts = architecture(config, dtype=torch.float32)
    of_one = activation_bytes(
        parts.model,
        length=length,
        supervised=int((batch.labels != -100).sum()) // rows,
        images=len(batch.pixel_values) // rows,
        attention="sdpa",
    )
    planned = (of_one.with_mask() if packed else of_one).times(rows)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    layers = dict.fromkeys(range(len(of_one.layers)), 0)
    seen: set[int] = set()
    alive, inside = [], [-1]

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        key = tensor.untyped_storage().data_ptr()
        if inside[0] >= 0 and key not in own and key not in seen:
            layers[inside[0]] += tensor.untyped_storage().nbytes()
        seen.add(key)
        return tensor

    for number, layer in enumerate(model.family.layers(model.decoder)):
        layer.register_forward_pre_hook(lambda *_, number=number: inside.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: inside.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch.inputs())
    assert of_one.mask > 0
    assert list(layers.values()) == pytest.approx(planned.layers, rel=0.1)
    assert sum(of_one.layers) * rows < 0.95 * sum(layers.values()), "without the mask it is too little"
