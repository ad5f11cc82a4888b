"""The same samples give the same ids and pixels from files, archives and tables, wherever the bytes of images are."""

from __future__ import annotations

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import layouts
import numpy as np
import pyarrow
import pytest
import tiny
import torch
from PIL import Image
from pyarrow import parquet

from zero_ds.config.schema import SourceConfig
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.formats import DataError
from zero_ds.data.images import ImageError, ImageProcessor, open_image
from zero_ds.data.mixing import mix
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records
from zero_ds.data.stored import Span, StoredImage

SAMPLES = layouts.conversations(20)
CONTENTS = [content for sample in SAMPLES for content in sample["bytes"]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return layouts.write_layouts(tmp_path_factory.mktemp("layouts"), SAMPLES)


def encoded(records: Records) -> list[Any]:
    """Everything that a model sees of the samples."""
    processor = ImageProcessor(tiny.IMAGE_SIZE, [0.5] * 3, [0.5] * 3)
    encode = SampleEncoder(ChatTemplate(tiny.tokenizer()), "response", processor, tiny.TOKENS_PER_IMAGE)
    return [encode(sample) for sample in records]


def same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        a.id == b.id and a.input_ids == b.input_ids and a.labels == b.labels and torch.equal(a.pixels, b.pixels)
        for a, b in pairs
    )


def test_every_layout_gives_the_same_ids_and_pixels(sources: dict[str, dict[str, Any]]) -> None:
    """Images are read in place: not one is copied into the cache."""
    expected = encoded(Records([SourceConfig.model_validate(sources["files"])]))
    assert len(expected) == len(SAMPLES)
    for name, source in sources.items():
        records = Records([SourceConfig.model_validate(source)])
        assert same(encoded(records), expected), name
        images = [image for sample in records for image in sample.images]
        if name != "files":
            assert all(isinstance(image, StoredImage) for image in images), name
            assert [image.read() for image in images] == CONTENTS, name


def streamed_alike(found: dict[str, dict[str, Any]], expected: list[Any]) -> bool:
    """Returns whether streamed shards give the same samples, whose order is another."""
    for name in ("hub", "shards"):
        read = encoded(Records([SourceConfig.model_validate({**found[name], "stream": True})]))
        by_id = {sample.id: sample for sample in read}
        if len(read) != len(expected) or not same([by_id[sample.id] for sample in expected], expected):
            return False
    return True


def test_streamed_shards_give_the_same_ids_and_pixels(sources: dict[str, dict[str, Any]]) -> None:
    assert streamed_alike(sources, encoded(Records([SourceConfig.model_validate(sources["files"])])))


@pytest.mark.slow(reason="500 samples in thirteen layouts; the test before it has 20")
def test_500_samples_in_every_layout(tmp_path: Path) -> None:
    found = layouts.write_layouts(tmp_path, layouts.conversations(500))
    expected = encoded(Records([SourceConfig.model_validate(found["files"])]))
    for name, source in found.items():
        assert same(encoded(Records([SourceConfig.model_validate(source)])), expected), name
    assert streamed_alike(found, expected)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_places_in_every_kind_of_page(tmp_path: Path, compression: str, version: str) -> None:
    for name, options in (("small", {}), ("large", layouts.LARGE_PAGES), ("plain", {"use_dictionary": False})):
        path = tmp_path / f"{name}.parquet"
        table = layouts.image_table(SAMPLES)
        parquet.write_table(table, path, compression=compression, data_page_version=version, **options)
        images = [image for sample in Records([SourceConfig(path=str(path))]) for image in sample.images]
        assert [image.read() for image in images if isinstance(image, StoredImage)] == CONTENTS


def test_an_unknown_encoding_costs_a_copy_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "delta.parquet"
    table = pyarrow.table({"image": [CONTENTS[0], CONTENTS[1]], "caption": ["one", "two"]})
    parquet.write_table(table, path, use_dictionary=False, column_encoding={"image": "DELTA_LENGTH_BYTE_ARRAY"})
    images = [sample.images[0] for sample in Records([SourceConfig(path=str(path))])]
    assert all(str(image).startswith("data:") for image in images)
    assert "2 images of column image are copied" in caplog.text
    assert open_image(images[0]).size == (40, 40)


def test_a_page_that_a_worker_could_not_hold_costs_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("zero_ds.data.embedded_images.LARGEST_PAGE", 5_000)
    path = tmp_path / "data.parquet"
    samples = SAMPLES[:5]  # a file of its own content, which no other test has converted
    contents = [content for sample in samples for content in sample["bytes"]]
    parquet.write_table(layouts.image_table(samples), path, data_page_version="1.0")
    images = [image for sample in Records([SourceConfig(path=str(path))]) for image in sample.images]
    assert f"{len(contents)} images of column images.bytes are copied" in caplog.text
    assert [base64.b64decode(str(image).partition(",")[2]) for image in images] == contents


def test_an_image_that_two_rows_share(tmp_path: Path) -> None:
    path = tmp_path / "shared.parquet"
    contents = [CONTENTS[0], CONTENTS[1], CONTENTS[0], CONTENTS[0], CONTENTS[2]]
    parquet.write_table(pyarrow.table({"image": contents, "caption": list("abcde")}), path)
    images = [sample.images[0] for sample in Records([SourceConfig(path=str(path))])]
    assert [image.read() for image in images if isinstance(image, StoredImage)] == contents


@pytest.mark.parametrize(
    "image",
    [
        pyarrow.array([CONTENTS[0]], pyarrow.large_binary()),
        pyarrow.array([[CONTENTS[0]]], pyarrow.large_list(pyarrow.binary())),
        pyarrow.array([[CONTENTS[0]]], pyarrow.list_(pyarrow.binary(), 1)),
        pyarrow.array([CONTENTS[0]], pyarrow.binary_view()),
        pyarrow.array([base64.b64encode(CONTENTS[0]).decode()], pyarrow.large_string()),
        pyarrow.array([{"bytes": CONTENTS[0], "path": "x.png", "more": 3}]),
    ],
    ids=lambda array: str(array.type),
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_images_in_columns_of_every_type(tmp_path: Path, image: Any, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    table = pyarrow.table({"image": image, "caption": pyarrow.array(["c"]).dictionary_encode()})
    if suffix == ".parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (sample,) = Records([SourceConfig(path=str(path))])
    assert open_image(sample.images[0]).size == open_image(layouts_address(CONTENTS[0])).size


def layouts_address(content: bytes) -> str:
    return f"data:;base64,{base64.b64encode(content).decode()}"


def test_a_small_image_in_base64(tmp_path: Path) -> None:
    """It is shorter than some paths, and is known by its beginning."""
    for number in (0, 1):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6)).save(buffer, ("PNG", "JPEG")[number])
        text = base64.b64encode(buffer.getvalue()).decode()
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps([{"image": text, "caption": "c"}]))
        assert len(text) < 4096 and open_image(Records([SourceConfig(path=str(path))])[0].images[0]).size == (8, 6)


def test_a_moved_table_is_read_at_its_new_place(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(layouts.image_table(SAMPLES), path)
    Records([SourceConfig(path=str(path))])
    moved = path.rename(tmp_path / "b.parquet")
    image = next(sample.images[0] for sample in Records([SourceConfig(path=str(moved))]) if sample.images)
    assert isinstance(image, StoredImage) and image.file == str(moved) and image.read() in CONTENTS


def test_text_in_a_record_is_never_a_place(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"image": Span(0, 10).text(), "caption": "c"}]))
    with pytest.raises(DataError, match="'image' must be a path"):
        Records([SourceConfig(path=str(path))])


def test_mixing_writes_images_of_tables_as_addresses(tmp_path: Path, sources: dict[str, dict[str, Any]]) -> None:
    mix([SourceConfig.model_validate(sources["parquet"])], tmp_path / "mixed.json", shuffle=False)
    mixed = Records([SourceConfig(path=str(tmp_path / "mixed.json"))])
    assert same(encoded(mixed), encoded(Records([SourceConfig.model_validate(sources["files"])])))


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uncompressed", "save_to_disk"])
def test_a_truncated_table(tmp_path: Path, sources: dict[str, dict[str, Any]], name: str) -> None:
    path = Path(sources[name]["path"])
    if path.is_dir():
        path = sorted(path.glob("train/*.arrow"))[0]
    for share in (0.0, 0.3, 0.99):
        cut = tmp_path / f"{share}{path.suffix}"
        cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(DataError, match=r"data file .* cannot be read: \S") as raised:
            Records([SourceConfig(path=str(cut))])
        assert "\n" not in str(raised.value)


def test_an_arrow_stream_that_ends_between_its_batches(tmp_path: Path, sources: dict[str, dict[str, Any]]) -> None:
    """Arrow's own reader takes it for a shorter one."""
    path = sorted(Path(sources["save_to_disk"]["path"]).glob("train/*.arrow"))[0]
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="it has no end mark; it is truncated"):
        Records([SourceConfig(path=str(cut))])


@pytest.mark.parametrize("name", ["uncompressed", "save_to_disk"])
def test_damaged_bytes_anywhere_in_a_table(tmp_path: Path, sources: dict[str, dict[str, Any]], name: str) -> None:
    """Each is one sentence, an image that cannot be read, or harmless; none ends the process or goes on for ever."""
    path = Path(sources[name]["path"])
    if path.is_dir():
        path = sorted(path.glob("train/*.arrow"))[0]
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for number in range(40):
        content = bytearray(whole)
        place = int(random.integers(0, len(content) - 16)) if number % 2 else len(content) - 60 * (number + 1)
        content[max(place, 0) : place + 16] = random.bytes(16)
        damaged = tmp_path / f"{number}{path.suffix}"
        damaged.write_bytes(content)
        try:
            for sample in Records([SourceConfig(path=str(damaged))], skip_bad=True):
                for image in sample.images:
                    open_image(image)
        except (DataError, ImageError) as error:
            assert len(str(error).splitlines()) == 1


def test_bytes_that_are_no_image(tmp_path: Path) -> None:
    path = tmp_path / "bad.parquet"
    parquet.write_table(pyarrow.table({"image": [b"nothing", CONTENTS[0]], "caption": ["a", "b"]}), path)
    bad, good = (sample.images[0] for sample in Records([SourceConfig(path=str(path))]))
    with pytest.raises(ImageError, match=r"image at byte \d+ of .*bad.parquet cannot be read: it is none of JPEG"):
        open_image(bad)
    assert open_image(good).size == (40, 40)


def test_a_file_that_shrinks_after_it_was_read(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    parquet.write_table(layouts.image_table(SAMPLES), path)
    image = [image for sample in Records([SourceConfig(path=str(path))]) for image in sample.images][-1]
    os.truncate(path, 100)
    with pytest.raises(ImageError, match="ends before it; the file has changed"):
        open_image(image)


def test_no_image_where_images_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    parquet.write_table(pyarrow.table({"question": ["q"], "answer": ["a"]}), path)
    with pytest.raises(DataError, match="has no sample with an image"):
        Records([SourceConfig(path=str(path), images_only=True)])
