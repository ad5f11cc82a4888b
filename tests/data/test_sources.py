"""Every mistake in LLaVA's JSON is reported in one sentence that names the sample, and no path leaves its root."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pytest
import tiny
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from places import ROOT

from zero_ds.config.loading import load_run, validate
from zero_ds.config.resume import fingerprint
from zero_ds.config.schema import SourceConfig
from zero_ds.data import arrow
from zero_ds.data.conversations import IGNORE, ChatTemplate, Turn
from zero_ds.data.formats import IMAGE_KEYS, REFUSED, DataError, parse
from zero_ds.data.images import open_image
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Records, evenly_spaced
from zero_ds.runtime.errors import ConfigError


def write(folder: Path, content: Any, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def records(path: Path, **options: Any) -> Records:
    return Records([SourceConfig(path=str(path), **options)])


def good(name: str = "good", **changes: Any) -> dict[str, Any]:
    return {**tiny.record(name, [("q?", "a.")]), **changes}


TALK = [{"from": "human", "value": "q?"}, {"from": "gpt", "value": "a."}]


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ("just text", "must be an object, not str"),
        (None, "must be an object, not NoneType"),
        ({"id": "bad"}, "sample bad has no 'conversations'"),
        ({"id": "bad", "conversations": []}, "sample bad has no 'conversations'"),
        ({"id": "bad", "conversations": "hello"}, "sample bad has no 'conversations'"),
        ({"id": "bad", "conversations": ["hello"]}, "sample bad, turn 0: unknown role None"),
        ({"id": "bad", "conversations": [{"value": "x"}]}, "sample bad, turn 0: unknown role None"),
        ({"id": "bad", "conversations": [{"from": "robot", "value": "x"}]}, "sample bad, turn 0: unknown role 'robot'"),
        (
            {"id": "bad", "conversations": [{"from": ["human"], "value": "x"}]},
            "sample bad, turn 0: unknown role ['human']",
        ),
        ({"id": "bad", "conversations": [{"from": "human"}]}, "sample bad, turn 0: the text is empty"),
        (
            {"id": "bad", "conversations": [*TALK[:1], {"from": "gpt", "value": "  \n"}]},
            "sample bad, turn 1: the text is empty",
        ),
        (
            {"id": "bad", "conversations": [{"from": "human", "value": {}}]},
            "turn 0: the text is {}, which is not a text",
        ),
        ({"id": "bad", "conversations": [{"from": "human", "value": True}]}, "the text is True, which is not a text"),
        ({"id": "bad", "conversations": TALK[:1]}, "sample bad has no answer to learn from"),
        ({"id": "bad", "conversations": TALK[1:]}, "sample bad has no question"),
        ({"id": "bad", "conversations": [{"from": "system", "value": "s"}, *TALK[1:]]}, "sample bad has no question"),
        ({"id": "bad", "image": "a.png", "conversations": TALK[1:]}, "sample bad has no question"),
        ({"id": "bad", "image": 5, "conversations": TALK}, "sample bad: 'image' must be a path or a list of paths"),
        (
            {"id": "bad", "image": ["a.png", 5], "conversations": TALK},
            "sample bad: 'image' must be a path or a list of paths",
        ),
        ({"id": "bad", "image": {"name": "a.png"}, "conversations": TALK}, "sample bad: 'image' must be a path"),
        (
            {
                "id": "bad",
                "image": ["a.png", "b.png"],
                "conversations": [{"from": "human", "value": "<image> q"}, *TALK[1:]],
            },
            "sample bad has 2 images for 1 <image>",
        ),
        (
            {"id": "bad", "conversations": [{"from": "human", "value": "<image> q"}, *TALK[1:]]},
            "sample bad has 0 images for 1 <image>",
        ),
        (
            {"id": "bad", "image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}, *TALK[1:]]},
            "sample bad has 1 images for 2 <image>",
        ),
        (
            {"id": "bad", "conversations": [TALK[0], {"from": "gpt", "value": "\ud800"}]},
            "sample bad, turn 1: the text is no",
        ),
        ({"id": "bad\ud800", "conversations": TALK}, "is not valid text"),
        ({"id": "bad", "image": "\ud800.png", "conversations": TALK}, "sample bad: 'image'"),
        ({"id": "bad", "image": "a\0.png", "conversations": TALK}, "sample bad: 'image'"),
        ({"id": "bad", "image": "", "conversations": TALK}, "sample bad: 'image'"),
    ],
)
def test_bad_record_names_file_number_and_sample(tmp_path: Path, record: Any, complaint: str) -> None:
    path = write(tmp_path, [good(), record])
    with pytest.raises(DataError) as caught:
        records(path)
    message = str(caught.value)
    assert f"{path} #1" in message and complaint in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "must hold a list of samples"),
        ("[{]", "cannot be read"),
        ("{}", "must hold a list of samples"),
        ("[]", "must hold a list of samples"),
        ('"text"', "must hold a list of samples"),
    ],
)
def test_bad_file(tmp_path: Path, content: str, complaint: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=complaint) as caught:
        records(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(b'[{"id": "\xff\xfe"}]')
    with pytest.raises(DataError, match=r"#0: sample '.udcff.udcfe' has no"):
        records(path)


def test_missing_file_and_no_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file .* does not exist"):
        records(tmp_path / "nowhere.json")
    with pytest.raises(ConfigError, match=r"set data\.sources"):
        Records([])


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
nearly = st.fixed_dictionaries(
    {},
    optional={
        "id": trees,
        "image": trees | st.lists(st.text(max_size=5), max_size=2),
        "conversations": trees
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "from": st.sampled_from(["human", "gpt", "system"]) | trees,
                    "value": st.just("<image>") | trees,
                },
            ),
            max_size=4,
        ),
    },
)


@given(nearly | trees)
@example({"conversations": [{"from": {}, "value": "x"}]})
def test_whatever_stands_there_is_a_record_or_a_data_error(record: Any) -> None:
    try:
        row = parse(record, "here")
    except DataError as error:
        assert str(error).startswith("here")
    else:
        assert {"user", "assistant"} <= set(row.roles) and len(row.roles) == len(row.texts)


# -- good records ------------------------------------------------------------------------------------------------------


def test_a_record_becomes_turns_and_paths(tmp_path: Path) -> None:
    path = write(tmp_path, [tiny.record("one", [("q?", "a."), ("r?", "b.")], "images/x.png"), good("two", id=7)])
    first, second = records(path)
    assert (first.id, first.images) == ("one", (str(tmp_path / "images" / "x.png"),))
    assert first.turns == (
        Turn("user", "<image>\nq?"),
        Turn("assistant", "a."),
        Turn("user", "r?"),
        Turn("assistant", "b."),
    )
    assert (second.id, second.images) == ("7", ())


def test_an_image_without_placeholder_goes_before_the_first_question(tmp_path: Path) -> None:
    path = write(tmp_path, [good(image="x.png")])
    assert records(path)[0].turns[0] == Turn("user", "<image>\nq?")


def test_an_image_in_an_answer_is_not_a_placeholder() -> None:
    talk = [TALK[0], {"from": "gpt", "value": "<image> is a tag"}]
    assert parse({"id": "x", "conversations": talk}, "here").images == ()


def test_limit_and_number_of_images(tmp_path: Path) -> None:
    path = write(tmp_path, [good(str(n), **({"image": "x.png"} if n % 2 else {})) for n in range(6)])
    chosen = records(path, limit=4)
    assert [sample.id for sample in chosen] == ["0", "1", "2", "3"]
    assert [chosen.images(n) for n in range(4)] == [0, 1, 0, 1]
    assert len(records(path, limit=100)) == 6


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, [good("old")])
    assert records(path)[0].id == "old"
    write(tmp_path, [good("new")])
    assert records(path)[0].id == "new"


CHAT = [{"role": "user", "content": "q?"}, {"role": "assistant", "content": "a."}]
PARTS = [{"type": "image"}, {"type": "text", "text": "q?"}]


@pytest.mark.parametrize(
    ("record", "first", "images"),
    [
        ({"id": "m", "messages": CHAT}, "q?", ()),
        ({"id": "m", "messages": CHAT, "images": ["x.png"]}, "<image>\nq?", ("x.png",)),
        ({"id": "m", "messages": CHAT, "images": ["x.png", "y.png"]}, "<image><image>\nq?", ("x.png", "y.png")),
        (
            {"id": "m", "messages": [{"role": "user", "content": PARTS}, CHAT[1]], "images": ["x.png"]},
            "<image>q?",
            ("x.png",),
        ),
        (
            {
                "id": "m",
                "messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}, PARTS[1]]}, CHAT[1]],
            },
            "<image>q?",
            ("x.png",),
        ),
        ({"idx": 7, "text": CHAT, "prompt": "p", "template": "t", "category": "c"}, "q?", ()),
        ({"id": "m", "conversations": None, "messages": CHAT}, "q?", ()),
    ],
)
def test_other_forms_of_conversation(record: dict[str, Any], first: str, images: tuple[str, ...]) -> None:
    row = parse(record, "here")
    assert row.id == ("7" if "idx" in record else "m")
    assert (row.roles, row.texts, row.images) == (("user", "assistant"), (first, "a."), images)


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([{"role": "tool", "content": "x"}, CHAT[1]], "turn 0: unknown role 'tool'"),
        ([{"from": "human", "role": "assistant", "value": "x"}, CHAT[1]], "has different values in 'from' and 'role'"),
        ([{"role": "user", "value": "x", "content": "y"}, CHAT[1]], "has different values in 'value' and 'content'"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, CHAT[1]], "is neither text nor image"),
        ([{"role": "user", "content": [{"type": "image", "text": "x"}]}, CHAT[1]], "is neither text nor image"),
        ([{"role": "user", "content": ["q?"]}, CHAT[1]], "is neither text nor image"),
        ([{"role": "user", "content": []}, CHAT[1]], "turn 0: the text is empty"),
        ([{"role": "user", "content": PARTS}, CHAT[1]], "has 0 images for 1 <image>"),
        ([{"role": "user", "content": [{"type": "image", "image": 5}, PARTS[1]]}, CHAT[1]], "'image' must be a path"),
        (
            [CHAT[0], {"role": "assistant", "content": PARTS}],
            "turn 1: role 'assistant' shows an image; only a user's turn",
        ),
    ],
)
def test_messages_that_cannot_be_used(messages: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        parse({"id": "bad", "messages": messages}, "here")


def case(name: str) -> dict[str, dict[str, Any]]:
    """Returns the records of a file of cases that users of other software reported, by id."""
    lines = (ROOT / "tests" / "support" / "cases" / name).read_text().splitlines()
    return {record["id"]: record for record in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("tools", "sample tools: key 'tools' is not supported: tool calls are not learned"),
        ("video", "sample video: key 'video' is not supported: only images and text are learned"),
        ("image and images", "names images in 'image' and others in 'images'; keep one of them"),
        ("part and images", "names images in 'images' and others in 'parts of its turns'; keep one of them"),
    ],
)
def test_a_key_with_a_meaning_is_refused_by_its_name(name: str, complaint: str) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        parse(case("F5_keys_that_are_not_read.jsonl")[name], "here")


def test_a_key_with_a_meaning_takes_effect() -> None:
    given = case("F5_keys_that_are_not_read.jsonl")
    system = parse(given["system"], "here")
    assert system.roles == ("system", "user", "assistant") and system.texts[0] == "Answer in French."
    for name in ("weight", "train"):
        assert parse(given[name], "here").learned == (True, False, True, True)
    row = parse(given["image_path"], "here")
    assert row.images == ("a.png",) and row.texts[0] == "<image>\nWhich color?"


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"image": "a.png"', '"image": "a.png", "image": "b.png"', "image"),
        ('"from": "gpt"', '"from": "human", "from": "gpt"', "from"),
        ('"value": "red"', '"value": "blue", "value": "red"', "value"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_key_that_appears_twice_is_refused(old: str, new: str, key: str, name: str, tmp_path: Path) -> None:
    """Readers of JSON take the last value, and the other one would be lost without a word."""
    turns = [{"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "red"}]
    text = json.dumps({"id": "x", "image": "a.png", "conversations": turns})
    (tmp_path / name).write_text(f"[{text.replace(old, new)}]" if name == "a.json" else text.replace(old, new))
    with pytest.raises(DataError, match=f"sample x.* has the key '{key}' twice"):
        records(tmp_path / name)


@pytest.mark.parametrize("key", [*REFUSED, "weight", "train", "loss"])
def test_keys_are_strict_in_records_and_turns(key: str) -> None:
    """Such a key is refused if its value says something; otherwise it counts as absent."""
    value: Any = 0.5 if key in ("weight", "train", "loss") else "x"
    turns = [CHAT[0], {**CHAT[1], key: value}]
    for record in (good(**{key: value}), {"id": "x", "messages": turns}):
        with pytest.raises(DataError, match=rf"\b{key}\b"):
            parse(record, "here")
        spelled = {"-" + key.title() if each == key else each: content for each, content in record.items()}
        if key in record:
            with pytest.raises(DataError, match=rf"key '-{key.title()}' is not read; write it '{key}'"):
                parse(spelled, "here")
    assert parse(good(**{key: None}), "here") == parse(good(), "here")
    assert parse({"id": "x", "messages": [CHAT[0], {**CHAT[1], key: None}]}, "here").learned == (True, True)


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (good(weight=0), "'weight', 'train' or 'loss' leaves it out"),
        (good(Image="a.png"), "key 'Image' is not read; write it 'image'"),
        (good(imageUrl="a.png"), "key 'imageUrl' is not read; write it 'image_url'"),
        (good(System="Be brief."), "key 'System' is not read; write it 'system'"),
        ({"id": "x", "messages": [CHAT[0], {**CHAT[1], "Train": False}]}, "key 'Train' is not read; write it 'train'"),
        ({"id": "x", "messages": [CHAT[0], {**CHAT[1], "loss_mask": 0}]}, "key 'loss_mask' is not supported"),
        (good(sample_weight=0), "key 'sample_weight' is not supported: call it 'weight'"),
        ({"id": "x", "messages": [CHAT[0], {**CHAT[1], "weight": 0}]}, "no answer to learn from; 'weight', 'train'"),
        ({"id": "x", "messages": [{**CHAT[0], "train": True}, CHAT[1]]}, "'train' of role 'user' is not supported"),
        ({"id": "x", "messages": [{**CHAT[0], "image": "a.png"}, CHAT[1]]}, "turn 0: key 'image' is not supported"),
        ({"id": "x", "conversations": TALK, "messages": CHAT}, "has turns in 'conversations' and in 'messages'"),
        (good(image="a.png", img="b.png"), "names images in 'image' and others in 'img'"),
        (good(system="one", conversations=[{"from": "system", "value": "two"}, *TALK]), "another one as turn 0"),
        (good(system=["x"]), "which is not a text"),
        (good(image="https://example.org/a.png"), "is an address, and images are read from files; fetch it first"),
        (good(image_url={"url": "http://example.org/a.png"}), "is an address, and images are read from files"),
    ],
)
def test_refusals_with_the_true_reason(record: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=re.escape(complaint)):
        parse(record, "here")


@pytest.mark.parametrize("key", IMAGE_KEYS)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], {"path": "a.png", "bytes": None}, [{"url": "a.png"}]])
def test_an_image_by_any_name(key: str, value: Any) -> None:
    assert parse(good(**{key: value}), "here").images == ("a.png",)


def test_images_that_are_not_named_twice() -> None:
    """A second key may repeat the images, tell where a file is from, or hold the bytes of a table."""
    assert parse(good(image="a.png", images=["a.png"]), "here").images == ("a.png",)
    unread: Counter[str] = Counter()
    assert parse(good(image="a.png", image_url="https://example.org/1"), "here", unread).images == ("a.png",)
    assert unread == {"image_url": 1}
    content = {"bytes": b"pixels", "path": "a.png"}
    assert parse(good(image=content), "here").images == ("data:;base64,cGl4ZWxz",)
    assert parse(good(image="file:///data/a.png"), "here").images == ("/data/a.png",)
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    row = parse({"id": "x", "messages": [{"role": "user", "content": [part, PARTS[1]]}, CHAT[1]]}, "here")
    assert row.images == ("data:image/png;base64,AAAA",) and row.texts[0] == "<image>q?"


def test_every_key_that_is_not_read_is_counted(tmp_path: Path) -> None:
    turns = [{**TALK[0], "markdown": None}, {**TALK[1], "model": "gpt-4"}]
    path = write(tmp_path, [good("a", source="web", conversations=turns), good("b", source="", score=3), good("c")])
    found = records(path)
    assert found.unread() == {"source": 1, "model (of a turn)": 1, "score": 1}
    assert [sample.id for sample in found] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "texts", "images"),
    [
        ("parquet nulls", ("<image>q?", "a"), ("a.png",)),
        ("number", ("2+1?", "3"), ()),
        ("role in conversations", ("q?", "a."), ()),
        ("json text", ("q?", "a."), ()),
        ("empty list beside messages", ("q?", "a."), ()),
    ],
)
def test_records_that_were_refused_with_a_false_reason(name: str, texts: tuple[str, ...], images: tuple[str]) -> None:
    row = parse(case("F13_refused_with_a_false_reason.jsonl")[name], "here")
    assert (row.roles, row.texts, row.images) == (("user", "assistant"), texts, images)


def test_turns_as_tables_hold_them() -> None:
    """A text of JSON, and the object of lists that the library `datasets` makes of a list of objects."""
    columns = {"from": ["human", "gpt"], "value": ["q?", "a."]}
    for turns in (json.dumps(TALK), columns):
        assert parse({"id": "x", "conversations": turns}, "here") == parse({"id": "x", "conversations": TALK}, "here")
    with pytest.raises(DataError, match=r"has no 'conversations'; it is \{'from': \['human'\].*, not a list of turns"):
        parse({"id": "x", "conversations": {"from": ["human"], "value": []}}, "here")
    number = [
        {"role": "user", "content": [{"type": "text", "text": 7}, {"text": "!"}]},
        {"role": "assistant", "content": 0},
    ]
    assert parse({"id": "x", "messages": number}, "here").texts == ("7!", "0")


def test_base64_without_an_address() -> None:
    content = base64.b64encode(bytes(5000)).decode()
    assert parse(good(image=content), "here").images == (f"data:;base64,{content}",)


def test_an_id_of_null_is_none() -> None:
    assert parse({**good(), "id": None}, "#3").id == "#3"
    assert parse({**good(), "id": None, "idx": 5}, "#3").id == "5"
    assert parse({**good(), "id": float("nan")}, "#3").id == "#3"


def test_answers_that_are_not_learned_are_kept_and_carry_no_loss(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{**TALK[0]}, {**TALK[1], "weight": 0}, {**TALK[0]}, {"from": "gpt", "value": "b."}]
    (sample,) = records(write(tmp_path, [good(conversations=turns)]))
    assert [turn.learned for turn in sample.turns] == [True, False, True, True]
    for supervise in ("response", "special_tokens"):
        encoder = SampleEncoder(ChatTemplate(tokenizer), supervise, image_prompt="off")  # type: ignore[arg-type]
        encoded = encoder.tokens(sample)
        plain = encoder.tokens(replace(sample, turns=tuple(replace(turn, learned=True) for turn in sample.turns)))
        assert encoded.input_ids == plain.input_ids and encoded.responses == plain.responses
        for label, other, response in zip(encoded.labels, plain.labels, encoded.responses, strict=True):
            assert label == (IGNORE if response == 0 else other)
        assert any(label != IGNORE for label in encoded.labels)


def test_full_path_is_followed_only_where_the_source_allows_it(tmp_path: Path) -> None:
    outside = str(tmp_path / "elsewhere" / "x.png")
    (tmp_path / "root").mkdir()
    rows = [good("a", full_path=outside), good("b", full_path=True, image=outside), good("c", image="y.png")]
    path = write(tmp_path / "root", rows)
    allowed = records(path, full_path=True)
    assert [sample.images[0] for sample in allowed] == [outside, outside, str(tmp_path / "root" / "y.png")]
    for number in (0, 1):
        with pytest.raises(DataError, match="allow that for this source with full_path: true"):
            records(path)[number]
    assert records(path)[2].images


def test_a_word_names_a_registered_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, [good("own")])
    (tmp_path / "datasets.yaml").write_text(f"mine:\n  path: {path}\n  limit: 1\n")
    assert SourceConfig.model_validate("mine") == SourceConfig(path=str(path), limit=1)
    assert SourceConfig.model_validate(str(path)) == SourceConfig(path=str(path))
    assert SourceConfig.model_validate("llava-1.5-665k").root == "data/images"
    assert SourceConfig.model_validate({"name": "mine", "limit": 7}) == SourceConfig(path=str(path), limit=7)
    with pytest.raises(ConfigError, match=r"unknown data set 'main'; did you mean 'mine'"):
        validate(SourceConfig, {"name": "main"}, what="data")
    run = load_run("llama-3.1-8b/encoder", ["data.sources.0.limit=5"])
    assert (run.data.sources[0].limit, run.data.sources[0].images_only) == (5, True)
    (tmp_path / "datasets.yaml").write_text("mine: [")
    with pytest.raises(ConfigError, match=r"list of data sets datasets\.yaml cannot be read"):
        validate(SourceConfig, "mine", what="data")


def test_bad_records_are_counted_and_skipped_where_that_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, [good("a"), {"id": "bad"}, good("b"), "text"])
    with pytest.raises(DataError, match=r"#1: sample bad has no.*\(2 such records; data\.bad_samples=skip skips them"):
        records(path)
    found = Records([SourceConfig(path=str(path))], skip_bad=True)
    assert [sample.id for sample in found] == ["a", "b"]
    assert [count for _, count in found.complaints()] == [2]
    assert "2 of 4 records cannot be used and are skipped; the first: #1: sample bad" in caplog.text
    with pytest.raises(DataError, match="has no usable sample"):
        Records([SourceConfig(path=str(write(tmp_path, ["text"], "b.json")))], skip_bad=True)


def test_a_moved_file_is_not_converted_again_and_is_named_by_its_new_place(tmp_path: Path) -> None:
    path = write(tmp_path, [good("moved"), {"id": "bad"}])
    with pytest.raises(DataError, match=re.escape(str(path))):
        records(path)
    path.rename(tmp_path / "new.json")
    with (
        mock.patch("zero_ds.data.arrow._convert", side_effect=AssertionError("was converted again")),
        pytest.raises(DataError, match=re.escape(str(tmp_path / "new.json"))),
    ):
        records(tmp_path / "new.json")


def test_a_file_of_an_hour_ago_is_not_even_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, [good("old")])
    os.utime(path, (time.time() - 3600,) * 2)
    assert records(path)[0].id == "old"
    with mock.patch("hashlib.blake2b", side_effect=AssertionError("was read again")):
        assert records(path)[0].id == "old"
    before = path.stat().st_mtime_ns
    write(tmp_path, [good("new")])
    os.utime(path, ns=(before, before - 1))
    assert records(path)[0].id == "new"


def test_two_processes_convert_once(tmp_path: Path) -> None:
    path = write(tmp_path, [good(str(n)) for n in range(2000)])
    with ThreadPoolExecutor(4) as pool, mock.patch("zero_ds.data.arrow._convert", wraps=arrow._convert) as convert:
        found = list(pool.map(lambda _: len(records(path)), range(4)))
    assert found == [2000] * 4 and convert.call_count == 1


def test_a_full_disk_while_converting_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, [good(f"full {tmp_path}")])
    with (
        mock.patch("pyarrow.ipc.new_stream", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(DataError, match=r"cannot be kept in .*: No space left on device; make room there"),
    ):
        records(path)
    assert not [p for p in (Path(datasets.config.HF_DATASETS_CACHE) / "zero_ds").iterdir() if p.name.startswith(".")]
    assert len(records(path)) == 1


def test_rows_in_many_batches(tmp_path: Path) -> None:
    rows = [good(f"{n}é", **({"image": f"{n}.png"} if n % 3 == 0 else {})) for n in range(23)]
    with mock.patch("zero_ds.data.arrow.ROWS", 5):
        found = records(write(tmp_path, rows))
    assert [sample.id for sample in found] == [f"{n}é" for n in range(23)]
    assert [found.images(n) for n in range(23)] == [int(n % 3 == 0) for n in range(23)]
    sizes = [sum(len(turn.text.encode()) for turn in found[n].turns) for n in range(23)]
    assert [found.size(n) for n in range(23)] == sizes
    with_image = records(tmp_path / "data.json", images_only=True)
    assert [sample.id for sample in with_image] == [f"{n}é" for n in range(0, 23, 3)]
    with pytest.raises(IndexError):
        found[23]


def test_a_permuted_source_takes_its_limit_at_random(tmp_path: Path) -> None:
    path = write(tmp_path, [good(str(n)) for n in range(50)])
    drawn = [[s.id for s in Records([SourceConfig(path=str(path), limit=20)], permute=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 20 and drawn[0] != sorted(drawn[0])


@given(st.lists(st.integers(0, 30), min_size=1, max_size=4))
def test_evenly_spaced(lengths: list[int]) -> None:
    order = evenly_spaced(lengths).tolist()
    assert len(order) == sum(lengths)
    for source, n in enumerate(lengths):
        assert [row for s, row in order if s == source] == list(range(n)), "its own order, complete"
        total = len(order)
        for start in range(
            0, total, max(1, total // 3)
        ):  # any stretch holds its share, up to the rounding of each source
            stretch = order[start : start + max(1, total // 3)]
            share = sum(s == source for s, _ in stretch)
            assert abs(share - n * len(stretch) / total) <= len(lengths)


def test_sources_are_mixed_evenly(tmp_path: Path) -> None:
    a = write(tmp_path, [good(f"a{n}") for n in range(4)], "a.json")
    b = write(tmp_path, [good(f"b{n}") for n in range(2)], "b.json")
    mixed = Records([SourceConfig(path=str(a)), SourceConfig(path=str(b))])
    assert [sample.id for sample in mixed] == ["a0", "b0", "a1", "a2", "b1", "a3"]


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret.png", "images/../../secret.png", "link/secret.png", "link.png", "ABSOLUTE"]
)
def test_paths_that_leave_the_root(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    outside = tmp_path / "secret.png"
    outside.write_bytes(b"secret")
    (root / "link").symlink_to(tmp_path)
    (root / "link.png").symlink_to(outside)
    name = str(outside) if name == "ABSOLUTE" else name
    path = write(root, [good("sly", image=name)])
    with pytest.raises(DataError, match=re.escape(f"sample sly: image path {name!r} leaves the data root {root}")):
        records(path)[0]


def test_paths_inside_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "images").mkdir(parents=True)
    (root / "inner").symlink_to(root / "images")
    path = write(tmp_path, [good("a", image="images/../images/x.png"), good("b", image="inner/x.png")])
    for sample in records(path, root=str(root)):
        assert sample.images == (str(root / "images" / "x.png"),)


def test_an_absolute_path_inside_the_root(tmp_path: Path) -> None:
    """The path may name the root itself, or a link to it."""
    (tmp_path / "root" / "images").mkdir(parents=True)
    (tmp_path / "also").symlink_to(tmp_path / "root")
    names = [str(tmp_path / folder / "images" / "x.png") for folder in ("root", "also")]
    path = write(tmp_path, [good(str(number), image=name) for number, name in enumerate(names)])
    for sample in records(path, root=str(tmp_path / "also")):
        assert sample.images == (str(tmp_path / "root" / "images" / "x.png"),)


def test_links_that_join_folders_need_leave(tmp_path: Path) -> None:
    """LLaVA's data has one folder of images, in which links lead to the data sets; a source must name their targets."""
    for name in ("root", "coco", "secret"):
        (tmp_path / name).mkdir()
    for name in ("coco", "secret"):
        (tmp_path / "root" / name).symlink_to(tmp_path / name)
    path = write(tmp_path, [good("a", image="coco/x.png"), good("b", image="secret/x.png")])
    link = re.escape(f"leaves the data root {tmp_path / 'root'} through a link to {tmp_path / 'coco'}; if you trust it")
    with pytest.raises(DataError, match=f"{link}.*allowed_roots"):
        records(path, root=str(tmp_path / "root"))[0]
    (tmp_path / "mounted").symlink_to(tmp_path / "coco")
    for allowed in ("coco", "mounted"):
        found = records(path, root=str(tmp_path / "root"), allowed_roots=(str(tmp_path / allowed),))
        assert found[0].images == (str(tmp_path / "coco" / "x.png"),)
        with pytest.raises(DataError, match=r"sample b: image path 'secret/x\.png' leaves the data root"):
            found[1]


def test_an_allowed_root_is_a_setting_that_old_runs_lack(tmp_path: Path, run_config: Any) -> None:
    def run(**more: Any) -> Any:
        return run_config("encoder", data={"sources": [{"path": "a.json", **more}]})

    content = run().model_dump(mode="json")
    del content["data"]["sources"][0]["allowed_roots"]
    assert fingerprint(content) == run().fingerprint() != run(allowed_roots=["b"]).fingerprint()


def test_images_in_the_data_itself(tmp_path: Path) -> None:
    """An address of base64 needs no root; it is opened like a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    (sample,) = records(write(tmp_path, [good(image=address)]))
    assert sample.images == (address,) and open_image(sample.images[0]).size == (4, 3)


def test_a_broken_line_does_not_lose_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    latin = json.dumps(good("latin")).encode().replace(b"q?", b"caf\xe9")
    path.write_bytes(
        b"\n".join([json.dumps(good("a")).encode(), b'{"id": "b", ', latin, json.dumps(good("c")).encode()])
    )
    found = Records([SourceConfig(path=str(path))], skip_bad=True)
    assert [sample.id for sample in found] == ["a", "c"]
    ((sentences, count),) = found.complaints()
    assert count == 2 and "#1: line 2 (sample b)" in sentences[0] and "sample latin, turn 0" in sentences[1]


def test_messages_stay_short_and_printable(tmp_path: Path) -> None:
    path = write(tmp_path, [{"id": "x\n\x1b[31m\ud800", "conversations": [{"from": "r" * 10**6, "value": "x"}]}])
    with pytest.raises(DataError) as caught:
        records(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["a" * 300 + ".png", "loop/a.png", "loop"])
def test_paths_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DataError, match=r"sample x: image path .* (cannot be followed|leaves)"):
        records(write(tmp_path, [good("x", image=name)]))[0]


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    import pyarrow

    path = write(tmp_path, [good(f"{tmp_path} {n}") for n in range(10)])
    with mock.patch("zero_ds.data.arrow.ROWS", 5):
        found = records(path)
    (folder,) = (Path(datasets.config.HF_DATASETS_CACHE) / "zero_ds").glob(f"{found._sources[0].tables[0].name}-*")
    assert folder.stat().st_mode & 0o777 == 0o755
    content = (folder / "records.arrow").read_bytes()
    source = pyarrow.BufferReader(content)
    pyarrow.ipc.open_stream(source).read_next_batch()
    for cut in (source.tell(), source.tell() + 50):
        (folder / "records.arrow").write_bytes(content[:cut])
        assert len(records(path)) == 10


@pytest.mark.parametrize("pattern", ["/tmp/*.json", "**x/y", "../*.json"])
def test_patterns_that_are_refused(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, [good()])
    with pytest.raises(ConfigError, match="files="):
        records(tmp_path, files=pattern)
