"""Format `remote-code`: a folder with modelling code of its own, for models that Llava cannot express.

The code in `remote/` is copied next to the weights. With it, `AutoModelForCausalLM` and `AutoProcessor` load the folder
if they are given `trust_remote_code=True`. Tensors keep the names that they have in `model.VisionLanguageModel`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zero_ds.config.schema import AdapterConfig
from zero_ds.data.images import ImageProcessor
from zero_ds.data.read_image import WHITE
from zero_ds.export.formats import LoadedTensor, write_image_reader
from zero_ds.export.source import Source
from zero_ds.export.tensors import as_dtype
from zero_ds.export.text import TextSettings, image_prompt
from zero_ds.model import lora
from zero_ds.model.adapter import adapter_parameters
from zero_ds.model.encoders.base import native_size
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.safetensors import Tensor

CODE = ("configuration_grafted.py", "modeling_grafted.py", "processing_grafted.py")
"""Files of `remote/` that are copied into exports, with the code that reads images."""


class RemoteCodeFormat:
    """The format `remote-code`; see `formats.ExportFormat` for its methods."""

    name = "remote-code"
    tag = "custom_code"
    remote_code = True
    usage = """from transformers import AutoProcessor, AutoModelForCausalLM
import torch
from PIL import Image

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
image = Image.open("image.png")
messages = [
    {{"role": "user", "content": "What is in this image?"}},
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
output_ids = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output_ids[0], skip_special_tokens=True))
"""

    def lacks(self, source: Source) -> str | None:
        """Returns None: the code expresses every model of this package."""
        return None

    def tensors(self, source: Source) -> list[tuple[str, Tensor]]:
        found: dict[str, Tensor] = {}
        for name, tensor in source.encoder_tensors().items():
            found[f"encoder.{source.encoder_names[name]}"] = tensor
        for name, span in source.adapter_spans().items():
            found[name] = as_dtype(span, source.dtype)
        for name, tensor in source.decoder_tensors().items():
            found[f"decoder.{name}"] = tensor
        return list(found.items())

    def loaded_tensors(self, source: Source, model: VisionLanguageModel) -> Iterator[LoadedTensor]:
        assert model.encoder is not None
        for name, tensor in model.encoder.state_dict().items():
            yield LoadedTensor(f"encoder.{source.encoder_names[name]}", tensor, exact=True)
        for name, parameter in adapter_parameters(model).items():
            yield LoadedTensor(name, parameter.detach(), exact=True)
        merged = source.merged_weights()
        for name, tensor in lora.stored_tensors(model.decoder):
            yield LoadedTensor(f"decoder.{name}", tensor, exact=name not in merged)

    def expected_shapes(self, source: Source, texts: TextSettings) -> dict[str, tuple[int, ...]]:
        # the code that write_files copies into the folder
        from zero_ds.export.remote.configuration_grafted import GraftedConfig
        from zero_ds.export.remote.modeling_grafted import GraftedForCausalLM

        settings = _config(source, texts)
        for name in ("architectures", "auto_map", "model_type"):
            del settings[name]
        with torch.device("meta"):
            model = GraftedForCausalLM(GraftedConfig(**settings))
        named = {f"encoder.{name}": f"encoder.{in_files}" for name, in_files in source.encoder_names.items()}
        shapes = {named.get(name, name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if settings["tie_word_embeddings"]:
            shapes.pop(f"decoder.{source.decoder.family.head}", None)
        return shapes

    def write_files(self, source: Source, texts: TextSettings, folder: Path) -> None:
        texts.tokenizer.save_pretrained(folder)
        files = {
            "config.json": _config(source, texts),
            "processor_config.json": _processor_config(source, texts),
            "generation_config.json": texts.generation,
        }
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        for name in CODE:
            (folder / name).write_bytes((Path(__file__).parent / "remote" / name).read_bytes())
        write_image_reader(folder)


def _config(source: Source, texts: TextSettings) -> dict[str, Any]:
    """Returns config.json: the arguments of remote/configuration_grafted.py and what transformers needs to find it."""
    text, vision = source.plain_configs()
    adapter = source.config.adapter
    attention = source.decoder.family.attention("sdpa")
    other: dict[str, Any] = {}
    if not source.decoder.is_registered and attention != "sdpa":
        other["decoder_attention"] = attention
    if adapter.kind != AdapterConfig().kind:
        other |= {"adapter_kind": adapter.kind, "adapter_factor": adapter.square}
    return {
        **other,
        **_encoder_settings(source),
        "architectures": ["GraftedForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_grafted.GraftedConfig",
            "AutoModelForCausalLM": "modeling_grafted.GraftedForCausalLM",
            "AutoModelForImageTextToText": "modeling_grafted.GraftedForCausalLM",
        },
        "model_type": "grafted_vlm",
        "dtype": text["dtype"],
        "image_token_id": texts.image_token_id,
        "feature_layer": source.encoder_config.feature_layer,
        "prefix_tokens": source.encoder_family.prefix_tokens,
        "patch_norm": source.encoder_family.final_norm if source.encoder_config.patch_norm else None,
        "boundary_tokens": adapter.boundary_tokens,
        "adapter_width": adapter.width or source.text.hidden_size,
        "aligner": source.has_aligner,
        "tie_word_embeddings": bool(source.text.tie_word_embeddings),
        "text_config": text,
        "vision_config": vision,
    }


def _encoder_settings(source: Source) -> dict[str, Any]:
    """Returns what modeling_grafted.py has to know about vision encoders that are not read as CLIP is."""
    family = source.encoder_family
    settings: dict[str, Any] = {}
    if not family.auto:
        settings["encoder_class"] = family.class_name
    if family.reads_patches:
        settings["encoder_patch_size"] = family.patch_size(source.vision)
    if family.interpolation and source.image_size != native_size(source.vision):
        settings["interpolation"] = family.interpolation
    return settings


def _processor_config(source: Source, texts: TextSettings) -> dict[str, Any]:
    """Returns processor_config.json: the arguments of remote/processing_grafted.py and where transformers finds it."""
    images = ImageProcessor.from_folder(source.encoder_folder, source.image_size)
    before, between = image_prompt(source.config.data)
    background = source.config.data.image_background
    return {
        "processor_class": "GraftedProcessor",
        "auto_map": {"AutoProcessor": "processing_grafted.GraftedProcessor"},
        "image_token": texts.image_token,
        "tokens_per_view": source.tokens_per_image,
        "image_size": images.size,
        "image_mean": images.mean,
        "image_std": images.std,
        "resample": int(images.resample),
        "image_grid": source.config.data.image_grid,
        "before": before,
        "between": between,
        **({} if background == WHITE else {"image_background": background}),
    }
