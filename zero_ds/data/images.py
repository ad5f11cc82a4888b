"""Turns image files into the pixel values that a vision encoder takes: RGB, padded to a square, resized, normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from zero_ds.data.formats import named
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import open_regular

MAX_PIXELS = 64_000_000
"""Number of pixels above which an image is rejected before it is decoded."""
MAX_SIDE = 20_000
"""Longest side of an image in pixels. Padded to a square, an image has the square of its longest side in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read (MPO as JPEG), by content and not by name. Some of Pillow's other readers run programs."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height. Pillow ignores values that are not an orientation."""
BAND = 4_000_000
"""Number of pixels that are padded and resized at a time."""
PATH_SHOWN = 1000
"""Number of characters that a message shows of an image's path."""


class ImageError(ValueError):
    """An image that cannot be used; the message names the file."""


def open_image(path: str | Path | Image.Image) -> Image.Image:
    """Reads an image, given as a file or as an open Pillow image, as upright RGB.

    Raises:
        ImageError: A missing, unreadable, truncated or oversized file.
    """
    if isinstance(path, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(path))
    with _opened(path) as file:
        ImageOps.exif_transpose(file, in_place=True)  # nobody else has this image, so it need not be copied
        return _as_rgb(file)


@contextmanager
def truncated_images_are_errors() -> Iterator[None]:
    """Makes truncated images an error within a block, instead of filling them up with grey.

    lmms-eval (0.7.3) lets Pillow fill up all truncated images of its process, because one data set needs it.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # sixteen bits, which convert() would cut off at 255
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Maps 0..65535 to the nearest of 0..255, row by row: a whole image in wider numbers could fill the memory."""
    out = np.empty(values.shape, np.uint8)
    for row, new in zip(values, out, strict=True):
        new[:] = (row.clip(0, 65535).astype(np.uint32) + 128) // 257
    return out


def check_header(path: str | Path) -> None:
    """Checks the format and the size of an image without decoding it.

    Raises:
        ImageError: A missing or oversized file, or one that does not begin like an image.
    """
    with _opened(path):
        pass


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Opens an image; everything that goes wrong here or in the block becomes an ImageError."""
    name = named(str(path), PATH_SHOWN)
    try:
        with truncated_images_are_errors(), open_regular(path) as raw, Image.open(raw, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS or max(file.size) > MAX_SIDE:
                raise ImageError(
                    f"image {name} has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are read, and "
                    f"{MAX_SIDE:,} on a side"
                )
            yield file
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"image {name} does not exist") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is rejected: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"image {name} cannot be read: it is none of {', '.join(FORMATS)}, or broken") from None
    except Exception as error:  # Pillow's readers raise many kinds for unexpected bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageError(f"image {name} cannot be read: {named(reason, PATH_SHOWN)}") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Returns width and height of an image as `open_image` reads it, from the header. PNG files are read as a whole.

    Raises:
        ImageError: As `check_header`.
    """
    with _opened(path) as file:
        width, height = file.size
        if isinstance(file, TiffImagePlugin.TiffImageFile):  # in some versions of Pillow its size is upright already
            width, height = (int(file.tag_v2[tag]) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        return (height, width) if sideways else (width, height)


class ImageProcessor:
    """Pads images to a square with the mean colour, resizes and normalises them (Table A.2), large ones also in tiles.

    With a grid of tilings (rows, columns), an image is shown once as a whole and once more cut into tiles, by the
    tiling that keeps most of its pixels and, among equals, has the least padding: "anyres" of LLaVA-NeXT.
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
        """Takes mean, deviation and resampling filter from the folder's preprocessor_config.json.

        Raises:
            ConfigError: The file is missing, damaged, or lacks them.
        """
        from transformers import AutoImageProcessor

        try:
            settings: Any = AutoImageProcessor.from_pretrained(folder)
            return cls(image_size, list(settings.image_mean), list(settings.image_std), int(settings.resample), grid)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # the library's own message has many lines
            raise ConfigError(
                f"{folder} holds no preprocessor_config.json that says how images are normalised; fetch the vision "
                "encoder again."
            ) from None

    def tiling(self, width: int, height: int) -> tuple[int, int]:
        """Returns rows and columns of an image's tiles; (1, 1) if it is shown only as a whole."""
        best = (1, 1)
        best_score = (-1, 0)
        for rows, columns in ((1, 1), *self.grid):
            across, down = columns * self.size, rows * self.size
            scale = min(across / width, down / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            padding = across * down - kept
            if (kept, -padding) > best_score:
                best = (rows, columns)
                best_score = (kept, -padding)
        return best

    def views(self, width: int, height: int) -> int:
        """Returns the number of squares that the vision encoder sees of an image: the whole and its tiles."""
        rows, columns = self.tiling(width, height)
        return 1 if rows * columns == 1 else 1 + rows * columns

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """Returns the pixel values of the views of an RGB image: (views, 3, size, size) float32."""
        return self.normalized(self.squares(image))

    def squares(self, image: Image.Image) -> torch.Tensor:
        """Returns the views of an RGB image before they are normalised: (views, 3, size, size) uint8.

        The whole comes first, then the tiles row by row.
        """
        rows, columns = self.tiling(*image.size)
        squares = [self._fitted(image, 1, 1)]
        if rows * columns > 1:
            tiled = self._fitted(image, rows, columns)
            for row in range(rows):
                for column in range(columns):
                    left, top = column * self.size, row * self.size
                    squares.append(tiled.crop((left, top, left + self.size, top + self.size)))
        views = np.empty((len(squares), 3, self.size, self.size), np.uint8)
        for view, square in zip(views, squares, strict=True):
            view[:] = np.asarray(square).transpose(2, 0, 1)
        return torch.from_numpy(views)

    def normalized(self, views: torch.Tensor) -> torch.Tensor:
        """Normalises views, of one image or of several: (views, 3, size, size) uint8 to float32."""
        pixels = torch.empty(views.shape, dtype=torch.float32)
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        for new, view in zip(pixels, views, strict=True):  # one by one, they stay in the CPU's cache
            new.copy_(view).div_(255.0).sub_(mean).div_(std)
        return pixels

    def _fitted(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """Returns the image in the middle of `rows` x `columns` squares, padded with the mean colour and resized."""
        fill = tuple(int(255 * channel) for channel in self.mean)  # rounded down, as in LLaVA and transformers
        width = max(image.width, -(-image.height * columns // rows))
        height = max(image.height, -(-image.width * rows // columns))
        left, top = (width - image.width) // 2, (height - image.height) // 2
        across, down = columns * self.size, rows * self.size
        if (width, height) == image.size:
            return image.resize((across, down), self.resample)
        # Pillow resizes rows first, each on its own, and then columns. Doing the same in two calls, the padded image,
        # which may be a hundred times as large as the image, never exists as a whole
        narrow = Image.new("RGB", (across, height), fill)
        if width == image.width:
            narrow.paste(image.resize((across, image.height), self.resample), (0, top))
            return narrow.resize((across, down), self.resample)
        step = max(1, BAND // width)
        for start in range(0, image.height, step):
            end = min(start + step, image.height)
            band = Image.new("RGB", (width, end - start), fill)
            band.paste(image, (left, -start))
            narrow.paste(band.resize((across, end - start), self.resample), (0, top + start))
        return narrow.resize((across, down), self.resample)
