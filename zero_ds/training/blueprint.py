"""The model of a run on the meta device: names and shapes of its parameters, without weights."""

from __future__ import annotations

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.training import stages
from zero_ds.training.folders import ModelFolders


def blueprint(config: RunConfig, plan: LayerPlan | None = None) -> VisionLanguageModel:
    """Returns the model that `setup.load_model` would load, on the meta device. Only config.json files are read.

    plan: how the surrogate is cut, where the run has no folder of it.

    Raises:
        ConfigError: a folder that does not exist, or an unknown family.
    """
    folders = ModelFolders.of(config)
    return build_model(
        ModelSpec(
            folders.decoder,
            encoder=folders.encoder,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            lora=config.lora,
            plan=plan,
            words_only=stages.words_only(config),
            on_meta=True,
        )
    )


def weights_names(model: VisionLanguageModel, parts: tuple[stages.Part, ...]) -> dict[str, str]:
    """Returns the name in a weights file of every parameter of `parts`, by its name in the module tree."""
    in_tree = {id(parameter): name for name, parameter in model.named_parameters()}
    return {in_tree[id(parameter)]: name for part in parts for name, parameter in model.parameters_of(part)}
