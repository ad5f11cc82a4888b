"""The chat template of an export writes the same prompts as training, however a message contains its images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GemmaTokenizer

from zero_ds.config.schema import DataConfig
from zero_ds.data.conversations import IMAGE_TOKEN, ChatTemplate, Turn
from zero_ds.data.samples import SampleEncoder
from zero_ds.data.sources import Sample
from zero_ds.export.text import chat_template
from zero_ds.grafting.tokenizers import for_templates_, for_texts_

TOKENIZER = tiny.tokenizer()
TOKEN = "<reponame>"
DATED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
ASK: dict[str, Any] = {"type": "text", "text": "which shape?"}
SHOW: dict[str, Any] = {"type": "image"}


def user(*contents: Any) -> dict[str, Any]:
    return {"role": "user", "content": contents[0] if isinstance(contents[0], str) else list(contents)}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[Turn]]] = {
    "an image in a list": ([user(SHOW, ASK)], [Turn("user", "<image>\nwhich shape?")]),
    "after the text": ([user(ASK, SHOW)], [Turn("user", "<image>\nwhich shape?")]),
    "as LLaVA and lmms-eval write it": ([user("<image>\nwhich shape?")], [Turn("user", "<image>\nwhich shape?")]),
    "on the last line": ([user("which shape?\n<image>")], [Turn("user", "which shape?\n<image>")]),
    "inside the text": ([user("is <image> a circle?")], [Turn("user", "is <image> a circle?")]),
    "two images in a list": ([user(SHOW, SHOW, ASK)], [Turn("user", "<image><image>\nwhich shape?")]),
    "two images in a text": ([user("<image> <image>\nwhich?")], [Turn("user", "<image> <image>\nwhich?")]),
    "no image": ([user("which shape?")], [Turn("user", "which shape?")]),
    "text in a list": ([user(ASK)], [Turn("user", "which shape?")]),
    "a second question": (
        [user(SHOW, ASK), said("an <image>"), user("sure?")],
        [Turn("user", "<image>\nwhich shape?"), Turn("assistant", "an <image>"), Turn("user", "sure?")],
    ),
    "an image with the second question": (
        [user("hello"), said("hi"), user(SHOW, ASK)],
        [Turn("user", "hello"), Turn("assistant", "hi"), Turn("user", "<image>\nwhich shape?")],
    ),
    "a system message": (
        [{"role": "system", "content": "Be brief."}, user(SHOW, ASK)],
        [Turn("system", "Be brief."), Turn("user", "<image>\nwhich shape?")],
    ),
}


@pytest.mark.parametrize("mode", ["fixed", "off"])
@pytest.mark.parametrize("case", list(CONVERSATIONS))
def test_messages_become_what_training_wrote(case: str, mode: Literal["fixed", "off"]) -> None:
    """All tokens are the same, also with a system prompt and a template that writes the date, which training fixes."""
    messages, turns = CONVERSATIONS[case]
    own = DATED + tiny.TEMPLATE
    encoder = SampleEncoder(
        template=ChatTemplate(TOKENIZER, own),
        supervise="response",
        processor=None,
        tokens_per_image=1,
        max_length=512,
        image_prompt=mode,
        system_prompt="Short.",
        seed=0,
    )
    expected = encoder.encode(encoder.turns(Sample("x", tuple(turns), ())), generate=True).input_ids
    template = chat_template(own, TOKEN, DataConfig(image_prompt=mode, system_prompt="Short."))
    text = TOKENIZER.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert text.startswith("26 Jul 2024")
    image = TOKENIZER.convert_tokens_to_ids(TOKEN)
    found = TOKENIZER(text, add_special_tokens=False).input_ids
    if case == "a second question":  # in training, <image> in an answer is plain text
        assert "an <image>" in text
    assert found == [image if token == IMAGE_TOKEN else token for token in expected]


def test_other_fields_of_a_message_are_kept() -> None:
    own = "{% for m in messages %}{{ m.role }}:{{ m.content }}:{{ m.name }};{% endfor %}"
    template = chat_template(own, TOKEN, DataConfig(image_prompt="off"))
    messages = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": None, "name": "Bo"}]
    text = TOKENIZER.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == "user:a:Ann;assistant::Bo;"


def llama() -> Any:
    """Returns a tokenizer like Llama-3's: a post-processor, not a setting, adds the first token."""
    words = tiny.tokenizer(named={"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"})
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", words.bos_token_id)]
    )
    return words


def gemma() -> Any:
    """Returns a tokenizer like Gemma's: its class adds the first token if a setting says so."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|im_end|>", "h", "i"]
    return GemmaTokenizer(vocab={word: number for number, word in enumerate(words)}, merges=[], add_bos_token=True)


@pytest.mark.parametrize("make", [llama, gemma])
def test_the_first_token_is_not_added_twice(make: Any, tmp_path: Path) -> None:
    """Serves software that tokenizes a written prompt as plain text and ends answers at the tokenizer's end token."""
    words = make()
    words.save_pretrained(tmp_path / "before")
    assert AutoTokenizer.from_pretrained(tmp_path / "before")("hi").input_ids[0] == words.bos_token_id
    end = words.convert_tokens_to_ids("<|im_end|>")
    for_templates_(words, end)
    words.save_pretrained(tmp_path / "after")
    for read in (words, AutoTokenizer.from_pretrained(tmp_path / "after")):
        assert read("hi").input_ids == read("hi", add_special_tokens=False).input_ids
        assert (read.eos_token_id, read.eos_token) == (end, "<|im_end|>") and read.bos_token is not None
        for_texts_(read)
        assert read("hi").input_ids == [words.bos_token_id, *read("hi", add_special_tokens=False).input_ids]
