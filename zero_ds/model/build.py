"""Builds the model for training, evaluation and export, and on the meta device for planning. No other file does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.config.schema import AdapterConfig, DataConfig, EncoderConfig, LoraConfig
from zero_ds.data.conversations import Supervision
from zero_ds.data.images import ImageProcessor
from zero_ds.data.samples import SampleEncoder
from zero_ds.model import lora
from zero_ds.model.decoders import Family
from zero_ds.model.decoders.cut import cut_config
from zero_ds.model.decoders.dense import dense_config
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import causal_class, without_dropout_
from zero_ds.model.encoders import EncoderFamily, empty_encoder, encoder_of, load_encoder, vision_config
from zero_ds.model.layer_plan import LayerPlan
from zero_ds.model.templates import load_template
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.model.word_space import WordSpaceModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.zero3 import partition_


@dataclass(frozen=True)
class Modules:
    """A decoder that has been loaded and, if the model sees, a vision encoder."""

    decoder: nn.Module
    family: Family
    encoder: nn.Module | None = None
    encoder_family: EncoderFamily | None = None


@dataclass(frozen=True)
class ModelSpec:
    """Everything that `build_model` builds a model from."""

    decoder: DecoderFolder | Path | Modules
    """Folder of the decoder, or loaded modules, with which `encoder`, `dtype` and `attention` have no effect."""
    encoder: Path | None = None
    """Folder of the vision encoder."""
    encoder_config: EncoderConfig | None = None
    adapter_config: AdapterConfig | None = None
    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    seed: int = 0
    """Seed of the random weights of adapter and LoRA."""
    lora: LoraConfig | None = None
    plan: LayerPlan | None = None
    """Plan of a surrogate that is to be cut out of `decoder` and has no folder yet. Used with loaded modules and with
    `on_meta`; a folder's own plan wins."""
    dense_width: int | None = None
    """With such a `plan` and `on_meta`: units of the dense network of every translator; None for copies of layers."""
    words_only: bool = False
    """If set, only the word embeddings of `decoder` are loaded, for a loss in the space of words."""
    on_meta: bool = False
    """If set, the model is built on the meta device from config.json files alone: names and shapes, no weights."""


def build_model(spec: ModelSpec) -> VisionLanguageModel:
    """Builds the model of a spec. Under an active HfDeepSpeedConfig its weights are loaded into ZeRO-3 partitions.

    Raises:
        ConfigError: a folder does not hold a model, its family is unknown, or its weights lack a tensor.
    """
    if isinstance(spec.decoder, Modules):
        return _put_together(spec.decoder, spec, spec.plan)
    folder = DecoderFolder.of(spec.decoder)
    _check_feature_layer(spec)
    _check_image_tokens(spec)
    if spec.on_meta:
        with torch.device("meta"):
            modules = _modules_on_meta(folder, spec)
            return _put_together(modules, spec, folder.plan or spec.plan, dtype=spec.dtype)
    plan = folder.plan  # read first, so that a damaged surrogate.json is found before anything large is read
    modules = _load_modules(folder, spec)
    torch.manual_seed(spec.seed)  # loading draws random numbers under ZeRO-3, and none without
    model = _put_together(modules, spec, plan, dtype=spec.dtype)
    partition_(model)
    without_dropout_(model)
    return model


def _check_feature_layer(spec: ModelSpec) -> None:
    """Refuses a hidden state that the vision encoder does not have, before anything is loaded."""
    if spec.encoder is None or spec.encoder_config is None:
        return
    layers = getattr(vision_config(spec.encoder), "num_hidden_layers", None)
    wanted = spec.encoder_config.feature_layer
    if layers is not None and not -layers - 1 <= wanted <= layers:
        raise ConfigError(
            f"encoder.feature_layer={wanted}, but {spec.encoder} has {layers} layers, and so hidden states "
            f"{-layers - 1} to {layers}; choose one of these."
        )


def _check_image_tokens(spec: ModelSpec) -> None:
    """Refuses squares of patches that are larger than the vision encoder's grid, before anything is loaded."""
    if spec.encoder is not None and spec.adapter_config is not None and spec.adapter_config.square > 1:
        family = _encoder_family(spec, spec.encoder)
        spec.adapter_config.image_tokens(family.tokens_per_image(vision_config(spec.encoder)))


def _load_modules(folder: DecoderFolder, spec: ModelSpec) -> Modules:
    if spec.words_only:
        decoder = _load_words(folder, spec.dtype)
    else:
        decoder = folder.load(dtype=spec.dtype, attention=spec.attention)
    if spec.encoder is None:
        return Modules(decoder, folder.family)
    encoder_family = _encoder_family(spec, spec.encoder)
    attention = "eager" if spec.attention == "eager" else encoder_family.attention("sdpa")
    encoder = load_encoder(encoder_family, spec.encoder, dtype=spec.dtype, attn_implementation=attention)
    return Modules(decoder, folder.family, encoder, encoder_family)


def _load_words(folder: DecoderFolder, dtype: torch.dtype) -> nn.Module:
    """Returns a decoder of the folder's class without layers, norm and head; reads the word embeddings alone."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        decoder = _without_layers(folder, dtype)
    table = cast(Any, decoder).get_input_embeddings()
    table.weight = nn.Parameter(folder.class_tensor(folder.family.embeddings).to(dtype), requires_grad=False)
    for module in decoder.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:  # of steps that never run
                setattr(module, name, nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False))
    return decoder.eval()


def _without_layers(folder: DecoderFolder, dtype: torch.dtype) -> nn.Module:
    """Makes a decoder without layers, norm and head."""
    config = cut_config(folder.text_config(), folder.family, [0])
    config._attn_implementation = "eager"
    decoder = causal_class(config)(config)  # called directly, since `from_config` partitions where ZeRO-3 is active
    decoder.set_output_embeddings(nn.Identity())
    folder.family.replace_layers_(decoder, nn.ModuleList())
    folder.family.replace_norm_(decoder, nn.Identity())
    return cast(nn.Module, decoder.to(dtype))


def _encoder_family(spec: ModelSpec, folder: Path) -> EncoderFamily:
    """Returns the description of the vision encoder, for the images and the norm that the run asks for."""
    settings = spec.encoder_config
    family = encoder_of(folder, settings.image_size if settings is not None else None)
    if settings is not None and settings.patch_norm and not family.final_norm:
        raise ConfigError(
            f"encoder.patch_norm=true, but {family.name} in {folder} has no norm after its last layer; leave it out."
        )
    return family


def _modules_on_meta(folder: DecoderFolder, spec: ModelSpec) -> Modules:
    from transformers import AutoModelForCausalLM

    config = folder.text_config()
    if folder.plan is None and spec.plan is not None:
        config = cut_config(config, folder.family, spec.plan.sources)
        if spec.dense_width is not None:
            config, _ = dense_config(folder, config, spec.plan.translators, spec.dense_width)
    # nothing attends on the meta device, and packages that a GPU needs may be missing here
    options: dict[str, Any] = {"dtype": spec.dtype, "attn_implementation": "eager"}
    encoder = encoder_family = None
    if spec.encoder is not None:
        encoder_family = _encoder_family(spec, spec.encoder)
        encoder = empty_encoder(encoder_family, vision_config(spec.encoder), **options)
    if spec.words_only:
        return Modules(_without_layers(folder, spec.dtype), folder.family, encoder, encoder_family)
    decoder = AutoModelForCausalLM.from_config(config, **options)
    return Modules(decoder, folder.family, encoder, encoder_family)


def _put_together(
    modules: Modules, spec: ModelSpec, plan: LayerPlan | None, dtype: torch.dtype | None = None
) -> VisionLanguageModel:
    parts: dict[str, Any] = {
        "plan": plan,
        "encoder": modules.encoder,
        "encoder_family": modules.encoder_family,
        "encoder_config": spec.encoder_config if modules.encoder is not None else None,
        "adapter_config": spec.adapter_config,
    }
    if spec.words_only:
        model: VisionLanguageModel = WordSpaceModel(modules.decoder, modules.family, **parts)
    else:
        model = VisionLanguageModel(modules.decoder, modules.family, **parts)
    if dtype is not None:
        # new layers are drawn whole, on the CPU and in float32, so that a run starts equally under every ZeRO stage
        for module in (model.adapter, model.boundary, model.aligner):
            if module is not None:
                module.to(dtype)
        if spec.lora is not None:
            lora.inject_(modules.decoder, modules.family, spec.lora, dtype)
    return model


def sample_encoder(
    model: VisionLanguageModel,
    decoder: DecoderFolder | Path,
    encoder: Path | None,
    data: DataConfig,
    *,
    supervise: Supervision = "response",
    seed: int = 0,
    learns: bool = True,
) -> SampleEncoder:
    """Builds the sample encoder of a run's data section, which training and answering share.

    decoder, encoder: folders of tokenizer and image processor. supervise: the tokens that carry loss. seed: seed of the
    random choice between image prompts. learns: whether a run trained, or trains, the model on conversations.

    Raises:
        ConfigError: as `load_template`.
    """
    config = cast(Any, model.decoder).config.get_text_config()
    processor = None
    if encoder is not None and model.encoder is not None and model.encoder_family is not None:
        size = model.encoder_family.image_size(model.encoder_family.vision_config(model.encoder))
        processor = ImageProcessor.from_folder(encoder, size, data.image_grid, data.image_background)
    return SampleEncoder(
        template=load_template(decoder, data, config=config, learns=learns),
        supervise=supervise,
        processor=processor,
        tokens_per_image=model.tokens_per_image(),
        max_length=data.max_length,
        image_prompt=data.image_prompt,
        system_prompt=data.system_prompt,
        seed=seed,
        vocabulary=cast(Any, model.decoder).get_input_embeddings().num_embeddings,
    )
