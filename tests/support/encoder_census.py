"""Carries a tiny random vision encoder of any type through the method: features, gradients, graft, export with proof.

`tools/census_encoders.py` does so for every type that can be a vision encoder, and a test for some unlike types.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.schema import EncoderConfig, RunConfig
from zero_ds.data.conversations import IMAGE_TOKEN
from zero_ds.data.images import ImageProcessor
from zero_ds.grafting.load import load_graft
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.shrink import seeded
from zero_ds.model.encoders import encoder_of, load_encoder, vision_config
from zero_ds.model.encoders.base import side
from zero_ds.model.encoders.listing import default_config
from zero_ds.model.encoders.shrink import shrunk, vision_class
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.training.stages import freeze_

LAYERS = 3


def write_encoder(model_type: str, out: Path, **changes: Any) -> None:
    """Writes a tiny random vision encoder of a type with the defaults of its class, and an image processor."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    config = shrunk(default_config(model_type, LAYERS))
    config.initializer_range = 0.1
    for name, value in changes.items():
        setattr(config, name, value)
    with seeded(0):
        model = vision_class(config)(config).float().eval()
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(out)
    size = side(config.image_size) if hasattr(config, "image_size") else 16
    square = {"height": size, "width": size}
    if "siglip" in model_type:
        SiglipImageProcessorPil(size=square).save_pretrained(out)
    else:
        own: dict[str, Any] = {"do_normalize": False} if model_type == "radio" else {}  # it normalises colours itself
        CLIPImageProcessorPil(size=square, crop_size=square, **own).save_pretrained(out)


def check_features(folder: Path) -> None:
    """Features must be the class's own hidden states at the patches, also with the norm, and at another size."""
    family, config = encoder_of(folder), vision_config(folder)
    model: Any = load_encoder(family, folder, dtype=torch.float32).eval()
    size = family.image_size(config)
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model(**family.inputs(config, pixels), output_hidden_states=True).hidden_states
        assert len(states) == config.num_hidden_layers + 1 == len(family.layers(model)) + 1
        for layer in (-1, -2):
            seen = family.features(model, pixels, layer, False)
            assert seen.shape == (2, family.tokens_per_image(config), config.hidden_size)
            torch.testing.assert_close(seen, states[layer][:, -seen.shape[1] :], rtol=0, atol=1e-6)
        assert len(family.used_layers(model, -2)) == config.num_hidden_layers - 1
        if family.final_norm:
            normed = family.features(model, pixels, -1, True)
            own = model.get_submodule(family.final_norm)(states[-1])[:, -seen.shape[1] :]
            torch.testing.assert_close(normed, own, rtol=0, atol=1e-6)
        patch = family.patch_size(config)
        same, larger = encoder_of(folder, size), size + 2 * patch
        assert torch.equal(same.features(model, pixels, -1, False), family.features(model, pixels, -1, False))
        if family.takes_any_size or family.interpolation:
            large = encoder_of(folder, larger)
            more = torch.rand(1, 3, larger, larger)
            count = large.features(model, more, -1, False).shape[1]
            assert count == (larger // patch) ** 2 == large.tokens_per_image(config)


def check_gradients(config: RunConfig, target: Path) -> VisionLanguageModel:
    """A loss on text after an image must reach the adapter and the parts of the encoder that train, and no others."""
    assert config.encoder is not None
    spec = ModelSpec(target, Path(config.encoder.path), config.encoder, config.adapter)
    model = build_model(spec)
    freeze_(model, config)
    trained = dict(model.parameters_of("encoder"))
    assert trained and all(p.requires_grad for p in trained.values())
    assert model.encoder is not None and model.encoder_family is not None
    size = model.encoder_family.image_size(model.encoder_family.vision_config(model.encoder))
    count = model.tokens_per_image()
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * count, 9, 11, 12, 13]])
    labels = torch.tensor([[-100] * (count + 2) + [11, 12, 13]])
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    model.train()(ids, labels, torch.ones_like(ids), pixels).total.backward()
    for name, parameter in [*model.parameters_of("adapter"), *trained.items()]:
        assert parameter.grad is not None, f"no gradient reaches {name}"
    moved = [name for name, parameter in trained.items() if parameter.grad is not None and parameter.grad.any()]
    assert len(moved) > len(trained) // 2
    last = spec.encoder_config
    assert last is not None
    few = build_model(ModelSpec(target, spec.encoder, last.model_copy(update={"train_last_layers": 1})))
    assert few.encoder is not None and few.encoder_family is not None
    inside = {id(p) for p in few.encoder_family.used_layers(few.encoder, last.feature_layer)[-1].parameters()}
    names = few.parameters_of("encoder")
    assert names and all(id(parameter) in inside for _, parameter in names)
    return model


def check_graft(run: Path, target: Path) -> None:
    """The graft on the full model must see the image."""
    grafted = load_graft(run, target)
    assert grafted.encoder is not None and grafted.encoder_family is not None
    size = grafted.encoder_family.image_size(grafted.encoder_family.vision_config(grafted.encoder))
    ids = torch.tensor([[5, *[IMAGE_TOKEN] * grafted.tokens_per_image(), 9, 11]])
    pixels = torch.rand(2, 1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = [grafted.logits(grafted.hidden_states(ids, torch.ones_like(ids), one)) for one in pixels]
    assert torch.isfinite(seen[0]).all() and (seen[0] - seen[1])[:, -1].abs().max() > 1e-6


STEPS = ("features", "gradients", "graft", "export")
"""Names of the proofs, in their order; `llava` follows if transformers' Llava has answered as the run does."""


def prove(
    model_type: str, work: Path, run_config: Callable[..., RunConfig], note: Callable[[str], None], **encoder: Any
) -> None:
    """Carries a type through all of STEPS and calls `note` after each; the first that fails raises.

    run_config: makes the config of a run of the encoder stage from changes, as the fixture of that name does.
    encoder: further settings of the run's section `encoder`.
    """
    import export_helper

    from zero_ds.export import export_model

    folder = work / "encoder"
    write_encoder(model_type, folder)
    note("model")
    check_features(folder)
    assert ImageProcessor.from_folder(folder, 16).std == [1.0] * 3 or model_type != "radio"
    note("features")
    config = run_config("encoder", work / "run", encoder={"path": str(folder), **encoder})
    surrogate = Path(str(config.surrogate))
    check_gradients(config, surrogate)
    note("gradients")
    run = export_helper.write_run(config, surrogate)
    check_graft(run, Path(config.target))
    note("graft")
    proof: dict[str, Any] = export_model(run, None, work / "export")
    assert proof["largest_logit_difference"] <= 1e-5
    note("export")
    if proof["format"] == "llava":
        note("llava")
    shutil.rmtree(work)


def step_under_zero3(model_type: str, work: Path, run_config: Callable[..., RunConfig], **encoder: Any) -> None:
    """Trains a step of the encoder stage on two ranks under ZeRO-3."""
    from distributed_helper import run_ranks, train_all

    folder = work / "zero3-encoder"
    write_encoder(model_type, folder)
    settings = EncoderConfig(path=str(folder), **encoder)
    config = run_config("encoder", work / "zero3", max_steps=1, zero="zero3", encoder=settings.model_dump())
    ends = run_ranks(train_all, 2, [config])
    wrong = [end for end in ends[0] if not end.startswith("step-")]
    if wrong:
        raise ConfigError(f"under ZeRO-3: {wrong[0].removeprefix('ConfigError: ')}")
    assert ends == [["step-000001"]] * 2, ends
