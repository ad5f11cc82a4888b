"""Images of every kind are read as a viewer shows them, or refused with the reason."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_kinds import CASES, KINDS, drawn
from PIL import ExifTags, Image, ImageOps

from zero_ds.data import images
from zero_ds.data.images import (
    ImageError,
    converted_as_in_training,
    image_size,
    open_image,
    unreadable_metadata_is_none,
)
from zero_ds.data.read_image import to_rgb


def seen(path: Path, background: str = "white") -> Any:
    return np.asarray(open_image(path, background)).astype(int)


# -- the cases that users of other software reported -------------------------------------------------------------------


def test_black_text_on_transparent_is_black_on_white(tmp_path: Path) -> None:
    path = CASES["black text on transparent"](tmp_path)
    alpha = np.asarray(Image.open(path))[..., 3].astype(int)
    assert np.abs(seen(path) - (255 - alpha)[..., None]).max() <= 1 and seen(path).min() < 10
    blue = seen(path, "#0000ff")
    assert np.abs(blue[..., 2] - (255 - alpha)).max() <= 1 and blue[..., :2].max() == 0


def test_a_photo_of_a_turned_phone_is_upright(tmp_path: Path) -> None:
    path = CASES["photo of orientation 6"](tmp_path)
    lying = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(seen(path), np.rot90(lying, -1)) and image_size(path) == (30, 40)


def test_whole_pixels_with_broken_metadata_are_read(tmp_path: Path) -> None:
    path = CASES["broken EXIF"](tmp_path)
    with pytest.raises(SyntaxError):
        ImageOps.exif_transpose(Image.open(path))
    assert np.array_equal(seen(path), np.asarray(Image.open(path))) and image_size(path) == (40, 30)


def test_floats_from_0_to_1_are_scaled(tmp_path: Path) -> None:
    path = CASES["floats from 0 to 1"](tmp_path)
    assert np.abs(seen(path)[..., 0] - 255 * np.asarray(Image.open(path))).max() <= 0.51 and seen(path).max() == 255


def test_twelve_bits_in_sixteen_are_refused_by_name(tmp_path: Path) -> None:
    path = CASES["twelve bits"](tmp_path)
    with pytest.raises(ImageError, match=r"its largest value is 4,095 of 65,535, as in images of 10, 12 or 14 bits"):
        open_image(path)


# -- every kind --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_a_viewer_shows(kind: str, tmp_path: Path) -> None:
    """The colours, on a background of choice where the image is transparent, with the tolerance of its format."""
    kept = KINDS[kind]
    path, expected = kept.write(tmp_path), kept.shown("#204060")
    assert np.abs(seen(path, "#204060") - expected).max() <= kept.tolerance
    assert image_size(path) == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_in_memory_is_read_as_its_file(kind: str, tmp_path: Path) -> None:
    """It may be opened, loaded, or bytes in an address. Reading it twice gives the same, and does not change it."""
    path = KINDS[kind].write(tmp_path)
    expected = seen(path, "red")
    lazy, loaded = Image.open(path), Image.open(path)
    loaded.load()
    before = loaded.tobytes()
    for given in (lazy, loaded):
        assert np.array_equal(seen(given, "red"), expected)  # type: ignore[arg-type]
        assert np.array_equal(seen(given, "red"), expected)  # type: ignore[arg-type]
    assert loaded.tobytes() == before
    once = open_image(path, "red")
    assert np.array_equal(seen(once, "blue"), expected)  # type: ignore[arg-type]
    address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    assert np.array_equal(seen(address, "red"), expected) and image_size(address) == image_size(path)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK"])
def test_an_image_without_transparency_is_what_it_was(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    drawn((40, 30)).convert(mode).save(path)
    assert np.array_equal(seen(path), np.asarray(Image.open(path).convert("RGB")))


def test_opaque_parts_keep_every_value() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    opaque = Image.merge("RGBA", [Image.fromarray(values)] * 3 + [Image.new("L", (16, 16), 255)])
    assert np.array_equal(np.asarray(to_rgb(opaque, "red"))[..., 1], values)


def png(width: int, height: int, depth: int, color: int, rows: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """Returns a PNG file with chunks `more` before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    chunks = b"".join(chunk(*each) for each in more)
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("depth", "color", "row", "key", "shown"),
    [
        (1, 0, b"\x40", b"\0\1", [0, 77]),
        (2, 0, b"\x60", b"\0\2", [85, 77]),
        (4, 0, b"\x3a", b"\0\x0a", [51, 77]),
        (8, 0, b"\x33\xaa", b"\0\xaa", [51, 77]),
        (16, 0, b"\xff\xff\x80\x80", b"\x80\x80", [255, 77]),
        (8, 2, b"\x33\x33\x33\1\2\3", b"\0\1\0\2\0\3", [51, 77]),
        (16, 2, b"\xff" * 6 + b"\x80\x80" * 3, b"\x80\x80" * 3, [255, 77]),
    ],
)
def test_a_value_that_means_transparent(
    tmp_path: Path, depth: int, color: int, row: bytes, key: bytes, shown: list[int]
) -> None:
    """PNG states it with the bits of the file, which Pillow keeps although it makes 8 bits of the pixels."""
    path = tmp_path / "a.png"
    path.write_bytes(png(2, 1, depth, color, b"\0" + row, (b"tRNS", key)))
    assert seen(path, "#4d4d4d")[0, :, 0].tolist() == shown


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.tiff"])
def test_orientations(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    drawn((40, 30)).save(tmp_path / name, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / name))
    assert np.array_equal(seen(tmp_path / name), np.asarray(expected))
    assert image_size(tmp_path / name) == expected.size


BROKEN: dict[str, Callable[[Path], None]] = {
    "not TIFF": lambda path: drawn((40, 30)).save(path, exif=b"Exif\0\0\0\x08\0\2\1\x12\0\3"),
    "cut": lambda path: drawn((40, 30)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\2\0\x12\1"),
    "far away": lambda path: drawn((40, 30)).save(path, exif=b"Exif\0\0II*\0\xf0\xff\xff\xff"),
    "odd orientation": lambda path: drawn((40, 30)).save(
        path, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\2\0\0\0\2up\0\0\0\0\0\0"
    ),
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("how", BROKEN)
def test_unreadable_metadata_is_none(tmp_path: Path, how: str, name: str) -> None:
    BROKEN[how](tmp_path / name)
    with Image.open(tmp_path / name) as file:
        expected = np.asarray(file.convert("RGB"))
    assert np.array_equal(seen(tmp_path / name), expected) and image_size(tmp_path / name) == (40, 30)


def test_unreadable_metadata_of_a_tiff(tmp_path: Path) -> None:
    """Pillow reads the folders of its metadata together with the pixels."""
    tags = Image.Exif()
    tags[0x8769] = 2_000_000_000
    path = tmp_path / "a.tiff"
    drawn((40, 30)).save(path, tiffinfo={0x8769: 2_000_000_000})
    assert np.array_equal(seen(path), np.asarray(drawn((40, 30))))


# -- ranges ------------------------------------------------------------------------------------------------------------

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def of(values: Any, name: str, folder: Path) -> Path:
    Image.fromarray(values).save(folder / name)
    return folder / name


@pytest.mark.parametrize(
    ("values", "name", "tolerance"),
    [
        ((RAMP * 65535).astype(np.uint16), "a.png", 1),
        ((RAMP * 65535).astype(np.uint16), "a.tiff", 1),
        ((RAMP * 65535).astype(np.int32), "a.tiff", 1),
        ((RAMP * 65535).astype(np.uint16), "a.pgm", 1),
        (RAMP.astype(np.float32), "a.tiff", 0.51),
        ((RAMP * 255).astype(np.float32), "a.tiff", 1),
        ((RAMP * 1.0005 - 0.0002).astype(np.float32), "a.tiff", 1),
    ],
)
def test_ranges_that_are_known(values: Any, name: str, tolerance: float, tmp_path: Path) -> None:
    assert np.abs(seen(of(values, name, tmp_path))[..., 0] - RAMP * 255).max() <= tolerance


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ((RAMP * 1023).astype(np.uint16), "largest value is 1,023 of 65,535"),
        ((RAMP * 16383).astype(np.uint16), "largest value is 16,383 of 65,535"),
        ((RAMP * 200).astype(np.uint16), "largest value is 200 of 65,535"),
        ((RAMP * 4095).astype(np.int32), "largest value is 4,095 of 65,535"),
        ((RAMP * 100_000).astype(np.int32), "its values go from 0 to 100,000; scale them"),
        ((RAMP * 100 - 50).astype(np.int32), "its values go from -50 to 50; scale them"),
        ((RAMP * 65535 - 32768).astype(np.int16).astype(np.int32), "its values go from -32,768"),
        ((RAMP * 2 - 1).astype(np.float32), "its values go from -1 to 1,"),
        ((RAMP * 8).astype(np.float32), "its values go from 0 to 8,"),
        ((RAMP * 65535).astype(np.float32), "its values go from 0 to 65535,"),
        (np.where(RAMP < 0.5, np.nan, RAMP).astype(np.float32), "nan"),
        (np.where(RAMP < 0.5, np.inf, RAMP).astype(np.float32), "inf"),
    ],
)
def test_ranges_that_are_not_known(values: Any, complaint: str, tmp_path: Path) -> None:
    path = of(values, "a.tiff", tmp_path)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert complaint in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ImageError) as caught:
        open_image(Image.open(path))
    assert complaint in str(caught.value)


def test_black_is_black(tmp_path: Path) -> None:
    for kind in (np.uint16, np.int32, np.float32):
        assert seen(of(np.zeros((4, 4), kind), "a.tiff", tmp_path)).max() == 0


def test_twelve_bits_that_a_file_states_are_scaled(tmp_path: Path) -> None:
    """A TIFF file with 12 bits a pixel, and a PGM file that names its largest value."""
    values = (RAMP * 4095).astype(np.uint16)
    packed = np.zeros((64, 96), np.uint8)
    packed[:, 0::3] = values[:, 0::2] >> 4
    packed[:, 1::3] = (values[:, 0::2] & 15) << 4 | values[:, 1::2] >> 8
    packed[:, 2::3] = values[:, 1::2] & 255
    tags = [(256, 64), (257, 64), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 64), (279, 96 * 64)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    tiff = tmp_path / "a.tiff"
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    tiff.write_bytes(head + packed.tobytes())
    assert len(head) == 122 and np.abs(seen(tiff)[..., 0] - RAMP * 255).max() <= 1
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 4095\n" + values.astype(">u2").tobytes())
    assert np.abs(seen(tmp_path / "a.pgm")[..., 0] - RAMP * 255).max() <= 1


@pytest.mark.parametrize(
    ("kind", "form", "most"), [("<u2", 1, 65535), ("<i2", 2, 32767), ("<f4", 3, 1), ("<f4", 3, 255)]
)
@pytest.mark.parametrize("white_is_zero", [False, True])
def test_what_a_tiff_says_of_its_gray(kind: str, form: int, most: int, white_is_zero: bool, tmp_path: Path) -> None:
    """Values with and without a sign, and files in which 0 is white, as in scans and X-ray images."""
    if kind == "<i2" and white_is_zero:
        return  # Pillow reads no such file
    pixels = (RAMP * most).astype(kind)
    bits, dark = 8 * pixels.itemsize, 0 if white_is_zero else 1
    tags = [(256, 64), (257, 64), (258, bits), (259, 1), (262, dark), (273, 134), (277, 1), (278, 64)]
    tags += [(279, pixels.nbytes), (339, form)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)
    path = tmp_path / "a.tiff"
    path.write_bytes(head + pixels.tobytes())
    wanted = 255 * (1 - RAMP if white_is_zero else RAMP)
    assert len(head) == 134 and np.abs(seen(path)[..., 0] - wanted).max() <= 1
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(open_image(opened)), seen(path))


def test_twelve_bits_of_color_are_refused_as_well(tmp_path: Path) -> None:
    """Pillow has dropped the lower eight bits, in which nearly all of the image was."""
    rows = np.zeros((8, 8, 3), ">u2")
    rows[...] = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8, 1)
    path = tmp_path / "a.png"
    path.write_bytes(png(8, 8, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows)))
    for given in (path, Image.open(path)):
        with pytest.raises(ImageError, match=r"its largest value is about 4,095 of 65,535"):
            open_image(given)


# -- limits and addresses ----------------------------------------------------------------------------------------------


def test_an_image_in_memory_has_the_limits_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(ImageError, match="image in memory has 20 x 20 pixels"):
        open_image(Image.new("RGB", (20, 20)))
    with pytest.raises(ImageError, match="it has 0 x 5 pixels"):
        open_image(Image.new("RGB", (0, 5)))
    noise = Image.effect_noise((9, 9), 90).convert("RGB")
    noise.save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    with pytest.raises(ImageError, match="cannot be read"):
        open_image(Image.open(io.BytesIO(content[:-20])))


@pytest.mark.parametrize(
    "address", ["data:image/png;base64", "data:image/png,abc", "data:;base64,a", "data:;base64,!!!"]
)
def test_addresses_that_hold_no_image(address: str) -> None:
    with pytest.raises(ImageError, match="image in a data: address cannot be read") as caught:
        open_image(address)
    assert "\n" not in str(caught.value)


def test_code_of_others_converts_as_training_reads(tmp_path: Path) -> None:
    """Tasks of lmms-eval convert their images themselves."""
    for kind in ("RGBA", "sixteen bits", "orientation 6"):
        path = KINDS[kind].write(tmp_path)
        with converted_as_in_training("red"):
            assert np.array_equal(np.asarray(Image.open(path).convert("RGB")), np.asarray(open_image(path, "red")))
            assert Image.open(path).convert("L").mode == "L"
    with unreadable_metadata_is_none():
        assert Image.open(CASES["broken EXIF"](tmp_path)).getexif() == {}
    with pytest.raises(SyntaxError):
        Image.open(CASES["broken EXIF"](tmp_path)).getexif()
