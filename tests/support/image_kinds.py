"""Images of every kind that readers disagree about, each with the pixels that a viewer shows."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor
from places import ROOT

SIDE = 32
"""Width and height of the images: those of the tiny vision encoder, so that no processor has to resize them."""


def drawn(size: tuple[int, int]) -> Image.Image:
    """Returns an opaque image without symmetries."""
    gradient = Image.linear_gradient("L").resize(size)
    others = gradient.rotate(180), Image.linear_gradient("L").rotate(90).resize(size)
    return Image.merge("RGB", (gradient, *others))


def _alpha(levels: int = 256) -> Image.Image:
    """Returns an alpha channel with values from 0 to 255, in `levels` steps."""
    ramp = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).T
    return Image.fromarray((np.floor(ramp / 256 * levels) * 255 / (levels - 1)).round().astype(np.uint8))


def _over(color: Any, alpha: Any, background: str) -> Any:
    """Returns `color` (height, width, 3) with `alpha` from 0 to 1 (height, width) over a background."""
    below = np.array(ImageColor.getrgb(background), float)
    return np.asarray(color, float) * alpha[..., None] + below * (1 - alpha[..., None])


@dataclass(frozen=True)
class Kind:
    """A kind of image."""

    write: Callable[[Path], Path]
    """Writes an example into a folder and returns its file."""
    shown: Callable[[str], Any]
    """Returns the pixels that a viewer shows of the example on this background: (height, width, 3), 0 to 255."""
    tolerance: float = 1.01
    """Largest difference that the format itself makes."""


def _kind(image: Image.Image, name: str, opaque: Any, alpha: Any = None, tolerance: float = 1.01, **more: Any) -> Kind:
    def write(folder: Path) -> Path:
        image.save(folder / name, **more)
        return folder / name

    visible = np.ones((SIDE, SIDE)) if alpha is None else np.asarray(alpha, float) / 255
    return Kind(write, lambda background: _over(opaque, visible, background), tolerance)


def _turned(orientation: int) -> Kind:
    """Returns a kind that is upright once its orientation is applied."""
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    upright = drawn((SIDE, SIDE))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return _kind(upright if back is None else upright.transpose(back), f"{orientation}.png", upright, exif=exif)


def _kinds() -> dict[str, Kind]:
    color, gray = drawn((SIDE, SIDE)), drawn((SIDE, SIDE)).convert("L")
    as_color = np.repeat(np.asarray(gray)[..., None], 3, 2)
    soft, hard = _alpha(), _alpha(2)
    rgba = Image.merge("RGBA", (*color.split(), soft))
    cut_out = Image.merge("RGBA", (*color.split(), hard))
    palette = color.quantize(16, dither=Image.Dither.NONE)
    with_key = np.asarray(palette).copy()
    with_key[np.asarray(hard) == 0] = 16
    keyed = Image.frombytes("P", (SIDE, SIDE), with_key.tobytes())
    keyed.putpalette([*(palette.getpalette() or [])[:48], 1, 2, 3])
    few = palette.convert("RGB")
    other = Image.new("RGBA", color.size, (255, 0, 0, 128))
    deep = np.asarray(gray).astype(np.uint16) * 257
    animated: dict[str, Any] = {"save_all": True, "append_images": [other]}
    return {
        "RGB": _kind(color, "rgb.png", color),
        "RGBA": _kind(rgba, "rgba.png", color, soft),
        "LA": _kind(Image.merge("LA", (gray, soft)), "la.png", as_color, soft),
        "palette": _kind(palette, "p.png", few),
        "palette with a transparent entry": _kind(keyed, "trns.png", few, hard, transparency=16),
        "palette with alphas": _kind(
            palette, "alphas.png", few, np.full((SIDE, SIDE), 100), transparency=bytes([100] * 16)
        ),
        "transparent GIF": _kind(keyed, "key.gif", few, hard, transparency=16),
        "animated GIF": _kind(palette, "moving.gif", few, save_all=True, append_images=[Image.new("P", (SIDE, SIDE))]),
        "animated PNG": _kind(rgba, "moving.png", color, soft, **animated),
        "transparent WebP": _kind(rgba, "a.webp", color, soft, lossless=True, exact=True),
        "animated WebP": _kind(rgba, "moving.webp", color, soft, lossless=True, exact=True, **animated),
        "CMYK": _kind(color.convert("CMYK"), "cmyk.tiff", color, tolerance=2),
        "CMYK JPEG": _kind(color.convert("CMYK"), "cmyk.jpg", color, tolerance=24, quality=98),
        "transparent TIFF": _kind(rgba, "rgba.tiff", color, soft),
        "sixteen bits": _kind(Image.fromarray(deep), "deep.png", as_color),
        "sixteen bits, TIFF": _kind(Image.fromarray(deep), "deep.tiff", as_color),
        "whole numbers of 32 bits": _kind(Image.fromarray(deep.astype(np.int32)), "int.tiff", as_color),
        "floats from 0 to 1": _kind(Image.fromarray(np.asarray(gray, np.float32) / 255), "float.tiff", as_color),
        "floats from 0 to 255": _kind(Image.fromarray(np.asarray(gray, np.float32)), "float255.tiff", as_color),
        "black and white": _kind(hard.convert("1"), "1.png", np.repeat(np.asarray(hard)[..., None], 3, 2)),
        "broken EXIF": _kind(color, "broken.png", color, exif=b"Exif\0\0\0\x08\0\2\1\x12\0\3\0\0\0\1\0\6"),
        "cut-out": _kind(cut_out, "hard.png", color, hard),
        **{f"orientation {number}": _turned(number) for number in range(1, 9)},
    }


KINDS = _kinds()
"""Kinds of images by name; all are read."""


def _case(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        return Path(shutil.copy(ROOT / "tests" / "support" / "cases" / name, folder / name))

    return write


def _floats(folder: Path) -> Path:
    Image.fromarray(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1))).save(folder / "F12.tiff")
    return folder / "F12.tiff"


CASES: dict[str, Callable[[Path], Path]] = {
    "black text on transparent": _case("F1_black_text_on_transparent.png"),
    "photo of orientation 6": _case("F7_phone_photo_orientation_6.jpg"),
    "broken EXIF": _case("F8_whole_pixels_broken_exif.png"),
    "floats from 0 to 1": _floats,
    "twelve bits": _case("F12_twelve_bits.png"),
}
"""Images that users of other software reported; each function writes one into a folder and returns its file."""
