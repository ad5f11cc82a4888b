"""Tokens of training are those of the model's own tokenizer, except for special tokens that somebody types."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from chat_templates import PUBLISHED, sentencepiece, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st

from zero_ds.data.conversations import IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.runtime.errors import ConfigError

OPTIONS: dict[str, Any] = {"tokens_per_image": 1, "supervise": "response"}
USABLE = [name for name, published in PUBLISHED.items() if published.verdict != "refused"]


def ids(template: ChatTemplate, *turns: Turn, **more: Any) -> list[int]:
    return template.encode(turns, **OPTIONS, **more).input_ids


def stock(template: ChatTemplate, *turns: Turn, **more: Any) -> list[int]:
    return list(template.tokenizer(template.render(turns, **more), add_special_tokens=False).input_ids)


QUESTIONS = (
    "\n\nLook:\n",
    " a blank first",
    "ends with blanks  \n\n",
    "\n",
    "1 234\t5",
    "caf\u00e9 \U0001f600",
    "a\u00a0b",
)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("family", USABLE)
def test_white_space_around_questions(family: str, question: str) -> None:
    template = ChatTemplate(tokenizer_of(family))
    turns = (
        Turn("user", question),
        Turn("assistant", "A red circle. "),
        Turn("user", question),
        Turn("assistant", "b\n"),
    )
    assert ids(template, *turns) == stock(template, *turns)
    assert ids(template, *turns[:3], generate=True) == stock(template, *turns[:3], generate=True)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Co"]), max_size=30), st.sampled_from(USABLE))
@settings(max_examples=60)
def test_any_question(question: str, family: str) -> None:
    template = ChatTemplate(tokenizer_of(family))
    turn = Turn("user", question.replace("<image>", ""))
    assert ids(template, turn, generate=True) == stock(template, turn, generate=True)


@pytest.mark.parametrize("family", USABLE)
def test_text_around_images(family: str) -> None:
    """An image takes the place of a special token, as in an exported prompt."""
    tokenizer = tokenizer_of(family)
    template = ChatTemplate(tokenizer)
    stands_for = template.words.lead
    shown = ids(template, Turn("user", "First:<image> Second:\n<image>\nwhich?"), generate=True)
    text = template.render([Turn("user", "First:IMAGE Second:\nIMAGE\nwhich?")], generate=True)
    written = list(tokenizer(text.replace("IMAGE", stands_for), add_special_tokens=False).input_ids)
    number = tokenizer.convert_tokens_to_ids(stands_for)
    places = [place for place, token in enumerate(shown) if token == IMAGE_TOKEN]
    assert len(places) == 2 and all(written[place] == number for place in places)
    assert [number if token == IMAGE_TOKEN else token for token in shown] == written


@pytest.mark.parametrize("legacy", [False, True])
def test_sentencepiece_puts_its_blank_where_the_tokenizer_puts_it(legacy: bool) -> None:
    words = sentencepiece(("<s>", "</s>"), legacy=legacy, bos_token="<s>", eos_token="</s>")
    words.chat_template = PUBLISHED["Llama-2"].template
    template = ChatTemplate(words)
    template.check()
    turns = (Turn("user", "What is shown?"), Turn("assistant", "A red circle."), Turn("user", "which?"))
    assert ids(template, *turns, generate=True) == stock(template, *turns, generate=True)
    forged = "A </s> circle"
    encoded = ids(template, Turn("user", forged), Turn("assistant", forged))
    assert encoded.count(words.eos_token_id) == 1
    assert words.decode(encoded).count("</s>") == 3


def test_words_that_were_added_to_the_vocabulary_are_words() -> None:
    """Ids are the stock tokenizer's, in questions, in answers, and in the template's own text."""
    words = tiny.tokenizer(template=tiny.TEMPLATE.replace(tiny.SYSTEM, "You know the glorbnak."))
    words.add_tokens(["glorbnak", "<part>"])
    template = ChatTemplate(words)
    template.check()
    turns = (Turn("user", "a glorbnak?"), Turn("assistant", "the glorbnak, <part>"))
    found = ids(template, *turns)
    assert found == stock(template, *turns)
    assert found.count(words.convert_tokens_to_ids("glorbnak")) == 3
    assert found.count(words.convert_tokens_to_ids("<part>")) == 1


def test_marks_of_the_template_stay_text_next_to_words() -> None:
    words = tiny.tokenizer(plain=("<think>", "</think>"), template=PUBLISHED["Qwen3"].template)
    words.add_tokens(["glorbnak"])
    template = ChatTemplate(words)
    typed = "a glorbnak </think> <|im_end|>\n"
    found = ids(template, Turn("user", typed), Turn("assistant", "b"))
    assert found.count(words.convert_tokens_to_ids("glorbnak")) == 1
    assert found.count(words.convert_tokens_to_ids("</think>")) == 1, "the one of the empty thought"
    assert typed in words.decode(found)


# -- data.special_tokens -----------------------------------------------------------------------------------------------

PLACES = ("<loc001>", "<loc002>", "<seg1>", "[REGION]")


def grounding(*names: str) -> ChatTemplate:
    return ChatTemplate(tiny.tokenizer(spare=("<reponame>", *PLACES)), special_tokens=names)


def test_special_tokens_are_text_unless_data_may_use_them() -> None:
    turns = (Turn("user", "where? <loc001><seg1>"), Turn("assistant", "<loc002> <|im_end|> [REGION]"))
    numbers = {name: grounding().tokenizer.convert_tokens_to_ids(name) for name in PLACES}
    plain = ids(grounding(), *turns)
    assert not set(numbers.values()) & set(plain)
    some = grounding("<loc*>", "[REGION]")
    found = ids(some, *turns)
    assert [name for token in found for name, number in numbers.items() if token == number] == [
        "<loc001>",
        "<loc002>",
        "[REGION]",
    ]
    assert found.count(some.end_of_turn()) == plain.count(some.end_of_turn()), "a typed end mark stays text"
    learned = some.encode(turns, **OPTIONS).labels
    assert numbers["<loc002>"] in learned and numbers["<loc001>"] not in learned
    everything = some.encode(turns, tokens_per_image=1, supervise="special_tokens").labels
    assert numbers["<loc001>"] not in everything, "tokens of a question are not learned"
    whole = grounding("<loc001>", "<loc002>", "<seg1>", "[REGION]")
    turns = (Turn("user", "where? <loc001><seg1>"), Turn("assistant", "<loc002> [REGION]"))
    assert ids(whole, *turns) == stock(whole, *turns)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("<loc003>", r"names '<loc003>', which is not an added token of the tokenizer; did you mean '<loc00\d>'"),
        ("<|im_*", r"names '<\|im_start\|>', which the chat template writes around turns"),
        ("shape", "is not an added token"),
    ],
)
def test_special_tokens_that_cannot_be_used(name: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        grounding(name)
