"""Turns image files into the pixel values that a vision encoder takes: RGB, padded to a square, resized, normalised."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError

from zero_ds.data.formats import named
from zero_ds.data.read_image import WHITE, embedded, is_embedded, to_rgb, upright_size
from zero_ds.data.stored import StoredImage
from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import open_regular

MAX_PIXELS = 64_000_000
"""Number of pixels above which an image is rejected before it is decoded."""
MAX_SIDE = 20_000
"""Longest side of an image in pixels. Padded to a square, an image has the square of its longest side in pixels."""
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""Formats that are read (MPO as JPEG), by content and not by name. Some of Pillow's other readers run programs."""
BAND = 4_000_000
"""Number of pixels that are padded and resized at a time."""
PATH_SHOWN = 1000
"""Number of characters that a message shows of an image's path."""


class ImageError(ValueError):
    """An image that cannot be used; the message names the file."""


def open_image(image: str | Path | StoredImage | Image.Image, background: str = WHITE) -> Image.Image:
    """Reads an image, given as a file, a `data:` address, a part of a file or a Pillow image, as upright RGB.

    `background` is the colour on which transparent parts are laid, as a name or #rrggbb. Images for a
    model are read by `ImageProcessor.open` instead, which knows the model's background.

    Raises:
        ImageError: A missing, unreadable, truncated or oversized file.
    """
    if isinstance(image, Image.Image):
        with _errors_name(image_name(image)):
            _check_size(image)
            return to_rgb(image, background)
    with _opened(image) as file:
        return to_rgb(file, background)


def image_name(image: str | Path | StoredImage | Image.Image) -> str:
    """Returns an image's name in messages: its path, or a phrase for an image without one."""
    if isinstance(image, Image.Image):
        image = str(getattr(image, "filename", "")) or "in memory"
    return "in a data: address" if is_embedded(str(image)) else named(str(image), PATH_SHOWN)


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


@contextmanager
def unreadable_metadata_is_none() -> Iterator[None]:
    """Lets Pillow return empty metadata within a block, instead of an error for an image whose pixels are whole.

    The library `datasets`, from which lmms-eval takes its images, asks each of them for its orientation.
    """
    getexif = Image.Image.getexif

    def readable(image: Image.Image) -> Image.Exif:
        try:
            return getexif(image)
        except Exception:  # Pillow raises many kinds for bytes it does not expect
            return Image.Exif()

    Image.Image.getexif = readable  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Image.Image.getexif = getexif  # type: ignore[method-assign]


@contextmanager
def converted_as_in_training(background: str) -> Iterator[None]:
    """Lets Pillow's `convert("RGB")` read images as training does within a block.

    Tasks of lmms-eval convert their images themselves. Pillow would show the hidden colours of transparent parts, and
    cut off 16 bits at 255.
    """
    convert = Image.Image.convert
    reading = False

    def as_in_training(image: Image.Image, mode: str | None = None, *arguments: Any, **options: Any) -> Image.Image:
        nonlocal reading
        if reading or mode != "RGB" or arguments or options:
            return convert(image, mode, *arguments, **options)
        reading = True  # open_image calls convert as well
        try:
            return open_image(image, background)
        finally:
            reading = False

    Image.Image.convert = as_in_training  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Image.Image.convert = convert  # type: ignore[method-assign]


def check_header(path: str | Path | StoredImage) -> None:
    """Checks the format and the size of an image without decoding it.

    Raises:
        ImageError: A missing or oversized file, or one that does not begin like an image.
    """
    with _opened(path):
        pass


def image_size(path: str | Path | StoredImage) -> tuple[int, int]:
    """Returns width and height of an image as `open_image` reads it, from the header. PNG files are read as a whole.

    Raises:
        ImageError: As `check_header`.
    """
    with _opened(path) as file:
        return upright_size(file)


@contextmanager
def _opened(path: str | Path | StoredImage) -> Iterator[Image.Image]:
    """Opens an image; everything that goes wrong here or in the block becomes an ImageError."""
    with _errors_name(image_name(path)), _bytes(path) as raw, Image.open(raw, formats=FORMATS) as file:
        _check_size(file)
        yield file


def _bytes(path: str | Path | StoredImage) -> BinaryIO:
    """Returns an open file with the bytes of an image."""
    if isinstance(path, StoredImage):
        return io.BytesIO(path.read())
    return io.BytesIO(embedded(str(path))) if is_embedded(str(path)) else open_regular(path)


class _TooLargeError(ValueError):
    """An image of more pixels than are read."""


def _check_size(image: Image.Image) -> None:
    if not image.width * image.height:  # only an image in memory can have this size
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    if image.width * image.height > MAX_PIXELS or max(image.size) > MAX_SIDE:
        raise _TooLargeError(
            f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read, and {MAX_SIDE:,} on a side"
        )


@contextmanager
def _errors_name(name: str) -> Iterator[None]:
    """Turns everything that goes wrong in a block into an ImageError that names the image."""
    try:
        with truncated_images_are_errors():
            yield
    except FileNotFoundError:
        raise ImageError(f"image {name} does not exist") from None
    except _TooLargeError as error:
        raise ImageError(f"image {name} {error}") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {name} is rejected: {error}") from None
    except UnidentifiedImageError:
        raise ImageError(f"image {name} cannot be read: it is none of {', '.join(FORMATS)}, or broken") from None
    except Exception as error:  # Pillow's readers raise many kinds for unexpected bytes
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise ImageError(f"image {name} cannot be read: {named(reason, PATH_SHOWN)}") from None


def _normalization(settings: Any) -> tuple[list[float], list[float]]:
    """Returns mean and deviation of an image processor for colours from 0 to 1, whatever range it brings them to."""
    if not getattr(settings, "do_normalize", True):  # the encoder does so itself, or reads colours as they are
        mean, std = [0.0] * 3, [1.0] * 3
    else:
        mean, std = list(settings.image_mean), list(settings.image_std)
    factor = getattr(settings, "rescale_factor", None) if getattr(settings, "do_rescale", True) else 1.0
    if factor is None or abs(factor * 255 - 1) < 1e-6:
        return mean, std
    return [value / (255 * factor) for value in mean], [value / (255 * factor) for value in std]


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
        background: str = WHITE,
    ) -> None:
        self.size = size
        self.mean = mean
        self.std = std
        self.resample = Image.Resampling(resample)
        self.grid = tuple(grid)
        self.background = background
        """Colour on which transparent parts of an image are laid."""

    @classmethod
    def from_folder(
        cls, folder: str | Path, image_size: int, grid: Sequence[tuple[int, int]] = (), background: str = WHITE
    ) -> ImageProcessor:
        """Takes mean, deviation and resampling filter from the folder's preprocessor_config.json.

        Raises:
            ConfigError: The file is missing, damaged, or lacks them.
        """
        settings = cls._settings(folder)
        try:
            mean, std = _normalization(settings)
            resample = getattr(settings, "resample", None)
            if resample is None and not getattr(settings, "do_resize", True):
                resample = Image.Resampling.BICUBIC
            return cls(image_size, mean, std, int(resample), grid, background)  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError, KeyError):
            raise cls._unusable(folder) from None

    @classmethod
    def size_of(cls, folder: str | Path) -> int | None:
        """Returns height and width of the images that the folder's own image processor makes, in pixels.

        None if there is no image processor, or it makes images that are not squares or have several sizes.
        """
        try:
            settings = cls._settings(folder)
        except ConfigError:  # `from_folder` says so when images are needed
            return None
        sizes = ["crop_size", "size"] if getattr(settings, "do_center_crop", None) else ["size"]
        size: Any = next((found for name in sizes if (found := getattr(settings, name, None))), None)
        if size is None or isinstance(size, int):
            return size
        sides = {size.get("height"), size.get("width")}
        if sides == {None}:
            sides = {size.get("shortest_edge")}
        return sides.pop() if len(sides) == 1 else None

    @classmethod
    def _settings(cls, folder: str | Path) -> Any:
        """Returns transformers' image processor of a folder."""
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, TypeError, AttributeError, KeyError):  # the library's message has many lines
            raise cls._unusable(folder) from None

    @staticmethod
    def _unusable(folder: str | Path) -> ConfigError:
        return ConfigError(
            f"{folder} holds no preprocessor_config.json that says how images are normalised; fetch the vision "
            "encoder again."
        )

    def open(self, image: str | Path | StoredImage | Image.Image) -> Image.Image:
        """Reads an image as the model is shown it, before it is padded: upright RGB, on the background.

        Raises:
            ImageError: As `open_image`.
        """
        return open_image(image, self.background)

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
