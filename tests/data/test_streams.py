"""Sources whose shards are read when their turn comes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from test_archives import tar

from zero_ds.config.schema import SourceConfig
from zero_ds.data import streams
from zero_ds.data.formats import DataError
from zero_ds.data.loader import Loader, Steps
from zero_ds.data.sources import Records

SHARDS, SAMPLES = 12, 5


@pytest.fixture(autouse=True)
def few_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(streams, "MIXED", 2)
    streams._opened.cache_clear()
    streams._sizes.cache_clear()
    yield
    streams._opened.cache_clear()
    streams._sizes.cache_clear()


def record(name: str) -> dict[str, str]:
    return {"id": name, "question": "q", "answer": "a"}


def shards(folder: Path, **choices: Any) -> SourceConfig:
    """Writes Parquet shards."""
    folder.mkdir(exist_ok=True)
    for shard in range(SHARDS):
        rows = [record(f"{shard}.{number}") for number in range(SAMPLES)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{shard:02}.parquet")
    return SourceConfig(path=str(folder), stream=True, **choices)


def tars(folder: Path, **choices: Any) -> SourceConfig:
    folder.mkdir(exist_ok=True)
    for shard in range(2):
        members = {f"{shard}-{n}.json": json.dumps(record(f"{shard}.{n}")).encode() for n in range(SAMPLES)}
        tar(folder / f"{shard}.tar", members)
    return SourceConfig(path=str(folder), files="*.tar", stream=True, **choices)


class Plain:
    processor = None
    tokens_per_image = 0


def drawn(records: Records, first: int, last: int, ranks: int = 1, grouping: Any = "off") -> list[list[str]]:
    """Returns the ids of each step, over all ranks, each of which starts at the first of them."""
    loader = Loader(records, Plain(), 12, 2, 0, ranks, pad_id=0, seed=3, grouping=grouping)  # type: ignore[arg-type]
    share = 12 // ranks
    every: list[list[str]] = [[] for _ in range(first, last)]
    for rank in range(ranks):
        steps = Steps(loader)
        for step in range(first, last):
            places = range(step * 12 + rank * share, step * 12 + (rank + 1) * share)
            every[step - first] += [records[steps.index(place)].id for place in places]
    return every


@pytest.mark.parametrize("grouping", ["off", "length"])
def test_every_sample_comes_once_an_epoch_at_any_world_size_and_from_any_step(tmp_path: Path, grouping: Any) -> None:
    source = shards(tmp_path / "s")
    whole = drawn(Records([source], permute=7), 0, 10, grouping=grouping)
    for epoch in (whole[:5], whole[5:]):
        names = [name for step in epoch for name in step]
        assert sorted(names) == sorted(f"{s}.{n}" for s in range(SHARDS) for n in range(SAMPLES))
    assert whole[:5] != whole[5:]
    for first, ranks in ((0, 2), (1, 3), (4, 1), (5, 4), (8, 6)):
        assert drawn(Records([source], permute=7), first, 10, ranks, grouping) == whole[first:]
    assert drawn(Records([source], permute=8), 0, 5, grouping=grouping) != whole[:5]


def test_shards_are_read_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    load = streams.load_table
    monkeypatch.setattr(streams, "load_table", lambda path, reading: read.append(path.name) or load(path, reading))
    records = Records([shards(tmp_path / "s")])
    assert len(records) == SHARDS * SAMPLES and not read
    for epoch in range(2):
        for window in range(SHARDS // 2):
            first = (epoch * SHARDS + 2 * window) * SAMPLES
            ids = [records[first + n].id for n in range(2 * SAMPLES)]
            assert len({name.split(".")[0] for name in ids}) == 2 and ids != sorted(ids)
        assert len(read) == SHARDS


def test_streams_are_mixed_with_other_sources_by_weight(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps([record(f"other.{n}") for n in range(20)]))
    records = Records([shards(tmp_path / "s", weight=1), SourceConfig(path=str(other), weight=1)])
    assert len(records) == 80
    for epoch in range(3):
        ids = [records[epoch * 80 + n].id for n in range(80)]
        assert sum(name.startswith("other") for name in ids) == 40
    seen = Counter(records[n].id for n in range(3 * 80))
    assert {seen[f"{s}.{n}"] for s in range(SHARDS) for n in range(SAMPLES)} == {2}


def test_limit_and_held_out_samples_are_the_same_in_every_epoch(tmp_path: Path) -> None:
    records = Records([shards(tmp_path / "s", limit=20)], share=0.25)
    held_out = records.held_out()
    assert held_out is not None
    rest = {sample.id for sample in held_out}
    for epoch in range(2):
        ids = {records[epoch * 15 + n].id for n in range(15)}
        assert len(ids) == 15 and len(ids | rest) == 20 and all(int(name.split(".")[0]) < 4 for name in ids | rest)


def test_tars_are_counted_by_headers_or_a_file_beside_them(tmp_path: Path) -> None:
    source = tars(tmp_path / "s")
    assert len({sample.id for sample in Records([source])}) == 2 * SAMPLES
    (tmp_path / "s" / "sizes.json").write_text(json.dumps({"0.tar": SAMPLES, "1.tar": SAMPLES + 1}))
    streams._sizes.cache_clear()
    records = Records([source])
    assert len(records) == 2 * SAMPLES + 1
    with pytest.raises(DataError, match=r"1\.tar holds 5 samples, and not 6, as its count .* sizes\.json says"):
        list(records)


def test_faults_name_the_shard_in_one_sentence(tmp_path: Path) -> None:
    source = shards(tmp_path / "s")
    records = Records([source])
    bad = [record("good"), {**record("bad"), "answer": ""}]
    (tmp_path / "s" / "03.parquet").unlink()
    with pytest.raises(DataError, match=r"03\.parquet does not exist"):
        list(records)
    (tmp_path / "s" / "03.parquet").write_bytes((tmp_path / "s" / "04.parquet").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"03\.parquet cannot be read: "):
        Records([source])
    parquet.write_table(pyarrow.Table.from_pylist(bad), tmp_path / "s" / "03.parquet")
    streams._opened.cache_clear()
    records, unusable = Records([source]), []
    for number in range(len(records)):
        try:
            records[number]
        except DataError as error:
            unusable.append(str(error))
    assert len(unusable) == 1 and "03.parquet sample 'bad'" in unusable[0]
    json_lines = tmp_path / "a.jsonl"
    json_lines.write_text(json.dumps(record("a")))
    with pytest.raises(DataError, match=r"cannot be streamed; Parquet and \.tar files can"):
        Records([SourceConfig(path=str(json_lines), stream=True)])
