"""Pictures: file -> RGB -> square -> the encoder's pixel values."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are refused before they are decoded."""


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file."""


def open_image(path: str | Path | Image.Image) -> Image.Image:
    """Reads a picture, a file or one that a program has opened, as upright RGB.

    Raises:
        ImageError: missing, unreadable, truncated or oversized file.
    """
    with contextlib.nullcontext(path) if isinstance(path, Image.Image) else _opened(path) as file:
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


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as it stands upright, from its header alone.

    Raises:
        ImageError: as `check_header`.
    """
    with _opened(path) as file:
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (file.height, file.width) if sideways else (file.width, file.height)


class ImageProcessor:
    """Pads to a square with the mean colour, resizes, normalises (Table A.2); large pictures also in tiles.

    With a grid of tilings (rows, columns) a picture is shown once as a whole and once more cut into the tiles of the
    tiling in which most of its pixels survive, of those that do the one with the least padding: LLaVA-NeXT's "anyres".
    """

    def __init__(
        self,
        size: int,
        mean: list[float],
        std: list[float],
        resample: int = Image.Resampling.BICUBIC,
        grid: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.size = size
        self.mean = mean
        self.std = std
        self.resample = Image.Resampling(resample)
        self.grid = tuple(grid)

    @classmethod
    def from_folder(cls, folder: str | Path, image_size: int, grid: Sequence[tuple[int, int]] = ()) -> ImageProcessor:
        """Mean, deviation and filter of the folder's preprocessor_config.json, the size of its model."""
        from transformers import AutoImageProcessor

        settings: Any = AutoImageProcessor.from_pretrained(folder)
        return cls(image_size, list(settings.image_mean), list(settings.image_std), int(settings.resample), grid)

    def tiling(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of a picture's tiles; (1, 1): it is shown as a whole alone."""
        best, best_key = (1, 1), (-1, 0)
        for rows, columns in ((1, 1), *self.grid):
            across, down = columns * self.size, rows * self.size
            scale = min(across / width, down / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if (key := (kept, kept - across * down)) > best_key:
                best, best_key = (rows, columns), key
        return best

    def views(self, width: int, height: int) -> int:
        """How many squares the encoder sees of a picture: the whole, and its tiles."""
        rows, columns = self.tiling(width, height)
        return 1 if rows * columns == 1 else 1 + rows * columns

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB picture -> its views: (views, 3, size, size) float32, the whole first, then tiles row by row."""
        rows, columns = self.tiling(*image.size)
        squares = [self._fitted(image, 1, 1)]
        if rows * columns > 1:
            tiled = self._fitted(image, rows, columns)
            squares += [
                tiled.crop((column * self.size, row * self.size, (column + 1) * self.size, (row + 1) * self.size))
                for row in range(rows)
                for column in range(columns)
            ]
        pixels = torch.from_numpy(np.stack([np.asarray(square) for square in squares])).permute(0, 3, 1, 2)
        pixels = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (self.mean, self.std))
        return (
            pixels.div_(255.0).sub_(mean).div_(std)
        )  # channels first: long rows of one constant, and nothing is copied

    def _fitted(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """The picture in the middle of so many squares, padded with the mean colour, resized."""
        fill = tuple(int(255 * channel) for channel in self.mean)  # cut off, as LLaVA and transformers do
        width = max(image.width, -(-image.height * columns // rows))
        height = max(image.height, -(-image.width * rows // columns))
        if image.size != (width, height):
            padded = Image.new("RGB", (width, height), fill)
            padded.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
            image = padded
        target = (columns * self.size, rows * self.size)
        return image if image.size == target else image.resize(target, self.resample)
