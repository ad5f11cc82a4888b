"""Format `llava`: transformers' own `LlavaForConditionalGeneration`, a folder that loads without any code of ours.

Tensors go by the names that published Llava folders have, which every version of transformers and vLLM reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from zero_ds.data.images import ImageProcessor
from zero_ds.export.source import Source
from zero_ds.export.tensors import as_dtype, in_memory
from zero_ds.export.text import Texts
from zero_ds.model import lora
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.safetensors import Tensor

REMOTE_CODE = False
TOWERS = {"clip": "vision_tower.vision_model."}
"""Encoder -> prefix of its tensors in published folders."""
STRATEGIES: dict[int, Any] = {0: "full", 1: "default"}
"""Tokens that an encoder puts before the patches -> what Llava calls it when they are dropped."""
PROJECTOR = {"adapter.0.": "linear_1.", "adapter.2.": "linear_2."}

USAGE = """from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image

model = LlavaForConditionalGeneration.from_pretrained("{name}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
messages = [
    {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in this image?"}}]}}
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.open("picture.png")
inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
output_ids = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output_ids[0], skip_special_tokens=True))
"""


def refuse(source: Source) -> None:
    """Raises ConfigError for a model with something that Llava cannot express."""
    config, text = source.config, source.text
    reasons = {
        "Llava has no image-boundary embeddings and no norm on patch tokens; this run uses them": (
            config.adapter.boundary_tokens or source.encoder_config.patch_norm
        ),
        "Llava shows every picture once; this run was trained with data.image_grid": bool(config.data.image_grid),
        f"Llava has no soft-capping of scores, which {source.family.name} needs": bool(
            getattr(text, "final_logit_softcapping", None) or getattr(text, "attn_logit_softcapping", None)
        ),
        f"Llava cannot leave out the {source.encoder_family.prefix_tokens} tokens before the patches": (
            source.encoder_family.prefix_tokens not in STRATEGIES or source.encoder_family.name not in TOWERS
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(f"{reason}; use --format remote-code.")


def tensors(source: Source) -> list[tuple[str, Tensor]]:
    """Every tensor of the folder by its name, in the order of the model.

    Raises:
        ConfigError, CheckpointError: weights that do not fit; a tensor that Llava has and the source has not.
    """
    refuse(source)
    found = {_encoder_name(source, name): tensor for name, tensor in source.encoder_tensors().items()}
    if source.config.adapter.width is None:
        for name, span in source.adapter_spans().items():
            found[_projector_name(name)] = as_dtype(span, source.dtype)
    else:
        folded = fold(source.adapter_in_memory(), source.dtype)
        found |= {f"multi_modal_projector.{name}": in_memory(tensor, source.dtype) for name, tensor in folded.items()}
    found |= {f"language_model.{name}": tensor for name, tensor in source.decoder_tensors().items()}
    return list(found.items())


def loaded(source: Source, model: VisionLanguageModel) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name in the folder, value, whether it is rounded as it stands) of every tensor of a model that was loaded whole.

    Another way to the same tensors than `tensors`, for comparison.
    """
    assert model.encoder is not None and model.adapter is not None
    for name, tensor in model.encoder.state_dict().items():
        yield _encoder_name(source, name), tensor, True
    adapter = {name: p.detach() for name, p in model.named_parameters() if name.startswith(("adapter.", "aligner."))}
    if model.aligner is None:
        for name, tensor in adapter.items():
            yield _projector_name(name), tensor, True
    else:
        for name, tensor in fold(adapter, source.dtype).items():
            yield f"multi_modal_projector.{name}", tensor, False
    merged = {f"{module}.weight" for module in source.lora()}
    for name, parameter in lora.without(model.decoder):
        yield f"language_model.{name}", parameter.detach(), name not in merged


def fold(adapter: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Adapter and aligner as the two linear layers of Llava's projector.

    Two linear layers in a row are one. Llava's inner width is that of its decoder: a narrower adapter is filled up with
    units that are zero before and, as GELU(0) = 0, behind the activation.

    Raises:
        ConfigError: the adapter is wider than the decoder.
    """
    wide = adapter["aligner.weight"].double()
    first, bias = adapter["adapter.0.weight"], adapter["adapter.0.bias"]
    room = len(wide) - len(first)
    if room < 0:
        raise ConfigError(f"Llava has no room for an adapter wider than its decoder ({len(first)} units).")
    last = wide @ adapter["adapter.2.weight"].double()
    return {
        "linear_1.weight": nn.functional.pad(first, (0, 0, 0, room)).to(dtype),
        "linear_1.bias": nn.functional.pad(bias, (0, room)).to(dtype),
        "linear_2.weight": nn.functional.pad(last, (0, room)).to(dtype),
        "linear_2.bias": (wide @ adapter["adapter.2.bias"].double() + adapter["aligner.bias"].double()).to(dtype),
    }


def _encoder_name(source: Source, name: str) -> str:
    return TOWERS[source.encoder_family.name] + name


def _projector_name(name: str) -> str:
    for ours, theirs in PROJECTOR.items():
        if name.startswith(ours):
            return f"multi_modal_projector.{theirs}{name.removeprefix(ours)}"
    raise AssertionError(f"Llava has no place for {name}")


def expected(source: Source, texts: Texts) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that transformers' class has, under the names of the folder."""
    from transformers import LlavaForConditionalGeneration

    settings = _config(source, texts)
    with torch.device("meta"):
        model = cast(nn.Module, LlavaForConditionalGeneration(settings))
    places = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": TOWERS[source.encoder_family.name],
        "model.multi_modal_projector.": "multi_modal_projector.",
        "lm_head.": "language_model.lm_head.",
    }
    shapes = {}
    for name, tensor in model.state_dict().items():
        prefix = next(prefix for prefix in places if name.startswith(prefix))
        shapes[places[prefix] + name.removeprefix(prefix)] = tuple(tensor.shape)
    if settings.tie_word_embeddings:
        shapes.pop("language_model.lm_head.weight")
    return shapes


def _config(source: Source, texts: Texts) -> Any:
    from transformers import LlavaConfig

    text, vision = source.plain_configs()
    settings: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=texts.image_token_id,
        projector_hidden_act="gelu",
        vision_feature_select_strategy=STRATEGIES[source.encoder_family.prefix_tokens],
        vision_feature_layer=source.encoder_config.feature_layer,
        image_seq_length=source.tokens_per_image,
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(source.text.tie_word_embeddings),
    )
    return settings


def write(source: Source, texts: Texts, folder: Path) -> None:
    """Writes config.json, the processor and generation_config.json beside the weights."""
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = _config(source, texts)
    settings.architectures = ["LlavaForConditionalGeneration"]
    settings.dtype = source.dtype
    settings.save_pretrained(folder)
    pictures = ImageProcessor.from_folder(source.encoder_folder, source.vision.image_size)
    size = {"height": pictures.size, "width": pictures.size}
    processor = LlavaProcessor(
        image_processor=LlavaImageProcessorPil(
            do_pad=True,
            size=size,
            crop_size=size,
            image_mean=pictures.mean,
            image_std=pictures.std,
            resample=pictures.resample,
        ),
        tokenizer=texts.tokenizer,
        patch_size=source.vision.patch_size,
        vision_feature_select_strategy=STRATEGIES[source.encoder_family.prefix_tokens],
        image_token=texts.image_token,
        num_additional_image_tokens=source.encoder_family.prefix_tokens,
        chat_template=texts.template,
    )
    processor.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(texts.generation, indent=2) + "\n", encoding="utf-8")
