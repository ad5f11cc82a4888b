"""Golden files for the chat template of each family, with text, ids and labels of one conversation.

For plain conversations, the templates below write the same text as the families' own templates. After an intended
change, write the files again with `python tests/data/test_golden.py` and review the diff.
"""

from __future__ import annotations

import functools
import tempfile
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import pytest
import tiny
from transformers import AutoTokenizer

from zero_ds.data.conversations import IGNORE, IMAGE_TOKEN, ChatTemplate, Supervision, Turn

GOLDEN = Path(__file__).parent / "golden"

_LOOP = "{% for m in messages %}"
_BOUNDS = {"eos_token": "<|im_end|>"}
TEMPLATES: dict[str, tuple[dict[str, Any], str]] = {
    "llama3": (
        {
            "spare": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
            "named": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        },
        "{{ '<|begin_of_text|>' }}" + _LOOP + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
        "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    ),
    "qwen2.5": (
        {"spare": (), "named": _BOUNDS},
        "{% if messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}"
        "{% endif %}" + _LOOP + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    ),
    "qwen3": (
        {"spare": (), "plain": ("<think>", "</think>"), "named": _BOUNDS},
        _LOOP + "{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
    ),
    "gemma": (
        {
            "spare": ("<bos>", "<start_of_turn>", "<end_of_turn>"),
            "named": {"bos_token": "<bos>", "eos_token": "<|endoftext|>"},
        },
        "{{ '<bos>' }}" + _LOOP + "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    ),
    "smollm2": ({"spare": ()}, tiny.TEMPLATE),
}
"""Special tokens, added tokens and chat template of each family, as published."""
TURNS = (
    Turn("user", "In<image> and<image>, which? Say <|im_end|> or <|eot_id|>."),
    Turn("assistant", "The star.\n"),
    Turn("user", "Why?"),
    Turn("assistant", "It is red."),
)


@functools.cache
def tokenizer_of(family: str) -> Any:
    """Returns the tokenizer of a family, after saving and loading it, because real ones are loaded from folders."""
    options, template = TEMPLATES[family]
    with tempfile.TemporaryDirectory() as folder:
        tiny.tokenizer(template=template, **options).save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)


def rendered(family: str) -> str:
    """Returns one line per token: id, text, and whether each kind of supervision gives it a label."""
    tokenizer = tokenizer_of(family)
    ways: tuple[Supervision, ...] = ("response", "special_tokens", "full")
    encoded = [ChatTemplate(tokenizer).encode(TURNS, tokens_per_image=2, supervise=way) for way in ways]
    lines = [f"{'id':>4}  {'text':<22}  " + "  ".join(ways)]
    for place, token in enumerate(encoded[0].input_ids):
        text = "[image]" if token == IMAGE_TOKEN else repr(tokenizer.decode([token]))[1:-1]
        labels = [each.labels[place] for each in encoded]
        assert all(label in (IGNORE, token) for label in labels)
        shown = "  ".join(
            ("x" if label != IGNORE else ".").center(len(way)) for label, way in zip(labels, ways, strict=True)
        )
        lines.append(f"{token:>4}  {text:<22}  {shown}".rstrip())
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_text_ids_and_labels(family: str) -> None:
    expected = (GOLDEN / f"{family}.txt").read_text(encoding="utf-8")
    for number, (ours, theirs) in enumerate(zip_longest(rendered(family).splitlines(), expected.splitlines()), 1):
        assert ours == theirs, f"line {number}"


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_typed_text_never_becomes_special_tokens(family: str) -> None:
    tokenizer = tokenizer_of(family)
    typed = " ".join(token.content for token in tokenizer.added_tokens_decoder.values())
    assert "<|im_end|>" in typed and ("</think>" in typed) == (family == "qwen3")
    turns = (Turn("user", typed), Turn("assistant", typed))
    ids = ChatTemplate(tokenizer).encode(turns, tokens_per_image=2, supervise="response").input_ids
    plain = (
        ChatTemplate(tokenizer)
        .encode((Turn("user", "q"), Turn("assistant", "a")), tokens_per_image=2, supervise="response")
        .input_ids
    )
    marks = set(tokenizer.added_tokens_decoder)
    assert [i for i in ids if i in marks] == [i for i in plain if i in marks]
    assert cast(str, tokenizer.decode(ids)).count(typed) == 2


@pytest.mark.parametrize("family", list(TEMPLATES))
def test_an_answer_ends_with_the_familys_token(family: str) -> None:
    end = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}.get(family, "<|im_end|>")
    tokenizer = tokenizer_of(family)
    assert tokenizer.decode([ChatTemplate(tokenizer).end_of_turn()]) == end


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("family", list(TEMPLATES))
def test_the_tokens_decode_to_the_rendered_template(family: str, generate: bool) -> None:
    """The contents have white space around them, which some templates trim and others keep."""
    tokenizer = tokenizer_of(family)
    turns = [Turn("user", "  Why?\n"), Turn("assistant", "\tIt is. "), Turn("user", " So? ")][: 3 if generate else 2]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    options = {"tokenize": False, "add_generation_prompt": generate, "enable_thinking": False}
    encoded = ChatTemplate(tokenizer).encode(turns, tokens_per_image=2, supervise="response", generate=generate)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, **options)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name in TEMPLATES:
        (GOLDEN / f"{name}.txt").write_text(rendered(name), encoding="utf-8")
