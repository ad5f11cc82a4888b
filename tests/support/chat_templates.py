"""Chat templates of published model families, written from their descriptions, with tokenizers that fit them.

The templates write the same text as the families' own for conversations without images. Each has the verdict of the
check that a run makes at its start (docs/data.md shows them as a table).
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import tiny

LOOP = "{% for m in messages %}"
ASK = "{% endfor %}{% if add_generation_prompt %}"
CHATML = LOOP + "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + ASK


@dataclass(frozen=True)
class Published:
    """A family's template, its tokens, and the verdict on it."""

    template: str
    end: str
    """Token that closes an answer."""
    marks: tuple[str, ...] = ()
    """Special tokens."""
    plain: tuple[str, ...] = ()
    """Added tokens that are not called special."""
    verdict: Literal["as it is", "each as last", "refused"] = "as it is"
    reason: str = ""
    """Text of the refusal."""
    system: bool = True
    """Whether the template takes a system message."""
    blank_first: bool = False
    """Whether the tokenizer puts a blank before a text, as SentencePiece's does."""
    stripping: bool = False
    """Whether special tokens take the white space after them, as Phi-3's do."""
    bos: str | None = None
    eos: str | None = None


def _thinking(last: str, prompt: str) -> str:
    """Returns a ChatML template that writes text before the last answer and at the end of a prompt."""
    return (
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' and loop.last %}{{ '" + last + "' }}{% endif %}"
        "{{ m.content.split('</think>')[-1].lstrip('\n') if m.role == 'assistant' else m.content }}"
        "{{ '<|im_end|>\n' }}" + ASK + "{{ '<|im_start|>assistant\n' }}" + prompt + "{% endif %}"
    )


_R1 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    + LOOP
    + "{% if m.role == 'user' %}{{ '<\uff5cUser\uff5c>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<\uff5cAssistant\uff5c>' + m.content.split('</think>')[-1] + '<\uff5cend\u2581of\u2581sentence\uff5c>' }}"
    "{% endif %}" + ASK
)
_DEEPSEEK_MARKS = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
_DEEPSEEK: dict[str, Any] = {"marks": _DEEPSEEK_MARKS, "bos": _DEEPSEEK_MARKS[0], "eos": _DEEPSEEK_MARKS[1]}
_LLAMA3 = (
    LOOP
    + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    + ASK
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_BOS_EOS: dict[str, Any] = {"marks": ("<s>", "</s>"), "bos": "<s>", "eos": "</s>", "blank_first": True}
_ROLE_TOKENS = (
    LOOP + "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}" + ASK + "{{ '<|assistant|>\n' }}{% endif %}"
)

_COMMAND_R = (
    "<BOS_TOKEN>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
)

PUBLISHED: dict[str, Published] = {
    "SmolLM2": Published(tiny.TEMPLATE, "<|im_end|>"),
    "Llama-3": Published("{{ bos_token }}" + _LLAMA3, "<|eot_id|>", _LLAMA3_MARKS, bos=_LLAMA3_MARKS[0]),
    "Llama-3.2": Published(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
        "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + today + '\n\n' + told + '<|eot_id|>' }}"
        + _LLAMA3,
        "<|eot_id|>",
        _LLAMA3_MARKS,
        bos=_LLAMA3_MARKS[0],
    ),
    "Llama-2": Published(
        "{% if messages[0].role == 'system' %}{% set told = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
        + LOOP
        + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (told if loop.first else '') }}"
        "{{ m.content | trim + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        **_BOS_EOS,
    ),
    "Mistral v0.3": Published(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set told = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set told = '' %}{% endif %}"
        + LOOP
        + "{% if m.role == 'user' %}{{ '[INST] ' + (told if loop.last else '') + m.content + '[/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}",
        "</s>",
        system=False,
        **{**_BOS_EOS, "marks": ("<s>", "</s>", "[INST]", "[/INST]")},
    ),
    "Vicuna": Published(
        "{{ bos_token + 'A chat between a user and an assistant.' }}"
        + LOOP
        + "{% if m.role == 'system' %}{{ raise_exception('no system message') }}{% endif %}"
        "{% if m.role == 'user' %}{{ ' USER: ' + m.content }}{% else %}{{ ' ASSISTANT: ' + m.content + eos_token }}"
        "{% endif %}" + ASK + "{{ ' ASSISTANT:' }}{% endif %}",
        "</s>",
        system=False,
        **_BOS_EOS,
    ),
    "Zephyr": Published(
        LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        + ASK
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "</s>",
        **_BOS_EOS,
    ),
    "Qwen2.5": Published(
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
        + CHATML
        + "{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_end|>",
    ),
    "Qwen3": Published(
        _thinking(
            "<think>\n\n</think>\n\n",
            "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        ),
        "<|im_end|>",
        plain=("<think>", "</think>"),
        verdict="each as last",
    ),
    "Qwen3-Thinking, QwQ": Published(
        _thinking("<think>\n\n</think>\n\n", "{{ '<think>\n' }}"),
        "<|im_end|>",
        plain=("<think>", "</think>", "\n\n"),
        verdict="refused",
        reason="which joins the end of a prompt and the beginning of an answer",
    ),
    "SmolLM3": Published(
        LOOP + "{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' + m.content.lstrip('\n') }}{% else %}"
        "{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}"
        + ASK
        + "{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        "<|im_end|>",
        plain=("<think>", "</think>"),
    ),
    "Gemma 2, 3": Published(
        "{{ bos_token }}"
        + LOOP
        + "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}" + ASK + "{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        system=False,
        bos="<bos>",
    ),
    "Phi-3": Published(_ROLE_TOKENS, "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), stripping=True),
    "Phi-4": Published(
        LOOP
        + "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
        + ASK
        + "{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}",
        "<|im_end|>",
        ("<|im_sep|>",),
    ),
    "Granite 3": Published(
        LOOP
        + "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\n' }}"
        + ASK
        + "{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    ),
    "Command R": Published(
        "{{ bos_token }}" + LOOP + "{{ '<|START_OF_TURN_TOKEN|>' }}"
        "{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>'}[m.role] }}"
        "{{ m.content | trim + '<|END_OF_TURN_TOKEN|>' }}"
        + ASK
        + "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
        _COMMAND_R,
        bos="<BOS_TOKEN>",
    ),
    "OLMo 2, Tulu 3": Published(
        "{{ bos_token }}" + LOOP + "{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
        + ASK
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "<|endoftext|>",
        bos="<|endoftext|>",
        eos="<|endoftext|>",
    ),
    "DeepSeek-V3": Published(_R1 + "{{ '<\uff5cAssistant\uff5c>' }}{% endif %}", _DEEPSEEK_MARKS[1], **_DEEPSEEK),
    "DeepSeek-R1 and its distillates": Published(
        _R1 + "{{ '<\uff5cAssistant\uff5c><think>\n' }}{% endif %}",
        _DEEPSEEK_MARKS[1],
        verdict="refused",
        reason="prompts that are never asked",
        **_DEEPSEEK,
    ),
    "GLM-4": Published(
        "{{ '[gMASK]<sop>' }}"
        + LOOP
        + "{{ '<|' + m.role + '|>\n' + m.content }}"
        + ASK
        + "{{ '<|assistant|>\n' }}{% endif %}",
        "<|user|>",
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        verdict="refused",
        reason="closes an answer without a special token",
    ),
    "gpt-oss": Published(
        LOOP + "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
        "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
        + ASK
        + "{{ '<|start|>assistant' }}{% endif %}",
        "<|return|>",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
        verdict="refused",
        reason="closes answers in different ways",
    ),
}


def sentencepiece(marks: tuple[str, ...], *, legacy: bool = False, **named: str) -> Any:
    """Returns a tokenizer like Llama-2's: words begin with a blank of their own, also at the beginning of a text.

    legacy: the blank is put at the beginning of every stretch between special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    lines = ["What is shown here?", "A red circle.", "Answer in English.", "[INST] [/INST] USER: ASSISTANT:"] * 3
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    content = json.loads(learned.to_str())["model"]
    first = ["<pad>", *marks, *(f"<0x{number:02X}>" for number in range(256))]
    vocabulary = {word: number for number, word in enumerate([*first, *content["vocab"]])}
    bpe = Tokenizer(models.BPE(vocabulary, [tuple(merge) for merge in content["merges"]], byte_fallback=True))
    if legacy:
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bpe.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in ("<pad>", *marks)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", clean_up_tokenization_spaces=False, **named)


@functools.cache
def tokenizer_of(family: str) -> Any:
    """Returns the tokenizer of a family, saved and loaded as from a model's folder."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    published = PUBLISHED[family]
    named = {key: value for key, value in (("bos_token", published.bos), ("eos_token", published.eos)) if value}
    if published.blank_first:
        words = sentencepiece(published.marks, **named)
    else:
        ends = named or {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
        # as in GPT-2's family, whose tokenizers know every byte
        words = tiny.tokenizer(
            spare=published.marks, plain=published.plain, named={**ends, "unk_token": "<|endoftext|>"}
        )
        if published.stripping:
            words.add_special_tokens(
                {"additional_special_tokens": [AddedToken(mark, rstrip=True, special=True) for mark in published.marks]}
            )
    words.chat_template = published.template
    with tempfile.TemporaryDirectory() as folder:
        words.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder)
