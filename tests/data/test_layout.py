"""Subsets, splits and shards of a data set's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.layout import chosen
from zero_ds.data.sources import Records

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
