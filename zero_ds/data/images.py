"""Pictures: file -> RGB -> square -> the encoder's pixel values."""

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
"""Pictures with more pixels are refused before they are decoded."""
MAX_SIDE = 20_000
"""Pictures with a longer side are refused, too: padded to a square they have its second power in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Kinds of pictures that are read (MPO as JPEG), whatever a file is called; of Pillow's others some run programs."""
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height; Pillow ignores what is no orientation."""
BAND = 4_000_000
"""Pixels that are padded and resized at a time."""
PATH_SHOWN = 1000
"""Characters that a message shows of a picture's path."""


class ImageError(ValueError):
    """A picture that cannot be used; the message names the file."""


def open_image(path: str | Path | Image.Image) -> Image.Image:
    """Reads a picture, a file or one that a program has opened, as upright RGB.

    Raises:
        ImageError: missing, unreadable, truncated or oversized file.
    """
    if isinstance(path, Image.Image):
        return _as_rgb(ImageOps.exif_transpose(path))
    with _opened(path) as file:
        ImageOps.exif_transpose(file, in_place=True)  # nobody else's: no copy
        return _as_rgb(file)


@contextmanager
def whole_pictures() -> Iterator[None]:
    """A block in which a picture that ends too early is an error, and not filled up with grey.

    lmms-eval (0.7.3) has Pillow fill up all pictures of its process, for the sake of one data set.
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
    """0..65535 -> the nearest of 0..255, row by row, for a picture's size in wider numbers would fill the memory."""
    out = np.empty(values.shape, np.uint8)
    for row, new in zip(values, out, strict=True):
        new[:] = (row.clip(0, 65535).astype(np.uint32) + 128) // 257
    return out


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
    name = named(str(path), PATH_SHOWN)
    try:
        with whole_pictures(), open_regular(path) as raw, Image.open(raw, formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS or max(file.size) > MAX_SIDE:
                raise ImageError(
                    f"image {name} has {file.width} x {file.height} pixels; at most {MAX_PIXELS:,} are read, and "
                    f"{MAX_SIDE:,} on a side"
                )
            yield file
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"there is no image {name}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is refused: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"image {name} cannot be read: it is none of {', '.join(FORMATS)}, or broken") from None
    except Exception as error:  # Pillow's readers raise many kinds for bytes that they do not expect
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageError(f"image {name} cannot be read: {named(reason, PATH_SHOWN)}") from None


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a picture as `open_image` gives it, from its header; of PNG all is read.

    Raises:
        ImageError: as `check_header`.
    """
    with _opened(path) as file:
        width, height = file.size
        if isinstance(file, TiffImagePlugin.TiffImageFile):  # whose own size is upright already, in some versions
            width, height = (int(file.tag_v2[tag]) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
        sideways = file.getexif().get(ExifTags.Base.Orientation, 1) in SIDEWAYS
        return (height, width) if sideways else (width, height)


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
        """Mean, deviation and filter of the folder's preprocessor_config.json, the size of its model.

        Raises:
            ConfigError: the file is missing, damaged, or does not say them.
        """
        from transformers import AutoImageProcessor

        try:
            settings: Any = AutoImageProcessor.from_pretrained(folder)
            return cls(image_size, list(settings.image_mean), list(settings.image_std), int(settings.resample), grid)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # as the library says it, over many lines
            raise ConfigError(
                f"{folder} holds no preprocessor_config.json that says how pictures are normalised; fetch the encoder "
                "again."
            ) from None

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
        """RGB picture -> pixel values of its views: (views, 3, size, size) float32."""
        return self.normalized(self.squares(image))

    def squares(self, image: Image.Image) -> torch.Tensor:
        """RGB picture -> its views as bytes: (views, 3, size, size) uint8, the whole first, then tiles row by row."""
        rows, columns = self.tiling(*image.size)
        squares = [self._fitted(image, 1, 1)]
        if rows * columns > 1:
            tiled = self._fitted(image, rows, columns)
            squares += [
                tiled.crop((column * self.size, row * self.size, (column + 1) * self.size, (row + 1) * self.size))
                for row in range(rows)
                for column in range(columns)
            ]
        views = np.empty((len(squares), 3, self.size, self.size), np.uint8)
        for view, square in zip(views, squares, strict=True):
            view[:] = np.asarray(square).transpose(2, 0, 1)
        return torch.from_numpy(views)

    def normalized(self, views: torch.Tensor) -> torch.Tensor:
        """Bytes of `squares`, or of several pictures' -> pixel values of the same shape, float32."""
        pixels = torch.empty(views.shape, dtype=torch.float32)
        mean, std = (torch.tensor(channels)[:, None, None] for channels in (self.mean, self.std))
        for new, view in zip(pixels, views, strict=True):  # one by one they stay in the processor's cache
            new.copy_(view).div_(255.0).sub_(mean).div_(std)
        return pixels

    def _fitted(self, image: Image.Image, rows: int, columns: int) -> Image.Image:
        """The picture in the middle of so many squares, padded with the mean colour, resized."""
        fill = tuple(int(255 * channel) for channel in self.mean)  # cut off, as LLaVA and transformers do
        width = max(image.width, -(-image.height * columns // rows))
        height = max(image.height, -(-image.width * rows // columns))
        left, top = (width - image.width) // 2, (height - image.height) // 2
        across, down = columns * self.size, rows * self.size
        if (width, height) == image.size:
            return image.resize((across, down), self.resample)
        # Pillow resizes rows first, each for itself, then columns: so the padded picture, which may be a hundred times
        # as large as the picture, is never made as a whole
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
