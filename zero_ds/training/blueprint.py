"""The model of a run without its weights: on the meta device, for the names and shapes of its parameters."""

from __future__ import annotations

from zero_ds.config.schema import RunConfig
from zero_ds.model.build import ModelSpec, build_model
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.hub import local_folder
from zero_ds.training import stages


def blueprint(config: RunConfig, plan: LayerPlan | None = None) -> VisionLanguageModel:
    """What `prepare.build` would build, without numbers; of the model folders only the configs are read.

    plan: of a surrogate that there is no folder of, for families without per-layer entries in their config; else the
    surrogate's own counts.

    Raises:
        ConfigError: a folder that is not there, or an unknown family.
    """
    folder = DecoderFolder(local_folder(config.target))
    if stages.decoder_kind(config) == "surrogate" and config.surrogate:
        folder, plan = DecoderFolder(local_folder(config.surrogate)), None
    sees = config.encoder is not None and stages.STAGES[config.stage].vision
    return build_model(
        ModelSpec(
            folder,
            encoder=local_folder(config.encoder.path) if config.encoder is not None and sees else None,
            encoder_config=config.encoder,
            adapter_config=config.adapter,
            lora=config.lora,
            plan=plan,
            on_meta=True,
        )
    )


def weights_names(model: VisionLanguageModel, parts: tuple[stages.Part, ...]) -> dict[str, str]:
    """Name in the module tree of every parameter of the parts -> its name in a weights file."""
    in_tree = {id(parameter): name for name, parameter in model.named_parameters()}
    return {in_tree[id(parameter)]: name for part in parts for name, parameter in model.parameters_of(part)}
