"""Subsets, splits and shards of a data set's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import layouts
import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.layout import chosen
from zero_ds.data.sources import Records
from zero_ds.runtime.errors import ConfigError

FILES = ["a/train-00000-of-00001.parquet", "a/test.parquet", "b/train/0.parquet", "c.json"]
CARD = """---
license: mit
configs:
- config_name: first
  data_files: a/*
- config_name: second
  data_dir: b
  data_files:
  - {split: train, path: "**/*.parquet"}
---
"""


@pytest.mark.parametrize(
    ("card", "subset", "split", "found"),
    [
        (None, None, None, FILES),
        (None, "a", None, FILES[:2]),
        (None, "a", "train", FILES[:1]),
        (None, None, "train", [FILES[0], FILES[2]]),
        (CARD, "first", "test", FILES[1:2]),
        (CARD, "second", "train", FILES[2:3]),
        ("---\nconfigs: [{config_name: 3}]\n---", "a", None, FILES[:2]),
    ],
)
def test_files_of_a_subset_and_split(card: str | None, subset: str | None, split: str | None, found: Any) -> None:
    assert chosen("set", card, FILES, subset, split) == found


def test_what_is_not_there_is_named_with_what_is() -> None:
    with pytest.raises(DataError, match=r"set has no subset frist; did you mean 'first'"):
        chosen("set", CARD, FILES, "frist", None)
    with pytest.raises(DataError, match=r"set has no split trian; did you mean 'train'"):
        chosen("set", None, FILES, None, "trian")


def test_a_missing_shard(tmp_path: Path) -> None:
    for number in (0, 2):
        table = pyarrow.table({"question": [f"q{number}"], "answer": ["a"]})
        parquet.write_table(table, tmp_path / f"train-{number:05d}-of-00003.parquet")
    with pytest.raises(DataError, match=r"is not complete: train-00001-of-00003.parquet is missing"):
        Records([SourceConfig(path=str(tmp_path))])
    assert len(Records([SourceConfig(path=str(tmp_path), files="train-*")])) == 2


def test_a_name_beside_a_path_is_a_subset() -> None:
    source = SourceConfig.model_validate({"path": "somebody/talks", "name": "first", "split": "train"})
    assert (source.subset, source.split) == ("first", "train")


# -- the hub's cache, without a network --------------------------------------------------------------------------------


def cached(name: str, files: dict[str, bytes]) -> None:
    """Puts a data set into the cache of the hub's client, in its own layout: a snapshot of links to blobs."""
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("1" * 40)
    (folder / "blobs").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("1" * 40)
    for number, (path, content) in enumerate(files.items()):
        blob = folder / "blobs" / f"{number:040d}"
        blob.write_bytes(content)
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).symlink_to(blob)


def test_a_subset_and_split_of_the_hub_with_their_images(tmp_path: Path) -> None:
    found = layouts.write_layouts(tmp_path, layouts.conversations(4))
    hub = Path(found["hub"]["path"])
    files = {str(path.relative_to(hub)): path.read_bytes() for path in hub.rglob("*") if path.is_file()}
    cached("somebody/tables", files)
    for revision in (None, "main", "1" * 40):
        source = {"path": "somebody/tables", "name": "talks", "split": "train", "revision": revision}
        records = Records([SourceConfig.model_validate(source)])
        assert [sample.id for sample in records] == ["s0", "s1", "s2", "s3"]
        assert open_image(records[0].images[0]).size == (40, 40)
    with pytest.raises(DataError, match=r"has no split trainn; did you mean 'train'"):
        Records([SourceConfig(path="somebody/tables", split="trainn")])
    with pytest.raises(ConfigError, match="could not be fetched from the hub"):
        Records([SourceConfig(path="somebody/tables", revision="other")])


def test_image_files_and_archives_of_the_hub(tmp_path: Path) -> None:
    found = layouts.write_layouts(tmp_path, layouts.conversations(4))
    folder = Path(found["files"]["path"]).parent
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    cached("somebody/files", files)
    cached("somebody/packed", {"data.json": files["data.json"], "images.tar": Path(found["tar"]["root"]).read_bytes()})
    metadata = b'{"file_name": "a.png", "text": "a thing"}'
    cached("somebody/folder", {"train/metadata.jsonl": metadata, "train/a.png": layouts.image_bytes(0)})
    for source in ({"path": "somebody/files"}, {"path": "somebody/packed", "root": "images.tar"}):
        records = Records([SourceConfig.model_validate(source)])
        assert [open_image(image).size for sample in records for image in sample.images][:1] == [(40, 40)]
    (captioned,) = Records([SourceConfig(path="somebody/folder")])
    assert captioned.turns[1].text == "a thing" and open_image(captioned.images[0]).size == (40, 40)
