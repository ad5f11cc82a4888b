# SPDX-License-Identifier: Apache-2.0
"""Reads images as a viewer shows them: upright, in RGB with 8 bits a channel, and with transparency on a background.

Training, answers and exported folders read images with this one file. It needs Pillow and NumPy alone, because exports
contain a copy of it, which runs where nothing else of training is installed.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps, TiffImagePlugin, TiffTags

WHITE = "white"
"""Background of transparent images unless another is chosen."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition that turns an image upright, by its orientation in EXIF. Other values are not an orientation."""
SIDEWAYS = (5, 6, 7, 8)
"""Orientations that swap width and height."""
SHARE = 4
"""A 16-bit image whose largest value is below this fraction (1 / SHARE) of the range is refused."""
SLACK = 1e-3
"""Rounding errors that are allowed at the ends of the range from 0 to 1, in floating-point numbers."""
_convert = Image.Image.convert
"""Pillow's own conversion, also where callers of this module have replaced it."""
BAND = 4_000_000
"""Number of pixels that are laid on the background at a time."""


def open_image(image: str | Path | Image.Image, background: str = WHITE) -> Image.Image:
    """Reads an image as upright RGB.

    image: a file, a `data:` address with base64, or a Pillow image, which is not changed. background: name or #rrggbb
    of the colour on which transparent images are laid.

    Raises:
        OSError, ValueError: a file that is not an image, or an image whose range of values is unknown.
    """
    if isinstance(image, Image.Image):
        return to_rgb(image, background)
    source: Any = io.BytesIO(embedded(str(image))) if is_embedded(str(image)) else image
    with Image.open(source) as file:
        return to_rgb(file, background)


def is_embedded(name: str) -> bool:
    """Returns whether a name is a `data:` address, which holds the image itself."""
    return name[:5].lower() == "data:"


def embedded(address: str) -> bytes:
    """Returns the bytes of an image in a `data:` address.

    Raises:
        ValueError: an address without base64, or with characters that base64 does not have.
    """
    head, comma, content = address.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError("its data: address has no ';base64,'")
    return base64.b64decode("".join(content.split()), validate=True)


def to_rgb(image: Image.Image, background: str = WHITE) -> Image.Image:
    """Returns a new image without metadata: upright RGB, with transparent parts on the background.

    Raises:
        OSError: damaged pixels. ValueError: a range of values that does not say which value is white.
    """
    raw_mode = _raw_mode(image)
    _skip_damaged_metadata(image)
    image.load()
    flat = _on_background(_eight_bits(image, raw_mode), background)
    turn = TURNS.get(orientation(image))
    if turn is not None:
        flat = flat.transpose(turn)
    flat.info = {}  # a copy keeps the orientation, by which the next reader would turn it again
    return flat


def orientation(image: Image.Image) -> int:
    """Returns the orientation in an image's metadata; 1, which is upright, if there is none or it cannot be read."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many kinds for bytes it does not expect, and whole pixels need no metadata
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def upright_size(file: Image.Image) -> tuple[int, int]:
    """Returns width and height of a file as `to_rgb` reads it, from its header. PNG files are read as a whole."""
    width, height = file.size
    if isinstance(file, TiffImagePlugin.TiffImageFile):  # in some versions of Pillow its size is upright already
        width, height = (int(file.tag_v2[tag]) for tag in (TiffImagePlugin.IMAGEWIDTH, TiffImagePlugin.IMAGELENGTH))
    if file.format == "PNG" and "exif" not in file.info:
        file.load()  # the orientation may come after the pixels
    return (height, width) if orientation(file) in SIDEWAYS else (width, height)


def _skip_damaged_metadata(image: Image.Image) -> None:
    """Removes unreadable metadata of a TIFF file, because Pillow reads metadata together with the pixels."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    try:
        exif = image.getexif()
    except Exception:  # the second time, Pillow returns the part that it has read
        exif = image.getexif()
    for key in TiffTags.TAGS_V2_GROUPS:
        if key in exif:
            try:
                exif.get_ifd(key)
            except Exception:
                del exif[key]


def _raw_mode(image: Image.Image) -> str:
    """Returns the layout of a file's pixels, such as `RGB;16B`; empty if the pixels have been read already."""
    tiles = getattr(image, "tile", None) or [("", None, 0, "")]
    arguments = tiles[0][3]
    first = arguments[0] if isinstance(arguments, (tuple, list)) and arguments else arguments
    return first if isinstance(first, str) else ""


# -- range of values ---------------------------------------------------------------------------------------------------


def _eight_bits(image: Image.Image, raw_mode: str) -> Image.Image:
    """Returns an image with 8 bits a channel, and with an alpha channel where a gray value means transparent."""
    transparent = image.info.get("transparency")
    if image.mode == "F":
        return _dark_as_low(image, _scaled_floats(image))
    if image.mode.startswith("I"):
        gray = _dark_as_low(image, _scaled_integers(image))
        if not isinstance(transparent, int):
            return gray
        alpha = np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8)
        return Image.merge("LA", (gray, Image.fromarray(alpha)))
    if "16" in raw_mode and image.mode in ("RGB", "RGBA", "RGBX", "LA"):  # Pillow has dropped the lower eight bits
        bands = image.getextrema()[: 1 if image.mode == "LA" else 3]
        highest = max(int(high) for _, high in bands)  # type: ignore[misc, arg-type]
        if 0 < highest < 256 // SHARE:
            raise ValueError(_too_dark(f"about {256 * highest + 255:,}", 65535))
    return _with_key_of_eight_bits(image, raw_mode)


def _with_key_of_eight_bits(image: Image.Image, raw_mode: str) -> Image.Image:
    """Returns the image with the value that means transparent, if any, in the 8 bits of its pixels.

    Pillow keeps it as the file has it: with 16 bits, or with as few as the gray values have.
    """
    key = image.info.get("transparency")
    if isinstance(key, tuple) and ("16" in raw_mode or max(key) > 255):
        new: Any = tuple(int(value) >> 8 for value in key)
    elif isinstance(key, int) and raw_mode in ("L;2", "L;4"):
        new = key * (85 if raw_mode == "L;2" else 17)
    elif isinstance(key, int) and image.mode == "1":
        new = 255 if key else 0
    else:
        return image
    image = image.copy()
    image.info["transparency"] = new
    return image


def _dark_as_low(image: Image.Image, gray: Image.Image) -> Image.Image:
    """Returns gray in 8 bits with 0 as black. Pillow turns it round for TIFF files of up to 8 bits alone."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return gray
    white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    return ImageOps.invert(gray) if white_is_zero else gray


def _scaled_integers(image: Image.Image) -> Image.Image:
    """Returns gray in 8 bits for an image of 16-bit or 32-bit integers."""
    values = np.asarray(image)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    white = 65535
    stated = image.format == "PPM"  # Pillow scales PPM by the largest value that the file states
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = int(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0])
        if image.mode.startswith("I;16"):
            white, stated = (1 << bits) - 1, bits < 16  # the file says so, as those with 12 bits do
        elif bits == 16:  # with a sign
            white = 32767
    if low < 0 or high > white:
        raise ValueError(f"its values go from {low:,} to {high:,}; scale them to 0 to {white:,}")
    if 0 < high <= white // SHARE and not stated:
        raise ValueError(_too_dark(f"{high:,}", white))
    gray = np.empty(values.shape, np.uint8)
    for row, new in zip(values, gray, strict=True):  # a whole image in wider numbers could fill the memory
        new[:] = (row.astype(np.uint32) * 255 + white // 2) // white
    return Image.fromarray(gray)


def _too_dark(highest: str, white: int) -> str:
    return (
        f"its largest value is {highest} of {white:,}, as in images of 10, 12 or 14 bits, so its brightness is not "
        "known; scale it to the whole range, or save it with 8 bits"
    )


def _scaled_floats(image: Image.Image) -> Image.Image:
    """Returns gray in 8 bits for floating-point numbers from 0 to 1 or from 0 to 255."""
    values = np.asarray(image)
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if low >= -SLACK and high <= 1 + SLACK:
        gray = np.empty(values.shape, np.uint8)
        for row, new in zip(values, gray, strict=True):
            new[:] = (row.clip(0, 1) * 255).round()
        return Image.fromarray(gray)
    if low >= 0 and 255 // SHARE <= high <= 255:
        return _convert(image, "L")
    raise ValueError(  # not-a-number, which is neither small nor large, comes here as well
        f"its values go from {low:g} to {high:g}, and only 0 to 1 and 0 to 255 are known; scale them to one of these"
    )


# -- transparency ------------------------------------------------------------------------------------------------------


def is_transparent(image: Image.Image) -> bool:
    """Returns whether an image has transparent parts: an alpha channel, or a value that means transparent."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode.endswith("A")


def _on_background(image: Image.Image, background: str) -> Image.Image:
    """Returns a new RGB image, with transparent parts on the background; a part of the rows at a time."""
    if not is_transparent(image):
        return _convert(image, "RGB")
    color = (*ImageColor.getrgb(background)[:3], 255)
    flat = Image.new("RGB", image.size)
    rows = max(1, BAND // max(1, image.width))
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if band.mode == "La":  # Pillow cannot convert this mode to RGBA directly
            band = _convert(band, "LA")
        band = _convert(band, "RGBA")
        flat.paste(Image.alpha_composite(Image.new("RGBA", band.size, color), band), (0, top))
    return flat
