"""Format `remote-code`: a folder with modelling code of its own, for what Llava cannot express.

The code in `remote/` is copied beside the weights; with it `AutoModelForCausalLM` and `AutoProcessor` load the folder
where they may (`trust_remote_code=True`). Tensors keep the names that they have in `model.VisionLanguageModel`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from zero_ds.data.images import ImageProcessor
from zero_ds.export.source import Source
from zero_ds.export.tensors import as_dtype
from zero_ds.export.text import Texts, wrapper
from zero_ds.model import lora
from zero_ds.model.vlm import VisionLanguageModel
from zero_ds.runtime.safetensors import Tensor

REMOTE_CODE = True
CODE = ("configuration_grafted.py", "modeling_grafted.py", "processing_grafted.py")

USAGE = """from transformers import AutoProcessor, AutoModelForCausalLM
import torch
from PIL import Image

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto", device_map="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
image = Image.open("picture.png")
messages = [
    {{"role": "user", "content": "What is in this image?"}},
]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=prompt, images=image, return_tensors="pt").to(model.device)
output_ids = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(output_ids[0], skip_special_tokens=True))
"""


def refuse(source: Source) -> None:
    """There is no model of this package that the format cannot express."""


def tensors(source: Source) -> list[tuple[str, Tensor]]:
    """Every tensor of the folder by its name, in the order of the model.

    Raises:
        ConfigError, CheckpointError: weights that do not fit.
    """
    found = {f"encoder.{name}": tensor for name, tensor in source.encoder_tensors().items()}
    found |= {name: as_dtype(span, source.dtype) for name, span in source.adapter_spans().items()}
    found |= {f"decoder.{name}": tensor for name, tensor in source.decoder_tensors().items()}
    return list(found.items())


def loaded(source: Source, model: VisionLanguageModel) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name in the folder, value, whether it is rounded as it stands) of every tensor of a model that was loaded whole.

    Another way to the same tensors than `tensors`, for comparison.
    """
    merged = {f"{module}.weight" for module in source.lora()}
    assert model.encoder is not None
    for name, tensor in model.encoder.state_dict().items():
        yield f"encoder.{name}", tensor, True
    for name, parameter in model.named_parameters():
        if name.startswith(("adapter.", "boundary.", "aligner.")):
            yield name, parameter.detach(), True
    for name, parameter in lora.without(model.decoder):
        yield f"decoder.{name}", parameter.detach(), name not in merged


def expected(source: Source, texts: Texts) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the folder's class has; its parts are transformers' own classes."""
    from zero_ds.model.decoders.folder import expected_shapes

    shapes = {f"encoder.{name}": tuple(tensor.shape) for name, tensor in source.encoder.state_dict().items()}
    shapes |= {name: span.shape for name, span in source.adapter_spans().items()}
    return shapes | {f"decoder.{name}": shape for name, shape in expected_shapes(source.folder).items()}


def write(source: Source, texts: Texts, folder: Path) -> None:
    """Writes code, config.json, the processor and generation_config.json beside the weights."""
    text, vision = source.plain_configs()
    adapter = source.config.adapter
    settings: dict[str, Any] = {
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
        "aligner": adapter.width is not None,
        "tie_word_embeddings": bool(source.text.tie_word_embeddings),
        "text_config": text,
        "vision_config": vision,
    }
    pictures = ImageProcessor.from_folder(source.encoder_folder, source.vision.image_size)
    before, between = wrapper(source.config.data)
    processor = {
        "processor_class": "GraftedProcessor",
        "auto_map": {"AutoProcessor": "processing_grafted.GraftedProcessor"},
        "image_token": texts.image_token,
        "tokens_per_view": source.tokens_per_image,
        "image_size": pictures.size,
        "image_mean": pictures.mean,
        "image_std": pictures.std,
        "resample": int(pictures.resample),
        "image_grid": source.config.data.image_grid,
        "before": before,
        "between": between,
    }
    texts.tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(texts.template, encoding="utf-8")
    files = {"config.json": settings, "processor_config.json": processor, "generation_config.json": texts.generation}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in CODE:
        (folder / name).write_bytes((Path(__file__).parent / "remote" / name).read_bytes())
