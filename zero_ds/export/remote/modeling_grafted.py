# SPDX-License-Identifier: Apache-2.0
"""A vision-language model: vision encoder, adapter with what the trained model has beside it, decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from .configuration_grafted import GraftedConfig


class Boundary(nn.Module):
    """Learned embeddings before and behind the tokens of a view."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(2, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(views, tokens, hidden) -> (views, tokens + 2, hidden)."""
        start, end = self.embeddings.weight.to(features.dtype).view(2, 1, 1, -1).expand(2, len(features), 1, -1)
        return torch.cat([start, features, end], dim=1)


class GraftedForCausalLM(PreTrainedModel, GenerationMixin):
    """The decoder's causal LM, with image features in place of the embeddings of image tokens."""

    config_class = GraftedConfig
    input_modalities = ["image", "text"]  # noqa: RUF012 - as transformers has it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - as transformers has it

    def __init__(self, config: GraftedConfig) -> None:
        super().__init__(config)
        text, width = config.text_config, config.adapter_width
        options: dict[str, Any] = {}
        if getattr(text, "attn_logit_softcapping", None) and text._attn_implementation == "sdpa":
            options["attn_implementation"] = "eager"  # sdpa leaves the soft-capping of scores out
        self.encoder = AutoModel.from_config(config.vision_config)
        self.adapter = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.boundary = Boundary(width) if config.boundary_tokens else None
        self.aligner = nn.Linear(width, text.hidden_size) if config.aligner else None
        self.decoder = AutoModelForCausalLM.from_config(text, **options)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.decoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.decoder.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.decoder.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(views, 3, height, width) -> (views, tokens, hidden), at the decoder's width."""
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        output = self.encoder(pixel_values=pixel_values, output_hidden_states=True)
        features = output.hidden_states[self.config.feature_layer][:, self.config.prefix_tokens :]
        if self.config.patch_norm:
            features = self._norm()(features)
        features = self.adapter(features)
        if self.boundary is not None:
            features = self.boundary(features)
        return self.aligner(features) if self.aligner is not None else features

    def _norm(self) -> nn.Module:
        """The encoder's norm by its name, on whatever level."""
        return next(
            module
            for name, module in self.encoder.named_modules()
            if name.rsplit(".", maxsplit=1)[-1] == self.config.patch_norm
        )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """As the decoder's; pixel_values: the views of all pictures in the order of their tokens."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("pictures need input_ids, which say where they stand")
            places = input_ids == self.config.image_token_id
            features = self.get_image_features(pixel_values).to(inputs_embeds.device, inputs_embeds.dtype)
            if int(places.sum()) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"{int(places.sum())} image tokens for {features.shape[0]} views of {features.shape[1]} tokens"
                )
            inputs_embeds = inputs_embeds.masked_scatter(places.unsqueeze(-1), features)
        return self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Pictures are read once, with the prompt; behind that they are in the cache."""
        pixel_values, cache = kwargs.pop("pixel_values", None), kwargs.get("past_key_values")
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if cache is None or cache.get_seq_length() == 0:
            inputs["pixel_values"] = pixel_values
        return inputs
