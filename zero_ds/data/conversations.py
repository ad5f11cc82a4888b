"""Encodes conversations as token ids and labels, which depend on text, tokenizer and chat template alone.

The chat template is rendered with markers in place of the contents, so the template's own text and the text that people
typed are told apart by construction. The text with its contents is then tokenised as the model's own tokenizer does it,
except that a special token that somebody types stays text (tokens.py). A template that asks for the date gets a fixed
one.

An answer is what comes after the prompt that would be asked for it: the conversation before it, and the text with which
the template opens an answer. It ends with a mark of the template, its end mark. All tokens from the prompt to the end
mark are learned. A template whose prompts are not the beginnings of its conversations is refused, unless rendering each
answer as the last one makes them so.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zero_ds.config.loading import TEMPLATE_ROOT
from zero_ds.data.tokens import ConversationError, GuardedTokenizer, Segment
from zero_ds.runtime.errors import ConfigError

IGNORE = -100
"""Label of a position without loss."""
IMAGE_TOKEN = -1
"""Id of an image token in `input_ids`, which no vocabulary has."""
PLACEHOLDER = "<image>"
"""Text that marks the position of an image."""

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


def read_template(path: str | None) -> str | None:
    """Returns the text of a chat template's file, or None if no file is named.

    path: a file, or the name of a template in the package, such as `llama-3`.

    Raises:
        ConfigError: A file that cannot be read.
    """
    if not path:
        return None
    packaged = TEMPLATE_ROOT / f"{path}.jinja"
    file = Path(path).expanduser()
    is_name = Path(path).name == path and not file.exists() and packaged.is_file()
    try:
        return (packaged if is_name else file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"data.chat_template={path} cannot be read: {reason}.") from None


THINKING = {"enable_thinking": False}
"""Arguments of every template: no thoughts. Qwen3 then opens prompts with an empty one, as answers in training."""
Trimmed = tuple[str | None, str | None]
"""Characters that a content loses at its beginning and at its end, as `strip` takes them: none (''), line breaks
('\\n'), or all white space (None), as with Llama's template."""
REMEMBERED = 128
"""Number of structures that a cache holds. Data with more different sequences of roles render some of them again."""
CHECKED_ANSWERS = 4
"""Number of answers at either end of a conversation whose prompts are compared; those between them repeat a pattern."""


class ChatTemplate:
    """A tokenizer's chat template, taken apart into structure and contents."""

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        special_tokens: Iterable[str] = (),
        stops: Iterable[int] = (),
        learns: bool = True,
    ) -> None:
        """Reads a chat template.

        template: text of a chat template, or the name of one of the tokenizer's; None means the tokenizer's own.
        special_tokens: names of the special tokens that people may type (`data.special_tokens`). stops: tokens that end
        an answer besides the template's own, as the model's generation config names them. learns: whether a model is
        trained on these conversations, or was; otherwise the text is the template's own even if its prompts could not
        be learned.

        Raises:
            ConversationError: the tokenizer has no chat template. ConfigError: a name in `special_tokens` cannot be
                used.
        """
        self.tokenizer = tokenizer
        self.template = template
        self.learns = learns
        self.source = _source(tokenizer, template)
        """Text of the chat template."""
        self.words = GuardedTokenizer(tokenizer, self.source, special_tokens)
        self._looked_for = _looked_for(self.source)
        self._stops = tuple(stops)
        self._renderings: dict[Any, _Rendering] = {}
        self._structures: dict[Any, _Structure] = {}
        self._encoded: dict[Segment, list[int]] = {}
        self._fixed: dict[Segment, list[int]] = {}

    # -- encoding ------------------------------------------------------------------------------------------------------

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

        Raises:
            ConversationError: a chat template that refuses the turns, whose answers cannot be learned, or which
                rewrites the text of a turn that is learned from.
        """
        structure = self._structure(tuple(turn.role for turn in turns), generate)
        if structure.fault and self.learns:
            raise ConversationError(structure.fault)
        if self.learns and not generate:
            self._check_contents(turns)
        spans = list(_spans(structure, turns, self.words))
        encoded = self._encode(spans)
        tokens = _Tokens()
        images = 0
        for span, (ids, prompt) in zip(spans, encoded, strict=True):
            if span.after_image:
                tokens.add([IMAGE_TOKEN] * _image_tokens(tokens_per_image, images), learned=False)
                images += 1
            self._add_structure(tokens, ids[:prompt], supervise, span.closes)
            if span.answer is not None:
                tokens.add(ids[prompt:], learned=True, response=span.answer)
        return EncodedConversation(tokens.input_ids, tokens.labels, images, tokens.responses)

    def _add_structure(self, tokens: _Tokens, ids: list[int], supervise: Supervision, closes: int | None) -> None:
        """Appends tokens outside of answers; the first one closes the answer number `closes`, if any."""
        start = len(tokens.input_ids)
        tokens.add(ids, learned=supervise == "full")
        if supervise == "special_tokens":
            for place, token in enumerate(ids, start):
                if token in self.words.special and token in self.words.marks:
                    tokens.labels[place] = token
        if ids and closes is not None:
            tokens.labels[start] = ids[0]
            tokens.responses[start] = closes

    def _encode(self, spans: Sequence[_Span]) -> list[tuple[list[int], int]]:
        """Returns the tokens of each span, and the number of them that come before an answer."""
        wanted = [part for span in spans for part in (span.segment, span.prompt)]
        self._remember_tokens(wanted)
        return [self._tokens_of(span) for span in spans]

    def _tokens_of(self, span: _Span) -> tuple[list[int], int]:
        whole = self._encoded[span.segment]
        if span.answer is None:
            return whole[span.lead :], len(whole) - span.lead
        prompt = self._encoded[span.prompt]
        if whole[: len(prompt)] != prompt:
            # The tokenizer would join the end of the prompt and the beginning of the answer, but the prompt stands
            # alone when it is asked. So the answer is read as a continuation, and both keep tokens of their own.
            rest = span.segment[len(span.prompt) :]
            if self.words.lead:
                (ids,) = self.words.encode([((self.words.lead, True), *rest)])
                whole = [*prompt, *ids[1:]]
            else:
                whole = [*prompt, *self.words.encode([rest])[0]]
        return whole[span.lead :], len(prompt) - span.lead

    def _remember_tokens(self, segments: Iterable[Segment]) -> None:
        """Encodes segments. Those of one conversation are remembered, of which `cut_turns` encodes beginnings next."""
        wanted = dict.fromkeys(segments)
        known = {each: self._encoded[each] for each in wanted if each in self._encoded}
        known |= {each: self._fixed[each] for each in wanted if each in self._fixed}
        missing = [each for each in wanted if each not in known]
        if not missing and known.keys() <= self._encoded.keys():
            return
        found = dict(zip(missing, self.words.encode(missing), strict=True))
        for segment in missing:
            if all(structure for _, structure in segment):
                _remember(self._fixed, segment, found[segment])
        self._encoded = known | found

    def encode_text(self, text: str) -> list[int]:
        """Returns the tokens of a text with which an answer begins; a typed special token stays text."""
        return self.encode_texts([text])[0]

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the same for several texts in one call, because a call costs more than the tokens of a short text.

        Raises:
            ConversationError: A text that the tokenizer turns into a special token in any case.
        """
        turns = (Turn("user", ""), Turn("assistant", ""))
        structure = self._structure(("user", "assistant"), False)
        empty = next(span for span in _spans(structure, turns, self.words) if span.answer == 0)
        opening = structure.pieces[1][structure.openings[1] :]
        spans = []
        for text in texts:
            span = _Span(list(empty.prompt), answer=0, prompt_parts=empty.prompt_parts)
            span.write(opening, True)
            span.write(text, False)
            spans.append(span)
        encoded = self._encode(spans)
        return [ids[prompt:] if text else [] for text, (ids, prompt) in zip(texts, encoded, strict=True)]

    # -- text of the template ------------------------------------------------------------------------------------------

    def render(self, turns: Sequence[Turn], *, generate: bool = False, ends: bool = True) -> str:
        """Returns turns as the text that `encode` reads; without `ends`, up to the end of the last turn's content."""
        structure = self._structure(tuple(turn.role for turn in turns), generate)
        text = structure.around([turn.text for turn in turns])
        return text if ends else text[: len(text) - len(structure.pieces[-1])]

    @property
    def each_as_last(self) -> bool:
        """Whether every answer is rendered as the last one of its conversation."""
        return self._structure(("user", "assistant", "user", "assistant"), False).each_as_last

    @property
    def closing(self) -> str:
        """Text after the last answer of a conversation."""
        return self._rendering(("user", "assistant"), False).pieces[-1]

    def end_of_turn(self) -> int:
        """Returns the token that closes an assistant's answer.

        Raises:
            ConversationError: The template writes none.
        """
        structure = self._structure(("user", "assistant"), False)
        marks = self.words.marks_in(structure.pieces[-1][structure.closings[1] :])
        if structure.closings[1] < 0 or not marks:
            raise ConversationError(structure.fault or NO_END)
        return marks[0]

    def ends(self) -> tuple[int, ...]:
        """Returns all tokens that end an answer: those of the model's files, and the template's own.

        Raises:
            ConversationError: As `end_of_turn`, if the model names no other tokens.
        """
        try:
            return tuple(dict.fromkeys([*self._stops, self.end_of_turn()]))
        except ConversationError:
            if not self._stops or self.learns:
                raise
            return tuple(dict.fromkeys(self._stops))

    def spoken(self, tokens: Sequence[int]) -> str:
        """Returns a generated answer as text, up to the first token that ends it."""
        ends = self.ends()
        said = list(itertools.takewhile(lambda token: token not in ends, tokens))
        return str(self.tokenizer.decode(said, skip_special_tokens=True)).strip()

    def check(self, *, system: str | None = None) -> None:
        """Checks for conversations of every kind that prompts equal training, as this module's docstring explains.

        `system` is the message with which all conversations begin; some templates refuse one, or read it.

        Raises:
            ConfigError: the chat template cannot be used, with the reason.
        """
        try:
            self._check(system)
        except ConversationError as error:
            raise ConfigError(
                f"{error}; give another template with data.chat_template=FILE or --chat-template FILE."
            ) from None

    def _check(self, system: str | None) -> None:
        self.end_of_turn()
        for roles in KINDS:
            if system is not None and roles[0] != "system":
                continue
            try:
                structure = self._structure(roles, False)
            except ConversationError:
                if roles[0] == "system" and system is None:
                    continue  # a sample with a system message is refused by its id
                raise
            if structure.fault:
                raise ConversationError(structure.fault)
            for number in range(len(QUESTIONS)):
                self._check_text(_example(roles, number, SYSTEM if system is None else system))
                self._check_tokens(_example(roles, number, SYSTEM))

    def _check_text(self, turns: Sequence[Turn]) -> None:
        """Compares the text of a conversation with the template's own, which may change its contents."""
        if self._structure(tuple(turn.role for turn in turns), False).each_as_last:
            return
        ours, own = self.render(turns), self._apply([(turn.role, turn.text) for turn in turns], False)
        if (place := _first_difference(ours, own)) is not None:
            shown = slice(max(0, place - 20), place + 20)
            raise ConversationError(
                f"the chat template changes the text of a turn, or writes other text around it: {own[shown]!r} in "
                f"place of {ours[shown]!r}"
            )

    def _check_contents(self, turns: Sequence[Turn]) -> None:
        """Compares the text of a conversation that holds a word which the template looks for, such as `</think>`.

        An export asks with the template itself, which may cut such a text, or write something else around it.
        """
        found = next((word for word in self._looked_for for turn in turns if word in turn.text), None)
        if found is None:
            return
        plain = self._rendering(tuple(turn.role for turn in turns), False)
        ours = plain.around([turn.text for turn in turns])
        own = self._apply([(turn.role, turn.text) for turn in turns], False)
        if ours != own:
            raise ConversationError(
                f"the chat template looks for {found!r} in the text of turns and rewrites it, so an exported model "
                "would be asked otherwise than it was trained; take it out of the text, or give another template with "
                "data.chat_template"
            )

    def _check_tokens(self, turns: Sequence[Turn]) -> None:
        """Compares the tokens of a conversation with the tokenizer's own, and its prompts with those of training."""
        encoded = self.encode(turns, tokens_per_image=0, supervise="response")
        own = list(self.tokenizer(self.render(turns), add_special_tokens=False).input_ids)
        if (difference := _first_difference(encoded.input_ids, own)) is not None:
            ours, theirs = (self.tokenizer.decode(ids[difference : difference + 1]) for ids in (encoded.input_ids, own))
            raise ConversationError(
                f"token {difference} of a conversation is {ours!r} in training and {theirs!r} for the tokenizer, which "
                "joins the end of a prompt and the beginning of an answer"
            )
        answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
        for response, place in enumerate(answers):
            prompt = self.encode(turns[:place], tokens_per_image=0, supervise="response", generate=True).input_ids
            span = [at for at, each in enumerate(encoded.responses) if each == response]
            whole = range(len(prompt), len(prompt) + len(span))
            learned = all(encoded.labels[at] == encoded.input_ids[at] for at in whole)
            if encoded.input_ids[: len(prompt)] != prompt or span != list(whole) or not learned:
                raise ConversationError(
                    f"the prompt of answer {response + 1} differs from the text before that answer in training"
                )
            if encoded.input_ids[span[-1]] != self.end_of_turn():
                raise ConversationError(f"answer {response + 1} does not end with the chat template's end mark")

    def _structure(self, roles: tuple[Role, ...], generate: bool) -> _Structure:
        """Returns the template's text around the contents, and where the answers in it begin and end."""
        key = (roles, generate)
        if key not in self._structures:
            plain = self._rendering(roles, generate)
            structure = self._with_answers(roles, plain.pieces, plain.trimmed, each_as_last=False)
            if structure.fault and self.learns and "assistant" in roles:
                pieces, trimmed = self._pieces_as_last(roles, plain)
                again = self._with_answers(roles, pieces, trimmed, each_as_last=True)
                if not again.fault:
                    structure = again
            _remember(self._structures, key, structure)
        return self._structures[key]

    def _pieces_as_last(
        self, roles: tuple[Role, ...], plain: _Rendering
    ) -> tuple[tuple[str, ...], tuple[Trimmed, ...]]:
        """Returns the pieces in which every answer is opened as in a conversation that ends with it."""
        pieces, trimmed, done = list(plain.pieces), list(plain.trimmed), 0
        for place, role in enumerate(roles):
            if role == "assistant":
                last = self._rendering(roles[: place + 1], False)
                pieces[done : place + 1] = last.pieces[done : place + 1]
                trimmed[done : place + 1] = last.trimmed[done : place + 1]
                done = place + 1
        return tuple(pieces), tuple(trimmed)

    def _with_answers(
        self,
        roles: tuple[Role, ...],
        pieces: tuple[str, ...],
        trimmed: tuple[Trimmed, ...],
        *,
        each_as_last: bool,
    ) -> _Structure:
        """Finds where answers begin and end, and the reason why they cannot be learned, if there is one."""
        openings, closings = [-1] * len(roles), [-1] * len(roles)
        fault = None
        answers = [place for place, role in enumerate(roles) if role == "assistant"]
        compared = {*answers[:CHECKED_ANSWERS], *answers[-CHECKED_ANSWERS:]}
        before = 0
        for number, place in enumerate(answers, 1):
            openings[place] = len(pieces[place])
            prompt = self._prompt(roles[:place]) if place in compared or each_as_last else None
            if prompt is not None:
                start, asked = before if each_as_last else 0, prompt.pieces
                same = asked[start:-1] == pieces[start:place] and prompt.trimmed[start:] == trimmed[start:place]
                if same and pieces[place].startswith(asked[-1]):
                    openings[place] = len(asked[-1])
                elif not fault:
                    fault = _other_prompt(number, asked[start:], pieces[start : place + 1])
            elif place not in compared:
                openings[place] = self._opening_like(pieces, openings, answers, place)
            mark = self.words.pattern.search(pieces[place + 1])
            blank = pieces[place + 1][: mark.start()] if mark else pieces[place + 1]
            if mark is not None and not blank.strip():
                closings[place] = mark.start()
            elif not fault:
                fault = NO_END if not blank.strip() else f"{NO_END}, but with {blank.strip()[:40]!r}"
            before = place + 1
        fault = fault or self._other_end(pieces, answers, closings)
        return _Structure(pieces, trimmed, tuple(openings), tuple(closings), fault, each_as_last)

    @staticmethod
    def _opening_like(pieces: tuple[str, ...], openings: Sequence[int], answers: Sequence[int], place: int) -> int:
        """Returns the length of a prompt's last piece, as of an earlier answer with the same piece before it."""
        same = (openings[other] for other in answers if other < place and pieces[other] == pieces[place])
        return next(same, len(pieces[place]))

    def _other_end(self, pieces: tuple[str, ...], answers: Sequence[int], closings: Sequence[int]) -> str | None:
        """Returns a sentence if the answers are closed in different ways; None if in one."""
        found = set()
        for place in answers:
            mark = self.words.pattern.match(pieces[place + 1], max(0, closings[place]))
            found.add((pieces[place + 1][: closings[place]], mark[0] if mark else ""))
        if len(found) > 1:
            shown = " and ".join(repr(blank + mark) for blank, mark in sorted(found))
            return f"the chat template closes answers in different ways, with {shown}"
        return None

    def _prompt(self, roles: tuple[Role, ...]) -> _Rendering | None:
        """Returns the prompt that would be asked after turns; None if the template refuses to ask."""
        try:
            return self._rendering(roles, True) if roles else None
        except ConversationError:
            return None

    def _rendering(self, roles: tuple[Role, ...], generate: bool) -> _Rendering:
        """Returns the template's own text around contents of these roles, and which contents it trims."""
        key = (roles, generate)
        if key not in self._renderings:
            # the markers carry white space that no template writes itself; where it is missing, the template trims
            text = self._apply([(role, f" \tzq{number}qz\t ") for number, role in enumerate(roles)], generate)
            found = list(re.finditer(r"( \t)?zq(\d+)qz(\t )?", text))
            if [int(mark[2]) for mark in found] != list(range(len(roles))):
                raise ConversationError("the chat template does not keep every turn's text")
            ends = [0, *(mark.end() for mark in found)]
            starts = [*(mark.start() for mark in found), len(text)]
            pieces = tuple(sys.intern(text[end:start]) for end, start in zip(ends, starts, strict=True))
            trimmed = tuple((None if mark[1] is None else "", None if mark[3] is None else "") for mark in found)
            if re.search(r"strip\(\s*['\"]", self.source):
                trimmed = self._trimmed_lines(roles, generate, pieces, trimmed)
            _remember(self._renderings, key, _Rendering(pieces, trimmed))
        return self._renderings[key]

    def _trimmed_lines(
        self, roles: tuple[Role, ...], generate: bool, pieces: tuple[str, ...], trimmed: tuple[Trimmed, ...]
    ) -> tuple[Trimmed, ...]:
        """Returns `trimmed` with an entry for contents that lose their line breaks alone, as Qwen3's answers do."""
        text = self._apply([(role, f"\n\tzq{number}qz\t\n") for number, role in enumerate(roles)], generate)
        befores, afters = [before for before, _ in trimmed], [after for _, after in trimmed]
        for number, (piece, between) in enumerate(zip(pieces, re.split(r"zq\d+qz", text), strict=True)):
            # what may be left of the blanks after the content before the piece, and before the one after it
            ends = {"": "\t\n", "\n": "\t"} if number and afters[number - 1] == "" else {None: ""}
            starts = {"": "\n\t", "\n": "\t"} if number < len(roles) and befores[number] == "" else {None: ""}
            for (end, left), (start, right) in itertools.product(ends.items(), starts.items()):
                if left + piece + right == between:
                    if end is not None:
                        afters[number - 1] = end
                    if start is not None:
                        befores[number] = start
                    break
        return tuple(zip(befores, afters, strict=True))

    def _apply(self, messages: Sequence[tuple[Role, str]], generate: bool) -> str:
        """Returns the text of the template for roles and contents."""
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [{"role": role, "content": content} for role, content in messages],
                    chat_template=STRFTIME + self.source if "strftime_now" in self.source else self.source,
                    tokenize=False,
                    add_generation_prompt=generate,
                    **THINKING,
                )
            )
        except Exception as error:  # a template raises what its author chose
            roles = ", ".join(role for role, _ in messages)
            raise ConversationError(f"the chat template refuses the roles {roles}: {error}") from None


class NoChatTemplate(ChatTemplate):
    """The tokenizer of a model without a chat template, which is enough for plain text."""

    def __init__(self, tokenizer: Any, stops: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.template = None
        self.learns = False
        self.source = ""
        self._stops = tuple(stops)

    def _structure(self, roles: tuple[Role, ...], generate: bool) -> _Structure:
        raise ConversationError(NO_TEMPLATE)


NO_TEMPLATE = "the tokenizer has no chat template; give one with data.chat_template=FILE or --chat-template FILE"
NO_END = "the chat template closes an answer without a special token"
KINDS: tuple[tuple[Role, ...], ...] = (
    ("user", "assistant"),
    ("user", "assistant") * 2,
    ("user", "assistant") * 3,
    ("system", "user", "assistant"),
    ("system", *("user", "assistant") * 2),
)
"""Kinds of conversations that a chat template is checked with."""
QUESTIONS = (
    ("What is shown here?", "A red circle."),
    ("\n\nLook at this:\n\n", "Blue, or 2.5 green ones?"),
    (" a", "b"),
)
"""Questions and answers, with white space that tokenizers join with the characters around it."""

SYSTEM = "Answer in English."
"""System message of the conversations that a chat template is checked with."""


def _example(roles: Sequence[Role], number: int, system: str) -> list[Turn]:
    """Returns a conversation with one of the questions and its answer."""
    question, answer = QUESTIONS[number]
    text_of: dict[Role, str] = {"user": question, "assistant": answer, "system": system}
    return [Turn(role, text_of[role]) for role in roles]


def _source(tokenizer: Any, template: str | None) -> str:
    """Returns the text of a tokenizer's chat template: `template`, or the tokenizer's own.

    Raises:
        ConversationError: the tokenizer has none.
    """
    if template is None and not tokenizer.chat_template:
        raise ConversationError(NO_TEMPLATE)
    try:
        return str(tokenizer.get_chat_template(template))
    except ValueError as error:
        raise ConversationError(f"the tokenizer's chat template cannot be used: {error}") from None


_LOOKS = re.compile(
    r"""(?:\.(?:r?split|r?partition|r?find|count|index|replace|startswith|endswith|removeprefix|removesuffix)\(\s*"""
    r"""|\breplace\(\s*)(?P<quote>['"])(?P<word>(?:(?!(?P=quote)).)+)(?P=quote)"""
    r"""|(?P<mark>['"])(?P<other>(?:(?!(?P=mark)).)+)(?P=mark)\s+(?:not\s+)?in\b"""
)
"""Places of a chat template that look for a word in a text, or for a key in a message, which does no harm."""


def _looked_for(source: str) -> tuple[str, ...]:
    """Returns the words that a chat template may look for in the text of turns."""
    words = {found["word"] or found["other"] for found in _LOOKS.finditer(source)}
    words = {word.encode().decode("unicode_escape") if "\\" in word else word for word in words}
    return tuple(sorted(word for word in words if word.strip()))


def _remember(cache: dict[Any, Any], key: Any, value: Any) -> None:
    """Adds to a cache, which drops its oldest entry if it is full."""
    if len(cache) >= REMEMBERED:
        del cache[next(iter(cache))]
    cache[key] = value


def _first_difference(first: Sequence[Any], second: Sequence[Any]) -> int | None:
    """Returns the first place at which two sequences differ; None if they are equal."""
    pairs = itertools.zip_longest(first, second)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), None)


def _other_prompt(number: int, asked: Sequence[str], trained: Sequence[str]) -> str:
    """Returns a sentence on a prompt that differs from the text before an answer in training."""
    one, other = next(
        ((one, other) for one, other in zip(asked[:-1], trained[:-1], strict=True) if one != other),
        (asked[-1], trained[-1]),
    )
    return (
        f"the chat template writes {other[-60:]!r} before answer {number} of a conversation, and {one[-60:]!r} where "
        "that answer is asked for, so a model would learn to answer prompts that are never asked"
    )


@dataclass(frozen=True)
class _Rendering:
    """A chat template around n contents, as the template writes it."""

    pieces: tuple[str, ...]
    """Text before, between and after the contents: n + 1 pieces."""
    trimmed: tuple[Trimmed, ...]
    """Characters that each content loses at its beginning and at its end."""

    def trim(self, turn: int, text: str) -> str:
        """Returns the text of a turn as the template writes it."""
        before, after = self.trimmed[turn]
        return text.lstrip(before).rstrip(after)

    def around(self, contents: Sequence[str]) -> str:
        """Returns the template's text with these contents."""
        written = [self.pieces[0]]
        for number, content in enumerate(contents):
            written += [self.trim(number, content), self.pieces[number + 1]]
        return "".join(written)


@dataclass(frozen=True)
class _Structure(_Rendering):
    """A chat template around n contents, in which the answers are found."""

    openings: tuple[int, ...]
    """Number of characters before each answer that belong to its prompt, in the piece before it; -1 for other turns."""
    closings: tuple[int, ...]
    """Position of the end mark in the piece after each answer; -1 for other turns, or if there is none."""
    fault: str | None = None
    """Reason why the answers cannot be learned."""
    each_as_last: bool = False


@dataclass
class _Span:
    """A stretch of a conversation that is tokenised on its own."""

    parts: list[tuple[str, bool]] = field(default_factory=list)
    """Texts, and whether the template wrote them."""
    lead: int = 0
    """Number of tokens at the beginning that are not part of the conversation."""
    after_image: bool = False
    closes: int | None = None
    """Number of the answer that the first token closes."""
    answer: int | None = None
    """Number of the answer in it, which begins after `prompt_parts` parts."""
    prompt_parts: int = 0

    @property
    def segment(self) -> Segment:
        """All texts."""
        return tuple(self.parts)

    @property
    def prompt(self) -> Segment:
        """Texts before the answer; none without one."""
        return tuple(self.parts[: self.prompt_parts])

    def write(self, text: str, structure: bool) -> None:
        """Appends a text."""
        if text:
            self.parts.append((text, structure))


def _spans(
    structure: _Structure, turns: Sequence[Turn], words: GuardedTokenizer, whole: bool = True
) -> Iterator[_Span]:
    """Cuts a conversation before the end marks and where prompts have their last mark, and at images.

    Such a cut has no effect on the tokens.
    """
    span = _Span()
    answers = 0
    for number, piece in enumerate(structure.pieces):
        start = 0
        if number and structure.closings[number - 1] >= 0 and turns[number - 1].role == "assistant":
            start = structure.closings[number - 1]
            span.write(piece[:start], True)
            yield span
            span = _Span(closes=answers - 1)
        if number == len(turns):
            span.write(piece[start:], True)
            break
        turn = turns[number]
        text = structure.trim(number, turn.text)
        if turn.role == "assistant":
            opening = max(start, structure.openings[number])
            prompt = piece[start:opening]
            cut = words.last_cut(prompt)
            if cut is not None and (cut or span.parts):
                span.write(prompt[:cut], True)
                yield span
                span = _Span()
                prompt = prompt[cut:]
            span.write(prompt, True)
            span.answer, span.prompt_parts = answers, len(span.parts)
            answers += 1
            span.write(piece[opening:], True)
            span.write(text, False)
            continue
        span.write(piece[start:], True)
        shown = text.split(PLACEHOLDER) if turn.role == "user" else [text]
        for index, part in enumerate(shown):
            if index:
                yield span
                span = _Span(after_image=True)
                if words.lead:
                    span.write(words.lead, True)
                    span.lead = 1
            span.write(part, False)
    yield span


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
