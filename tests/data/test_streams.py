"""Sources whose shards are read when their turn comes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import tiny
from pyarrow import parquet
from test_archives import tar

from zero_ds.config.schema import SourceConfig
from zero_ds.data import streams
from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.formats import DataError
from zero_ds.data.loader import Loader, Steps
from zero_ds.data.samples import SampleEncoder
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
    """One is new at a time, and no more than `MIXED` are in use."""
    read: list[str] = []
    load = streams.load_table
    monkeypatch.setattr(streams, "load_table", lambda path, reading: read.append(path.name) or load(path, reading))
    records = Records([shards(tmp_path / "s")])
    assert len(records) == SHARDS * SAMPLES and not read
    orders = []
    for epoch in range(2):
        names = []
        for place in range(len(records)):
            names.append(int(records[epoch * len(records) + place].id.split(".")[0]))
            assert epoch or len(read) == len(set(names))
        spans = [range(names.index(s), len(names) - names[::-1].index(s)) for s in range(SHARDS)]
        assert max(sum(place in span for span in spans) for place in range(len(names))) == 2
        orders.append(list(dict.fromkeys(names)))
    assert orders[0] != orders[1] and len(read) == SHARDS


@pytest.mark.parametrize("sizes", [[1], [3, 0, 20, 1, 1, 7], [40]])
def test_a_pass_holds_every_sample_once(monkeypatch: pytest.MonkeyPatch, sizes: list[int]) -> None:
    monkeypatch.setattr(streams, "MIXED", 8)
    order = streams.MixedOrder(sizes, [1, 2])
    assert sorted(order[place] for place in range(len(order))) == list(range(sum(sizes)))
    places = [order[place] for place in reversed(range(len(order)))]
    assert places[::-1] == [order[place] for place in range(len(order))]


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
    assert set(faults(records)) == {f"{tmp_path}/s/1.tar holds 5 samples, and not 6, as sizes.json says"}
    for content, complaint in (("[]", "must hold an object"), ("{", "is not JSON"), ('{"0.tar": -1}', "gives -1 as")):
        (tmp_path / "s" / "sizes.json").write_text(content)
        streams._sizes.cache_clear()
        with pytest.raises(DataError, match=complaint):
            Records([source])


def faults(records: Records) -> list[str]:
    """Returns the fault of each sample that cannot be used, up to the first semicolon."""
    found = []
    for number in range(len(records)):
        try:
            records[number]
        except DataError as error:
            assert "\n" not in str(error)
            found.append(str(error).removeprefix("data file ").partition(";")[0])
    return found


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_that_change_during_a_run(tmp_path: Path, kind: str) -> None:
    source = {"parquet": shards, "tar": tars}[kind](tmp_path / "s")
    *_, one, other = sorted((tmp_path / "s").glob(f"*.{kind}"))
    content, size = one.read_bytes(), one.stat().st_size
    for change, complaint in (
        (lambda: one.unlink(), f"{one} does not exist"),
        (lambda: one.write_bytes(content[: size // 2]), f"{one} cannot be read: "),
        (lambda: one.write_bytes(other.read_bytes()), f"{one} has changed since the start of the run"),
    ):
        streams._opened.cache_clear()
        records = Records([source])
        change()
        found = faults(records)
        assert len(found) == SAMPLES and all(fault.startswith(complaint) for fault in found), found
        one.write_bytes(content)
    before = Records([source]).content()
    one.write_bytes(other.read_bytes())
    assert Records([source]).content() != before, "a run is not resumed with another shard"


def test_damaged_shards_at_the_start(tmp_path: Path) -> None:
    source, tarred = shards(tmp_path / "s"), tars(tmp_path / "t")
    one, other = tmp_path / "s" / "03.parquet", tmp_path / "t" / "1.tar"
    one.write_bytes(one.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"03\.parquet cannot be read: "):
        Records([source])
    other.write_bytes(other.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"1\.tar cannot be read: "):
        Records([tarred])
    other.unlink()
    one.unlink()
    assert len(Records([tarred])) == SAMPLES, "no number says how many shards there are"
    for number in (0, 2):
        (tmp_path / "s" / f"{number:02}.parquet").rename(tmp_path / "s" / f"train-0000{number}-of-00003.parquet")
    with pytest.raises(DataError, match=r"is not complete: train-00001-of-00003.parquet is missing"):
        Records([source])


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize(
    ("members", "complaint"),
    [
        ({"../1.json": b"{}"}, "its member '../1.json' leaves its folder"),
        ({"/1.json": b"{}"}, "its member '/1.json' leaves its folder"),
        ({"1.jpg": "/etc/passwd", "1.txt": b"x"}, "its member '1.jpg' is a link"),
        ({"1.json": b"{"}, "its member '1.json' is not JSON"),
        ({"1.jpg": b"x", "1.cls": b"3"}, "has no 'conversations'"),
    ],
)
def test_shards_of_strangers(tmp_path: Path, listed: bool, members: dict[str, Any], complaint: str) -> None:
    """Nothing is read outside of a shard, whether it is looked through at the start or later."""
    (tmp_path / "s").mkdir()
    tar(tmp_path / "s" / "a.tar", members)
    if listed:
        (tmp_path / "s" / "sizes.json").write_text('{"a.tar": 1}')
    with pytest.raises(DataError, match=complaint) as raised:
        Records([SourceConfig(path=str(tmp_path / "s"), stream=True)])[0]
    assert "\n" not in str(raised.value)


def test_records_that_cannot_be_used_and_files_that_cannot_be_streamed(tmp_path: Path) -> None:
    source = shards(tmp_path / "s")
    rows = [record("good"), {**record("bad"), "answer": ""}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s" / "03.parquet")
    (fault,) = faults(Records([source]))
    assert "03.parquet #1: sample bad has no" in fault
    json_lines = tmp_path / "a.jsonl"
    json_lines.write_text(json.dumps(record("a")))
    with pytest.raises(DataError, match=r"cannot be streamed; Parquet and \.tar files can"):
        Records([SourceConfig(path=str(json_lines), stream=True)])


def test_workers_read_shards_ahead_and_give_the_same_batches(tmp_path: Path) -> None:
    encode = SampleEncoder(ChatTemplate(tiny.tokenizer()), "response")
    source, other = shards(tmp_path / "s"), tars(tmp_path / "t")
    found = []
    for workers in (2, 0):  # the workers convert the shards
        records = Records([source, other], permute=1)
        loader = Loader(records, encode, 10, 5, 0, 1, 0, 0, workers=workers, packing=True)
        found.append([(batch.ids, batch.input_ids.tolist()) for step in loader.steps(0, 15) for batch in step])
    assert found[0] == found[1] and len({name for ids, _ in found[0] for name in ids}) == 60  # ten names twice
