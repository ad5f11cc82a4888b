"""Vision encoders: how a kind of vision transformer is loaded, and where its layers, norm and patch tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """One kind of vision transformer."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` in config.json (of the vision part)."""
    load: Callable[..., nn.Module]
    """Function that loads the vision transformer: (path, **from_pretrained arguments) -> module."""
    prefix_tokens: int
    """Number of tokens before the patches (CLS, registers), which are dropped."""
    final_norm: str
    """Attribute of the norm after the last layer."""

    llava_prefix: str | None = None
    """Prefix of the encoder's tensors in published Llava folders; None if transformers' Llava has no names for it."""

    def vision_config(self, module: nn.Module) -> Any:
        """Returns the config of a loaded vision transformer."""
        config = cast(Any, module).config
        return getattr(config, "vision_config", config)

    def image_size(self, config: Any) -> int:
        """Returns height and width of an image in pixels. config: the vision transformer's."""
        return int(config.image_size)

    def tokens_per_image(self, config: Any) -> int:
        """Returns the number of patch tokens of an image. config: the vision transformer's."""
        return int((self.image_size(config) // config.patch_size) ** 2)

    def layers(self, module: nn.Module) -> nn.ModuleList:
        """Returns the transformer layers, found by structure because libraries rename the modules above them."""
        config = self.vision_config(module)
        for child in module.modules():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return child
        raise RuntimeError(f"no list of {config.num_hidden_layers} layers in the {self.name} encoder")

    def norm(self, module: nn.Module) -> nn.Module:
        """Returns the norm after the last layer."""
        for name, child in module.named_modules():
            if name.split(".")[-1] == self.final_norm:
                return child
        raise RuntimeError(f"no {self.final_norm} in the {self.name} encoder")

    def features(
        self, module: nn.Module, pixel_values: torch.Tensor, feature_layer: int, patch_norm: bool
    ) -> torch.Tensor:
        """Computes patch features: (images, 3, height, width) -> (images, tokens, width).

        feature_layer: index among the hidden states, of which the first are the embeddings; negative counts from the
        end. patch_norm: whether the final norm is applied.
        """
        output = module(pixel_values=pixel_values, output_hidden_states=True)
        patches = output.hidden_states[feature_layer][:, self.prefix_tokens :]
        return cast(torch.Tensor, self.norm(module)(patches)) if patch_norm else patches

    def used_layers(self, module: nn.Module, feature_layer: int) -> list[nn.Module]:
        """Returns the layers that hidden state `feature_layer` depends on; hidden state 0 is the embeddings."""
        layers = list(self.layers(module))
        last = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
        return layers[:last]
