"""Frozen decoder layers in 8 bits: how far losses and gradients move, which weights stay as they were, and refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from distributed_helper import run_ranks, train_all
from learned import apart
from safetensors.torch import load_file
from test_packing import encoded
from torch import nn

from zero_ds.config.schema import EncoderConfig, LoraConfig, RunConfig
from zero_ds.data.batches import collate
from zero_ds.grafting.load import load_trained
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.distillation import Teacher
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training import stages
from zero_ds.training.checkpoint.manifest import describe_run
from zero_ds.training.deepspeed import ds_config
from zero_ds.training.options.int8 import FrozenLinear, quantize_
from zero_ds.training.planning.architecture import architecture
from zero_ds.training.resume import difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_layer_multiplies_with_rounded_weights(dtype: torch.dtype, bias: bool) -> None:
    """Weights move by at most half a step of their row; products and gradients are exactly those of such weights."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)
    linear.weight[3] *= 1000
    linear.weight[5] = 0
    layer = FrozenLinear(linear)
    assert layer.weight.dtype == torch.int8 and not any(p.requires_grad for p in layer.parameters())
    rounded = layer.weight * layer.scale
    assert rounded.dtype == dtype
    off = (layer.weight.double() * layer.scale.double() - linear.weight.double()).abs()
    # in bf16 the scale itself is rounded, so that a row's largest may lie 0.25 steps beyond 127
    assert bool((off <= (0.5 + 2**-9 * 127) * layer.scale.double()).all())
    twin = nn.Linear(48, 32, bias=bias).to(dtype).requires_grad_(False)
    twin.load_state_dict({**linear.state_dict(), "weight": rounded})
    ours, theirs = (torch.randn(2, 5, 48, dtype=dtype).requires_grad_() for _ in range(2))
    theirs.data.copy_(ours.data)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(ours)
    assert all(t.dtype == torch.int8 or t.numel() == 32 for t in kept), "the dequantized weight is not kept"
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert apart(output, twin(theirs)) < tolerance
    upstream = torch.randn_like(output)
    output.backward(upstream)
    twin(theirs).backward(upstream)
    assert ours.grad is not None and theirs.grad is not None and apart(ours.grad, theirs.grad) < tolerance


def model_on(made: Callable[..., Path], decoder: Path) -> VisionLanguageModel:
    clip = made("clip")
    return build_model(ModelSpec(decoder, clip, EncoderConfig(path=str(clip)), seed=1))


def learned(model: VisionLanguageModel, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    """Returns the loss, and the gradient that arrives at the image features."""
    features: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        features.append(output)

    assert model.adapter is not None
    handle = model.adapter.register_forward_hook(keep)
    outcome = model.train()(**batch.inputs())
    outcome.total.backward()
    handle.remove()
    assert features[0].grad is not None
    return float(outcome.total.detach()), features[0].grad


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_move_little(made: Callable[..., Path], family: str) -> None:
    """Six layers deep, with weights far from linear: losses within 0.5 %, features' gradients within 15 %."""
    plain, quantized = (model_on(made, made(family, tied=True)) for _ in range(2))
    for model in (plain, quantized):
        model.decoder.requires_grad_(False)
    names = {name: p.shape for name, p in quantized.named_parameters()}
    assert quantize_(quantized) == tiny.LAYERS
    assert {name: p.shape for name, p in quantized.named_parameters()} == names
    linears = [m for layer in plain.family.layers(plain.decoder) for m in layer.modules() if isinstance(m, nn.Linear)]
    rounded = [m for m in quantized.decoder.modules() if isinstance(m, FrozenLinear)]
    assert len(rounded) == len(linears)
    assert sum(m.weight.nbytes for m in linears) == 4 * sum(m.weight.nbytes for m in rounded)
    batch = collate(encoded(0, [30, 21, 12], [1, 1, 0]), 0, tiny.IMAGE_SIZE)
    (loss, gradient), (expected, wanted) = learned(quantized, batch), learned(plain, batch)
    assert loss == pytest.approx(expected, rel=5e-3) and loss != expected
    assert apart(gradient, wanted) < 0.15


def test_what_trains_stays_and_a_teacher_follows(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], small: Path
) -> None:
    """Translators that learn from the target are left alone; the layers that only the target has are not."""
    config = run_config("encoder", distill={"logits": 1.0, "hidden": 0.5})
    batch = collate(encoded(0, [30, 21], [1, 1]), 0, tiny.IMAGE_SIZE)
    found = []
    for quantized in (False, True):
        model = model_on(made, small)
        model.teacher = Teacher(model, made("llama", tied=True), config.distill, torch.float32)
        stages.freeze_(model, config)
        if quantized:
            quantize_(model)
            assert not any(isinstance(m, FrozenLinear) for layer in model.translators() for m in layer.modules())
            assert all(p.dtype == torch.float32 for _, p in model.parameters_of("translator"))
            assert any(isinstance(m, FrozenLinear) for m in model.teacher.modules())
        found.append(learned(model, batch))
    (expected, wanted), (loss, gradient) = found
    assert loss == pytest.approx(expected, rel=5e-3) and loss != expected
    assert apart(gradient, wanted) < 0.15


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_saves_checkpoints_resumes_and_grafts(
    run_config: Callable[..., RunConfig],
    trained: Path,
    small: Path,
    made: Callable[..., Path],
    tmp_path: Path,
    precision: str,
) -> None:
    """Two ranks under ZeRO-2 resume to the same bits, and their losses are near those of unrounded weights."""
    base: dict[str, Any] = {
        "init_from": [str(trained / "pretrain")],
        "precision": precision,
        "activation_checkpointing": True,
        "optimizer": {"learning_rate": 1e-3, "warmup_ratio": 0.0},
        "max_steps": 4,
        "checkpoint": {"every_steps": 2, "keep": 3},
    }
    configs = [run_config("encoder", tmp_path / name, frozen_weights=name, **base) for name in ("native", "int8")]
    assert run_ranks(train_all, 2, configs) == [["step-000004"] * 2] * 2
    if precision == "fp32":
        again = tmp_path / "again"
        shutil.copytree(tmp_path / "int8", again)
        shutil.rmtree(again / "step-000004")
        (again / "latest").write_text("step-000002\n")
        resumed = configs[1].model_copy(update={"out": str(again)})
        other = configs[0].model_copy(update={"out": str(again)})
        everything = configs[1].model_copy(update={"stage": "decoder", "out": str(tmp_path / "all")})
        adapted = everything.model_copy(update={"lora": LoraConfig(rank=2), "out": str(tmp_path / "adapted")})
        ends = run_ranks(train_all, 2, [other, everything, adapted, resumed])[0]
        assert "holds another run (frozen_weights: 'int8' -> 'native')" in ends[0]
        assert ends[1].startswith("ConfigError: stage decoder trains the decoder; frozen_weights=int8 is for frozen")
        assert ends[2].startswith("ConfigError: frozen_weights=int8 needs frozen decoder layers, and all of them train")
        assert ends[3] == "step-000004"
        first, second = (load_file(run / "step-000004/weights.safetensors") for run in (tmp_path / "int8", again))
        assert all(torch.equal(first[name], second[name]) for name in first)
    native, rounded = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("native", "int8")
    )
    assert rounded == pytest.approx(native, rel=2e-2) and rounded != native
    before, after = (load_file(tmp_path / name / "step-000004/weights.safetensors") for name in ("native", "int8"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    graft = load_trained(tmp_path / "int8", made("llama", tied=True))
    assert not any(isinstance(module, FrozenLinear) for module in graft.modules())
    held = dict(graft.named_targets())
    assert all(torch.equal(held[name], tensor.float()) for name, tensor in after.items())


def test_checkpoints_without_the_entry_are_resumed(run_config: Callable[..., RunConfig]) -> None:
    config, rounded = run_config("encoder"), run_config("encoder", frozen_weights="int8")
    assert config.fingerprint() != rounded.fingerprint()
    older = describe_run(config)["config"]
    del older["frozen_weights"]
    assert difference(older, config.model_dump(mode="json")) == "no difference"
    assert difference(older, rounded.model_dump(mode="json")) == "frozen_weights: 'native' -> 'int8'"
    later = config.model_copy(update={"zero": "zero1", "seed": 5}).model_dump(mode="json")
    assert difference(older, later) == "seed: 0 -> 5"


@pytest.mark.parametrize("zero", ["zero3", "zero3_resident"])
def test_partitions_are_refused(run_config: Callable[..., RunConfig], zero: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"keeps whole weights on each rank, which {zero}\.json shards; set zero=zero2"
    ):
        ds_config(run_config("encoder", frozen_weights="int8", zero=zero), 1)


def test_a_plan_counts_a_byte_each(
    run_config: Callable[..., RunConfig], made: Callable[..., Path], small: Path
) -> None:
    config = run_config("encoder", frozen_weights="int8")
    model = model_on(made, small).to(torch.bfloat16)
    stages.freeze_(model, config)
    quantize_(model)
    planned = architecture(config, dtype=torch.bfloat16).size.frozen_bytes
    assert planned == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert planned < architecture(config.model_copy(update={"frozen_weights": "native"})).size.frozen_bytes
