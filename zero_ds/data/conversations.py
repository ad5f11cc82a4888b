"""Conversations -> token ids and labels: pure functions of text, tokenizer and chat template.

The chat template is rendered once with stand-ins for the contents; what lies between the stand-ins is structure and is
tokenised with its special tokens, what a person typed is tokenised as plain text. So the spans of every part are known
by construction, and a special token that somebody types stays text. A template that asks for the date gets a fixed one.
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
"""Stand-in for one image token in `input_ids`; no vocabulary has it."""
PLACEHOLDER = "<image>"
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
"""What a template's `strftime_now` writes for each code: the day that Llama-3.1's template names if none is given."""
STRFTIME = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f"|replace('{code}', '{text}')" for code, text in DATE.items())
    + " }}{%- endmacro %}\n"
)
"""Stands before a template, in the place of transformers' function, for which nothing can be passed. The line break at
the end goes with the tag (`trim_blocks`), and keeps the template's first line at the beginning of a line."""

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
class EncodedConversation:
    """`input_ids`, `labels` and `responses`, all of length `seq`; an image position holds IMAGE_TOKEN and IGNORE.

    A token of a response, or the one that closes it, holds the response's number in `responses`, all others -1.
    """

    input_ids: list[int]
    labels: list[int]
    images: int
    responses: list[int]


class ConversationError(ValueError):
    """A conversation that cannot be turned into a sample."""


def read_template(path: str | None) -> str | None:
    """The text of a chat template's file; None, where none is named.

    Raises:
        ConfigError: a file that cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8") if path else None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
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
        # all_special_ids are the named ones alone, bos, eos and such, and not every model names the marks of turns
        added = tokenizer.added_tokens_decoder
        self._special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        words = self._backend.get_vocab(with_added_tokens=False) if self._backend else {}
        # what only a template may write, also tokens that are not called special, as Qwen3's </think>; but not Gemma's
        # <table> or \n\n, which are words of its vocabulary
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
        """Encodes turns, with stand-ins for every `<image>` in a user's text: as many for each, or one number an image.

        Labels are as `supervise` says. With `generate` the structure that opens the assistant's answer is appended.
        """
        around = self._structure(tuple(turn.role for turn in turns), generate)
        contents = [around.trim(number, turn.text) for number, turn in enumerate(turns)]
        parts_of = [
            content.split(PLACEHOLDER) if turn.role == "user" else [content]
            for turn, content in zip(turns, contents, strict=True)
        ]
        texts = iter(self._encode_contents([part for parts in parts_of for part in parts]))
        ids: list[int] = []
        labels: list[int] = []
        responses: list[int] = []
        images, answers = 0, 0

        def of_image(number: int) -> int:
            if isinstance(tokens_per_image, int):
                return tokens_per_image
            return tokens_per_image[number] if number < len(tokens_per_image) else 0

        for number, piece in enumerate(around.pieces):
            structure, special = self._encode_structure(piece)
            start = len(ids)
            ids += structure
            labels += structure if supervise == "full" else [IGNORE] * len(structure)
            responses += [-1] * len(structure)
            if supervise == "special_tokens":
                for place in special:
                    labels[start + place] = structure[place]
            if special and number and turns[number - 1].role == "assistant":  # the token that closes the answer
                labels[start + special[0]] = structure[special[0]]
                responses[start + special[0]] = answers - 1
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
        return EncodedConversation(ids, labels, images, responses)

    def encode_text(self, text: str) -> list[int]:
        """Tokens of plain text: no special token comes out of it, whatever was typed."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The same of several texts, in one call: a call costs more than the tokens of a short text.

        Raises:
            ConversationError: a text of which the tokenizer makes a special token in any case.
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
        """What the tokenizer makes of texts whose special tokens it splits.

        Of a fast one its core is asked: transformers' way there costs as much as the tokens of a conversation, half of
        it for places of characters that nobody asks for.
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
        """Tokens of a text in which somebody typed a mark that is no special token, as `</think>`.

        No option of tokenizers has these split, so the text goes through all of its parts but the search for them.
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
        """As `encode_texts`; remembers one conversation's, of which `cut_turns` asks for the beginnings next."""
        if any(text not in self._typed for text in texts):
            self._typed = dict(zip(texts, self.encode_texts(texts), strict=True))
        return [self._typed[text] for text in texts]

    def end_of_turn(self) -> int:
        """The token that closes an assistant's answer, where generation stops."""
        piece = self._structure(("user", "assistant"), False).pieces[-1]
        structure, special = self._encode_structure(piece)
        if special:
            return structure[special[0]]
        raise ConversationError("the chat template closes an answer without a special token")

    def _encode_structure(self, piece: str) -> tuple[list[int], list[int]]:
        """Tokens of a piece of the template, and the places of the special ones among them."""
        if piece not in self._structure_ids:
            ids = list(self.tokenizer(piece, add_special_tokens=False).input_ids)
            special = [place for place, token in enumerate(ids) if token in self._special]
            _remember(self._structure_ids, piece, (ids, special))
        return self._structure_ids[piece]

    def _structure(self, roles: tuple[Role, ...], generate: bool) -> _Structure:
        """The template's text around the contents, and which contents it trims."""
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
            # a stand-in whose white space is no template's own, to tell what is trimmed; one search finds all of them
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
"""Entries of a cache of structures; data with turns in other numbers than so many render some of them again."""


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= REMEMBERED:
        del cache[next(iter(cache))]
    cache[key] = value


@dataclass(frozen=True)
class _Structure:
    """A chat template around n turns."""

    pieces: tuple[str, ...]
    """The text before, between and behind the contents: n + 1 pieces."""
    trimmed: tuple[tuple[bool, bool], ...]
    """Which contents lose the white space before and behind them, as with Llama's template."""

    def trim(self, turn: int, text: str) -> str:
        """A turn's text as the template writes it."""
        before, behind = self.trimmed[turn]
        text = text.lstrip() if before else text
        return text.rstrip() if behind else text


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


def cut_turns(
    turns: Sequence[Turn], length: int, encode: Callable[[Sequence[Turn]], EncodedConversation]
) -> EncodedConversation | None:
    """Encodes as many leading turns as fit into `length` tokens; None if not even one answered turn does.

    Found by bisection: of two beginnings, the longer one has more tokens.
    """
    ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
    ends = [end for end in ends if end == len(turns) or turns[end].role != "assistant"]  # an answer may be two turns
    if len(turns) and (not ends or ends[-1] != len(turns)):
        ends.append(len(turns))  # what follows the last answer is kept where everything fits
    best, fits, fails = None, 0, len(ends) + 1
    middle = len(ends)  # most conversations fit as a whole
    while fails - fits > 1:
        encoded = encode(turns[: ends[middle - 1]])
        if len(encoded.input_ids) <= length:
            best, fits = encoded, middle
        else:
            fails = middle
        middle = (fits + fails) // 2
    return best if best is not None and any(label != IGNORE for label in best.labels) else None
