"""Finds and loads the model that a user names: a folder or hub id, an export, a run, or a run grafted into a target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from zero_ds.config.schema import DataConfig, EncoderConfig
from zero_ds.data.conversations import WRAPPERS, read_template
from zero_ds.data.read_image import WHITE
from zero_ds.data.samples import SampleEncoder
from zero_ds.grafting.compatibility import run_config
from zero_ds.grafting.engines.offload import spread_
from zero_ds.grafting.load import load_graft, load_trained
from zero_ds.grafting.tokenizers import for_texts_
from zero_ds.model.adapter import Adapter
from zero_ds.model.build import ModelSpec, Modules, build_model, sample_encoder
from zero_ds.model.decoders import family_of_config
from zero_ds.model.decoders.folder import DecoderFolder
from zero_ds.model.decoders.shrink import position_limit
from zero_ds.model.encoders import described, fitted
from zero_ds.model.loading import load_complete, model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import home_path
from zero_ds.runtime.hub import local_folder
from zero_ds.training.checkpoint.checkpoint import Checkpoint, find_checkpoint
from zero_ds.training.stages import decoder_folder

ANY_LENGTH = 1 << 20
"""Longest prompt of a decoder without a limit of its own, in tokens."""

EXPORT = "llava"
"""`model_type` in the config.json of an exported folder."""


@dataclass(frozen=True)
class NamedModel:
    """A model that was found by its name. No weights have been read yet."""

    name: str
    kind: Literal["target", "surrogate", "trained", "graft", "export"]
    decoder: DecoderFolder
    """Folder of the decoder. For an export, the exported folder itself."""
    checkpoint: Checkpoint | None = None
    """Checkpoint with the vision encoder and the adapter, if a run was named."""
    chat_template: str | None = None
    """File with a chat template that replaces the model's own."""

    @property
    def folder(self) -> Path:
        """Path of `decoder`."""
        return self.decoder.path

    @property
    def sees(self) -> bool:
        """True if the model has a vision encoder."""
        if self.checkpoint is None:
            return self.kind == "export"
        return run_config(self.checkpoint).encoder is not None

    def identity(self) -> dict[str, Any]:
        """Returns name, kind, folders and hashes, which a result records to identify the model that was measured."""
        found: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind,
            "decoder": str(self.folder),
            "decoder_hash": model_hash(self.folder),
        }
        if self.checkpoint is not None:
            found["weights"] = str(self.checkpoint.folder)
            found["step"] = self.checkpoint.step
            found["weights_sha256"] = self.checkpoint.manifest.get("weights_sha256")
        return found


@dataclass(frozen=True)
class Served:
    """Arguments for starting vLLM."""

    folder: Path
    """Folder of an ordinary Hugging Face model."""
    dtype: str
    max_length: int
    """Largest number of tokens of a prompt and its answer together."""
    tensor_parallel: int = 1
    """Number of devices that share the model."""
    memory_share: float = 0.85
    """Share of a GPU's memory that vLLM may use; the vision encoder needs the rest."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, with the sample encoder that turns conversations into its tokens."""

    model: VisionLanguageModel
    encoder: SampleEncoder
    served: Served | None = None
    """How vLLM runs the decoder; `model` then holds none of its layers. None if the model runs in this process."""


def find_model(name: str, target: str | None = None, chat_template: str | None = None) -> NamedModel:
    """Finds the model that `name` stands for.

    name: folder or hub id of a target, a surrogate or an export; or the folder of a run or of one of its checkpoints,
    which stands for the model as it was trained. target: folder or hub id of a full model to graft the run into.
    chat_template: file with a chat template that replaces the model's own.

    Raises:
        ConfigError, CheckpointError: the model or the file does not exist, or `target` was given for a name that is
            not a run.
    """
    read_template(chat_template)
    folder = home_path(name)
    if (folder / "latest").is_file() or (folder / "manifest.json").is_file():
        checkpoint = find_checkpoint(folder)
        decoder = DecoderFolder(local_folder(target or decoder_folder(run_config(checkpoint))))
        is_graft = target is not None and not decoder.is_surrogate
        return NamedModel(name, "graft" if is_graft else "trained", decoder, checkpoint, chat_template)
    if target is not None:
        raise ConfigError(f"{name} is not a run, so it cannot be grafted into {target}; leave out --target.")
    decoder = DecoderFolder(local_folder(name))
    if decoder.is_surrogate:
        return NamedModel(name, "surrogate", decoder, None, chat_template)
    return NamedModel(name, "export" if _is_export(decoder) else "target", decoder, None, chat_template)


def _is_export(folder: DecoderFolder) -> bool:
    try:
        return bool(folder.raw_config["model_type"] == EXPORT)
    except (OSError, ConfigError):
        return False  # loading the folder as a target will raise the error that explains it


def load_model(
    named: NamedModel,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    offload_folder: Path | None = None,
) -> LoadedModel:
    """Loads a model onto one device. A `device_map` places some decoder layers elsewhere (engines/offload.py).

    Prompts may be as long as the decoder allows; `data.max_length` applies only to training.

    Raises:
        ConfigError, CheckpointError: a damaged folder, or parts that do not belong together.
    """
    if named.kind == "export":
        model, encoder = _load_export(named, dtype, attention)
    elif named.checkpoint is None:
        model = build_model(ModelSpec(decoder=named.decoder, dtype=dtype, attention=attention)).eval()
        encoder = sample_encoder(model, named.decoder, None, _data(named), learns=False)
    else:
        model, encoder = _load_run(named, named.checkpoint, dtype, attention)
    longest = position_limit(cast(Any, model.decoder).config.get_text_config()) or ANY_LENGTH
    loaded = LoadedModel(model, replace(encoder, max_length=longest))
    if device_map is None:
        model.to(device)
    else:
        spread_(model, device_map, torch.device(device), offload_folder)
    return loaded


def _load_run(
    named: NamedModel, checkpoint: Checkpoint, dtype: torch.dtype, attention: str
) -> tuple[VisionLanguageModel, SampleEncoder]:
    config = run_config(checkpoint)
    load = load_graft if named.kind == "graft" else load_trained
    model = load(checkpoint.folder, named.decoder, dtype=dtype, attention=attention)
    vision = local_folder(config.encoder.path) if config.encoder else None
    # training may draw the prompt around an image at random; answering always uses the same prompt
    image_prompt = "off" if config.data.image_prompt == "off" else "fixed"
    data = _data(named, config.data).model_copy(update={"image_prompt": image_prompt})
    return model, sample_encoder(model, named.decoder, vision, data, seed=config.seed)


def _data(named: NamedModel, data: DataConfig | None = None) -> DataConfig:
    """Returns a run's data section, or an empty one, with the chat template that the user named."""
    data = data or DataConfig()
    return data if named.chat_template is None else data.model_copy(update={"chat_template": named.chat_template})


def _load_export(named: NamedModel, dtype: torch.dtype, attention: str) -> tuple[VisionLanguageModel, SampleEncoder]:
    """Loads transformers' Llava and takes it apart into vision encoder, adapter and decoder again."""
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    folder = named.folder
    llava: Any = load_complete(
        LlavaForConditionalGeneration.from_pretrained, folder, dtype=dtype, attn_implementation=attention
    )
    config = llava.config
    text, vision = config.text_config, config.vision_config
    family = family_of_config(text, folder)
    encoder_family = fitted(described(vision, folder), vision, folder, None)
    strategy = {0: "full", 1: "default"}.get(encoder_family.prefix_tokens)
    if config.vision_feature_select_strategy != strategy or isinstance(config.vision_feature_layer, list):
        raise ConfigError(
            f"{folder} takes image features from several layers or includes the tokens before the patches, which "
            "zero_ds does not support; open it with transformers."
        )
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(text)
    setattr(decoder, family.backbone, llava.model.language_model)
    decoder.set_output_embeddings(llava.lm_head)
    decoder.generation_config = llava.generation_config
    model = build_model(
        ModelSpec(
            Modules(decoder, family, llava.model.vision_tower, encoder_family),
            encoder_config=EncoderConfig(path=str(folder), feature_layer=config.vision_feature_layer),
        )
    )
    projector = llava.model.multi_modal_projector
    model.adapter = Adapter.of_linears([projector.linear_1, projector.linear_2], projector.act)
    background = getattr(config, "image_background", WHITE)  # exports state it if it is another colour
    encoder = sample_encoder(model.eval(), folder, folder, _data(named, DataConfig(image_background=background)))
    for_texts_(encoder.template.tokenizer)
    has_image_prompt = WRAPPERS[0].split("{image}")[0] in str(encoder.template.tokenizer.chat_template)
    return model, replace(encoder, image_prompt="fixed" if has_image_prompt else "off")
