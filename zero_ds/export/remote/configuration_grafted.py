# SPDX-License-Identifier: Apache-2.0
"""Configuration of a vision-language model: vision encoder, adapter, decoder."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.configuration_utils import PretrainedConfig


class GraftedConfig(PretrainedConfig):
    """text_config, vision_config: of the two models; the rest is what stands between them.

    feature_layer: index into the encoder's hidden states; prefix_tokens: tokens before the patches, which are dropped;
    patch_norm: name of the encoder's norm that is applied to patch tokens, or None; boundary_tokens: whether a learned
    embedding stands before and one behind every view; adapter_width: hidden size of the adapter; aligner: whether one
    more linear layer brings it to the decoder's.
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
        aligner: bool = False,
        **kwargs: Any,
    ) -> None:
        self.text_config = _made(text_config, "llama")
        self.vision_config = _made(vision_config, "clip_vision_model")
        self.image_token_id = image_token_id
        self.feature_layer = feature_layer
        self.prefix_tokens = prefix_tokens
        self.patch_norm = patch_norm
        self.boundary_tokens = boundary_tokens
        self.adapter_width = adapter_width or self.text_config.hidden_size
        self.aligner = aligner
        super().__init__(**kwargs)


def _made(config: Any, default: str) -> Any:
    """A config object of what a file holds."""
    if isinstance(config, dict):
        settings = dict(config)
        return AutoConfig.for_model(settings.pop("model_type", default), **settings)
    return AutoConfig.for_model(default) if config is None else config
