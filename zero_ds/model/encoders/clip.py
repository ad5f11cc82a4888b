"""CLIP's vision transformer: one CLS token before the patches, a norm after the last layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from zero_ds.model.encoders.base import EncoderFamily


def _load(path: str, **arguments: Any) -> nn.Module:
    from transformers import CLIPVisionModel

    return CLIPVisionModel.from_pretrained(path, **arguments)


FAMILY = EncoderFamily(
    name="clip",
    model_types=("clip_vision_model", "clip"),
    load=_load,
    prefix_tokens=1,
    final_norm="post_layernorm",
    llava_prefix="vision_tower.vision_model.",
    class_name="CLIPVisionModel",
    interpolation="interpolate_pos_encoding",
)
