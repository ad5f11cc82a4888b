"""Vision encoders without code of their own: found by their structure and verified, or refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoder_census
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from zero_ds.cli.main import app
from zero_ds.config.schema import EncoderConfig, RunConfig
from zero_ds.data.images import ImageProcessor
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.encoders import encoder_of, listing, load_encoder, vision_config
from zero_ds.model.encoders.shrink import shrunk
from zero_ds.model.encoders.structure import describe
from zero_ds.runtime.errors import ConfigError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


UNLIKE: dict[str, tuple[dict[str, Any], bool]] = {
    "siglip": ({"image_size": 24}, False),  # no token before the patches; positions interpolated when asked
    "siglip2": ({"feature_layer": -2}, False),  # rows of patches instead of pixels
    "dinov2_with_registers": ({"patch_norm": True}, False),  # five tokens before the patches
    "aimv2_vision_model": ({"patch_norm": True, "feature_layer": -2}, False),  # two norms of the same name
    "radio": ({"image_size": 20}, False),  # ten tokens before the patches; normalises colours itself
    "dinov3_vit": ({"image_size": 24, "train_last_layers": 2}, False),  # rotary positions, at random in training
    "vit": ({"feature_layer": 2}, True),  # tensors have other names in files than in the class
}
"""Types, each with settings of the run and whether transformers' own Llava answers as the run does."""


@pytest.mark.parametrize("model_type", UNLIKE)
def test_unlike_types_go_through_the_method(
    model_type: str, run_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export_helper

    export_helper.here(monkeypatch)
    done: list[str] = []
    settings, llava = UNLIKE[model_type]
    encoder_census.prove(model_type, tmp_path, run_config, done.append, **settings)
    assert done == ["model", *encoder_census.STEPS, *(["llava"] if llava else [])]


def test_unlike_types_train_under_zero3(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Position tables that a parent module reads, and pooling heads that no loss reaches, are partitioned as well."""
    from distributed_helper import run_ranks, train_all

    configs = []
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "siglip2": ({}, {}),
        "siglip": ({}, {"image_size": 24}),
        "dinov3_vit": ({"num_register_tokens": 0}, {}),  # a parameter without elements
    }
    for model_type, (shape, settings) in kinds.items():
        encoder_census.write_encoder(model_type, tmp_path / model_type, **shape)
        encoder = {"path": str(tmp_path / model_type), **settings}
        run = tmp_path / f"{model_type}-run"
        configs.append(run_config("encoder", run, max_steps=1, zero="zero3", encoder=encoder))
    assert run_ranks(train_all, 2, configs) == [["step-000001"] * 3] * 2


# -- sizes of images ---------------------------------------------------------------------------------------------------


def test_another_size_interpolates_positions(made: Callable[..., Path]) -> None:
    """Gives the same bits as before at the config's own size."""
    folder = made("clip")
    plain, same, larger = (encoder_of(folder, size) for size in (None, tiny.IMAGE_SIZE, 48))
    module: Any = load_encoder(plain, folder, dtype=torch.float32).eval()
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        expected = module(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(plain.features(module, pixels, -2, False), expected)
        assert torch.equal(same.features(module, pixels, -2, False), expected)
        more = torch.rand(1, 3, 48, 48)
        own = module(pixel_values=more, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
        assert torch.equal(larger.features(module, more, -1, False), own[:, 1:])
    assert larger.tokens_per_image(module.config) == 9


def test_a_run_at_another_size(run_config: Callable[..., RunConfig], made: Callable[..., Path]) -> None:
    config = run_config("encoder", encoder={"path": str(made("clip")), "image_size": 64})
    assert config.encoder is not None
    model = build_model(ModelSpec(Path(config.target), made("clip"), config.encoder))
    assert model.tokens_per_image() == 16 and model.image_features(torch.rand(1, 3, 64, 64)).shape[1] == 16
    assert config.fingerprint() != run_config("encoder").fingerprint()
    unset = run_config("encoder", encoder={"path": str(made("clip")), "image_size": None})
    assert unset.fingerprint() == run_config("encoder").fingerprint()


@pytest.mark.parametrize(
    ("model_type", "size", "reason"),
    [
        (
            "siglip",
            30,
            r"image_size=30 is not a multiple of the patches of .*, which have 4 x 4 pixels; choose (28|32)",
        ),
        ("siglip2", 18, "not a multiple"),
        ("aimv2_vision_model", 24, "positions for images of 16 pixels only, and its class does not interpolate"),
    ],
)
def test_sizes_that_an_encoder_cannot_read(tmp_path: Path, model_type: str, size: int, reason: str) -> None:
    encoder_census.write_encoder(model_type, tmp_path)
    with pytest.raises(ConfigError, match=reason) as caught:
        encoder_of(tmp_path, size)
    assert "\n" not in str(caught.value)


def test_a_class_that_reads_any_size_takes_its_processors(tmp_path: Path) -> None:
    """DINOv2's config names the size of its table of positions, and its image processor the size that it is used at."""
    encoder_census.write_encoder("dinov2", tmp_path, image_size=32)
    path = tmp_path / "preprocessor_config.json"
    size = {"height": 20, "width": 20}
    path.write_text(json.dumps({**json.loads(path.read_text()), "size": {"shortest_edge": 24}, "crop_size": size}))
    assert ImageProcessor.size_of(tmp_path) == 20
    family = encoder_of(tmp_path)
    assert family.image_size(vision_config(tmp_path)) == 20 and family.tokens_per_image(vision_config(tmp_path)) == 25
    assert encoder_of(tmp_path, 32).tokens_per_image(vision_config(tmp_path)) == 64
    path.unlink()
    assert encoder_of(tmp_path).image_size(vision_config(tmp_path)) == 32


# -- image processors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "mean", "std"),
    [
        ({}, 0.5, 0.25),
        ({"do_normalize": False}, 0.0, 1.0),
        ({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, 0.5, 0.5),
        ({"do_rescale": False, "image_mean": [127.5] * 3, "image_std": [63.75] * 3}, 0.5, 0.25),
    ],
)
def test_colours_are_normalised_as_the_encoders_own_files_say(
    tmp_path: Path, changes: dict[str, Any], mean: float, std: float
) -> None:
    own = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2, "size": {"height": 16, "width": 16}}
    content = {"image_processor_type": "SiglipImageProcessor", **own, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    processor = ImageProcessor.from_folder(tmp_path, 16)
    assert processor.mean == pytest.approx([mean] * 3) and processor.std == pytest.approx([std] * 3)
    assert int(processor.resample) == 2 and ImageProcessor.size_of(tmp_path) == 16


def test_a_folder_without_image_processor(run_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from distributed_helper import run_ranks, train_all

    encoder_census.write_encoder("siglip", tmp_path / "siglip")
    (tmp_path / "siglip" / "preprocessor_config.json").unlink()
    config = run_config("encoder", tmp_path / "run", encoder={"path": str(tmp_path / "siglip")})
    ((end,),) = run_ranks(train_all, 1, [config])
    assert "holds no preprocessor_config.json that says how images are normalised" in end and "\n" not in end


# -- towers of larger models -------------------------------------------------------------------------------------------


def two_towers(model_type: str, out: Path) -> Any:
    """Writes a class with a text and a vision tower, of the tiny sizes of the census; returns its vision tower."""
    from transformers import CONFIG_MAPPING, AutoModel

    whole: Any = CONFIG_MAPPING[model_type]()
    text = type(whole.text_config)(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=5, num_attention_heads=4
    )
    vision = shrunk(listing.default_config(model_type, 3))
    config = type(whole)(text_config=text.to_dict(), vision_config=vision.to_dict())
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(config).float().eval()
    model.save_pretrained(out)
    return model.vision_model


@pytest.mark.parametrize("model_type", ["clip", "siglip", "siglip2", "metaclip_2", "aimv2"])
def test_the_vision_tower_of_a_class_with_text(model_type: str, tmp_path: Path) -> None:
    tower = two_towers(model_type, tmp_path)
    family = encoder_of(tmp_path)
    module = load_encoder(family, tmp_path, dtype=torch.float32)
    own = {name: value for name, value in tower.named_parameters() if not name.startswith("head.")}
    assert type(module) is type(tower) and dict(module.named_parameters()).keys() == own.keys()
    assert all(torch.equal(parameter, own[name]) for name, parameter in module.named_parameters())


def test_the_vision_tower_of_a_llava_folder(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    for name, vision in (
        ("siglip", shrunk(listing.default_config("siglip", 3))),
        ("clip", CLIPVisionConfig(**sizes, image_size=16, patch_size=4)),
    ):
        config = LlavaConfig(vision_config=vision.to_dict(), text_config=LlamaConfig(vocab_size=50, **sizes).to_dict())
        model: Any = LlavaForConditionalGeneration(config)
        model.save_pretrained(tmp_path / name)
        module = load_encoder(encoder_of(tmp_path / name), tmp_path / name, dtype=torch.float32)
        own = dict(model.model.vision_tower.named_parameters())
        assert all(torch.equal(parameter, own[n]) for n, parameter in module.named_parameters())


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"model_type": "resnet"},
            r"\(resnet\) cannot be used as a vision encoder: its config has no num_hidden_layers",
        ),
        ({"model_type": "llama"}, "no class for 'llama' that reads images"),
        ({"model_type": "bert"}, "no class for 'bert' that reads images"),
        ({"model_type": "vit_mae"}, "not one token|computes something else"),
        ({"model_type": "yolos"}, "cannot be used as a vision encoder"),
        ({"model_type": "pixtral"}, "not one token"),
        ({"model_type": "qwen2_5_vl"}, "cannot be used as a vision encoder"),
        ({"model_type": "videomae"}, "does not run"),
        (
            {"model_type": "siglip_vision_model", "image_size": [224, 112]},
            "pixels, not squares|does not run|cannot read",
        ),
        ({"model_type": "not-a-type"}, "transformers cannot read"),
        ({"model_type": "intern_vit_6b", "auto_map": {"AutoConfig": "c.C"}}, "transformers cannot read"),
    ],
)
def test_what_is_not_a_vision_encoder_is_refused_in_one_sentence(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason) as caught:
        encoder_of(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("layers", "reason"), [(2, "have 3 layers, and its config.json says num_hidden_layers=2"), (4, "missing")]
)
@pytest.mark.parametrize("model_type", ["clip", "siglip", "vit", "two towers"])
def test_a_config_that_lies_about_its_depth(tmp_path: Path, model_type: str, layers: int, reason: str) -> None:
    if model_type == "clip":
        tiny.clip(tmp_path)
    elif model_type == "two towers":
        two_towers("siglip", tmp_path)
    else:
        encoder_census.write_encoder(model_type, tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config.get("vision_config", config)["num_hidden_layers"] = layers
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=reason) as caught:
        load_encoder(encoder_of(tmp_path), tmp_path, dtype=torch.float32)
    assert "\n" not in str(caught.value)


def test_missing_tensors(tmp_path: Path) -> None:
    encoder_census.write_encoder("siglip", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.1." in name)]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"do not fill the model: .*layers\.1"):
        load_encoder(encoder_of(tmp_path), tmp_path, dtype=torch.float32)


def test_a_norm_that_an_encoder_does_not_have(made: Callable[..., Path], tmp_path: Path) -> None:
    encoder_census.write_encoder("internvl_vision", tmp_path)
    with pytest.raises(
        ConfigError, match=r"patch_norm=true, but internvl_vision in .* has no norm after its last layer"
    ):
        build_model(ModelSpec(made("llama", tied=True), tmp_path, EncoderConfig(path=str(tmp_path), patch_norm=True)))


def test_verdicts_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from zero_ds.model.encoders import structure

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = listing.default_config("siglip")
    first = describe(config)
    assert {name.split(".")[0] for name in first.idle} == {"head", "post_layernorm"}
    monkeypatch.setattr(structure, "_inspect", lambda *arguments: pytest.fail("inspected again"))
    again = describe(config)
    assert {**vars(again), "load": None} == {**vars(first), "load": None}


# -- the list ----------------------------------------------------------------------------------------------------------


def test_the_list_of_types() -> None:
    done = CliRunner().invoke(app, ["models", "siglip", "dinov3_vit", "clip", "resnet"])
    assert done.exit_code == 0, done.output
    assert "verified" in done.output and "registered" in done.output
    assert "3 of 4 types can be vision encoders" in done.output


def test_the_page_says_what_the_code_finds() -> None:
    """The table of types is generated; a sample of its rows is compared with the verdicts of today."""
    text = (Path(__file__).parents[2] / "docs" / "encoders.md").read_text(encoding="utf-8")
    for model_type in ("clip", "siglip", "siglip2", "dinov2_with_registers", "radio", "resnet"):
        row = listing.section([listing.verdict(model_type)]).splitlines()[-1]
        assert row in text, f"write docs/encoders.md again with `zero-ds models --page`: {row}"
