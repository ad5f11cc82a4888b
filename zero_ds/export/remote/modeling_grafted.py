# SPDX-License-Identifier: Apache-2.0
"""A vision-language model: vision encoder, adapter, decoder."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation.utils import GenerationMixin
from transformers.modeling_utils import PreTrainedModel

from .configuration_grafted import GraftedConfig


class Adapter(nn.Sequential):
    """Turns patch features into image tokens: merges squares of patches if its kind does that, then linear layers."""

    def __init__(self, vision_size: int, hidden_size: int, kind: str, factor: int) -> None:
        layers: list[nn.Module] = [nn.Linear(vision_size * (factor**2 if kind == "pixel_shuffle" else 1), hidden_size)]
        if kind != "linear":
            layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
        super().__init__(*layers)
        self.kind = kind
        self.factor = factor

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(views, patches, vision hidden) -> (views, tokens, hidden)."""
        if self.kind == "pixel_shuffle":
            features = squares_of(features, self.factor).flatten(2)
        elif self.kind == "pooling":
            ones = torch.ones_like(features[:1, :, :1], dtype=torch.float32)
            present = squares_of(ones, self.factor).mean(2)  # below 1 where a square reaches beyond the grid
            features = (squares_of(features, self.factor).mean(2) / present).to(features.dtype)
        features = super().forward(features)
        return features


def squares_of(features: torch.Tensor, size: int) -> torch.Tensor:
    """Cuts grids of patches into squares: (views, patches, hidden) -> (views, squares, size * size, hidden).

    Patches and squares are in reading order. A grid that `size` does not divide is filled up with zeros at its right
    and lower edge.
    """
    side = math.isqrt(features.shape[1])
    grid = features.unflatten(1, (side, side))
    missing = -side % size
    grid = nn.functional.pad(grid, (0, 0, 0, missing, 0, missing))
    cut = grid.unflatten(1, (-1, size)).unflatten(3, (-1, size))  # views, rows, size, columns, size, hidden
    return cut.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Boundary(nn.Module):
    """Puts learned embeddings before and after the tokens of every view of an image."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(2, hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(views, tokens, hidden) -> (views, tokens + 2, hidden)."""
        start, end = self.embeddings.weight.to(features.dtype)
        start = start.expand(len(features), 1, -1)
        end = end.expand(len(features), 1, -1)
        return torch.cat([start, features, end], dim=1)


class GraftedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model that reads image features in place of the embeddings of image tokens."""

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
            options["attn_implementation"] = "eager"  # sdpa does not soft-cap attention scores
        elif config.decoder_attention and text._attn_implementation == "sdpa":
            options["attn_implementation"] = config.decoder_attention
        if config.encoder_class:
            self.encoder = getattr(transformers, config.encoder_class)._from_config(config.vision_config)
        else:
            self.encoder = AutoModel.from_config(config.vision_config)
        self.adapter = Adapter(config.vision_config.hidden_size, width, config.adapter_kind, config.adapter_factor)
        self.boundary = Boundary(width) if config.boundary_tokens else None
        self.aligner = nn.Linear(width, text.hidden_size) if config.aligner else None
        self.decoder = AutoModelForCausalLM.from_config(text, **options)
        self._is_stateful = getattr(self.decoder, "_is_stateful", False)
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
        """(views, 3, height, width) -> (views, tokens, hidden), at the decoder's hidden size."""
        pixel_values = pixel_values.to(next(self.encoder.parameters()).dtype)
        output = self.encoder(**self._encoder_inputs(pixel_values), output_hidden_states=True)
        features = output.hidden_states[self.config.feature_layer][:, self.config.prefix_tokens :]
        if self.config.patch_norm:
            features = self._patch_norm()(features)
        features = self.adapter(features)
        if self.boundary is not None:
            features = self.boundary(features)
        if self.aligner is not None:
            features = self.aligner(features)
        return features

    def _encoder_inputs(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Returns the vision encoder's arguments: images, or the rows of their patches and the shape of the grid."""
        patch = self.config.encoder_patch_size
        if not patch:
            inputs: dict[str, Any] = {"pixel_values": pixel_values}
            return {**inputs, self.config.interpolation: True} if self.config.interpolation else inputs
        views, colours, height, width = pixel_values.shape
        rows, columns = height // patch, width // patch
        cut = pixel_values[:, :, : rows * patch, : columns * patch].reshape(views, colours, rows, patch, columns, patch)
        flat = cut.permute(0, 2, 4, 3, 5, 1).reshape(views, rows * columns, patch * patch * colours)
        grid = torch.tensor([[rows, columns]] * views)
        return {"pixel_values": flat, "pixel_attention_mask": None, "spatial_shapes": grid}

    def _patch_norm(self) -> nn.Module:
        """Returns the encoder's norm: the module of this path, or, as some encoders keep it deeper, of this name."""
        named = dict(self.encoder.named_modules())
        if self.config.patch_norm in named:
            return named[self.config.patch_norm]
        for name, module in named.items():
            if name.split(".")[-1] == self.config.patch_norm:
                return module
        raise ValueError(f"the vision encoder has no module {self.config.patch_norm}")

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
        """Runs the decoder. pixel_values: the views of all images, in the order of their tokens in `input_ids`."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("images need input_ids, which hold their positions")
            positions = input_ids == self.config.image_token_id
            features = self.get_image_features(pixel_values).to(inputs_embeds.device, inputs_embeds.dtype)
            views, tokens = features.shape[:2]
            if int(positions.sum()) != views * tokens:
                raise ValueError(f"{int(positions.sum())} image tokens for {views} views of {tokens} tokens")
            inputs_embeds = inputs_embeds.masked_scatter(positions.unsqueeze(-1), features)
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

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates; a decoder that takes no `past_key_values` reads the whole text again for every token."""
        if "past_key_values" not in inspect.signature(self.decoder.forward).parameters:
            kwargs["use_cache"] = False
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Passes images with the prompt only; for later tokens their keys and values are in the cache."""
        pixel_values = kwargs.pop("pixel_values", None)
        cache = kwargs.get("past_key_values")
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc]
        if _is_empty(cache):
            inputs["pixel_values"] = pixel_values
        return inputs


def _is_empty(cache: Any) -> bool:
    """Returns whether nothing has been read into a cache. One without keys and values exists only once it is filled."""
    try:
        return cache is None or cache.get_seq_length() == 0
    except ValueError:
        return False
