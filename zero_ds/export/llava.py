"""Format `llava`: transformers' own `LlavaForConditionalGeneration`, a folder that loads without any code of zero_ds.

The folder also contains `read_image.py`, because transformers' processor turns no image upright and reads no image of
more than 8 bits. The model card opens images with it.

The tensors have the names of published Llava folders, which every version of transformers and vLLM reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn

from zero_ds.data.images import ImageProcessor
from zero_ds.data.read_image import WHITE
from zero_ds.export.formats import LoadedTensor, write_image_reader
from zero_ds.export.source import Source
from zero_ds.export.tensors import as_dtype, in_memory, read
from zero_ds.export.text import TextSettings
from zero_ds.model import lora
from zero_ds.model.adapter import LINEARS, adapter_parameters, linear_layers
from zero_ds.model.encoders.base import native_size
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.safetensors import Tensor

STRATEGIES: dict[int, Any] = {0: "full", 1: "default"}
"""Llava's `vision_feature_select_strategy`, by the number of tokens that the encoder puts before the patches."""
PROJECTOR = ("multi_modal_projector.linear_1", "multi_modal_projector.linear_2")
"""Linear layers of Llava's projector, first to last; `.weight` and `.bias` follow."""
PLAIN = {"mlp": "gelu", "linear": "linear"}
"""Kinds of adapters that Llava's projector can be, with the activation between its two layers."""
DECODER = "language_model."
"""Prefix of the decoder's tensors."""

T = TypeVar("T")
Linear = tuple[torch.Tensor, torch.Tensor]
"""Weight (out, in) and bias (out) of a linear layer."""


class LlavaFormat:
    """The format `llava`; see `formats.ExportFormat` for its methods."""

    name = "llava"
    tag = "llava"
    remote_code = False
    usage = """from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.dynamic_module_utils import get_class_from_dynamic_module

# upright, with 8 bits a channel and transparency on a background, as in training but unlike PIL or the processor
open_image = get_class_from_dynamic_module("read_image.open_image", "{name}")
model = LlavaForConditionalGeneration.from_pretrained("{name}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
messages = [
    {{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": "What is in this image?"}}]}}
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
image = open_image("image.png", background="{background}")
inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
output_ids = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output_ids[0], skip_special_tokens=True))
"""

    def lacks(self, source: Source) -> str | None:
        """Returns the reason why Llava cannot express a model; None if it can."""
        return _what_llava_lacks(source)

    def tensors(self, source: Source) -> list[tuple[str, Tensor]]:
        found: dict[str, Tensor] = {}
        for name, tensor in source.encoder_tensors().items():
            found[_encoder_name(source, name)] = tensor
        adapter = source.adapter_spans()
        if _is_computed(source):
            in_order = linear_layers({name: read(span) for name, span in adapter.items()})
            for name, value in _computed_projector(source, in_order).items():
                found[name] = in_memory(value, source.dtype)
        else:
            for name, span in _projector(linear_layers(adapter)).items():
                found[name] = as_dtype(span, source.dtype)
        for name, tensor in source.decoder_tensors().items():
            found[f"{DECODER}{name}"] = tensor
        return list(found.items())

    def loaded_tensors(self, source: Source, model: VisionLanguageModel) -> Iterator[LoadedTensor]:
        assert model.encoder is not None
        for name, tensor in model.encoder.state_dict().items():
            yield LoadedTensor(_encoder_name(source, name), tensor, exact=True)
        in_order = linear_layers({name: p.detach() for name, p in adapter_parameters(model).items()})
        projector = _computed_projector(source, in_order) if _is_computed(source) else _projector(in_order)
        for name, tensor in projector.items():
            yield LoadedTensor(name, tensor, exact=not source.has_aligner)
        merged = source.merged_weights()
        for name, tensor in lora.stored_tensors(model.decoder):
            yield LoadedTensor(f"{DECODER}{name}", tensor, exact=name not in merged)

    def expected_shapes(self, source: Source, texts: TextSettings) -> dict[str, tuple[int, ...]]:
        from transformers import LlavaForConditionalGeneration

        config = _llava_config(source, texts)
        with torch.device("meta"):
            model = cast(nn.Module, LlavaForConditionalGeneration(config))
        # prefixes in the class of transformers 5 -> prefixes in published folders
        prefixes = {
            "model.language_model.": f"{DECODER}model.",
            "model.vision_tower.": _encoder_prefix(source),
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": f"{DECODER}lm_head.",
        }
        shapes = {}
        for name, tensor in model.state_dict().items():
            prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
            inner = name.removeprefix(prefix)
            if prefix == "model.vision_tower.":
                inner = source.encoder_names[inner]
            shapes[prefixes[prefix] + inner] = tuple(tensor.shape)
        if config.tie_word_embeddings:
            shapes.pop(f"{DECODER}lm_head.weight")
        return shapes

    def write_files(self, source: Source, texts: TextSettings, folder: Path) -> None:
        config = _llava_config(source, texts)
        config.architectures = ["LlavaForConditionalGeneration"]
        config.dtype = source.dtype
        if source.config.data.image_background != WHITE:
            config.image_background = source.config.data.image_background
        config.save_pretrained(folder)
        write_image_reader(folder)
        _llava_processor(source, texts).save_pretrained(folder)
        generation = json.dumps(texts.generation, indent=2) + "\n"
        (folder / "generation_config.json").write_text(generation, encoding="utf-8")


def _what_llava_lacks(source: Source) -> str | None:
    """Returns the reason why Llava cannot express a model, or None."""
    config, text, encoder = source.config, source.text, source.encoder_family
    if config.adapter.square > 1 or config.adapter.kind not in PLAIN:
        return (
            f"Llava's projector makes an image token of every patch; this run was trained with adapter.kind="
            f"{config.adapter.kind}"
        )
    if len(LINEARS) != len(PROJECTOR):
        return f"Llava's projector has {len(PROJECTOR)} linear layers; this adapter has {len(LINEARS)}"
    if config.adapter.boundary_tokens or source.encoder_config.patch_norm:
        return "Llava has no image-boundary embeddings and no norm on patch tokens; this run uses them"
    if config.data.image_grid:
        return "Llava shows every image once; this run was trained with data.image_grid"
    family = source.decoder.family
    if getattr(text, family.score_cap, None) or getattr(text, "attn_logit_softcapping", None):
        return f"Llava has no soft-capping of scores, which {family.name} needs"
    wider = config.adapter.width is not None and config.adapter.width > text.hidden_size
    if wider and config.adapter.kind != "linear":
        return (
            f"Llava has no room for an adapter that is wider ({config.adapter.width} units) than its decoder "
            f"({text.hidden_size})"
        )
    if family.head_bias:
        return f"Llava's output head has no bias, which {family.name} needs"
    if family.score_factor:
        return f"Llava has no {family.score_factor} for scores, which {family.name} needs"
    if family.wrong_attentions and not source.decoder.is_registered:
        return f"Llava would compute the attention of {family.name} with sdpa, which it cannot"
    if any(group.sources != (*group.targets,) for group in source.decoder.class_tensors):
        return f"published Llava folders have no names for the experts of {family.name}"
    if (family.backbone, family.head) != ("model", "lm_head.weight"):
        return f"published Llava folders have no names for the tensors of {family.name}"
    if encoder.llava_prefix is None:
        return f"the vision encoder {encoder.name} has no Llava form"
    if not encoder.takes_any_size and source.image_size != native_size(source.vision):
        return (
            f"Llava does not interpolate the position embeddings of {encoder.name}, which has images of "
            f"{native_size(source.vision)} pixels, to encoder.image_size={source.image_size}"
        )
    if encoder.wrong_attentions:
        return f"Llava would compute the attention of {encoder.name} with sdpa, which it cannot"
    if encoder.prefix_tokens not in STRATEGIES:
        return f"Llava cannot drop the {encoder.prefix_tokens} tokens that {encoder.name} puts before the patches"
    return None


def _encoder_prefix(source: Source) -> str:
    prefix = source.encoder_family.llava_prefix
    assert prefix is not None, "LlavaFormat.lacks refuses such encoders"
    return prefix


def _encoder_name(source: Source, name: str) -> str:
    return _encoder_prefix(source) + source.encoder_names[name]


def _projector(layers: Sequence[tuple[T, T]]) -> dict[str, T]:
    """Returns the tensors of linear layers under the names that they have in Llava's projector."""
    found = {}
    for name, (weight, bias) in zip(PROJECTOR, layers, strict=True):
        found[f"{name}.weight"] = weight
        found[f"{name}.bias"] = bias
    return found


def fold_aligner(layers: Sequence[Linear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns adapter and aligner as the tensors of Llava's projector, which has two linear layers.

    layers: the two linear layers of the adapter and the aligner.

    The aligner follows the adapter's last layer without an activation, so the two are one linear layer. The inner width
    of Llava's projector is that of its decoder: a narrower adapter is padded with units that are zero before the
    activation and, because GELU(0) = 0, also after it. A wider one cannot be expressed.
    """
    (first, first_bias), (last, last_bias), (aligner, aligner_bias) = layers
    padding = len(aligner) - len(first)
    assert padding >= 0, "Llava has no room for an adapter that is wider than its decoder"
    folded = aligner.double() @ last.double()
    folded_bias = aligner.double() @ last_bias.double() + aligner_bias.double()
    return _projector(
        [
            (
                nn.functional.pad(first, (0, 0, 0, padding)).to(dtype),
                nn.functional.pad(first_bias, (0, padding)).to(dtype),
            ),
            (nn.functional.pad(folded, (0, padding)).to(dtype), folded_bias.to(dtype)),
        ]
    )


def _is_computed(source: Source) -> bool:
    """Returns whether the projector's tensors are not simply those of the adapter."""
    return source.has_aligner or source.config.adapter.kind == "linear"


def _computed_projector(source: Source, layers: Sequence[Linear]) -> dict[str, torch.Tensor]:
    """Returns the tensors of Llava's projector for an adapter whose own tensors it does not have."""
    if source.config.adapter.kind == "linear":
        return linear_projector(layers, source.dtype)
    return fold_aligner(layers, source.dtype)


def linear_projector(layers: Sequence[Linear], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Returns one linear layer as the tensors of Llava's projector, whose activation is then `linear`, the identity.

    layers: the adapter's linear layer, and the aligner if there is one. They are the projector's first layer; its
    second is the identity matrix, which changes no bit of its input in any number format.
    """
    weight, bias = layers[0]
    for after, after_bias in layers[1:]:
        bias = after.double() @ bias.double() + after_bias.double()
        weight = after.double() @ weight.double()
    width = len(weight)
    identity = (torch.eye(width, dtype=dtype), torch.zeros(width, dtype=dtype))
    return _projector([(weight.to(dtype), bias.to(dtype)), identity])


def _llava_config(source: Source, texts: TextSettings) -> Any:
    from transformers import LlavaConfig

    text, vision = source.plain_configs()
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=texts.image_token_id,
        projector_hidden_act=PLAIN[source.config.adapter.kind],
        vision_feature_select_strategy=STRATEGIES[source.encoder_family.prefix_tokens],
        vision_feature_layer=source.encoder_config.feature_layer,
        image_seq_length=source.tokens_per_image,
        multimodal_projector_bias=True,
        tie_word_embeddings=bool(source.text.tie_word_embeddings),
    )
    return config


def _llava_processor(source: Source, texts: TextSettings) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    ours = ImageProcessor.from_folder(source.encoder_folder, source.image_size)
    size = {"height": ours.size, "width": ours.size}
    images = LlavaImageProcessorPil(
        do_pad=True, size=size, crop_size=size, image_mean=ours.mean, image_std=ours.std, resample=ours.resample
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=texts.tokenizer,
        patch_size=source.encoder_family.patch_size(source.vision),
        vision_feature_select_strategy=STRATEGIES[source.encoder_family.prefix_tokens],
        image_token=texts.image_token,
        num_additional_image_tokens=source.encoder_family.prefix_tokens,
        chat_template=texts.template,
    )
