"""VisionLanguageModel: the decoder's inputs, its answers, and the names of its parameters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, SiglipVisionModel

from zero_ds.config.schema import AdapterConfig, EncoderConfig
from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN
from zero_ds.model import losses
from zero_ds.model.adapter import match_embeddings_
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.decoders.folder import family_of
from zero_ds.model.encoders import ENCODERS, encoder_of
from zero_ds.model.layer_plan import Replaced
from zero_ds.model.losses import supervised_rows
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.surrogate.build import build_surrogate


@pytest.fixture
def build(made: Callable[..., Path]) -> Callable[..., VisionLanguageModel]:
    """`build(decoder=FOLDER, boundary_tokens=True, feature_layer=-2)`: an assembled tiny model, always the same."""

    def make(
        decoder: Path | None = None, *, vision: bool = True, family: str = "llama", **options: Any
    ) -> VisionLanguageModel:
        boundary = options.pop("boundary_tokens", False)
        torch.manual_seed(1)
        clip = made(options.pop("encoder", "clip"))
        model = build_model(
            ModelSpec(
                decoder or made(family, tied=True),
                clip if vision else None,
                EncoderConfig(path=str(clip), **options) if vision else None,
                AdapterConfig(boundary_tokens=boundary),
            )
        )
        return model.eval()

    return make


def batch(model: VisionLanguageModel, images: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns two samples of unequal length, the first with `images` images."""
    generator = torch.Generator().manual_seed(seed)
    n = model.tokens_per_image()
    ids = torch.randint(10, 200, (2, 30), generator=generator)
    for number in range(images):
        start = 3 + number * (n + 2)
        ids[0, start : start + n] = IMAGE_TOKEN
    mask = torch.ones_like(ids)
    mask[1, 22:] = 0
    labels = ids.clone()
    labels[:, :20] = IGNORE
    labels[1, 22:] = IGNORE
    pixels = torch.randn(max(images, 1), 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, generator=generator)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "pixel_values": pixels}


def logits(model: VisionLanguageModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.hidden_states(inputs["input_ids"], inputs["attention_mask"], inputs.get("pixel_values"))
        return model.logits(hidden)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_is_answered_as_by_the_decoder(
    made: Callable[..., Path], build: Callable[..., VisionLanguageModel], family: str, tied: bool
) -> None:
    folder = made(family, tied=tied)
    model = build(folder)
    inputs = batch(model, images=0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = plain(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    where = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, inputs)[where], expected[where])


@pytest.mark.parametrize("name", ENCODERS)
def test_features_are_the_encoders_patches_through_the_adapter(
    made: Callable[..., Path], build: Callable[..., VisionLanguageModel], name: str
) -> None:
    assert name in tiny.ENCODERS, "tests/support/tiny.py needs a builder for each encoder"
    assert encoder_of(made(name)).name == name
    model = build(encoder=name, feature_layer=-2)
    pixels = batch(model)["pixel_values"]
    features = model.image_features(pixels)
    assert features.shape == (2, model.tokens_per_image(), tiny.HIDDEN)
    assert model.tokens_per_image() == tiny.TOKENS_PER_IMAGE
    if name == "clip":
        plain = CLIPVisionModel.from_pretrained(made("clip")).eval()
        patches = plain(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        torch.testing.assert_close(features, model.adapter(patches))  # type: ignore[misc]
        normed = build(feature_layer=-2, patch_norm=True)
        layer = next(module for n, module in plain.named_modules() if n.endswith("post_layernorm"))
        torch.testing.assert_close(normed.image_features(pixels), normed.adapter(layer(patches)))  # type: ignore[misc]


def test_siglip_trains_no_pooling_head(made: Callable[..., Path], build: Callable[..., VisionLanguageModel]) -> None:
    """The head pools patches into one vector, which no image token passes; every patch token is one of the image's."""
    model = build(encoder="siglip", feature_layer=-2)
    inputs = batch(model)
    plain = SiglipVisionModel.from_pretrained(made("siglip")).eval()
    patches = plain(pixel_values=inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.image_features(inputs["pixel_values"]), model.adapter(patches))  # type: ignore[misc]
    trained = dict(model.parameters_of("encoder"))
    assert trained and not any(".head." in name for name in trained)
    model(**inputs).total.backward()
    assert all(parameter.grad is not None for parameter in trained.values())


def test_features_stand_where_the_image_tokens_stood(build: Callable[..., VisionLanguageModel]) -> None:
    model = build()
    inputs = batch(model, images=2)
    embeddings = model.embed(inputs["input_ids"], inputs["pixel_values"])
    images = inputs["input_ids"] == IMAGE_TOKEN
    torch.testing.assert_close(embeddings[images], model.image_features(inputs["pixel_values"]).flatten(0, 1))
    words = model.decoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    torch.testing.assert_close(embeddings[~images], words[inputs["input_ids"][~images]])


def test_boundary_embeddings_frame_every_image(build: Callable[..., VisionLanguageModel]) -> None:
    model = build(boundary_tokens=True)
    inputs = batch(model, images=2)
    features = model.image_features(inputs["pixel_values"])
    assert model.tokens_per_image() == tiny.TOKENS_PER_IMAGE + 2 == features.shape[1]
    start, end = model.boundary.embeddings.weight  # type: ignore[union-attr]
    for image in features:
        torch.testing.assert_close(image[0], start)
        torch.testing.assert_close(image[-1], end)
    assert {n for n, _ in model.parameters_of("adapter")} >= {"boundary.embeddings.weight", "adapter.0.weight"}
    assert torch.isfinite(model(**inputs).total)


def test_the_dummy_image_of_a_text_batch_has_no_effect(build: Callable[..., VisionLanguageModel]) -> None:
    model = build()
    inputs = batch(model, images=0)
    losses = []
    for pixels in (None, torch.zeros(1, 3, 32, 32), torch.randn(1, 3, 32, 32)):
        model.zero_grad()
        loss = model(**{**inputs, "pixel_values": pixels}).total
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for _, p in model.parameters_of("adapter")]
        if pixels is not None:  # in the graph, so that the collectives of every rank are the same
            assert all(g is not None and not g.any() for g in gradients)
    assert losses[0] == losses[1] == losses[2]


def test_loss_is_the_sum_over_samples_however_they_are_padded(build: Callable[..., VisionLanguageModel]) -> None:
    model = build()
    inputs = batch(model, images=1)
    whole = model(**inputs).total
    first = {k: v[:1] for k, v in inputs.items()}
    second = {k: v[1:, :22] for k, v in inputs.items() if k != "pixel_values"}
    torch.testing.assert_close(whole, model(**first).total + model(**second, pixel_values=inputs["pixel_values"]).total)
    inputs["input_ids"][1, 22:] = 5
    torch.testing.assert_close(model(**inputs).total, whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_kernels_agree(
    made: Callable[..., Path], build: Callable[..., VisionLanguageModel], attention: str
) -> None:
    model = build_model(ModelSpec(made("llama", tied=True), attention=attention)).eval()
    inputs = batch(build(), images=0)
    del inputs["pixel_values"]
    where = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(model, inputs)[where], logits(build(), inputs)[where])


def test_a_term_of_the_loss_is_a_function_in_a_table(
    build: Callable[..., VisionLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new term needs no change outside of model/losses.py."""

    def squared_logits(predictions: losses.Predictions) -> torch.Tensor:
        return predictions.logits.square().sum()

    model = build()
    inputs = batch(model, images=1)
    plain = model(**inputs)
    hidden = model.hidden_states(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    extra = model.logits(hidden[supervised_rows(inputs["labels"])]).square().sum()
    monkeypatch.setitem(losses.TERMS, "squared_logits", squared_logits)
    assert torch.equal(model(**inputs).total, plain.total) and plain.terms is None, "a term without a weight is not run"
    model.loss_weights = {"squared_logits": 0.1}
    both = model(**inputs)
    torch.testing.assert_close(both.total, plain.total + 0.1 * extra)
    torch.testing.assert_close(both.terms, extra.detach().reshape(1))
    assert not both.terms.requires_grad
    assert torch.equal(both.tokens, plain.tokens), "the next-token losses are reported without other terms"


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_do_not_depend_on_the_decoder(
    made: Callable[..., Path], build: Callable[..., VisionLanguageModel], tmp_path: Path
) -> None:
    target = made("llama", tied=True)
    build_surrogate(target, [Replaced(1, 2), Replaced(4, 5)], tmp_path / "small")
    whole, small = build(target), build(tmp_path / "small")
    for part in ("encoder", "adapter"):
        assert [n for n, _ in whole.parameters_of(part)] == [n for n, _ in small.parameters_of(part)]
    assert whole.parameters_of("translator") == [] == whole.translators()
    layers = small.family.layers(small.decoder)
    assert [id(layer) for layer in small.translators()] == [id(layers[1]), id(layers[3])]
    names = dict(small.parameters_of("translator"))
    assert names["translator.1.mlp.up_proj.weight"] is layers[3].mlp.up_proj.weight  # type: ignore[union-attr]
    assert {name.split(".")[1] for name in names} == {"0", "1"}
    assert set(names) <= set(small.named_targets())


def test_parts_cover_what_a_decoder_stage_trains(build: Callable[..., VisionLanguageModel]) -> None:
    model = build()
    named = [n for part in ("encoder", "adapter", "decoder") for n, _ in model.parameters_of(part)]
    left = {n for n, _ in model.named_parameters()} - set(named)
    assert len(named) == len(set(named)) and all("post_layernorm" in n for n in left)


def test_a_model_without_vision(build: Callable[..., VisionLanguageModel]) -> None:
    model = build(vision=False)
    assert (model.encoder, model.adapter, model.tokens_per_image()) == (None, None, 0)
    assert model.parameters_of("encoder") == [] == model.parameters_of("adapter")
    inputs = batch(model, images=0)
    del inputs["pixel_values"]
    assert torch.isfinite(model(**inputs).total)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["llama", "clip"])
def test_weights_that_do_not_fill_the_model_are_refused(
    made: Callable[..., Path], build: Callable[..., VisionLanguageModel], tmp_path: Path, which: str
) -> None:
    """Transformers would leave such tensors random."""
    source = made("llama", tied=True) if which == "llama" else made("clip")
    shutil.copytree(source, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    victim = next(name for name in tensors if "layers.1." in name and name.endswith("weight"))
    del tensors[victim]
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    clip = tmp_path / "model" if which == "clip" else made("clip")
    llm = tmp_path / "model" if which == "llama" else made("llama", tied=True)
    with pytest.raises(ConfigError, match=r"do not fill the model: .*layers\.1"):
        build_model(ModelSpec(llm, clip, EncoderConfig(path=str(clip))))


def test_weights_of_another_shape_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(made("llama", tied=True), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "intermediate_size": 52}))
    with pytest.raises(ConfigError, match=r"weights in .* do not have the shapes that its config\.json describes"):
        build_model(ModelSpec(tmp_path / "model"))


@pytest.mark.parametrize("damage", ["truncated", "no weights", "no json"])
def test_damaged_models_are_refused(made: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(made("llama", tied=True), folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "no weights":
        weights.unlink()
    else:
        (folder / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(ConfigError) as caught:
        build_model(ModelSpec(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"llama"'])
@pytest.mark.parametrize("lookup", [encoder_of, family_of])
def test_folders_that_are_no_model(tmp_path: Path, lookup: Callable[[Path], object], text: str) -> None:
    if text:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        lookup(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "./no/where", "no/such-model", "a/b/c", "", "../up/there", "~/nowhere"])
def test_models_that_are_not_there(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        local_folder(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_adapter_is_scaled_to_the_words(build: Callable[..., VisionLanguageModel]) -> None:
    model = build(boundary_tokens=True)
    pixels = torch.randn(16, 3, 32, 32)
    words = model.decoder.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    factor = match_embeddings_(model, pixels)
    features = model.image_features(pixels)[:, 1:-1]
    torch.testing.assert_close(features.std(), words.std(), rtol=1e-3, atol=0)
    assert factor != 1 and model.boundary is not None


def test_nothing_is_dropped_at_random(made: Callable[..., Path], tmp_path: Path) -> None:
    decoder = tmp_path / "dropping"
    shutil.copytree(made("llama", tied=True), decoder)
    content = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**content, "attention_dropout": 0.5}))
    model = build_model(ModelSpec(decoder, attention="eager")).train()
    assert model.decoder.config.attention_dropout == 0.5, "exports keep it"  # type: ignore[union-attr]
    ids = torch.arange(3, 13)[None]
    first, second = (model.hidden_states(ids, torch.ones_like(ids)) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("images", [0, 2])
def test_a_pass_asks_the_device_for_nothing(build: Callable[..., VisionLanguageModel], images: int) -> None:
    """Reading a value from a GPU makes the host wait, so a pass reads none: it works on tensors without values.

    With eager attention, because for the others transformers asks once per pass whether anything is padded.
    """
    model = build()
    model.decoder.set_attn_implementation("eager")  # type: ignore[operator]
    inputs = batch(model, images=images)
    rows = supervised_rows(inputs["labels"])
    image_places = (inputs["input_ids"] == IMAGE_TOKEN).nonzero(as_tuple=True)
    expected = model(**inputs)
    torch.testing.assert_close(model(**inputs, known=(rows, image_places)), expected, rtol=0, atol=0)

    model.to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    rows, image_places = (tuple(indices.to("meta") for indices in places) for places in (rows, image_places))
    found = model(**inputs, known=(rows, image_places))
    found.total.backward()
    assert found.tokens.shape == expected.tokens.shape
    for known in ((None, image_places), (rows, None)):
        with pytest.raises(RuntimeError, match="meta"):  # the error of tensors without values that are read
            model(**inputs, known=known)


@pytest.mark.parametrize("layer", [-30, -5, 4])
def test_a_hidden_state_that_the_encoder_does_not_have(made: Callable[..., Path], layer: int) -> None:
    """The tiny CLIP has three layers, and so the hidden states -4 to 3."""
    config = EncoderConfig(path="clip", feature_layer=layer)
    for on_meta in (True, False):
        spec = ModelSpec(made("llama", tied=True), made("clip"), encoder_config=config, on_meta=on_meta)
        with pytest.raises(ConfigError, match=rf"encoder\.feature_layer={layer}, but .* hidden states -4 to 3"):
            build_model(spec)


@pytest.mark.parametrize("layer", [-4, -1, 0, 3])
def test_hidden_states_that_the_encoder_has(made: Callable[..., Path], layer: int) -> None:
    config = EncoderConfig(path="clip", feature_layer=layer)
    build_model(ModelSpec(made("llama", tied=True), made("clip"), encoder_config=config, on_meta=True))
