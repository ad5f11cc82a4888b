"""Liger's kernels replace transformers' layers with the same losses, scores and gradients, to 1e-5 in float32.

Most of it runs in Triton's interpreter, for which `launch/test_kernels.sh` installs Liger; no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from interpreted import complete_
from learned import TOLERANCE, apart, compare, learned
from places import GATHERED
from safetensors.torch import load_file
from test_packing import encoded

from zero_ds.config.schema import EncoderConfig, RunConfig
from zero_ds.data.batches import collate, collate_rows
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.distillation import Teacher
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.options import liger as kernels
from zero_ds.training.options.recompute import recompute_

interpreted = pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="run by launch/test_kernels.sh")
if "TRITON_INTERPRET" in os.environ:  # in ranks as well, as far as they import this module
    complete_()


def test_what_is_lacking_is_said_before_anything_is_loaded(
    run_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels.check(run_config("encoder"))
    config = run_config("encoder", kernels="liger")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'zero_ds\[kernels\]'"):
        kernels.check(config)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    with pytest.raises(ConfigError, match="needs a GPU"):
        kernels.check(config)


def test_a_run_asks_first(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = run_config("encoder", tmp_path / "run", kernels="liger", target="nowhere")
    ((sentence,),) = run_ranks(train_without_interpreter, 1, config)
    assert sentence.startswith("ConfigError: kernels=liger needs")


def train_without_interpreter(config: RunConfig) -> list[str]:
    os.environ.pop("TRITON_INTERPRET", None)
    return train_all([config])


def tiny_model(made: Callable[..., Path], decoder: Path) -> VisionLanguageModel:
    clip = made("clip")
    return build_model(ModelSpec(decoder, clip, EncoderConfig(path=str(clip)), seed=1))


@interpreted
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_scores_and_gradients_are_the_same(made: Callable[..., Path], family: str) -> None:
    """Trains all weights or through frozen ones, with padded or packed rows, and activation checkpointing on or off."""
    plain, fused = (tiny_model(made, made(family, tied=True)) for _ in range(2))
    names = [name for name, _ in fused.named_parameters()]
    kernels.fuse_(fused.decoder)
    assert [name for name, _ in fused.named_parameters()] == names
    samples = encoded(0, [14, 11, 6], [1, 1, 0])
    padded = collate(samples, 0, tiny.IMAGE_SIZE)
    packed = collate_rows([samples[:2], samples[2:]], 0, tiny.IMAGE_SIZE)
    compare(learned(fused, padded), learned(plain, padded))
    inputs = [padded.input_ids, padded.attention_mask, padded.pixel_values]
    with torch.no_grad():
        ours, theirs = (model.logits(model.hidden_states(*inputs)) for model in (fused, plain))
    seen = padded.attention_mask.bool()
    assert apart(ours[seen], theirs[seen]) < TOLERANCE
    for model in (plain, fused):
        recompute_(model, range(len(model.family.layers(model.decoder))))
    compare(learned(fused, packed), learned(plain, packed))
    for model in (plain, fused):
        model.decoder.requires_grad_(False)
    through_frozen = learned(fused, packed)
    assert any(name.startswith("encoder.") for name in through_frozen)
    assert not any(name.startswith("decoder.") for name in through_frozen)
    compare(through_frozen, learned(plain, packed))


@interpreted
def test_a_surrogate_that_follows_its_target_learns_the_same(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], small: Path
) -> None:
    """Distillation runs layers twice, and lends some to the target's part: each pass has its own gradients."""
    config = run_config("encoder", distill={"logits": 1.0, "hidden": 0.5, "next_token": 0.5})
    batch = collate(encoded(0, [14, 11], [1, 1]), 0, tiny.IMAGE_SIZE)
    found = []
    for fused in (True, False):
        model = tiny_model(made, small)
        for layer in model.translators():  # as after some training
            for parameter in layer.parameters():
                parameter.data *= 1.1
        model.teacher = Teacher(model, made("llama", tied=True), config.distill, torch.float32)
        stages.freeze_(model, config)
        if fused:
            kernels.fuse_(model.decoder)
        found.append(learned(model, batch))
    assert any(".layers." in name and name.startswith("decoder.") for name in found[0])
    compare(*found)


@interpreted
def test_other_models_of_the_process_stay_as_they_are(made: Callable[..., Path]) -> None:
    first, second = (tiny_model(made, made("llama", tied=True)) for _ in range(2))
    modeling = vars(sys.modules[type(first.decoder).__module__])
    before = dict(modeling)
    batch = collate(encoded(0, [9, 6], [0, 0]), 0, tiny.IMAGE_SIZE)
    expected = learned(second, batch)
    kernels.fuse_(first.decoder)
    assert dict(modeling) == before
    third = tiny_model(made, made("llama", tied=True))
    for model in (second, third):
        assert all(torch.equal(value, expected[name]) for name, value in learned(model, batch).items())


@interpreted
def test_what_the_kernels_do_not_compute_is_refused(made: Callable[..., Path]) -> None:
    decoder: Any = tiny_model(made, made("llama", tied=True)).decoder
    decoder.config.hidden_act = "gelu"
    with pytest.raises(ConfigError, match=r"computes silu, and this decoder gelu; set kernels=torch"):
        kernels.fuse_(decoder)
    decoder.config.model_type = "unheard_of"
    with pytest.raises(ConfigError, match="no kernels for model_type 'unheard_of'"):
        kernels.fuse_(decoder)


def train_interpreted(configs: list[RunConfig]) -> list[str]:
    return train_all(configs)  # a function of this module, for which a rank imports it


@interpreted
@pytest.mark.parametrize("zero", ["zero2", GATHERED], ids=["zero2", "zero3"])
def test_a_run_is_the_same(run_config: Callable[..., RunConfig], tmp_path: Path, zero: str) -> None:
    """Two ranks make two steps of the encoder stage with activation checkpointing, packed rows and demo sentences."""
    configs = [
        run_config(
            "encoder",
            tmp_path / name,
            kernels=name,
            zero=zero,
            activation_checkpointing=True,
            data={**run_config("encoder").data.model_dump(), "packing": True},
            max_steps=2,
            adapter={"match_embeddings": True},
        )
        for name in ("torch", "liger")
    ]
    assert run_ranks(train_interpreted, 2, configs, timeout=900) == [["step-000002"] * 2] * 2
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("torch", "liger")]
    theirs, ours = ([json.loads(line) for line in of_run] for of_run in lines)
    for before, after in zip(theirs, ours, strict=True):
        for name in ("loss", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=TOLERANCE)
    before, after = (load_file(tmp_path / name / "step-000002/weights.safetensors") for name in ("torch", "liger"))
    assert before.keys() == after.keys()
    assert json.loads((tmp_path / "liger/step-000002/manifest.json").read_text())["config"]["kernels"] == "liger"
