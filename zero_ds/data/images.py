"""Pictures: file -> RGB -> square -> the encoder's pixel values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused before they are decoded."""


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file."""


def open_image(path: str | Path) -> Image.Image:
    """Reads a picture as upright RGB.

    Raises:
        ImageError: missing, unreadable, truncated or oversized file.
    """
    with _opened(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # sixteen bits, which convert() would cut off at 255
            values = np.asarray(image, dtype=np.float64).clip(0, 65535)
            image = Image.fromarray((values / 257).round().astype(np.uint8))
        return image.convert("RGB")


def check_header(path: str | Path) -> None:
    """Looks at a picture's kind and size, without decoding it.

    Raises:
        ImageError: missing or oversized file, or one that does not begin like a picture.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """The file with what is wrong with it as ImageErrors, here and in the block."""
    try:
        with Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ImageError(
                    f"image {path} has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are read"
                )
            yield file
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no image {path}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {path} is refused: {error}") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"image {path} cannot be read: {error}") from None


class ImageProcessor:
    """Pads to a square with the mean colour, resizes, normalises (Table A.2)."""

    def __init__(
        self, size: int, mean: list[float], std: list[float], resample: int = Image.Resampling.BICUBIC
    ) -> None:
        self.size = size
        self.mean = mean
        self.std = std
        self.resample = Image.Resampling(resample)

    @classmethod
    def from_folder(cls, folder: str | Path, image_size: int) -> ImageProcessor:
        """Mean, deviation and filter of the folder's preprocessor_config.json, the size of its model."""
        from transformers import AutoImageProcessor

        settings: Any = AutoImageProcessor.from_pretrained(folder)
        return cls(image_size, list(settings.image_mean), list(settings.image_std), int(settings.resample))

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB picture -> (3, size, size) float32."""
        fill = tuple(int(255 * channel) for channel in self.mean)  # cut off, as LLaVA and transformers do
        side = max(image.size)
        if image.size != (side, side):
            square = Image.new("RGB", (side, side), fill)
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), self.resample)
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0)
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()
