# SPDX-License-Identifier: Apache-2.0
"""Configuration of a vision-language model: vision encoder, adapter, decoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig


class GraftedConfig(PretrainedConfig):
    """Configuration of a GraftedForCausalLM.

    text_config: configuration of the decoder.
    vision_config: configuration of the vision encoder.
    image_token_id: token that stands for one image feature in a prompt.
    feature_layer: index of the encoder's hidden states that are the image features.
    prefix_tokens: number of the encoder's tokens before the patches, which are dropped.
    patch_norm: name of the encoder's norm that is applied to the patch tokens, or None.
    boundary_tokens: whether every view of an image has a learned embedding before and one after its tokens.
    adapter_width: hidden size of the adapter; 0 means the decoder's.
    adapter_kind: "mlp" for Linear, GELU, Linear; "linear" for one linear layer; "pixel_shuffle" and "pooling" first
        merge squares of patches, by putting their features side by side or by averaging them, and go on like "mlp".
    adapter_factor: height and width of these squares, in patches.
    aligner: whether another linear layer brings the adapter's output to the decoder's hidden size.
    decoder_attention: implementation of attention in the decoder where sdpa cannot compute it, or None.
    encoder_class: name of the vision encoder's class where AutoModel does not find it, or None.
    encoder_patch_size: pixels of a patch's side for a vision encoder that reads rows of patches; 0 for others.
    interpolation: argument that makes the vision encoder interpolate its position embeddings, or None.
    """

    model_type = "grafted_vlm"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}  # noqa: RUF012 - as transformers has it

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        image_token_id: int = 0,
        feature_layer: int = -1,
        prefix_tokens: int = 1,
        patch_norm: str | None = None,
        boundary_tokens: bool = False,
        adapter_width: int = 0,
        adapter_kind: str = "mlp",
        adapter_factor: int = 1,
        aligner: bool = False,
        decoder_attention: str | None = None,
        encoder_class: str | None = None,
        encoder_patch_size: int = 0,
        interpolation: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_config = _to_config(text_config, "llama")
        self.vision_config = _to_config(vision_config, "clip_vision_model")
        self.image_token_id = image_token_id
        self.feature_layer = feature_layer
        self.prefix_tokens = prefix_tokens
        self.patch_norm = patch_norm
        self.boundary_tokens = boundary_tokens
        self.adapter_width = adapter_width or self.text_config.hidden_size
        self.adapter_kind = adapter_kind
        self.adapter_factor = adapter_factor
        self.aligner = aligner
        self.decoder_attention = decoder_attention
        self.encoder_class = encoder_class
        self.encoder_patch_size = encoder_patch_size
        self.interpolation = interpolation
        super().__init__(**kwargs)


def _to_config(config: Any, default_type: str) -> Any:
    """Returns a configuration as an object: unchanged, made from a dictionary, or, for None, of the default type."""
    if config is None:
        return AutoConfig.for_model(default_type)
    if isinstance(config, dict):
        settings = dict(config)
        model_type = settings.pop("model_type", default_type)
        return AutoConfig.for_model(model_type, **settings)
    return config
