"""Shares of sources in an epoch: by weight, by count, several times over."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zero_ds.config.schema import DataConfig, SourceConfig
from zero_ds.data.loader import Loader, Steps
from zero_ds.data.sources import Records


def source(folder: Path, name: str, samples: int, **share: Any) -> SourceConfig:
    path = folder / f"{name}.json"
    path.write_text(json.dumps([{"id": f"{name}{n}", "question": "q", "answer": "a"} for n in range(samples)]))
    return SourceConfig(path=str(path), **share)


def ids(records: Records, epochs: int = 1) -> list[str]:
    return [records[index].id for index in range(epochs * len(records))]


def test_weights_make_shares_and_epochs_go_on_where_the_last_one_ended(tmp_path: Path) -> None:
    records = Records([source(tmp_path, "a", 30, weight=1), source(tmp_path, "b", 10, weight=3)])
    assert len(records) == 40 and Counter(name[0] for name in ids(records)) == {"a": 10, "b": 30}
    # after three epochs, source a has been seen once and source b nine times
    seen = Counter(ids(records, 3))
    assert {seen[f"a{n}"] for n in range(30)} == {1} and {seen[f"b{n}"] for n in range(10)} == {9}
    assert [name for name in ids(records) if name[0] == "a"] == [f"a{n}" for n in range(10)]
    assert ids(records, 2) == ids(records, 2) and len(list(records)) == 40


def test_repeat_and_count(tmp_path: Path) -> None:
    records = Records([source(tmp_path, "a", 4, repeat=2.5), source(tmp_path, "b", 9, count=3)])
    seen = Counter(name[0] for name in ids(records))
    assert seen == {"a": 10, "b": 3} and records.names() == ["a", "b"]
    assert {records.source(index) for index in range(26)} == {0, 1}


def test_without_shares_nothing_changes(tmp_path: Path) -> None:
    records = Records([source(tmp_path, "a", 3), source(tmp_path, "b", 2, repeat=1)])
    assert not records.epochs_differ and ids(records) == ["a0", "b0", "a1", "b1", "a2"]
    with pytest.raises(IndexError):
        records[5]


def test_the_loader_draws_later_epochs(tmp_path: Path) -> None:
    class Ids:
        processor = None
        tokens_per_image = 0

    records = Records([source(tmp_path, "a", 6, weight=1), source(tmp_path, "b", 2, weight=1)])
    loader = Loader(records, Ids(), 4, 4, 0, 1, pad_id=0, seed=0)  # type: ignore[arg-type]
    grouped = Steps(replace(loader, grouping="length"))
    for step in range(6):
        places = range(4 * step, 4 * step + 4)
        assert {grouped.index(place) // 8 for place in places} == {step // 2}, "each epoch draws its own samples"
    steps = Steps(loader)
    seen = Counter(records[steps.index(position)].id for position in range(3 * len(records)))
    assert {seen[f"a{n}"] for n in range(6)} == {2} and {seen[f"b{n}"] for n in range(2)} == {6}


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ([{"path": "a", "weight": 1}, {"path": "b"}], "a has a weight and b has none"),
        ([{"path": "a", "weight": 1, "count": 3}], "exclude each other"),
        ([{"path": "a", "repeat": 0}], "greater than 0"),
    ],
)
def test_shares_that_are_refused(sources: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataConfig(sources=sources)
