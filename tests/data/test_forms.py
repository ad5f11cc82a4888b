"""Forms of conversation, told apart by their keys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from zero_ds.config.schema import SourceConfig
from zero_ds.data.formats import DataError
from zero_ds.data.forms import Reading, read_record
from zero_ds.data.sources import Records

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="


@pytest.mark.parametrize(
    ("record", "texts", "images"),
    [
        (
            {"images": ["a.png"], "texts": [{"user": "q", "assistant": "a", "source": "x"}]},
            ("<image>\nq", "a"),
            ("a.png",),
        ),
        ({"texts": {"user": ["q", "r"], "assistant": ["a", "b"]}}, ("q", "a", "r", "b"), ()),
        ({"query": "<image>q", "response": "a", "images": ["a.png"]}, ("<image>q", "a"), ("a.png",)),
        ({"question": "q", "answer": 7, "system": "s"}, ("s", "q", "7"), ()),
        ({"instruction": "i", "input": "x", "output": "o"}, ("i\nx", "o"), ()),
        ({"instruction": "i", "input": "", "output": "o"}, ("i", "o"), ()),
        ({"prompt": "p", "completion": "c"}, ("p", "c"), ()),
        ({"image": "a.png", "caption": "c"}, ("<image>\nDescribe the image.", "c"), ("a.png",)),
        ({"file_name": "a.png", "text": "c"}, ("<image>\nDescribe the image.", "c"), ("a.png",)),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]},
                    {"role": "assistant", "content": "a"},
                ]
            },
            ("<image>", "a"),
            (PIXEL,),
        ),
        ({"question": "no", "answer": "no", "messages": TURNS}, ("q", "a"), ()),  # a list of turns wins
    ],
)
def test_forms(record: dict[str, Any], texts: tuple[str, ...], images: tuple[str, ...]) -> None:
    row = read_record(record, "#0")
    assert (row.texts, row.images) == (texts, images)


def test_turns_as_llama_factory_writes_them() -> None:
    """Its second version: text under `value`, and a weight for each turn."""

    def turn(role: str, text: str, weight: float) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "value": text}], "loss_weight": weight}

    turns = [turn("user", "q", 0.0), turn("assistant", "a", 0.0), turn("user", "r", 0.0), turn("assistant", "b", 1.0)]
    unread: Counter[str] = Counter()
    row = read_record({"messages": turns}, "#0", unread)
    assert row.texts == ("q", "a", "r", "b") and row.learned == (True, False, True, True) and not unread
    with pytest.raises(DataError, match=r"loss_weight 0.5 is neither 0 nor 1"):
        read_record({"messages": [*turns, turn("assistant", "c", 0.5)]}, "#0")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (
            {"query": "q", "response": "r", "question": "q", "answer": "a"},
            "'query' and 'response' and in 'question' and 'answer'",
        ),
        ({"texts": [{"user": "q"}]}, "turn 0 of 'texts': it has no 'user' and 'assistant'"),
        ({"text": "plain text"}, "has no 'conversations'; turns are read from"),
        ({"caption": "c"}, "has no 'conversations'"),
        ({"image": "a.png", "caption": ["c", "d"]}, "neither text nor image"),
        ({"question": "q", "answer": ""}, "has no 'conversations'"),
    ],
)
def test_records_of_no_form(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        read_record(record, "#0")


def test_the_question_before_captions_is_chosen_and_part_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "captions.parquet"
    parquet.write_table(pyarrow.table({"image": ["a.png"], "caption": ["c"]}), path)
    usual = Records([SourceConfig(path=str(path))])
    asked = Records([SourceConfig(path=str(path))], caption_prompt="What is there? <image>")
    assert usual[0].turns[0].text == "<image>\nDescribe the image."
    assert asked[0].turns[0].text == "What is there? <image>"
    assert usual.content() != asked.content()


def test_columns_that_a_source_names() -> None:
    reading = Reading((("image", "img_file"), ("question", "q"), ("answer", "a")))
    unread: Counter[str] = Counter()
    record = {"img_file": "a.png", "q": "q", "a": "a", "image": "other.png", "text": "more", "author": "x"}
    row = read_record(record, "#0", unread, reading)
    assert (row.images, row.texts) == (("a.png",), ("<image>\nq", "a"))
    assert unread == {"image": 1, "text": 1, "author": 1}
    with pytest.raises(DataError, match=r"has no 'q', which columns.question names; did you mean 'qs'\?"):
        read_record({"img_file": "a.png", "qs": "q", "a": "a"}, "#0", None, reading)
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert read_record({"chat": turns}, "#0", None, Reading((("conversations", "chat"),))).texts == ("q", "a")


# -- visual question answering sets ------------------------------------------------------------------------------------

VQA = {"image": "train/COCO_{img_id:0>12}.png", "question": "question", "answer": "answer"}


@pytest.mark.parametrize("img_id", ["47", 47])
def test_records_by_id_whose_images_are_numbers(tmp_path: Path, img_id: Any) -> None:
    """Reads paths made from several keys, as in COCO-QA, VQA and GQA."""
    path = tmp_path / "train.json"
    content = {"513": {"type": "color", "question": "q", "answer": "red", "img_id": img_id}, "9": {"img_id": ""}}
    content["9"] |= {"question": "no image?", "answer": "none"}
    path.write_text(json.dumps(content, indent=1))
    records = Records([SourceConfig(path=str(path), columns=VQA)])
    assert [sample.id for sample in records] == ["513", "9"] and records.unread() == {"type": 1}
    assert [sample.images for sample in records] == [(str(tmp_path / "train/COCO_000000000047.png"),), ()]
    path.write_text('{"1": {"question": "q", "answer": "a"}, "1": {"question": "q", "answer": "a"}}')
    with pytest.raises(DataError, match=r"has two records with the id 1; remove one"):
        Records([SourceConfig(path=str(path))])


def test_records_that_are_lists(tmp_path: Path) -> None:
    """Reads records that are lists, as in easy-VQA."""
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([["what is it?", "circle", 0], ["is it red?", "no", 12]]))
    columns = {"question": "0", "answer": "1", "image": "images/{2}.png"}
    one, other = Records([SourceConfig(path=str(path), columns=columns)])
    assert one.turns[1].text == "circle" and one.images == (str(tmp_path / "images/0.png"),)
    assert other.images == (str(tmp_path / "images/12.png"),)
    with pytest.raises(DataError, match="a sample must be an object, not list"):
        Records([SourceConfig(path=str(path))])


@pytest.mark.parametrize(
    ("column", "value", "complaint"),
    [
        ("{imgid}.png", "1", "has no 'imgid', which columns.image names; did you mean 'img_id'"),
        ("{img_id", "1", "cannot be read"),
        ("{img_id.__class__}.png", "1", "has no 'img_id.__class__'"),
        ("{img_id[0]}.png", "1", r"has no 'img_id\[0\]'"),
        ("{img_id:05d}.png", "x", "columns cannot write 'img_id' as 05d for x"),
        ("{img_id:999999999}.png", "x", "columns cannot write 'img_id' as 999999999 for x"),
        ("{img_id}.png", [1], "columns cannot write 'img_id' for"),
        ("{img_id}.png", True, "columns cannot write 'img_id' for True"),
    ],
)
def test_columns_that_cannot_be_written(column: str, value: Any, complaint: str) -> None:
    record = {"img_id": value, "question": "q", "answer": "a"}
    with pytest.raises(DataError, match=complaint):
        read_record(record, "#0", None, Reading((("image", column),)))


def test_a_column_that_is_made_of_keys_does_not_leave_the_root(tmp_path: Path) -> None:
    path = tmp_path / "data" / "a.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"n": "../x", "question": "q", "answer": "a"}]))
    (sample,) = [Records([SourceConfig(path=str(path), columns={"image": "{n}.png"})])]
    with pytest.raises(DataError, match="leaves"):
        sample[0]
