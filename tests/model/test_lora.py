"""LoRA has no effect at first, is on the requested layers, is saved whole under ZeRO-3, and is merged in a graft."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_helper import run_ranks, train_all
from safetensors.torch import load_file

from zero_ds.config.schema import LoraConfig, RunConfig
from zero_ds.model import lora
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import family_of
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError


@pytest.fixture
def build(made: Callable[..., Path]) -> Callable[..., VisionLanguageModel]:
    def make(family: str = "llama", **options: object) -> VisionLanguageModel:
        config = LoraConfig.model_validate(options) if options else None
        return build_model(ModelSpec(made(family, tied=True), lora=config)).eval()

    return make


def said(model: VisionLanguageModel) -> torch.Tensor:
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        return model.logits(model.hidden_states(ids, torch.ones_like(ids)))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_adapters_begin_without_effect_and_merge_into_the_weights(
    build: Callable[..., VisionLanguageModel], family: str
) -> None:
    plain, model = build(family), build(family, rank=3, alpha=7, modules=["q_proj", "up_proj"], layers=[0, 4])
    torch.testing.assert_close(said(model), said(plain), rtol=0, atol=0)
    named = dict(model.parameters_of("lora"))
    prefix = f"lora.{family_of(Path(plain.decoder.config.name_or_path)).layer_prefix}"  # type: ignore[union-attr]
    assert set(named) == {
        f"{prefix}{layer}.{module}.lora_{side}.weight"
        for layer in (0, 4)
        for module in ("self_attn.q_proj", "mlp.up_proj")
        for side in "AB"
    }
    assert {n for n, _ in model.parameters_of("decoder")} == {n for n, _ in plain.parameters_of("decoder")}
    with torch.no_grad():
        for name, parameter in named.items():
            if ".lora_B." in name:
                parameter.normal_()
    changed = said(model)
    assert not torch.allclose(changed, said(plain), atol=1e-2)
    lora.merge_(model.decoder)
    torch.testing.assert_close(said(model), changed, atol=1e-4, rtol=1e-4)
    assert [n for n, _ in model.decoder.named_parameters()] == [n for n, _ in plain.decoder.named_parameters()]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"modules": ["q_prok"]}, "lora.modules names 'q_prok'; a layer of this decoder has down_proj, gate_proj"),
        ({"layers": [6]}, "lora.layers names layer 6; the decoder has layers 0 to 5"),
        ({"layers": [-1]}, "lora.layers names layer -1"),
    ],
)
def test_what_the_decoder_does_not_have(
    build: Callable[..., VisionLanguageModel], options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        build(**options)


@pytest.fixture(scope="module")
def runs(run_config: Callable[..., RunConfig], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs the decoder stage with LoRA from a trained encoder: with ZeRO-2, with ZeRO-3, and resumed on one rank."""
    import shutil

    root = tmp_path_factory.mktemp("lora")
    options = {
        "lora": {"rank": 4, "alpha": 8, "layers": [1, 4]},
        "init_from": [str(trained / "encoder")],
        "max_steps": 4,
        "checkpoint": {"every_steps": 2, "keep": 5},
    }
    configs = [run_config("decoder", root / zero, zero=zero, **options) for zero in ("zero2", "zero3")]
    assert run_ranks(train_all, 2, configs) == [["step-000004"] * 2] * 2
    shutil.copytree(root / "zero3", root / "again")
    shutil.rmtree(root / "again" / "step-000004")
    (root / "again" / "latest").write_text("step-000002\n")
    assert run_ranks(train_all, 1, [run_config("decoder", root / "again", zero="zero3", **options)]) == [
        ["step-000004"]
    ]
    return root


def test_what_is_saved_is_whole_and_the_same_under_every_stage(runs: Path) -> None:
    two, three, again = (
        load_file(runs / n / "step-000004" / "weights.safetensors") for n in ("zero2", "zero3", "again")
    )
    adapters = {name: tensor for name, tensor in three.items() if name.startswith("lora.")}
    assert len(adapters) == 2 * 2 * 2 and not any(name.startswith("decoder.") for name in three)
    for name, tensor in adapters.items():
        assert tensor.numel() > 0 and tensor.any(), f"{name} is empty or was not trained"
        assert 4 in tensor.shape
    for name, tensor in three.items():
        if name.endswith("k_proj.bias"):
            continue  # has no effect on a softmax: its gradient is rounding, which Adam blows up
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(again[name], tensor, atol=1e-4, rtol=1e-4)


def test_a_graft_with_merged_adapters_answers_like_the_model_in_training(
    runs: Path, made: Callable[..., Path], small: Path
) -> None:
    from zero_ds.grafting.compatibility import run_config
    from zero_ds.grafting.load import load_graft, load_trained
    from zero_ds.training.checkpoint.checkpoint import find_checkpoint
    from zero_ds.training.checkpoint.load import load_weights_

    target = made("llama", tied=True)
    merged = load_graft(runs / "zero3", target)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    unmerged = build_model(ModelSpec(target, lora=run_config(find_checkpoint(runs / "zero3")).lora)).eval()
    checkpoint = find_checkpoint(runs / "zero3")
    load_weights_(unmerged.named_targets(), checkpoint, skip=lambda name: not name.startswith("lora."))
    torch.testing.assert_close(said(merged), said(unmerged), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(said(merged), said(build_model(ModelSpec(target)).eval()), atol=1e-3), "they do something"
    with pytest.raises(ConfigError, match=r"was trained with LoRA on its target, and .* is a surrogate"):
        load_trained(runs / "zero3", small)


def test_export_proves_a_model_with_adapters(runs: Path, made: Callable[..., Path], tmp_path: Path) -> None:
    from zero_ds.export import export_model

    proof = export_model(runs / "zero3", str(made("llama", tied=True)), tmp_path / "export")
    assert proof and (tmp_path / "export" / "proof.json").is_file()
