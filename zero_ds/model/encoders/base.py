"""Vision encoders: how a kind of vision transformer is loaded, and where its layers, norm and patch tokens are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, cast

import torch
from torch import nn

from zero_ds.runtime.errors import ConfigError


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
    """Name, or path in the module, of the norm after the last layer; empty without one."""

    llava_prefix: str | None = None
    """Prefix of the encoder's tensors in published Llava folders; None if transformers' Llava has no names for it."""
    class_name: str = ""
    """Name of transformers' class; empty if AutoModel finds it by the config."""
    auto: bool = True
    """True if AutoModel finds the class by the config of the vision transformer."""
    layer_list: str = ""
    """Path of the layers; empty if they are the first list that is as long as the config says."""
    idle: tuple[str, ...] = ()
    """Names of parameters that no patch feature depends on (pooling heads, mask tokens), which never train."""
    interpolation: str = ""
    """Argument of the forward pass with which the class interpolates its position embeddings to images of another size;
    empty if it has none or needs none."""
    takes_any_size: bool = False
    """True if the class fits its positions to the size of the images without being asked."""
    reads_patches: bool = False
    """True if the class reads rows of flattened patches and the shape of their grid (NaFlex) instead of pixels."""
    wrong_attentions: tuple[str, ...] = ()
    """Implementations of attention that do not compute the encoder's attention; eager takes their place."""
    size: int | None = None
    """Height and width of images in pixels, if they are not those of the config."""

    def attention(self, name: str) -> str:
        """Returns the implementation of attention that the encoder uses where `name` is asked for."""
        return "eager" if name in self.wrong_attentions else name

    def vision_config(self, module: nn.Module) -> Any:
        """Returns the config of a loaded vision transformer."""
        config = cast(Any, module).config
        return getattr(config, "vision_config", config)

    def image_size(self, config: Any) -> int:
        """Returns height and width of an image in pixels. config: the vision transformer's."""
        return self.size if self.size is not None else native_size(config)

    def patch_size(self, config: Any) -> int:
        """Returns height and width of a patch in pixels. config: the vision transformer's."""
        return side(config.patch_size)

    def tokens_per_image(self, config: Any) -> int:
        """Returns the number of patch tokens of an image. config: the vision transformer's."""
        return int((self.image_size(config) // self.patch_size(config)) ** 2)

    def at_size(self, size: int, config: Any, folder: object) -> EncoderFamily:
        """Returns the description of the encoder for images of `size` pixels in height and width.

        config: the vision transformer's. folder: only appears in the error message.

        Raises:
            ConfigError: the size is not a multiple of the patch, or the class reads images of one size only.
        """
        patch, native = self.patch_size(config), native_size(config)
        if size == native:
            return replace(self, size=size)
        if size % patch:
            near = max(patch, round(size / patch) * patch)
            raise ConfigError(
                f"encoder.image_size={size} is not a multiple of the patches of {folder}, which have {patch} x {patch} "
                f"pixels; choose {near}."
            )
        if not (self.takes_any_size or self.interpolation):
            raise ConfigError(
                f"encoder.image_size={size}, but {self.name} in {folder} has positions for images of {native} pixels "
                "only, and its class does not interpolate them; leave image_size out."
            )
        return replace(self, size=size)

    def layers(self, module: nn.Module) -> nn.ModuleList:
        """Returns the transformer layers, found by structure because libraries rename the modules above them."""
        if self.layer_list:
            return cast(nn.ModuleList, module.get_submodule(self.layer_list))
        config = self.vision_config(module)
        for child in module.modules():
            if isinstance(child, nn.ModuleList) and len(child) == config.num_hidden_layers:
                return child
        raise RuntimeError(f"no list of {config.num_hidden_layers} layers in the {self.name} encoder")

    def norm(self, module: nn.Module) -> nn.Module:
        """Returns the norm after the last layer; a module without parameters if there is none."""
        if not self.final_norm:
            return nn.Identity()
        named = dict(module.named_modules())
        if self.final_norm in named:
            return named[self.final_norm]
        for name, child in named.items():
            if name.split(".")[-1] == self.final_norm:
                return child
        raise RuntimeError(f"no {self.final_norm} in the {self.name} encoder")

    def inputs(self, config: Any, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Returns the arguments with which the class reads images. pixel_values: (images, 3, height, width)."""
        if self.reads_patches:
            return patch_rows(pixel_values, self.patch_size(config))
        inputs: dict[str, Any] = {"pixel_values": pixel_values}
        if self.interpolation and self.image_size(config) != native_size(config):
            inputs[self.interpolation] = True
        return inputs

    def features(
        self, module: nn.Module, pixel_values: torch.Tensor, feature_layer: int, patch_norm: bool
    ) -> torch.Tensor:
        """Computes patch features: (images, 3, height, width) -> (images, tokens, width).

        feature_layer: index among the hidden states, of which the first are the embeddings; negative counts from the
        end. patch_norm: whether the final norm is applied.
        """
        output = module(**self.inputs(self.vision_config(module), pixel_values), output_hidden_states=True)
        patches = output.hidden_states[feature_layer][:, self.prefix_tokens :]
        return cast(torch.Tensor, self.norm(module)(patches)) if patch_norm else patches

    def used_layers(self, module: nn.Module, feature_layer: int) -> list[nn.Module]:
        """Returns the layers that hidden state `feature_layer` depends on; hidden state 0 is the embeddings."""
        layers = list(self.layers(module))
        last = feature_layer if feature_layer >= 0 else len(layers) + 1 + feature_layer
        return layers[:last]

    def untrained(self, module: nn.Module) -> set[nn.Parameter]:
        """Returns the parameters outside of the layers that features do not depend on, and the final norm's."""
        named = dict(module.named_parameters())
        return {named[name] for name in self.idle if name in named} | set(self.norm(module).parameters())


def side(value: Any) -> int:
    """Returns the length of a square's side, which configs write as a number or as height and width.

    Raises:
        ConfigError: height and width differ.
    """
    if isinstance(value, list | tuple):
        if len(set(value)) != 1:
            raise ConfigError(f"it reads images or patches of {' x '.join(map(str, value))} pixels, not squares")
        value = value[0]
    return int(value)


def native_size(config: Any) -> int:
    """Returns height and width of the images that a config is made for, in pixels."""
    size = getattr(config, "image_size", None)
    if size is None:  # NaFlex has a number of patches instead
        return isqrt(int(config.num_patches)) * side(config.patch_size)
    return side(size)


def patch_rows(pixel_values: torch.Tensor, patch: int) -> dict[str, Any]:
    """Cuts images into the flattened patches that NaFlex encoders read: rows from the top, colours last.

    pixel_values: (images, 3, height, width), which becomes (images, tokens, patch * patch * 3). No patch is padding, so
    there is no mask. The grid's shape stays on the CPU, where the class reads it.
    """
    images, channels, height, width = pixel_values.shape
    rows, columns = height // patch, width // patch
    cut = pixel_values[:, :, : rows * patch, : columns * patch].reshape(images, channels, rows, patch, columns, patch)
    flat = cut.permute(0, 2, 4, 3, 5, 1).reshape(images, rows * columns, patch * patch * channels)
    grid = torch.tensor([[rows, columns]] * images, dtype=torch.long, device="cpu")
    return {"pixel_values": flat, "pixel_attention_mask": None, "spatial_shapes": grid}
