"""Conversations -> token ids and labels: pure functions of text, tokenizer and chat template.

The chat template is rendered once with stand-ins for the contents; what lies between the stand-ins is structure and is
tokenised with its special tokens, what a person typed is tokenised as plain text. So the spans of every part are known
by construction, and a special token that somebody types stays text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

IGNORE = -100
"""Label of a position without loss."""
IMAGE_TOKEN = -1
"""Stand-in for one image token in `input_ids`; no vocabulary has it."""
PLACEHOLDER = "<image>"

WRAPPERS = (
    "Based on the visual elements captured in this image of{image}, {question}",
    "Looking at what is shown in this picture of{image}, {question}",
    "Given the contents of the photo{image}, {question}",
    "With the visual details of{image} in mind, {question}",
    "From what can be seen in{image}, {question}",
)
"""Wordings of the image prompt; the first one is the paper's and the fixed one."""

Role = Literal["system", "user", "assistant"]
Supervision = Literal["response", "special_tokens", "full"]
"""Which tokens carry loss: responses with the token that closes them; these and the template's special tokens (appendix
A.5); all but image tokens."""


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Encoded:
    """`input_ids`, `labels` and `responses`, all of length `seq`; an image position holds IMAGE_TOKEN and IGNORE.

    A token of a response, or the one that closes it, holds the response's number in `responses`, all others -1.
    """

    input_ids: list[int]
    labels: list[int]
    images: int
    responses: list[int]


class ConversationError(ValueError):
    """A conversation that cannot be turned into a sample."""


class ChatTemplate:
    """A tokenizer's chat template, taken apart into structure and contents."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if template is None and not tokenizer.chat_template:
            raise ConversationError("the tokenizer has no chat template; give one with data.chat_template=FILE")
        self._special = set(tokenizer.all_special_ids)
        self._cache: dict[tuple[str, ...], _Structure] = {}
        self._structure_ids: dict[str, list[int]] = {}

    def encode(
        self,
        turns: Sequence[Turn],
        *,
        tokens_per_image: int | Sequence[int],
        supervise: Supervision,
        generate: bool = False,
    ) -> Encoded:
        """Encodes turns, with stand-ins for every `<image>` in a user's text: as many for each, or one number an image.

        Labels are as `supervise` says. With `generate` the structure that opens the assistant's answer is appended.
        """
        around = self._structure(tuple(turn.role for turn in turns), generate)
        contents = [turn.text.strip() if trim else turn.text for turn, trim in zip(turns, around.trimmed, strict=True)]
        parts_of = [
            content.split(PLACEHOLDER) if turn.role == "user" else [content]
            for turn, content in zip(turns, contents, strict=True)
        ]
        texts = iter(self.encode_texts([part for parts in parts_of for part in parts]))
        ids: list[int] = []
        labels: list[int] = []
        responses: list[int] = []
        images, answers = 0, 0

        def of_image(number: int) -> int:
            if isinstance(tokens_per_image, int):
                return tokens_per_image
            return tokens_per_image[number] if number < len(tokens_per_image) else 0

        for number, piece in enumerate(around.pieces):
            structure = self._encode_structure(piece)
            answered = number > 0 and turns[number - 1].role == "assistant"
            for position, token in enumerate(structure):
                special = token in self._special
                closing = answered and special and not any(t in self._special for t in structure[:position])
                ids.append(token)
                named = special and supervise == "special_tokens"
                labels.append(token if closing or named or supervise == "full" else IGNORE)
                responses.append(answers - 1 if closing else -1)
            if number == len(turns):
                break
            turn = turns[number]
            learned = turn.role == "assistant"
            answers += learned
            for index in range(len(parts_of[number])):
                if index:
                    count = of_image(images)
                    ids += [IMAGE_TOKEN] * count
                    labels += [IGNORE] * count
                    responses += [-1] * count
                    images += 1
                text = next(texts)
                ids += text
                labels += text if learned or supervise == "full" else [IGNORE] * len(text)
                responses += [answers - 1 if learned else -1] * len(text)
        return Encoded(ids, labels, images, responses)

    def encode_text(self, text: str) -> list[int]:
        """Tokens of plain text: no special token comes out of it, whatever was typed."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of several texts, in one call: a call costs more than the tokens of a short text."""
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        found = iter(self.tokenizer(filled, add_special_tokens=False, split_special_tokens=True).input_ids)
        return [list(next(found)) if text else [] for text in texts]

    def end_of_turn(self) -> int:
        """The token that closes an assistant's answer, where generation stops."""
        piece = self._structure(("user", "assistant"), False).pieces[-1]
        for token in self._encode_structure(piece):
            if token in self._special:
                return token
        raise ConversationError("the chat template closes an answer without a special token")

    def _encode_structure(self, piece: str) -> list[int]:
        if piece not in self._structure_ids:
            self._structure_ids[piece] = list(self.tokenizer(piece, add_special_tokens=False).input_ids)
        return self._structure_ids[piece]

    def _structure(self, roles: tuple[Role, ...], generate: bool) -> _Structure:
        """The template's text around the contents, and which contents it trims."""
        key = (*roles, "generate") if generate else roles
        if key not in self._cache:
            stand_ins = [f" zq{index}qz " for index in range(len(roles))]
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": role, "content": stand_in} for role, stand_in in zip(roles, stand_ins, strict=True)],
                    chat_template=self.template,
                    tokenize=False,
                    add_generation_prompt=generate,
                    enable_thinking=False,  # Qwen3's: an empty thought opens answers in training, so also in prompts
                )
            except Exception as error:  # a template raises what its author chose
                raise ConversationError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from None
            trimmed = tuple(stand_in not in text for stand_in in stand_ins)
            marks = [s.strip() if trim else s for s, trim in zip(stand_ins, trimmed, strict=True)]
            pieces = re.split("|".join(marks), text) if marks else [text]
            if len(pieces) != len(roles) + 1:
                raise ConversationError("the chat template does not keep every turn's text")
            self._cache[key] = _Structure(tuple(pieces), trimmed)
        return self._cache[key]


@dataclass(frozen=True)
class _Structure:
    """A chat template around n turns."""

    pieces: tuple[str, ...]
    """The text before, between and behind the contents: n + 1 pieces."""
    trimmed: tuple[bool, ...]
    """Which contents lose the white space around them, as Llama's template has it."""


def image_prompt(question: str, mode: Literal["fixed", "random", "off"], sample_id: str, seed: int = 0) -> str:
    """Wraps the first question of an image sample: `Based on the visual elements ... of<image>, <question>`.

    LLaVA's data puts the placeholder on a line of its own before or behind the question; that line goes. `random`
    chooses by seed and sample, so that every process chooses alike. Text around several placeholders stays as it is.
    """
    if mode == "off" or question.count(PLACEHOLDER) != 1:
        return question
    if not (question.startswith(PLACEHOLDER) or question.endswith(PLACEHOLDER)):
        return question
    bare = question.replace(PLACEHOLDER, "").strip()
    choice = 0
    if mode == "random":
        choice = hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()[0] % len(WRAPPERS)
    return WRAPPERS[choice].format(image=PLACEHOLDER, question=bare)


def cut_turns(turns: Sequence[Turn], length: int, encode: Any) -> Encoded | None:
    """Encodes as many leading turns as fit into `length` tokens; None if not even one answered turn does."""
    kept = list(turns)
    while kept:
        encoded: Encoded = encode(kept)
        if len(encoded.input_ids) <= length:
            return encoded if any(label != IGNORE for label in encoded.labels) else None
        while kept and kept[-1].role == "assistant":
            kept.pop()
        while kept and kept[-1].role != "assistant":
            kept.pop()
    return None
