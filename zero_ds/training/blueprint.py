"""The model of a run without its weights: on the meta device, for the names and shapes of its parameters."""

from __future__ import annotations

import torch

from zero_ds.config.schema import RunConfig
from zero_ds.model import lora
from zero_ds.model.decoders import family_of
from zero_ds.model.decoders.folder import text_config
from zero_ds.model.encoders import encoder_of, vision_config
from zero_ds.model.layer_plan import LayerPlan, read_surrogate
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
    from transformers import AutoModel, AutoModelForCausalLM

    target = local_folder(config.target)
    folder = target
    if stages.decoder_kind(config) == "surrogate" and config.surrogate:
        folder = local_folder(config.surrogate)
        plan = read_surrogate(folder).plan
    text = text_config(folder)
    if folder == target and plan is not None:
        text.num_hidden_layers = plan.surrogate_depth
    encoder = encoder_family = None
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(text)
        if config.encoder is not None and stages.STAGES[config.stage].vision:
            where = local_folder(config.encoder.path)
            encoder_family = encoder_of(where)
            encoder = AutoModel.from_config(vision_config(where))
        model = VisionLanguageModel(
            decoder,
            family_of(folder),
            plan=plan,
            encoder=encoder,
            encoder_family=encoder_family,
            encoder_config=config.encoder if encoder is not None else None,
            adapter_config=config.adapter,
        )
        if config.lora is not None:
            lora.inject_(decoder, model.family, config.lora, torch.float32)
    return model


def weights_names(model: VisionLanguageModel, parts: tuple[stages.Part, ...]) -> dict[str, str]:
    """Name in the module tree of every parameter of the parts -> its name in a weights file."""
    in_tree = {id(parameter): name for name, parameter in model.named_parameters()}
    return {in_tree[id(parameter)]: name for part in parts for name, parameter in model.parameters_of(part)}
