"""Compiled decoder layers give the same losses, scores and gradients, to 1e-5 in float32; unfit settings are refused.

`launch/test_kernels.sh` runs the tests that need a C++ compiler.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed_helper import run_ranks, train_all
from learned import compare, learned
from places import GATHERED
from test_packing import encoded

from zero_ds.config.schema import EncoderConfig, RunConfig
from zero_ds.data.batches import collate, collate_rows
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.options import compilation
from zero_ds.training.options.recompute import recompute_

compiles = pytest.mark.skipif("TEST_COMPILE" not in os.environ, reason="run by launch/test_kernels.sh")


def test_no_compiler_is_said_before_anything_is_loaded(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "_compiler", lambda: None)
    compilation.check(run_config("encoder"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and none was found; install g\+\+"):
        compilation.check(run_config("encoder", compile=True))
    with pytest.raises(ConfigError, match="fuse the same operations; leave one of them out"):
        compilation.check(run_config("encoder", compile=True, kernels="liger"))
    with pytest.raises(ConfigError, match="would keep the weights of frozen_weights=int8 whole"):
        compilation.check(run_config("encoder", compile=True, frozen_weights="int8"))


def test_what_zero3_gathers_is_not_compiled(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Compiled code keeps its weights for the backward pass; if they are gathered, that is the whole model."""
    for zero in ("zero3", GATHERED):
        with pytest.raises(
            ConfigError, match=rf"keep all that {Path(zero).stem}.json gathers; set zero=zero3_resident"
        ):
            ds_config(run_config("encoder", compile=True, zero=zero), 2)
    assert ds_config(run_config("encoder", compile=True, zero="zero3_resident"), 2)
    own = json.loads(Path(GATHERED).read_text())
    own["zero_optimization"]["stage3_param_persistence_threshold"] = 1_000_000
    few = tmp_path / "few.json"  # larger parameters are gathered, and only the model knows whether it has any
    few.write_text(json.dumps(own))
    assert ds_config(run_config("encoder", compile=True, zero=str(few)), 2)


@compiles
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_decoder_learns_the_same(made: Callable[..., Path], family: str) -> None:
    """Padded and packed rows of several lengths, everything trained, then the decoder frozen and recomputed."""
    compiled, plain = (
        build_model(ModelSpec(made(family, tied=True), made("clip"), EncoderConfig(path=str(made("clip"))), seed=1))
        for _ in range(2)
    )
    layers = list(compiled.family.layers(compiled.decoder))
    names = [name for name, _ in compiled.named_parameters()]
    compilation.compile_(layers)
    assert [name for name, _ in compiled.named_parameters()] == names
    samples = encoded(0, [14, 11, 6], [1, 1, 0])
    size = plain.encoder_family.vision_config(plain.encoder).image_size  # type: ignore[union-attr, arg-type]
    batches = [
        collate(samples, 0, size),
        collate(encoded(1, [9, 12], [0, 1]), 0, size),
        collate_rows([samples[:2], samples[2:]], 0, size),
    ]
    for batch in batches:
        compare(learned(compiled, batch), learned(plain, batch))
    assert frames() > 0
    for model in (compiled, plain):
        model.decoder.requires_grad_(False)
        recompute_(model, range(len(layers)))
    before = frames()
    for batch in batches[1:]:
        compare(learned(compiled, batch), learned(plain, batch))
    assert frames() > before, "compiled again, now with recomputation"


def frames() -> int:
    """Returns how often this process has compiled something."""
    import torch

    return int(torch._dynamo.utils.counters["frames"]["ok"])


def train_compiling(configs: list[RunConfig]) -> tuple[list[str], int]:
    return train_all(configs), frames()


@compiles
@pytest.mark.parametrize("stage", ["pretrain", "encoder", "decoder"])
@pytest.mark.parametrize("zero", ["zero2", "zero3_resident"])
def test_a_compiled_run_is_the_same(
    run_config: Callable[..., RunConfig], tmp_path: Path, stage: str, zero: str
) -> None:
    """Two ranks make six steps, on images and on text alone."""
    ways = {"plain": False, "compiled": True}
    configs = [run_config(stage, tmp_path / n, compile=on, zero=zero, log_every=1) for n, on in ways.items()]
    for ends, compiled_frames in run_ranks(train_compiling, 2, configs, timeout=900):
        assert ends == ["step-000006"] * 2 and compiled_frames > 0
    plain, compiled = (losses(tmp_path / name) for name in ways)
    assert compiled == pytest.approx(plain, rel=1e-5) and len(plain) == 6


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
