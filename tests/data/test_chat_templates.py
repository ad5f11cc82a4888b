"""Prompts equal the text before answers in training, for the chat templates of many model families."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
from chat_templates import ASK, CHATML, LOOP, PUBLISHED, tokenizer_of

from zero_ds.data.conversations import IGNORE, ChatTemplate, ConversationError, Role, Turn
from zero_ds.runtime.errors import ConfigError

USABLE = [name for name, published in PUBLISHED.items() if published.verdict != "refused"]
OPTIONS: dict[str, Any] = {"tokens_per_image": 2, "supervise": "response"}
KINDS: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant"),
    ("user", "assistant", "user", "assistant", "user", "assistant"),
    ("system", "user", "assistant"),
    ("system", "user", "assistant", "user", "assistant"),
)
TEXTS = ("What is shown here?", "A red circle.", "Answer in English. 42")


def turns_of(roles: tuple[Role, ...]) -> list[Turn]:
    texts: dict[Role, str] = {"user": TEXTS[0], "assistant": TEXTS[1], "system": TEXTS[2]}
    return [Turn(role, f"{texts[role]} {number}") for number, role in enumerate(roles)]


def stock(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@pytest.mark.parametrize("family", list(PUBLISHED))
def test_verdict(family: str) -> None:
    published = PUBLISHED[family]
    template = ChatTemplate(tokenizer_of(family))
    if published.verdict == "refused":
        with pytest.raises(ConfigError, match=published.reason):
            template.check()
        return
    template.check()
    assert template.each_as_last == (published.verdict == "each as last")
    assert template.tokenizer.convert_ids_to_tokens(template.end_of_turn()) == published.end
    if published.system:
        template.check(system="Answer in English.")
    else:
        with pytest.raises(ConfigError, match=r"refuses the roles system|does not keep every turn's text"):
            template.check(system="Answer in English.")


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("family", USABLE)
def test_what_is_asked_is_what_is_learned(family: str, kind: tuple[Role, ...]) -> None:
    """For every answer: the prompt, the tokens that are learned, and the end mark."""
    if kind[0] == "system" and not PUBLISHED[family].system:
        return
    tokenizer, turns = tokenizer_of(family), turns_of(kind)
    template = ChatTemplate(tokenizer)
    encoded = template.encode(turns, **OPTIONS)
    assert encoded.input_ids == stock(tokenizer, template.render(turns))
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    for response, place in enumerate(answers):
        prompt = template.encode(turns[:place], generate=True, **OPTIONS).input_ids
        assert prompt == stock(tokenizer, template.render(turns[:place], generate=True))
        assert encoded.input_ids[: len(prompt)] == prompt
        after = encoded.labels[len(prompt) :]
        length = after.index(template.end_of_turn()) + 1
        assert IGNORE not in after[:length], "learned from the first token to the end mark"
        assert set(after[length : length + 1]) <= {IGNORE}
        assert encoded.responses[len(prompt) : len(prompt) + length] == [response] * length
        assert template.spoken(after[:length]) == turns[place].text
    assert sum(label != IGNORE for label in encoded.labels) == sum(each >= 0 for each in encoded.responses)


@pytest.mark.parametrize("family", [name for name in USABLE if PUBLISHED[name].verdict == "as it is"])
def test_the_text_is_the_templates_own(family: str) -> None:
    tokenizer, turns = tokenizer_of(family), turns_of(KINDS[1])
    if "strftime_now" in PUBLISHED[family].template:
        return  # training fixes the date
    for end, generate in ((6, False), (5, True)):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns[:end]]
        own = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
        )
        assert ChatTemplate(tokenizer).render(turns[:end], generate=generate) == own


@pytest.mark.parametrize("family", ["SmolLM3", "Qwen3"])
@pytest.mark.parametrize("answer", ["\n\n red\n", "\t\nred", "red"])
def test_line_breaks_that_a_template_removes(family: str, answer: str) -> None:
    tokenizer = tokenizer_of(family)
    turns = [Turn("user", "\nwhich?\n"), Turn("assistant", answer)]
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    own = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    assert ChatTemplate(tokenizer).render(turns) == own


def test_every_answer_is_opened_as_the_last_one() -> None:
    """Qwen3 writes an empty thought before the last answer alone, and at the end of every prompt."""
    template = ChatTemplate(tokenizer_of("Qwen3"))
    text = template.render(turns_of(KINDS[1]))
    assert text.count("<|im_start|>assistant\n<think>\n\n</think>\n\nA red circle.") == 3
    assert template.render(turns_of(KINDS[1][:3]), generate=True) == text[: text.index("A red circle. 3")]
    single = turns_of(KINDS[0])
    messages = [{"role": turn.role, "content": turn.text} for turn in single]
    assert template.render(single) == template.tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_model_that_no_run_trained_is_asked_as_its_template_says() -> None:
    """A template whose prompts open a thought may be used with a model that is not trained here."""
    for family in ("DeepSeek-R1 and its distillates", "Qwen3"):
        tokenizer, turns = tokenizer_of(family), turns_of(KINDS[1])[:5]
        template = ChatTemplate(tokenizer, learns=False)
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        own = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        assert template.encode(turns, generate=True, **OPTIONS).input_ids == stock(tokenizer, own)


# -- single faults -----------------------------------------------------------------------------------------------------


def test_a_blank_before_the_end_mark_is_learned() -> None:
    """The model used to learn the end mark after a blank, and never the blank after an answer."""
    tokenizer = tiny.tokenizer()
    template = ChatTemplate(
        tokenizer,
        "{% for m in messages %}{% if m['role']=='user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' + m['content'] + ' <|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    template.check()
    encoded = template.encode([Turn("user", "which?"), Turn("assistant", "red")], **OPTIONS)
    assert tokenizer.decode([label for label in encoded.labels if label != IGNORE]) == "red <|im_end|>"


def test_an_end_mark_that_is_not_in_the_vocabulary_is_refused() -> None:
    template = ChatTemplate(
        tiny.tokenizer(),
        "{% for m in messages %}{% if m['role']=='user' %}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>assistant\n' + m['content'] + '<|eot|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    with pytest.raises(ConfigError, match=r"without a special token, but with '<\|eot\|>'; give another"):
        template.check()
    with pytest.raises(ConversationError, match="without a special token"):
        template.encode([Turn("user", "a"), Turn("assistant", "b")] * 2, **OPTIONS)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (CHATML + "{{ '<|im_start|>assistant' }}{% endif %}", None),  # the line break is learned
        (CHATML + "{{ '<|im_start|>bot\n' }}{% endif %}", "before answer 1 of a conversation"),
        (
            CHATML + "{{ '<|im_start|>assistant\n' }}{% endif %}{{ '' if add_generation_prompt else '<|im_end|>' }}",
            None,
        ),
        (LOOP + "{{ m.role + ':' + m.content + '<|im_end|>' }}" + ASK + "{{ 'assistant:' }}{% endif %}", None),
        (
            LOOP + "{{ m.role + ': ' + m.content + '<|im_end|>' }}" + ASK + "{{ 'assistant: ' }}{% endif %}",
            "joins the end of a prompt and the beginning of an answer",
        ),
        (
            "{{ messages | length }}" + CHATML + "{{ '<|im_start|>assistant\n' }}{% endif %}",
            "prompts that are never asked",
        ),
        (
            LOOP + "{{ '<|im_start|>' + m.role + m.content + ('' if loop.last else '<|im_end|>') }}"
            "{% if loop.last and m.role == 'assistant' %}{{ '<|endoftext|>' }}{% endif %}"
            + ASK
            + "{{ '<|im_end|><|im_start|>assistant' }}{% endif %}",
            "closes answers in different ways",
        ),
    ],
)
def test_templates_of_ones_own(source: str, reason: str | None) -> None:
    template = ChatTemplate(tiny.tokenizer(), source)
    if reason is None:
        template.check()
    else:
        with pytest.raises(ConfigError, match=reason):
            template.check()


@pytest.mark.parametrize(
    "content",
    [
        "m.content | replace('\n', ' ')",
        "m.content | tojson",
        "m.content.rstrip('\n ')",
        "(m.content | truncate(15))",
        "m.content + (' (numbers)' if '2.5' in m.content else '')",
    ],
)
def test_a_template_that_changes_contents_is_refused(content: str) -> None:
    """An export's template would ask other text than training had."""
    template = ChatTemplate(
        tiny.tokenizer(), CHATML.replace("m.content", content) + "{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"changes the text of a turn|closes an answer without"):
        template.check()


def test_a_template_that_reads_the_system_message_is_refused_with_such_a_message() -> None:
    """A template like SmolLM3's, in which `/no_think` and the like are switches."""
    switch = "{% if messages[0].role == 'system' and '/brief' in messages[0].content %}{{ '<|im_start|>' }}{% endif %}"
    template = ChatTemplate(tiny.tokenizer(), switch + CHATML + "{{ '<|im_start|>assistant\n' }}{% endif %}")
    template.check(system="Be kind.")
    with pytest.raises(ConfigError, match="writes other text around it"):
        template.check(system="Be kind. /brief")


def test_a_prompt_whose_end_the_tokenizer_joins_with_the_answer_is_refused() -> None:
    tokenizer = tokenizer_of("Vicuna")
    source = PUBLISHED["Vicuna"].template.replace("{{ ' ASSISTANT:' }}", "{{ ' ASSISTANT: ' }}")
    with pytest.raises(ConfigError, match=r"token \d+ of a conversation is .* which joins the end of a prompt"):
        ChatTemplate(tokenizer, source).check()


def test_a_tokenizer_without_a_template_is_told_what_to_do() -> None:
    with pytest.raises(ConversationError, match="--chat-template FILE"):
        ChatTemplate(tiny.tokenizer(template=None))


@pytest.mark.parametrize("family", ["Qwen3", "DeepSeek-V3"])
@pytest.mark.parametrize("place", [1, 3])
def test_an_answer_that_the_template_would_cut_is_refused(family: str, place: int) -> None:
    """Training would keep the thought, while the template of an export cuts it out of the conversation."""
    template = ChatTemplate(tokenizer_of(family))
    texts = ["What is shown?", "A circle.", "Which colour?", "Red."]
    turns = [Turn("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    template.encode(turns, **OPTIONS)
    turns[place] = Turn("assistant", f"It is round.</think>{texts[place]}")
    with pytest.raises(ConversationError, match=r"looks for '</think>' in the text of turns and rewrites it"):
        template.encode(turns, **OPTIONS)
    template.encode(turns[:-1], **OPTIONS, generate=True)


def test_a_switch_in_a_record_s_own_system_message_is_refused() -> None:
    source = LOOP + (
        "{{ '<|im_start|>' + m.role + m.content + (' (short)' if m.role == 'system' and '/short' in m.content else '') "
        "+ '<|im_end|>' }}" + ASK + "{{ '<|im_start|>assistant' }}{% endif %}"
    )
    template = ChatTemplate(tiny.tokenizer(), source)
    template.check()
    talk = [Turn("user", "Why /short?"), Turn("assistant", "So.")]
    template.encode([Turn("system", "Be kind."), *talk], **OPTIONS)
    with pytest.raises(ConversationError, match="'/short'"):
        template.encode([Turn("system", "Answer /short."), *talk], **OPTIONS)
