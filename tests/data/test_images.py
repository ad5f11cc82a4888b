"""Any file becomes upright RGB or one sentence, and RGB becomes the pixel values that transformers makes."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from zero_ds.data.images import MAX_PIXELS, ImageError, ImageProcessor, image_size, open_image
from zero_ds.runtime.errors import ConfigError

RAMP = Image.linear_gradient("L").resize((40, 30))
COLORED = Image.merge("RGB", (RAMP, RAMP.rotate(180), RAMP.transpose(Image.Transpose.FLIP_LEFT_RIGHT)))


def saved(folder: Path, image: Image.Image, name: str, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def apart(left: Image.Image, right: Image.Image) -> float:
    """Returns the mean difference of two images on the scale 0 to 255."""
    return float(np.abs(np.asarray(left, np.float64) - np.asarray(right, np.float64)).mean())


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGB", "a.png"),
        ("RGB", "a.jpg"),
        ("RGB", "a.webp"),
        ("RGB", "a.bmp"),
        ("RGB", "a.gif"),
        ("RGBA", "a.png"),
        ("CMYK", "a.jpg"),
        ("CMYK", "a.tiff"),
    ],
)
def test_color_modes(tmp_path: Path, mode: str, name: str) -> None:
    options = {"quality": 95} if name.endswith((".jpg", ".webp")) else {}
    opened = open_image(saved(tmp_path, COLORED.convert(mode), name, **options))
    assert (opened.mode, opened.size) == ("RGB", COLORED.size)
    assert apart(opened, COLORED) < 8


def test_a_tiff_of_luma_and_chroma(tmp_path: Path) -> None:
    """Pillow reads it uncompressed from version 13; earlier ones take it for RGBX and reject it as damaged."""
    path = saved(tmp_path, COLORED.convert("YCbCr"), "a.tiff")
    if int(PIL.__version__.split(".")[0]) < 13:
        refused(path, "cannot be read")
    else:
        assert apart(open_image(path), COLORED) < 8


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "I;16", "I", "F"])
def test_gray_modes(tmp_path: Path, mode: str) -> None:
    """Images of 16 bits and more are scaled to 8 bits and not clipped at 255."""
    if mode in ("I;16", "I"):
        array = np.asarray(RAMP).astype(np.uint16) * 257
        path = tmp_path / "a.png"
        Image.fromarray(array).save(path)
    elif mode == "F":
        path = saved(tmp_path, Image.fromarray(np.asarray(RAMP, np.float32)), "a.tiff")
    else:
        path = saved(tmp_path, RAMP.convert(mode), "a.png")
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert apart(opened, RAMP.convert(mode).convert("RGB") if mode == "1" else RAMP.convert("RGB")) < 2


def test_sixteen_bit_color(tmp_path: Path) -> None:
    """Three channels of 16 bits, which cameras write and Pillow cannot."""
    array = np.asarray(COLORED).astype(">u2") * 257
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    path = tmp_path / "a.png"
    path.write_bytes(png(COLORED.width, COLORED.height, depth=16, color=2, data=zlib.compress(rows)))
    assert apart(open_image(path), COLORED) < 1


def test_orientation_of_a_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    opened = open_image(saved(tmp_path, COLORED, "a.png", exif=exif))
    assert opened.size == (30, 40)
    assert apart(opened, COLORED.transpose(Image.Transpose.ROTATE_270)) == 0


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    other = Image.new("RGB", COLORED.size, "red")
    opened = open_image(saved(tmp_path, COLORED, "a.webp", save_all=True, append_images=[other], lossless=True))
    assert apart(opened, COLORED) < 1


# -- files that cannot be used -----------------------------------------------------------------------------------------


def png(width: int, height: int, *, depth: int = 8, color: int = 0, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def refused(path: Path, complaint: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(path)
    message = str(caught.value)
    assert str(path) in message and complaint in message and "\n" not in message


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "a.png", "does not exist")


def test_folder(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0"])
def test_a_file_that_is_not_an_image(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    refused(path, "cannot be read")


def test_a_rare_format_under_a_common_name(tmp_path: Path) -> None:
    """The content decides the format of a file, and rarely used decoders are not exposed to untrusted files."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", format="DDS")
    refused(tmp_path / "a.jpg", "cannot be read")


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_truncated(tmp_path: Path, name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are errors even if a library has told Pillow to fill them up, as lmms-eval does."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    noise = Image.effect_noise((200, 200), 90).convert("RGB")
    path = saved(tmp_path, noise, name)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(path, "cannot be read")
    assert lenient == ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    """A few bytes claim billions of pixels; at 12,000 Pillow itself only warns."""
    assert side * side > MAX_PIXELS
    path = tmp_path / "a.png"
    path.write_bytes(png(side, side, data=zlib.compress(b"\0" * 1000)))
    refused(path, "")


def test_text_bomb(tmp_path: Path) -> None:
    """A PNG text chunk unpacks to far more than the image."""
    path = tmp_path / "a.png"
    packed = b"comment\0\0" + zlib.compress(b"a" * (1 << 27))
    chunk = struct.pack(">I", len(packed)) + b"zTXt" + packed + struct.pack(">I", zlib.crc32(b"zTXt" + packed))
    content = png(2, 2, data=zlib.compress(b"\0\0\0" * 2))
    path.write_bytes(content[:33] + chunk + content[33:])
    refused(path, "cannot be read")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    COLORED.save(buffer, kind)
    return buffer.getvalue()


FILES = {kind: encoded(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "TGA", "PCX")}


@pytest.mark.filterwarnings("ignore")
@given(
    st.sampled_from(sorted(FILES)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
    st.integers(1, 5000),
)
@settings(max_examples=300)
@example("TIFF", [(4, 255)], 5000)
def test_damaged_files_give_an_image_or_an_image_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, changes: list[tuple[int, int]], length: int
) -> None:
    content = bytearray(FILES[kind][:length])
    for place, value in changes:
        content[place % len(content)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(content)
    try:
        assert open_image(path).mode == "RGB"
    except ImageError as error:
        assert str(path) in str(error)


# -- pixel values ------------------------------------------------------------------------------------------------------

MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (32, 32), (64, 64), (7, 90), (1, 1), (500, 3)])
def test_pixels_equal_those_of_transformers(size: tuple[int, int]) -> None:
    """The processor in an export, Llava's own, pads and resizes to the same pixels."""
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    image = COLORED.resize(size)
    theirs = LlavaImageProcessorPil(
        do_pad=True,
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=MEAN,
        image_std=STD,
        resample=Image.Resampling.BICUBIC,
    )(image, return_tensors="pt").pixel_values[0]
    (ours,) = ImageProcessor(32, MEAN, STD)(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # one step of eight bits is 0.015


def test_padding_is_the_mean_color_and_centred() -> None:
    (pixels,) = ImageProcessor(32, MEAN, STD)(Image.new("RGB", (32, 16), "white"))
    assert pixels[:, :8].abs().max() < 0.02 and pixels[:, 24:].abs().max() < 0.02, "the mean is zero once normalised"
    assert pixels[:, 8:24].min() > 1


def test_processor_reads_its_folder(made: Any) -> None:
    processor = ImageProcessor.from_folder(made("clip"), 32)
    assert (processor.size, processor.resample) == (32, Image.Resampling.BICUBIC)
    assert processor.mean == pytest.approx(MEAN) and processor.std == pytest.approx(STD)


@pytest.mark.parametrize(
    "content", [None, "{", "{}", '{"image_processor_type": "CLIPImageProcessor", "image_mean": 3}']
)
def test_a_folder_without_a_usable_processor(made: Any, tmp_path: Path, content: str | None) -> None:
    shutil.copytree(made("clip"), tmp_path / "clip")
    path = tmp_path / "clip" / "preprocessor_config.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(ConfigError, match="that says how images are normalised") as caught:
        ImageProcessor.from_folder(tmp_path / "clip", 32)
    assert "\n" not in str(caught.value)


# -- tiles -------------------------------------------------------------------------------------------------------------

GRID = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))


@pytest.mark.parametrize(
    ("size", "tiling"),
    [
        ((32, 32), (1, 1)),
        ((20, 10), (1, 1)),  # nothing is gained by enlarging
        ((640, 640), (2, 2)),
        ((640, 320), (1, 2)),
        ((320, 640), (2, 1)),
        ((900, 300), (1, 3)),
        ((100, 4000), (3, 1)),
    ],
)
def test_the_tiling_keeps_most_pixels_with_least_padding(size: tuple[int, int], tiling: tuple[int, int]) -> None:
    processor = ImageProcessor(32, MEAN, STD, grid=GRID)
    assert processor.tiling(*size) == tiling
    assert processor.views(*size) == (1 if tiling == (1, 1) else 1 + tiling[0] * tiling[1])


@pytest.mark.parametrize("size", [(640, 640), (640, 300), (100, 333), (7, 9), (64, 33)])
def test_the_tiling_is_the_one_that_transformers_chooses(size: tuple[int, int]) -> None:
    from transformers.image_processing_utils import select_best_resolution

    width, height = size
    resolutions = [[32 * rows, 32 * columns] for rows, columns in ((1, 1), *GRID)]
    best = select_best_resolution((height, width), resolutions)
    assert ImageProcessor(32, MEAN, STD, grid=GRID).tiling(width, height) == (best[0] // 32, best[1] // 32)


def test_views_are_the_whole_and_its_tiles_row_by_row() -> None:
    image = Image.new("RGB", (64, 64))
    for number, color in enumerate(("red", "lime", "blue", "white")):
        image.paste(color, (32 * (number % 2), 32 * (number // 2), 32 * (number % 2) + 32, 32 * (number // 2) + 32))
    views = ImageProcessor(32, [0.0] * 3, [1.0] * 3, grid=GRID)(image)
    assert views.shape == (5, 3, 32, 32)
    for view, color in zip(views[1:], ([1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]), strict=True):
        torch.testing.assert_close(view, torch.tensor(color, dtype=torch.float32).view(3, 1, 1).expand(3, 32, 32))
    assert views[0][:, :14, :14].flatten(1).mean(1).tolist() == pytest.approx([1, 0, 0], abs=0.05)


@given(st.integers(1, 300), st.integers(1, 300), st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=5))
@settings(max_examples=60, deadline=None)
def test_the_size_alone_tells_the_number_of_views(width: int, height: int, grid: list[tuple[int, int]]) -> None:
    processor = ImageProcessor(8, MEAN, STD, grid=grid)
    assert len(processor(Image.new("RGB", (width, height)))) == processor.views(width, height) <= 17


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_size_of_an_image_that_lies_on_its_side(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (40, 20)).save(tmp_path / "x.jpg", exif=exif)
    assert image_size(tmp_path / "x.jpg") == open_image(tmp_path / "x.jpg").size


def test_a_thread_of_pixels_is_refused(tmp_path: Path) -> None:
    """Padded to a square, it would have billions of pixels."""
    refused(saved(tmp_path, Image.new("1", (30_000, 1)), "a.png"), "20,000 on a side")


def test_a_pipe_is_not_an_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    refused(tmp_path / "a.png", "not a regular file")


@pytest.mark.parametrize("orientation", [0, 5, 6, 8, 9])
@pytest.mark.parametrize("name", ["a.jpg", "a.tif", "a.png", "a.webp"])
def test_the_size_is_that_of_the_opened_image(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.new("RGB", (128, 32)), name, exif=exif)
    assert image_size(path) == open_image(path).size


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("size", [(300, 37), (37, 300), (64, 64)])
def test_bands_give_the_pixels_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], resample: Image.Resampling
) -> None:
    image = Image.effect_noise(size, 90).convert("RGB")
    processor = ImageProcessor(32, [0.4, 0.5, 0.6], [1.0] * 3, resample)
    side = max(size)
    whole = Image.new("RGB", (side, side), (102, 127, 153))
    whole.paste(image, ((side - size[0]) // 2, (side - size[1]) // 2))
    monkeypatch.setattr("zero_ds.data.images.BAND", 5 * side)
    assert processor._fitted(image, 1, 1).tobytes() == whole.resize((32, 32), resample).tobytes()
