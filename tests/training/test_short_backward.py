"""Steps of text alone: the backward pass ends at the first layer that learns, and nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from safetensors.torch import load_file

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.training import stages
from zero_ds.training.options.recompute import recompute_
from zero_ds.training.planning.flops import step_cost


def model_of(config: RunConfig) -> VisionLanguageModel:
    """Returns the run's model, in which the parts of its stage train."""
    assert config.encoder is not None
    model = build_model(
        ModelSpec(
            decoder=Path(str(config.surrogate)),
            encoder=Path(config.encoder.path),
            encoder_config=config.encoder,
            adapter_config=config.adapter,
        )
    )
    stages.freeze_(model, config)
    return model


@pytest.mark.parametrize("recomputed", [0, 2, 4])
def test_gradients_are_the_same_and_early_layers_are_skipped(
    run_config: Callable[..., RunConfig], recomputed: int
) -> None:
    model = model_of(run_config("pretrain"))
    model.train()
    recompute_(model, range(recomputed))
    passed: list[int] = []
    for number, layer in enumerate(model.family.layers(model.decoder)):
        layer.register_full_backward_pre_hook(lambda *_, number=number: passed.append(number))
    input_ids = torch.randint(5, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": input_ids, "labels": input_ids, "attention_mask": torch.ones_like(input_ids)}
    pixels = torch.zeros(1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    found = []
    for text_only in (False, True):
        model.zero_grad()
        passed.clear()
        loss = model(**batch, pixel_values=pixels, text_only=text_only).total
        loss.backward()
        learned = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), learned, set(passed)))
    (whole, all_gradients, all_layers), (short, gradients, layers) = found
    assert torch.equal(whole, short)
    assert gradients.keys() == all_gradients.keys() and any("adapter" in name for name in gradients)
    assert all(torch.equal(gradients[name], all_gradients[name]) for name in gradients)
    first = model.plan.translators[0]  # type: ignore[union-attr]
    assert first > 0 and 0 in all_layers and min(layers) == first


def test_a_text_costs_less_where_its_backward_pass_ends(run_config: Callable[..., RunConfig]) -> None:
    """Text alone costs fewer counted FLOPs in `pretrain`, and the same in `decoder`, where everything learns."""
    cost = step_cost(model_of(run_config("pretrain")))
    work = {"tokens": 100.0, "pairs": 1000.0, "supervised": 10.0, "image_tokens": 0.0}
    assert cost.flops(**work, images=0) < 0.95 * cost.flops(**work, images=1e-9)
    whole = step_cost(model_of(run_config("decoder")))
    assert 0.9 < whole.flops(**work, images=0) / whole.flops(**work, images=1e-9) <= 1


def test_two_ranks_learn_the_same(
    run_config: Callable[..., RunConfig], trained: Path, data: Path, tmp_path: Path
) -> None:
    """Steps of text between steps with images, alternating as DeepSpeed would not expect, give the same bits."""
    mixed = json.loads(data.read_text())
    texts, shown = ([r for r in mixed if ("image" in r) is has_image] for has_image in (False, True))
    records = [*texts, *texts, *shown[:4], *texts, *texts, *shown[2:6]]
    shutil.copytree(data.parent / "images", tmp_path / "images")
    (tmp_path / "mixed.json").write_text(json.dumps(records))
    configs = [
        run_config(
            "pretrain",
            tmp_path / f"{zero}-{short}",
            zero=zero,
            short_backward=short,
            data={"sources": [{"path": str(tmp_path / "mixed.json")}], "max_length": 512, "system_prompt": ""},
            init_from=[str(trained / "pretrain")],
            optimizer={"learning_rate": 1e-3},
            max_steps=8,
        )
        for zero in ("zero2", "zero3_resident")
        for short in (False, True)
    ]
    assert run_ranks(train_all, 2, configs) == [["step-000008"] * len(configs)] * 2
    for zero in ("zero2", "zero3_resident"):
        long, short = (tmp_path / f"{zero}-{short}" for short in (False, True))
        losses = [
            [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (long, short)
        ]
        assert losses[0] == losses[1] and len(losses[0]) == 8
        before, after = (load_file(run / "step-000008/weights.safetensors") for run in (long, short))
        assert all(torch.equal(before[name], after[name]) for name in before)
