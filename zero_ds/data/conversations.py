"""Encodes conversations as token ids and labels, which depend on text, tokenizer and chat template alone.

The chat template is rendered once with markers in place of the contents. Everything between the markers is structure
and is tokenised with its special tokens; everything that a person typed is tokenised as plain text. So the span of each
part is known by construction, and a typed special token stays text. A template that asks for the date
gets a fixed one.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zero_ds.runtime.errors import ConfigError

IGNORE = -100
"""Label of a position without loss."""
IMAGE_TOKEN = -1
"""Id of an image token in `input_ids`, which no vocabulary has."""
PLACEHOLDER = "<image>"
"""Text that marks the position of an image."""
SENTENCEPIECE_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"

DATE = {
    "%d": "26",
    "%-d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%Y": "2024",
    "%y": "24",
    "%a": "Fri",
    "%A": "Friday",
    "%j": "208",
    "%H": "00",
    "%M": "00",
    "%S": "00",
}
"""Text that a template's `strftime_now` writes for each code: the day that Llama-3.1's template names by default."""
STRFTIME = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in DATE.items())
    + " }}{%- endmacro %}\n"
)
"""Macro that precedes a template and replaces transformers' `strftime_now`, for which no argument can be passed.

The line break at its end is removed with the tag (`trim_blocks`), and the template still starts at the beginning of a
line.
"""

WRAPPERS = (
    "Based on the visual elements captured in this image of{image}, {question}",
    "Looking at what is shown in this picture of{image}, {question}",
    "Given the contents of the photo{image}, {question}",
    "With the visual details of{image} in mind, {question}",
    "From what can be seen in{image}, {question}",
)
"""Wordings of the image prompt. The first one is the paper's, which `fixed` uses."""

Role = Literal["system", "user", "assistant"]
Supervision = Literal["response", "special_tokens", "full"]
"""Tokens that carry loss: responses with the token that closes each; these and the template's special tokens (appendix
A.5); all tokens except image tokens."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str
    learned: bool = True
    """Whether the turn carries loss if it is an answer."""


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids and labels of a conversation; `seq` is its number of tokens."""

    input_ids: list[int]
    """Token ids: (seq,), with IMAGE_TOKEN at image positions."""
    labels: list[int]
    """Token ids where a token carries loss, IGNORE elsewhere: (seq,)."""
    images: int
    """Number of images whose tokens are in `input_ids`."""
    responses: list[int]
    """Number of the response that a token belongs to or closes, or -1: (seq,)."""


class _Tokens:
    """Token ids, labels and responses of a conversation as they are put together."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.labels: list[int] = []
        self.responses: list[int] = []

    def add(self, ids: list[int], *, learned: bool, response: int = -1) -> None:
        """Appends tokens, which carry loss if `learned`, and belong to a response if it is not -1."""
        self.input_ids += ids
        self.labels += ids if learned else [IGNORE] * len(ids)
        self.responses += [response] * len(ids)


class ConversationError(ValueError):
    """A conversation that cannot be turned into a sample."""


def read_template(path: str | None) -> str | None:
    """Returns the text of a chat template's file, or None if no file is named.

    Raises:
        ConfigError: A file that cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"data.chat_template={path} cannot be read: {reason}.") from None


class ChatTemplate:
    """A tokenizer's chat template, taken apart into structure and contents."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = template
        if template is None and not tokenizer.chat_template:
            raise ConversationError("the tokenizer has no chat template; give one with data.chat_template=FILE")
        try:
            self._source = str(tokenizer.get_chat_template(template))
        except ValueError as error:
            raise ConversationError(f"the tokenizer's chat template cannot be used: {error}") from None
        # all_special_ids holds only named tokens such as bos and eos, and not every model names the marks of its turns
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        words = self._backend.get_vocab(with_added_tokens=False) if self._backend else {}
        # tokens that only a template may write, among them some that are not called special, such as Qwen3's </think>;
        # but not Gemma's <table> or \n\n, which are words of its vocabulary
        self._marks = self._special | {
            number
            for number, token in added.items()
            if (token.content not in words or token.content in self._source)
            and not token.content.replace(SENTENCEPIECE_BLANK, " ").isspace()
        }
        self._structures: dict[tuple[str, ...], _Structure] = {}
        self._structure_ids: dict[str, tuple[list[int], list[int]]] = {}
        self._typed: dict[str, list[int]] = {}

    def encode(
        self,
        turns: Sequence[Turn],
        *,
        tokens_per_image: int | Sequence[int],
        supervise: Supervision,
        generate: bool = False,
    ) -> EncodedConversation:
        """Encodes turns, with image tokens in the place of every `<image>` in a user's text.

        `tokens_per_image` is their number for every image, or one number for each image. `supervise` says which tokens
        get a label. With `generate`, the structure that opens the assistant's answer is appended.
        """
        structure = self._structure(tuple(turn.role for turn in turns), generate)
        parts_of: list[list[str]] = []  # the text of each turn, split at its images
        for number, turn in enumerate(turns):
            content = structure.trim(number, turn.text)
            parts_of.append(content.split(PLACEHOLDER) if turn.role == "user" else [content])
        encoded_parts = iter(self._encode_contents([part for parts in parts_of for part in parts]))
        tokens = _Tokens()
        images, answers = 0, 0
        for number, piece in enumerate(structure.pieces):
            closes_answer = number > 0 and turns[number - 1].role == "assistant"
            self._add_structure(tokens, piece, supervise, closes=answers - 1 if closes_answer else None)
            if number == len(turns):
                break
            is_answer = turns[number].role == "assistant"
            if is_answer:
                answers += 1
            for index in range(len(parts_of[number])):
                if index > 0:
                    count = _image_tokens(tokens_per_image, images)
                    tokens.add([IMAGE_TOKEN] * count, learned=False)
                    images += 1
                learned = is_answer or supervise == "full"
                tokens.add(next(encoded_parts), learned=learned, response=answers - 1 if is_answer else -1)
        return EncodedConversation(tokens.input_ids, tokens.labels, images, tokens.responses)

    def _add_structure(self, tokens: _Tokens, piece: str, supervise: Supervision, closes: int | None) -> None:
        """Appends a piece of the template; `closes` is the number of the answer that it closes, if any."""
        ids, special = self._encode_structure(piece)
        start = len(tokens.input_ids)
        tokens.add(ids, learned=supervise == "full")
        if supervise == "special_tokens":
            for place in special:
                tokens.labels[start + place] = ids[place]
        if special and closes is not None:
            tokens.labels[start + special[0]] = ids[special[0]]
            tokens.responses[start + special[0]] = closes

    def encode_text(self, text: str) -> list[int]:
        """Returns the tokens of plain text, in which a typed special token stays text."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the same for several texts in one call, because a call costs more than the tokens of a short text.

        Raises:
            ConversationError: A text that the tokenizer turns into a special token in any case.
        """
        filled = [text for text in texts if text]
        if not filled:
            return [[] for _ in texts]
        found = iter(self._plain(filled))
        ids_of = [next(found) if text else [] for text in texts]
        for number, (text, ids) in enumerate(zip(texts, ids_of, strict=True)):
            if not self._marks.isdisjoint(ids):
                ids_of[number] = self._without_marks(text)
        return ids_of

    def _plain(self, texts: list[str]) -> list[list[int]]:
        """Returns the tokens of texts, in which the tokenizer splits special tokens.

        Fast tokenizers are called through their core, because transformers' wrapper costs as much as the tokens of a
        conversation, half of it for character offsets that are not used.
        """
        if self._backend is None:
            ids = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
            return [list(each) for each in ids]
        # settings that an earlier call of the tokenizer may have left
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.truncation is not None:
            self._backend.no_truncation()
        if not self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = True
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _without_marks(self, text: str) -> list[int]:
        """Returns the tokens of a text with a typed mark that is not a special token, such as `</think>`.

        No option of tokenizers splits such marks, so this calls every part of the tokenizer except the search for them.

        Raises:
            ConversationError: the tokenizer turns the text into a mark even so.
        """
        if self._backend is None:
            raise ConversationError("only fast tokenizers keep a typed token of the chat template as text")
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        words = [text]
        if self._backend.pre_tokenizer is not None:
            words = [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in self._backend.model.tokenize(word)]
        if wrong := self._marks.intersection(ids):
            raise ConversationError(f"the tokenizer makes {self.tokenizer.decode(min(wrong))} of a typed text")
        return ids

    def _encode_contents(self, texts: Sequence[str]) -> list[list[int]]:
        """Works as `encode_texts`, but remembers one conversation: `cut_turns` encodes shorter versions of it next."""
        if any(text not in self._typed for text in texts):
            self._typed = dict(zip(texts, self.encode_texts(texts), strict=True))
        return [self._typed[text] for text in texts]

    def end_of_turn(self) -> int:
        """Returns the token that closes an assistant's answer, at which generation stops."""
        piece = self._structure(("user", "assistant"), False).pieces[-1]
        structure, special = self._encode_structure(piece)
        if special:
            return structure[special[0]]
        raise ConversationError("the chat template closes an answer without a special token")

    def _encode_structure(self, piece: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of a piece of the template, and the indices of the special ones among them."""
        if piece not in self._structure_ids:
            ids = list(self.tokenizer(piece, add_special_tokens=False).input_ids)
            special = [place for place, token in enumerate(ids) if token in self._special]
            _remember(self._structure_ids, piece, (ids, special))
        return self._structure_ids[piece]

    def _structure(self, roles: tuple[Role, ...], generate: bool) -> _Structure:
        """Returns the template's text around the contents, and which contents it trims."""
        key = (*roles, "generate") if generate else roles
        if key not in self._structures:
            try:
                text = self.tokenizer.apply_chat_template(
                    [{"role": role, "content": f" \tzq{number}qz\t "} for number, role in enumerate(roles)],
                    chat_template=STRFTIME + self._source if "strftime_now" in self._source else self._source,
                    tokenize=False,
                    add_generation_prompt=generate,
                    enable_thinking=False,  # Qwen3's: an empty thought opens answers in training, so also in prompts
                )
            except Exception as error:  # a template raises what its author chose
                raise ConversationError(f"the chat template refuses the roles {', '.join(roles)}: {error}") from None
            # markers with white space that no template writes itself show which white space is trimmed
            found = list(re.finditer(r"( \t)?zq(\d+)qz(\t )?", text))
            if [int(mark[2]) for mark in found] != list(range(len(roles))):
                raise ConversationError("the chat template does not keep every turn's text")
            ends = [0, *(mark.end() for mark in found)]
            starts = [*(mark.start() for mark in found), len(text)]
            pieces = tuple(sys.intern(text[end:start]) for end, start in zip(ends, starts, strict=True))
            structure = _Structure(pieces, tuple((mark[1] is None, mark[3] is None) for mark in found))
            _remember(self._structures, key, structure)
        return self._structures[key]


REMEMBERED = 128
"""Number of structures that a cache holds. Data with more different sequences of roles render some of them again."""


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds to a cache, which drops its oldest entry if it is full."""
    if len(cache) >= REMEMBERED:
        del cache[next(iter(cache))]
    cache[key] = value


@dataclass(frozen=True)
class _Structure:
    """A chat template around n turns."""

    pieces: tuple[str, ...]
    """Text before, between and after the contents: n + 1 pieces."""
    trimmed: tuple[tuple[bool, bool], ...]
    """Whether each content loses the white space before it and after it, as with Llama's template."""

    def trim(self, turn: int, text: str) -> str:
        """Returns the text of a turn as the template writes it."""
        before, after = self.trimmed[turn]
        if before:
            text = text.lstrip()
        if after:
            text = text.rstrip()
        return text


def _image_tokens(tokens_per_image: int | Sequence[int], image: int) -> int:
    """Returns the number of tokens of one image; 0 for an image that the numbers do not cover."""
    if isinstance(tokens_per_image, int):
        return tokens_per_image
    return tokens_per_image[image] if image < len(tokens_per_image) else 0


def image_prompt(question: str, mode: Literal["fixed", "random", "off"], sample_id: str, seed: int = 0) -> str:
    """Wraps the first question of an image sample: `Based on the visual elements ... of<image>, <question>`.

    LLaVA's data has the placeholder on a line of its own before or after the question, and that line is removed.
    `random` chooses a wording by seed and sample, so that every process makes the same choice. A question with several
    placeholders, or with one in the middle, stays as it is.
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


def cut_turns(
    turns: Sequence[Turn], length: int, encode: Callable[[Sequence[Turn]], EncodedConversation]
) -> EncodedConversation | None:
    """Encodes as many leading turns as fit within `length` tokens; returns None if not even one answered turn does.

    The number of turns is found by bisection, because a longer beginning has more tokens.
    """
    answered = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    ends = [
        end for end in answered if end == len(turns) or turns[end].role != "assistant"
    ]  # an answer may be two turns
    if len(turns) and (not ends or ends[-1] != len(turns)):
        ends.append(len(turns))  # turns after the last answer are kept if everything fits
    best: EncodedConversation | None = None
    fits, fails = 0, len(ends) + 1
    middle = len(ends)  # most conversations fit as a whole
    while fails - fits > 1:
        encoded = encode(turns[: ends[middle - 1]])
        if len(encoded.input_ids) <= length:
            best, fits = encoded, middle
        else:
            fails = middle
        middle = (fits + fails) // 2
    if best is None or all(label == IGNORE for label in best.labels):
        return None
    return best
