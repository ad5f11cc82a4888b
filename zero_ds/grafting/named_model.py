"""A model by the name that a user gives it: a folder or hub id, an export, a run, or a run plugged into its target."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from zero_ds.config.schema import DataConfig, EncoderConfig
from zero_ds.data.conversations import WRAPPERS
from zero_ds.data.samples import SampleEncoder
from zero_ds.grafting.engines.offload import spread_
from zero_ds.grafting.graft import load_graft, load_trained, run_config
from zero_ds.grafting.tokenizers import for_texts_
from zero_ds.model.build import ModelSpec, Modules, build_model, sample_encoder
from zero_ds.model.decoders import FAMILIES
from zero_ds.model.encoders import ENCODERS
from zero_ds.model.loading import load_complete, model_hash
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.hub import local_folder
from zero_ds.training.checkpoint.checkpoint import Checkpoint, find_checkpoint
from zero_ds.training.stages import decoder_folder

EXPORT = "llava"
"""`model_type` of an exported folder."""


@dataclass(frozen=True)
class NamedModel:
    """What a name stands for, before anything large is read."""

    name: str
    kind: Literal["target", "surrogate", "trained", "graft", "export"]
    folder: Path
    """The decoder's folder; an export's own."""
    commit: Checkpoint | None = None
    """Where encoder and adapter come from, if a run was named."""

    @property
    def sees(self) -> bool:
        """Whether it has a vision encoder."""
        return self.kind == "export" or (self.commit is not None and run_config(self.commit).encoder is not None)

    def identity(self) -> dict[str, Any]:
        """Kind, folders and hashes: what a result says about the model that it was measured on."""
        found: dict[str, Any] = {"name": self.name, "kind": self.kind, "decoder": str(self.folder)}
        found["decoder_hash"] = model_hash(self.folder)
        if self.commit is not None:
            found |= {"weights": str(self.commit.folder), "step": self.commit.step}
            found["weights_sha256"] = self.commit.manifest.get("weights_sha256")
        return found


@dataclass(frozen=True)
class LoadedModel:
    """A model with what turns conversations into its tokens."""

    model: VisionLanguageModel
    encoder: SampleEncoder
    served: Served | None = None
    """How vLLM runs the decoder; then `model` holds none of its layers."""


@dataclass(frozen=True)
class Served:
    """What vLLM is started with."""

    folder: Path
    """Of an ordinary Hugging Face model."""
    dtype: str
    max_length: int
    tensor_parallel: int = 1


def find_model(name: str, target: str | None = None) -> NamedModel:
    """What `name` stands for: the folder or hub id of a target, a surrogate or an export; or a run or commit folder,
    which means the model as it was trained, or, with `target`, plugged into that model.

    Raises:
        ConfigError, CheckpointError: nothing of that name, or a `target` where there is nothing to plug in.
    """
    folder = Path(name).expanduser()
    if (folder / "latest").is_file() or (folder / "manifest.json").is_file():
        commit = find_checkpoint(folder)
        decoder = local_folder(target or decoder_folder(run_config(commit)))
        grafted = target is not None and not (decoder / "surrogate.json").is_file()
        return NamedModel(name, "graft" if grafted else "trained", decoder, commit)
    if target is not None:
        raise ConfigError(f"{name} is no run, so nothing of it can be plugged into {target}; leave out --target.")
    folder = local_folder(name)
    if (folder / "surrogate.json").is_file():
        return NamedModel(name, "surrogate", folder)
    return NamedModel(name, "export" if _model_type(folder) == EXPORT else "target", folder)


def _model_type(folder: Path) -> str | None:
    try:
        return cast("str | None", json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError):
        return None


def load_model(
    named: NamedModel,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    device: torch.device | str = "cpu",
    device_map: str | None = None,
    offload_folder: Path | None = None,
) -> LoadedModel:
    """Reads the model into memory, onto one device, or with a `device_map` (offload.py) decoder layers elsewhere.

    Prompts may be as long as the decoder allows, whatever `data.max_length` was in training.

    Raises:
        ConfigError, CheckpointError: a folder that is damaged, or parts that do not belong together.
    """
    if named.kind == "export":
        model, encoder = _load_export(named.folder, dtype, attention)
    elif named.commit is None:
        model = build_model(ModelSpec(decoder=named.folder, dtype=dtype, attention=attention)).eval()
        encoder = sample_encoder(model, named.folder, None, DataConfig())
    else:
        config = run_config(named.commit)
        load = load_graft if named.kind == "graft" else load_trained
        model = load(named.commit.folder, named.folder, dtype=dtype, attention=attention)
        vision = local_folder(config.encoder.path) if config.encoder else None
        prompt = "off" if config.data.image_prompt == "off" else "fixed"
        encoder = sample_encoder(
            model, named.folder, vision, config.data.model_copy(update={"image_prompt": prompt}), seed=config.seed
        )
    longest = int(cast(Any, model.decoder).config.get_text_config().max_position_embeddings)
    model = model.to(device) if device_map is None else spread_(model, device_map, torch.device(device), offload_folder)
    return LoadedModel(model, replace(encoder, max_length=longest))


def _load_export(folder: Path, dtype: torch.dtype, attention: str) -> tuple[VisionLanguageModel, SampleEncoder]:
    """transformers' Llava taken apart into encoder, adapter and decoder again."""
    from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

    llava: Any = load_complete(
        LlavaForConditionalGeneration.from_pretrained, folder, dtype=dtype, attn_implementation=attention
    )
    config = llava.config
    text, vision = config.text_config, config.vision_config
    family = next((f for f in FAMILIES.values() if text.model_type in f.model_types), None)
    tower = next((e for e in ENCODERS.values() if vision.model_type in e.model_types), None)
    if family is None or tower is None:
        raise ConfigError(f"{folder} holds a {text.model_type} with a {vision.model_type}, which is not known here.")
    if config.vision_feature_select_strategy != "default" or isinstance(config.vision_feature_layer, list):
        raise ConfigError(f"{folder} reads its vision encoder in a way that is not known here; use its own library.")
    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(text)
    setattr(decoder, family.backbone, llava.model.language_model)
    decoder.set_output_embeddings(llava.lm_head)
    decoder.generation_config = llava.generation_config
    model = build_model(
        ModelSpec(
            Modules(decoder, family, llava.model.vision_tower, tower),
            encoder_config=EncoderConfig(path=str(folder), feature_layer=config.vision_feature_layer),
        )
    )
    assert model.adapter is not None
    projector = llava.model.multi_modal_projector
    model.adapter[0], model.adapter[2] = projector.linear_1, projector.linear_2
    encoder = sample_encoder(model.eval(), folder, folder, DataConfig())
    for_texts_(encoder.template.tokenizer)
    wrapped = WRAPPERS[0].split("{image}")[0] in str(encoder.template.tokenizer.chat_template)
    return model, replace(encoder, image_prompt="fixed" if wrapped else "off")
