"""ZeRO-3 gathers the whole next layer ahead of time, however large it is, and a plan counts late gathers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zero_ds.config.schema import RunConfig
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.training.deepspeed import DS_CONFIG_ROOT, ds_config, ds_config_names
from zero_ds.training.gathering import LIVE, PREFETCH, Units, follow_layers_, share_ahead
from zero_ds.training.planning import speed

HIDDEN, INNER, VOCABULARY = 8192, 28672, 128256
LLAMA_70B = {
    "model.embed_tokens.weight": VOCABULARY * HIDDEN,
    "lm_head.weight": VOCABULARY * HIDDEN,
    "model.norm.weight": HIDDEN,
    **{f"model.layers.{n}.self_attn.{part}_proj.weight": HIDDEN * HIDDEN for n in (0, 11) for part in "qo"},
    **{f"model.layers.{n}.self_attn.{part}_proj.weight": HIDDEN * HIDDEN // 8 for n in (0, 11) for part in "kv"},
    **{f"model.layers.{n}.mlp.{part}_proj.weight": HIDDEN * INNER for n in (0, 11) for part in ("up", "gate", "down")},
}
UNITS = Units(layer=855_638_016, largest=VOCABULARY * HIDDEN)


def test_units_are_layers_and_what_stands_alone(made: Callable[..., Path]) -> None:
    assert Units.of_sizes(LLAMA_70B, "model.layers.") == UNITS
    folder = DecoderFolder(made("llama", tied=True))
    layer = folder.family.layers(folder.load(dtype=torch.float32))[0]
    assert Units.of_folder(folder).layer == sum(p.numel() for p in layer.parameters())


def prefetched(zero: dict[str, Any]) -> float:
    """Returns the part of a 70B layer that DeepSpeed's own loop gathers during the layer before it.

    The loop takes parameter after parameter until the bucket is full; the layer that computes is whole meanwhile.
    """
    sizes = [size for name, size in LLAMA_70B.items() if name.startswith("model.layers.11.")]
    room, taken = min(zero.get(LIVE, 1e9) - UNITS.layer, zero.get(PREFETCH, 5e7)), 0
    while sizes and taken < room:
        taken += sizes.pop(0)
    return taken / UNITS.layer


@pytest.mark.parametrize("name", [name for name in ds_config_names() if name.startswith("zero3")])
def test_the_next_layer_of_a_70b_is_gathered_as_a_whole(run_config: Callable[..., RunConfig], name: str) -> None:
    assert prefetched({}) < 0.1, "DeepSpeed's defaults"
    ds = ds_config(run_config("encoder", zero=name, nvme_path="/nvme"), 4, ranks_per_node=4)
    assert PREFETCH not in ds["zero_optimization"] and LIVE not in ds["zero_optimization"], "the model is not known yet"
    follow_layers_(ds, UNITS)
    zero = ds["zero_optimization"]
    assert prefetched(zero) == share_ahead(zero, UNITS.layer) == 1.0
    assert zero[LIVE] >= UNITS.layer + UNITS.largest, "also next to word embeddings or head"


def test_numbers_of_the_user_stay(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    content = json.loads((DS_CONFIG_ROOT / "zero3.json").read_text())
    content["zero_optimization"][PREFETCH] = 7
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    ds = ds_config(run_config("encoder", zero=str(path)), 1)
    follow_layers_(ds, UNITS)
    assert ds["zero_optimization"][PREFETCH] == 7 and ds["zero_optimization"][LIVE] > 1_000_000_000
    ds = ds_config(run_config("encoder", zero="zero2"), 1)
    follow_layers_(ds, UNITS)
    assert PREFETCH not in ds["zero_optimization"]


def test_small_layers_keep_deepspeeds_sizes() -> None:
    ds: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    follow_layers_(ds, Units(layer=3_500_000, largest=28_000_000))
    assert ds["zero_optimization"] == {"stage": 3, PREFETCH: 50_000_000, LIVE: 1_000_000_000}


@given(st.integers(0, 2_000_000_000), st.integers(0, 4_000_000_000), st.integers(0, 1_000_000_000))
def test_the_share_is_one_part(bucket: int, live: int, unit: int) -> None:
    share = share_ahead({PREFETCH: bucket, LIVE: live}, unit)
    assert 0 <= share <= 1
    if unit:
        assert share * unit <= max(0, live - unit) + 1 and share * unit <= bucket + 1


def test_a_plan_counts_what_nothing_overlaps() -> None:
    """With DeepSpeed's own sizes, a 70B layer waits for nine tenths of its parameters."""
    layers = [[size for name, size in LLAMA_70B.items() if name.startswith(f"model.layers.{n}.")] for n in (0, 11)]
    parts: Any = SimpleNamespace(itemsize=2, frozen=list(LLAMA_70B.values()), trained=[1000], frozen_layers=layers)
    cluster: Any = SimpleNamespace(gpus=8, ranks_per_node=8, collective=lambda size, ranks: size / 1e9)
    ds: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    default = speed._sharded(parts, ds, cluster, 1)
    assert default.exposed == pytest.approx(2 * 2 * 2 * UNITS.layer * (1 - 5e7 / UNITS.layer) / 1e9)
    follow_layers_(ds, UNITS)
    followed = speed._sharded(parts, ds, cluster, 1)
    assert (followed.exposed, followed.during) == (0.0, default.during)
    ds["zero_optimization"]["overlap_comm"] = False
    assert speed._sharded(parts, ds, cluster, 3).exposed == pytest.approx(3 * 2 * 1000 / 1e9)
    step = speed.Step(computing=3.0, communication=2.0, update=0.5, flops=1.0, gpus=1, peak=1.0, exposed=1.5)
    assert step.seconds == 3.0 + 1.5 + 0.5
