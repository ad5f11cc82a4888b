"""SigLIP's vision transformer, also that of SigLIP 2 with a fixed resolution: no token before the patches."""

from __future__ import annotations

from typing import Any

from torch import nn

from zero_ds.model.encoders.base import EncoderFamily


def _load(path: str, **arguments: Any) -> nn.Module:
    """Loads the vision transformer without its pooling head, which no image token passes."""
    from transformers import AutoConfig, SiglipVisionModel

    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    config.vision_use_head = False
    return SiglipVisionModel.from_pretrained(path, config=config, **arguments)


FAMILY = EncoderFamily(
    name="siglip",
    model_types=("siglip_vision_model", "siglip"),
    load=_load,
    prefix_tokens=0,
    final_norm="post_layernorm",
)
