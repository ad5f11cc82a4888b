"""The stage table against the paper's Table A.2 and appendix A.5, and the parameters that it switches on in a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from zero_ds.config.loading import load_run, recipe_names
from zero_ds.config.schema import EncoderConfig, RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.layer_plan import Replaced
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.surrogate.build import build_surrogate
from zero_ds.training import stages


def config(stage: str, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {"target": "llm", "surrogate": "small", "encoder": {"path": "clip"}, "out": "run"}
    return RunConfig.model_validate({**base, "stage": stage, **changes})


@pytest.mark.parametrize(
    ("stage", "trains", "decoder", "supervise"),
    [
        ("pretrain", ("adapter", "translator"), "small", "special_tokens"),
        ("encoder", ("encoder", "adapter"), "small", "special_tokens"),
        ("decoder", ("encoder", "adapter", "decoder"), "llm", "response"),
        ("translator", ("translator",), "small", "response"),
    ],
)
def test_table_a2(stage: str, trains: tuple[str, ...], decoder: str, supervise: str) -> None:
    run = config(stage)
    assert stages.stage_of(run).name == stage
    assert stages.trained_parts(run) == trains
    assert stages.decoder_folder(run) == decoder
    assert stages.supervision(run) == supervise


def test_the_baselines_of_the_paper() -> None:
    """Adapter on the full model; encoder on the full, frozen model (Table 7's `Llama-70B encoder`)."""
    adapter = config("pretrain", decoder="target")
    assert stages.trained_parts(adapter) == ("adapter",) and stages.decoder_folder(adapter) == "llm"
    encoder = config("encoder", decoder="target")
    assert stages.trained_parts(encoder) == ("encoder", "adapter") and stages.decoder_folder(encoder) == "llm"


def test_a_language_model_alone() -> None:
    """Stage decoder without a vision encoder trains the language model on text, also by low-rank adapters."""
    run = config("decoder", encoder=None)
    assert stages.stage_of(run).name == "decoder" and not stages.has_vision(run)
    assert stages.trained_parts(run) == ("decoder",) and stages.decoder_folder(run) == "llm"
    assert stages.trained_parts(config("decoder", encoder=None, lora={})) == ("lora",)
    assert stages.has_vision(config("decoder")) and not stages.has_vision(config("translator"))


def test_distilled_translators_train_in_every_stage_on_a_surrogate() -> None:
    run = config("encoder", distill={"logits": 1.0, "next_token": 0.0})
    assert stages.trained_parts(run) == ("encoder", "adapter", "translator")
    assert stages.trained_parts(config("pretrain", distill={"logits": 1.0})) == ("adapter", "translator")
    assert stages.trained_parts(config("encoder", distill={"next_token": 0.0})) == ("encoder", "adapter")


def test_supervision_and_rates_can_be_set() -> None:
    assert stages.supervision(config("encoder", data={"supervise": "response"})) == "response"
    run = config("encoder", optimizer={"learning_rate": 1e-3, "learning_rates": {"encoder": 1e-5}})
    assert [stages.learning_rate(run, part) for part in ("encoder", "adapter")] == [1e-5, 1e-3]


@pytest.mark.parametrize(
    ("stage", "changes", "complaint"),
    [
        (
            "encoder",
            {"losses": {"entropy": 0.1}},
            r"losses names 'entropy', which is not a term of the loss; add it to",
        ),
        ("encodr", {}, "unknown stage 'encodr'; did you mean 'encoder'"),
        ("encoder", {"encoder": None}, "needs a vision encoder; set encoder.path=FOLDER"),
        (
            "decoder",
            {"encoder": None, "adapter": {"width": 8}},
            r"stage decoder has no vision encoder here, so adapter.width=8 has no place in it; leave it out",
        ),
        (
            "decoder",
            {"encoder": None, "data": {"sources": [{"path": "a.json", "images_only": True}]}},
            r"no vision encoder here, and a.json is used for its images only; name a data set of texts",
        ),
        ("pretrain", {"surrogate": None}, "trains against a surrogate; set surrogate=FOLDER or decoder=target"),
        ("translator", {"decoder": "target"}, "stage translator has nothing to train against the target"),
    ],
)
def test_runs_that_cannot_be(stage: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        stages.stage_of(config(stage, **changes))


def test_init_from_must_exist(tmp_path: Path) -> None:
    assert stages.check_start(config("encoder", init_from=[str(tmp_path)])) == [tmp_path]
    with pytest.raises(ConfigError, match=r"init_from names .*gone, which does not exist; run the earlier stage first"):
        stages.check_start(config("encoder", init_from=[str(tmp_path / "gone")]))


# -- freezing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(made: Callable[..., Path], tmp_path: Path) -> Callable[..., VisionLanguageModel]:
    def build(kind: str = "surrogate", **encoder: Any) -> VisionLanguageModel:
        folder = made("llama", tied=True)
        if kind == "surrogate":
            build_surrogate(folder, [Replaced(1, 2), Replaced(4, 5, 2)], tmp_path / "small")
            folder = tmp_path / "small"
        clip = made("clip")
        return build_model(ModelSpec(folder, clip, EncoderConfig(path=str(clip), **encoder)))

    return build


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("stage", "kind", "prefixes"),
    [
        (
            "pretrain",
            "surrogate",
            ("adapter.", "decoder.model.layers.1.", "decoder.model.layers.3.", "decoder.model.layers.4."),
        ),
        ("translator", "surrogate", ("decoder.model.layers.1.", "decoder.model.layers.3.", "decoder.model.layers.4.")),
        ("encoder", "surrogate", ("adapter.", "encoder.")),
        ("decoder", "target", ("adapter.", "encoder.", "decoder.")),
    ],
)
def test_freeze(model: Callable[..., VisionLanguageModel], stage: str, kind: str, prefixes: tuple[str, ...]) -> None:
    whole = model(kind)
    groups = stages.freeze_(whole, config(stage, decoder=kind))
    # the norm after CLIP's last layer sees the CLS token only, which does not reach the decoder
    expected = {n for n, _ in whole.named_parameters() if n.startswith(prefixes) and "post_layernorm" not in n}
    assert trainable(whole) == expected
    assert tuple(groups) == stages.trained_parts(config(stage, decoder=kind))
    named = [p for group in groups.values() for _, p in group]
    assert len({id(p) for p in named}) == len(named), "no parameter in two groups"
    assert {id(p) for p in named} == {id(p) for p in whole.parameters() if p.requires_grad}


@pytest.mark.parametrize(("last", "layers"), [(1, {2}), (2, {1, 2}), (9, {0, 1, 2})])
def test_last_layers_of_the_encoder(model: Callable[..., VisionLanguageModel], last: int, layers: set[int]) -> None:
    whole = model(train_last_layers=last)
    stages.freeze_(whole, config("encoder"))
    inside = {name for name in trainable(whole) if name.startswith("encoder.")}
    assert inside and {int(name.split(".layers.")[1].split(".")[0]) for name in inside} == layers


def test_layers_after_the_feature_layer_stay_frozen(model: Callable[..., VisionLanguageModel]) -> None:
    whole = model(feature_layer=-2)
    stages.freeze_(whole, config("encoder"))
    assert not any(".layers.2." in name for name in trainable(whole) if name.startswith("encoder."))
    assert any(".layers.1." in name for name in trainable(whole) if name.startswith("encoder."))


def test_norm_on_patch_tokens_trains_with_the_adapter(model: Callable[..., VisionLanguageModel]) -> None:
    whole = model(patch_norm=True)
    groups = stages.freeze_(whole, config("pretrain"))
    assert any("post_layernorm" in name for name, _ in groups["adapter"])
    assert any("post_layernorm" in name for name in trainable(whole))


def test_a_part_without_parameters_is_an_error(
    model: Callable[..., VisionLanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename in a library must not leave a part silently untrained."""
    whole = model()
    monkeypatch.setattr(VisionLanguageModel, "parameters_of", lambda self, part: [])
    with pytest.raises(RuntimeError, match="should train the encoder, but no parameter of it was found"):
        stages.freeze_(whole, config("encoder"))


# -- settings without effect -------------------------------------------------------------------------------------------


def test_rates_of_parts_that_do_not_train_are_named() -> None:
    rates = {"encoder": 1e-5, "decoder": 1e-5, "lora": 1e-5}
    said = stages.remarks(config("encoder", optimizer={"learning_rates": rates}))
    assert said == [
        f"optimizer.learning_rates.{part} has no effect: this run trains encoder, adapter alone."
        for part in ("decoder", "lora")
    ]
    assert stages.remarks(config("decoder", optimizer={"learning_rates": {"encoder": 1e-5, "decoder": 1e-5}})) == []


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_of_the_package_have_no_such_rates(recipe: str) -> None:
    assert stages.remarks(load_run(recipe)) == []


def test_epochs_of_less_than_one_batch_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    from zero_ds.training.setup import total_steps

    assert total_steps(config("encoder", global_batch=128), samples=8) == 1
    assert "epochs=1 of 8 samples is less than one global batch of 128" in caplog.text
    caplog.clear()
    assert total_steps(config("encoder", global_batch=4, epochs=0.5), samples=9) == 2
    assert total_steps(config("encoder", global_batch=128, max_steps=3), samples=8) == 3
    assert not caplog.text
