"""Data files of every kind are read record by record, as other libraries read them, or give a one-sentence error."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from pace import scaled
from places import ROOT
from pyarrow import parquet

from zero_ds.config.schema import SourceConfig
from zero_ds.data import files
from zero_ds.data.files import raw_records
from zero_ds.data.formats import DataError
from zero_ds.data.sources import Records

leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def as_json(text: str) -> Any:
    """Reads a file as a whole: returns its list, or DataError for anything but a list with elements."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return DataError
    return content if isinstance(content, list) and content else DataError


def ours(path: Path) -> Any:
    try:
        return list(raw_records(path))
    except DataError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return DataError


@given(st.lists(trees, max_size=5), st.sampled_from([None, 1]), st.booleans(), st.sampled_from([1, 2, 3, 7, 64, 4096]))
@settings(max_examples=200, deadline=None)
def test_a_list_is_read_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, content: list[Any], indent: int | None, ascii_only: bool, block: int
) -> None:
    text = json.dumps(content, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with mock.patch.object(files, "BLOCK", block):
        found = ours(path)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        assert found is DataError, "half of a surrogate pair is not valid UTF-8"
    else:
        assert found == as_json(text)


@given(st.data(), st.lists(trees, min_size=1, max_size=4), st.sampled_from([1, 3, 64]))
@settings(max_examples=300, deadline=None)
def test_damage_is_found_where_a_whole_file_reader_finds_it(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, content: list[Any], block: int
) -> None:
    text = json.dumps(content)
    place = data.draw(st.integers(0, len(text) - 1))
    text = (
        text[:place]
        + data.draw(st.sampled_from(["", "[", "]", "{", "}", ",", ":", '"', "1", "x", "\\"]))
        + (text[place + 1 :] if data.draw(st.booleans()) else "")
    )
    path = tmp_path_factory.mktemp("json") / "x.json"
    path.write_text(text, encoding="utf-8")
    with mock.patch.object(files, "BLOCK", block):
        assert repr(ours(path)) == repr(as_json(text))


def test_a_string_that_is_never_closed_does_not_fill_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('["' + "x" * 5000, encoding="utf-8")
    with (
        mock.patch.object(files, "BLOCK", 64),
        mock.patch.object(files, "LONGEST", 1000),
        pytest.raises(DataError, match="a record of more than 1,000 characters"),
    ):
        list(raw_records(path))


def test_a_byte_that_is_not_utf8_is_reported_as_such(tmp_path: Path) -> None:
    """An element may continue in the next block, so that block is read as well. Its errors are not the element's."""
    path = tmp_path / "x.json"
    path.write_bytes(b'[true, {"\xff": 1}]')
    with mock.patch.object(files, "BLOCK", 5), pytest.raises(DataError, match="byte 0xff is not valid UTF-8"):
        list(raw_records(path))


def test_objects_nested_too_deeply(tmp_path: Path) -> None:
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text("[" * 200_000, encoding="utf-8")
        with pytest.raises(DataError, match="cannot be read"):
            list(raw_records(tmp_path / name))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_number_of_thousands_of_digits(tmp_path: Path, name: str) -> None:
    """Python does not convert it to an integer, and raises an error that is not a JSON error."""
    number = '{"id": ' + "9" * 5000 + "}"
    (tmp_path / name).write_text(f"[{number}]" if name == "x.json" else number, encoding="utf-8")
    with pytest.raises(DataError, match="digits") as caught:
        list(raw_records(tmp_path / name))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet"])
def test_a_pipe_is_not_a_data_file(tmp_path: Path, name: str) -> None:
    """Opening it like a file would wait for a writer forever."""
    os.mkfifo(tmp_path / name)
    for read in (raw_records, lambda path: Records([SourceConfig(path=str(path))])):
        with pytest.raises(DataError, match="regular file"):
            list(read(tmp_path / name))


def as_list(folder: Path, records: list[Any]) -> Path:
    (folder / "x.json").write_text("\ufeff" + json.dumps(records), encoding="utf-8")  # with a byte order mark
    return folder / "x.json"


def as_lines(folder: Path, records: list[Any]) -> Path:
    (folder / "x.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return folder / "x.jsonl"


def as_parquet(folder: Path, records: list[Any]) -> Path:
    keys = {key for record in records for key in record}
    whole = [{key: record.get(key) for key in keys} for record in records]
    parquet.write_table(pyarrow.Table.from_pylist(whole), folder / "x.parquet")
    return folder / "x.parquet"


RECORDS = [tiny.record(f"r{n}", [("q?", "a.")], "a.png" if n % 2 else None) for n in range(5)]


@pytest.mark.parametrize("write", [as_list, as_lines, as_parquet])
def test_every_kind_of_file_gives_the_same_samples(tmp_path: Path, write: Callable[..., Path]) -> None:
    samples = list(Records([SourceConfig(path=str(write(tmp_path, RECORDS)))]))
    assert [sample.id for sample in samples] == [f"r{n}" for n in range(5)]
    assert [len(sample.images) for sample in samples] == [0, 1, 0, 1, 0]


def test_progress_counts_the_bytes(tmp_path: Path) -> None:
    for path in (as_list(tmp_path, RECORDS), as_lines(tmp_path, RECORDS)):
        seen: list[int] = []
        list(raw_records(path, seen.append))
        assert sum(seen) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl", b'{"id": 1}\n{"id": \n', "line 2: Expecting value"),
        ("x.jsonl", b'{"id": "\xff\xfe"}\n', "line 1"),
        ("x.jsonl", b"\n\n", "at least one"),
        ("x.parquet", b"PAR1 is how it begins", "cannot be read"),
        ("x.parquet", b"", "cannot be read"),
        ("x.json", b"[1 2]", "a comma is missing at character 3"),
        ("x.json", b"[1, 2", "it ends in the middle of the list"),
        ("x.json", b"[1] [2]", "text follows the end of the list at character 4"),
        ("x.json", b"[1, ]", "Expecting value at character 4"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(complaint)) as caught:
        list(raw_records(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for number, name in enumerate(("b.jsonl", "a.jsonl", "deep/c.jsonl")):
        (tmp_path / name).write_text(json.dumps(tiny.record(str(number), [("q?", "a.")], f"{number}.png")))
    (tmp_path / "notes.txt").write_text("no data")
    samples = list(Records([SourceConfig(path=str(tmp_path))]))
    assert [sample.id for sample in samples] == ["1", "0", "2"]
    assert samples[2].images == (str(tmp_path / "2.png"),), "the folder is the root"
    only = list(Records([SourceConfig(path=str(tmp_path), files="deep/*")]))
    assert [sample.id for sample in only] == ["2"]
    with pytest.raises(DataError, match="holds no file that matches 'z\\*'"):
        Records([SourceConfig(path=str(tmp_path), files="z*")])
    with pytest.raises(DataError, match=r"holds no file that ends in \.json, \.jsonl, \.parquet"):
        (tmp_path / "empty").mkdir()
        Records([SourceConfig(path=str(tmp_path / "empty"))])


@pytest.mark.parametrize("blank", ["", "\ufeff", " \n\t", "\n" * 70_000])
def test_lists_and_lines_are_told_apart_by_what_they_are(tmp_path: Path, blank: str) -> None:
    lines, whole = "\n".join(map(json.dumps, RECORDS)), json.dumps(RECORDS, indent=1)
    for name, content in (("a.json", lines), ("b.jsonl", whole)):
        (tmp_path / name).write_text(blank + content, encoding="utf-8")
        assert list(raw_records(tmp_path / name)) == RECORDS


def test_json_lines_called_json(tmp_path: Path) -> None:
    (sample,) = Records([SourceConfig(path=str(ROOT / "tests" / "support" / "cases" / "F13_json_lines_called.json"))])
    assert (sample.id, [turn.text for turn in sample.turns]) == ("1", ["q?", "a."])


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_not_a_list(tmp_path: Path, indent: int | None) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"data": RECORDS, "version": 1}, indent=indent))
    with pytest.raises(DataError, match=r"must hold a list of samples.*one object with the keys \['data', 'version'\]"):
        list(raw_records(tmp_path / "x.json"))


def test_companions_of_data_files_are_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    as_list(tmp_path, RECORDS)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": {"file_name": "x.json"}}, indent=1))
    (tmp_path / "state.json").write_text('{"_data_files": [], "_fingerprint": "1"}')
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("[1]")
    found = Records([SourceConfig(path=str(tmp_path))])
    assert len(found) == 5
    skipped = {str(file.relative_to(tmp_path)) for file in found.companions()}
    assert skipped == {"dataset_info.json", "state.json", ".cache/x.json"}
    assert all(name in caplog.text for name in skipped)
    with pytest.raises(
        DataError, match=r"holds no samples: dataset_info\.json holds one object, not a list of samples"
    ):
        Records([SourceConfig(path=str(tmp_path), files="dataset_*")])


def test_an_address_is_not_a_data_file() -> None:
    with pytest.raises(DataError, match=r"is an address; fetch it first, for example with `curl -LO https://"):
        Records([SourceConfig(path="https://example.org/data.json")])


def check(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zero_ds.cli", "data", "check", *words, "--workers", "0"]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=scaled(120))


def test_a_data_set_of_the_hub_is_taken_from_its_cache(tmp_path: Path) -> None:
    """The cache has the library's own layout, which is used without a network."""
    folder = tmp_path / "hub" / "datasets--somebody--talks"
    snapshot = folder / "snapshots" / ("0" * 40)
    (snapshot / "data").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for name in ("math-0", "math-1", "code-0"):
        as_parquet(snapshot / "data", [{"idx": n, "text": CHAT} for n in range(4)]).rename(
            snapshot / "data" / f"{name}.parquet"
        )
    whole, part = (check("somebody/talks", *more, home=tmp_path) for more in ((), ("--files", "data/math-*")))
    assert (whole.returncode, part.returncode) == (0, 0), whole.stderr + part.stderr
    assert "12 samples, 0 images" in whole.stdout and "8 samples, 0 images" in part.stdout
    other = check("somebody/else", home=tmp_path)
    assert other.returncode == 2 and "Traceback" not in other.stderr
    assert "could not be fetched from the hub" in other.stderr and len(other.stderr.strip().splitlines()) == 1


CHAT = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a."}]
