"""WebDataset shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layouts
import pytest
from test_archives import tar

from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.images import open_image
from zero_ds.data.sources import Records

TALK = json.dumps({"image": "elsewhere.jpg", "question": "q", "answer": "a", "author": "x"}).encode()


def test_members_of_a_name_are_a_sample(tmp_path: Path) -> None:
    image = layouts.image_bytes(0)
    members = {
        "a/1.jpg": image,
        "a/1.json": TALK,
        "a/2.PNG": image,
        "a/2.txt": b"a thing\n",
        "3.json": b'{"id": "own", "question": "q", "answer": "a"}',
        "4.left.png": image,
        "4.right.png": image,
        "4.caption": b"two things",
        "4.cls": b"7",
    }
    records = Records([SourceConfig(path=str(tar(tmp_path / "set.tar", members)))])
    assert [sample.id for sample in records] == ["a/1", "a/2", "own", "4"]
    assert [len(sample.images) for sample in records] == [1, 1, 0, 2]
    assert [sample.turns[1].text for sample in records] == ["a", "a thing", "a", "two things"]
    assert open_image(records[3].images[1]).size == (40, 40)
    assert records.unread() == {"author": 1, "cls": 1}


@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"1.jpg": "2.jpg", "1.txt": b"x"}, "its member '1.jpg' is a link"),
        ({"../1.jpg": b"x"}, "its member '../1.jpg' leaves its folder"),
        ({"1.json": b"{"}, "its member '1.json' is not JSON"),
        ({"1.json": b"[1]"}, "a sample must be an object, not list"),
        ({"1.jpg": b"x"}, "has no 'conversations'"),
        ({}, "must hold a list of samples, and at least one"),
    ],
)
def test_shards_that_are_refused(tmp_path: Path, members: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        Records([SourceConfig(path=str(tar(tmp_path / "set.tar", members)))])


def test_a_truncated_shard(tmp_path: Path) -> None:
    path = tar(tmp_path / "set.tar", {"1.jpg": b"x" * 900, "1.txt": b"x"})
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(DataError, match="it is truncated"):
        Records([SourceConfig(path=str(path))])


def test_archives_beside_other_data_files_are_no_shards(tmp_path: Path) -> None:
    tar(tmp_path / "images.tar", {"a.png": layouts.image_bytes(0)})
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "caption": "c"}]))
    (sample,) = Records([SourceConfig(path=str(tmp_path), root=str(tmp_path / "images.tar"))])
    assert open_image(sample.images[0]).size == (40, 40)
