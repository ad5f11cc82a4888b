"""Layers that repeat others are counted for `zero-ds plan` without being run, which changes no number."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from torch import nn

from zero_ds.config.loading import load_run
from zero_ds.training.planning import activations
from zero_ds.training.planning.architecture import architecture


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("llama-3.2-3b/pretrain", []),
        ("llama-3.2-3b/encoder", ["attention=eager"]),
        ("llama-3.2-3b/encoder", ["frozen_weights=int8", "distill.logits=1"]),
        ("llama-3.2-3b/decoder", ["data.packing=true"]),
    ],
)
def test_layers_that_repeat_others_count_as_if_they_ran(
    monkeypatch: pytest.MonkeyPatch, recipe: str, overrides: list[str]
) -> None:
    config = load_run(recipe, overrides)
    model = architecture(config).model
    layers = model.family.layers(model.decoder)
    ran: list[nn.Module] = []
    inner = type(layers[0]).forward

    def forward(layer: nn.Module, *inputs: Any, **named: Any) -> Any:
        ran.append(layer)
        return inner(layer, *inputs, **named)

    monkeypatch.setattr(type(layers[0]), "forward", forward)
    short = activations.longest_sample_bytes(model, config)
    assert len(ran) < len(layers) / 2, "few of them ran"
    ran.clear()
    with monkeypatch.context() as patch:
        patch.setattr(activations, "_repeats_skipped", lambda stacks, saved: contextlib.nullcontext())
        whole = activations.longest_sample_bytes(model, config)
    assert len(ran) == len(layers), "nothing of the stand-ins is left"
    assert short == whole
    assert any(short.layers)


def test_layers_differ_by_what_trains_and_by_their_settings() -> None:
    model = architecture(load_run("llama-3.2-3b/pretrain")).model
    first, second = list(model.family.layers(model.decoder))[:2]
    assert activations._traits(first) == activations._traits(second)
    next(second.parameters()).requires_grad_(True)
    assert activations._traits(first) != activations._traits(second)
    next(second.parameters()).requires_grad_(False)
    second.attention_type = "another"
    assert activations._traits(first) != activations._traits(second)
