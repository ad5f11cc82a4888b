"""Stages `words` and `words-encoder`, the loss in later stages, and the report of nearest words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed_helper import run_ranks
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages


def aligned(configs: list[RunConfig]) -> list[Any]:
    """Trains runs one after another; returns the report of the first, and its lines."""
    from zero_ds.training.train import train
    from zero_ds.training.words import lines, nearest_words

    for config in configs:
        train(config)
    found = nearest_words(configs[0], count=2)
    return [found, lines(found)]


@pytest.mark.parametrize("ranks", [1])
def test_a_start_in_the_space_of_words(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], tmp_path: Path, ranks: int
) -> None:
    """The adapter learns the words of the answers; a later stage starts from it, and keeps a little of the loss."""
    words = {"align": {"scale": 10.0}, "optimizer": {"learning_rate": 1e-2}}
    configs = [
        run_config("words", tmp_path / "words", max_steps=30, **words),
        run_config("words-encoder", tmp_path / "both", max_steps=2, zero="zero1"),
        run_config(
            "pretrain", tmp_path / "later", max_steps=2, init_from=[str(tmp_path / "words")], align={"weight": 0.1}
        ),
        run_config("words", tmp_path / "sharded", max_steps=2, zero="zero3", **words),
        run_config(
            "pretrain",
            tmp_path / "later sharded",
            max_steps=2,
            init_from=[str(tmp_path / "words")],
            align={"weight": 0.1},
            zero="zero3",
        ),
        run_config("pretrain", tmp_path / "without", max_steps=2, init_from=[str(tmp_path / "words")]),
    ]
    found, lines = run_ranks(aligned, ranks, configs)[0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "words" / "metrics.jsonl").read_text().splitlines()]
    assert min(losses[-6:]) < 0.8 * losses[0]
    names = set(load_file(tmp_path / "words" / "step-000030" / "weights.safetensors"))
    assert names == {f"adapter.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    both = set(load_file(tmp_path / "both" / "step-000002" / "weights.safetensors"))
    assert names < both and any(name.startswith("encoder.") for name in both)

    def first(run: str) -> float:
        return float(json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    assert first("sharded") == pytest.approx(losses[0], rel=1e-4)
    assert first("later sharded") == pytest.approx(first("later"), rel=1e-4)
    assert first("later") > first("without") + 1e-3, "the loss in the space of words is a part of the later stage's"
    assert len(found) == 2 and json.loads((tmp_path / "words" / "words.json").read_text())[0]["sample"] == "image-0"
    hits = sum(bool({w for w, _ in e["nearest"]} & {w for w, _ in e["answers"]}) for e in found)
    assert hits and len(lines) == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"preview": {"every_steps": 5}},
            r"stage words has no decoder that could answer; set preview\.every_steps=null",
        ),
        ({"distill": {"logits": 1.0}}, "stage words has no decoder to distil"),
        ({"dynamic_loss": {"order": 0.5}}, "losses and dynamic_loss have no place"),
        ({"encoder": None}, r"needs a vision encoder; set encoder\.path"),
    ],
)
def test_what_needs_a_decoder_is_refused(run_config: Callable[..., RunConfig], changes: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        stages.stage_of(run_config("words", **changes))


def test_a_weight_without_effect_is_said(run_config: Callable[..., RunConfig]) -> None:
    config = run_config("translator", encoder=None, align={"weight": 0.1})
    assert not stages.uses_words(config)
    assert stages.remarks(config) == ["align.weight=0.1 has no effect: this run sees no images."]
    assert stages.uses_words(run_config("encoder", align={"weight": 0.1}))
    assert not stages.uses_words(run_config("encoder"))
