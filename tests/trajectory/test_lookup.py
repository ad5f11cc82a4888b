"""Questions whose answer is a word of the text before it: reading the file, and what cannot be told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zero_ds.data.conversations import ChatTemplate
from zero_ds.data.samples import SampleEncoder
from zero_ds.runtime.errors import ConfigError
from zero_ds.trajectory.lookup import chance, read_lookups


@pytest.fixture(scope="module")
def encoder(tokenizer: Any) -> SampleEncoder:
    return SampleEncoder(ChatTemplate(tokenizer), "full", max_length=128, system_prompt="")


def write(path: Path, *words: dict[str, Any], answer: str = "The star is red.") -> Path:
    rows = [
        {"id": f"q{i}", "question": "a red star; which color?", "answer": answer, "words": [w]}
        for i, w in enumerate(words)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_the_prompt_ends_where_the_word_begins(encoder: SampleEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", {"kind": "color", "word": "red", "choices": ["red", "blue", "green"]})
    (lookup,) = read_lookups(path, encoder)
    tokenizer = encoder.template.tokenizer
    assert tokenizer.decode(lookup.input_ids).endswith("The star is")
    assert tokenizer.decode([lookup.choices[lookup.answer]]).strip() in "red"
    assert len(lookup.choices) == 3 and chance([lookup]) == pytest.approx(1 / 3)


def test_choices_may_be_the_words_of_the_file(encoder: SampleEncoder, tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    rows = [
        {"question": f"a {word} star", "answer": f"it is {word}", "words": [{"word": word}]}
        for word in ("red", "blue", "green", "red")
    ]
    path.write_text(json.dumps(rows))
    found = read_lookups(path, encoder)
    assert len(found) == 4 and all(len(lookup.choices) == 3 for lookup in found)
    assert len(read_lookups(path, encoder, count=2, seed=1)) == 2


def test_words_that_begin_alike_are_left_out(encoder: SampleEncoder, tmp_path: Path) -> None:
    path = write(tmp_path / "q.json", {"word": "red", "choices": ["red", "red circle"]})
    with pytest.raises(ConfigError, match=r"no word of .* can be looked up"):
        read_lookups(path, encoder)


@pytest.mark.parametrize(
    ("word", "complaint"),
    [
        ({"word": ""}, "'word' must be a non-empty string"),
        ({"word": "blue"}, "'blue' does not start at character None"),
        ({"word": "red", "start": 3}, "'red' does not start at character 3"),
        ({"word": "red", "start": True}, "'red' does not start at character True"),
        ({"word": "red", "choices": ["red"]}, "'choices' must list 'red' and at least one other word"),
        ({"word": "red", "choices": ["blue", "green"]}, "'choices' must list 'red'"),
    ],
)
def test_wrong_words(encoder: SampleEncoder, tmp_path: Path, word: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_lookups(write(tmp_path / "q.json", word), encoder)
