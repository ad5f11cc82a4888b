"""Tokens of text that a chat template and people have written together, as the model's own tokenizer gives them.

The tokenizer reads the text as it is, so its ids are those of any other software that reads the same text. The marks of
a chat template are the exception: typed by a person they stay text. A text with a typed mark is read by a copy of the
tokenizer in which the marks have other, unguessable names, so that only the template can write them.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from zero_ds.runtime.errors import ConfigError, did_you_mean

SENTENCEPIECE_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"

BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""Names of tokens for single bytes."""

Part = tuple[str, bool]
"""A text, and whether the chat template wrote it."""
Segment = tuple[Part, ...]
"""Text that is tokenised in one piece."""


class ConversationError(ValueError):
    """A conversation that cannot be turned into a sample."""


class GuardedTokenizer:
    """A tokenizer, and the tokens that only the chat template may write."""

    def __init__(self, tokenizer: Any, source: str, typed: Iterable[str] = ()) -> None:
        """Finds the marks of a chat template.

        source: text of the chat template; typed: names of special tokens that may be typed, in which `*` stands for any
        characters.

        Raises:
            ConfigError: a name in `typed` is not that of an added token, or the chat template writes it.
        """
        self.tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._added = dict(tokenizer.added_tokens_decoder)
        # all_special_ids holds only named tokens such as bos and eos, and not every model names the marks of its turns
        self.special = {*tokenizer.all_special_ids, *(i for i, token in self._added.items() if token.special)}
        self.typed = self._tokens_named(typed, source)
        # a template may write tokens that are not called special, such as Qwen3's </think>; other added tokens are
        # words, such as Gemma's \n\n, and so is one that looks like a word
        written = {
            number
            for number, token in self._added.items()
            if token.content in source and re.search(r"[^\w\s]", token.content.replace(SENTENCEPIECE_BLANK, " "))
        }
        # the tokenizer spells characters outside its vocabulary with tokens for single bytes
        spelled = {number for number, token in self._added.items() if BYTE.fullmatch(token.content)}
        self._unknown = self._unknown_word()
        unknown = tokenizer.convert_tokens_to_ids(self._unknown) if self._unknown else None
        self.marks = (self.special | written) - self.typed - spelled - {unknown}
        names = {number: self.name(number) for number in self.marks}
        self.pattern = _any_of(names.values())
        self.lead = next((name for number, name in sorted(names.items()) if self._is_plain(number)), "")
        """A mark after which text is read as in the middle of a text, or '' if there is none."""
        self._cuts = _any_of(name for number, name in names.items() if self._is_plain(number, after=True))
        self._marks_of: dict[str, list[int]] = {}
        self._guarded: _Renamed | None = None

    def _unknown_word(self) -> str | None:
        """Returns the token that the tokenizer makes of characters it does not know, if it makes one.

        A tokenizer of bytes knows all of them; GPT-2's family nevertheless calls the end of a text its unknown token.
        """
        if self._backend is None:
            return self.tokenizer.unk_token
        model = self._backend.model
        return model.unk_token if hasattr(model, "unk_token") else self.tokenizer.unk_token

    def name(self, token: int) -> str:
        """Returns the text of an added or special token."""
        if token in self._added:
            return str(self._added[token].content)
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _is_plain(self, token: int, after: bool = False) -> bool:
        """Returns whether a token takes no blanks before it, nor, unless `after`, those after it."""
        added = self._added.get(token)
        if added is None:
            return False
        return not (added.lstrip or added.single_word or (added.rstrip and not after))

    def _tokens_named(self, names: Iterable[str], source: str) -> set[int]:
        found: set[int] = set()
        known = {token.content: number for number, token in self._added.items()}
        for name in names:
            pattern = re.compile(".*".join(re.escape(part) for part in name.split("*")), re.DOTALL)
            matching = {content: number for content, number in known.items() if pattern.fullmatch(content)}
            if not matching:
                raise ConfigError(
                    f"data.special_tokens names {name!r}, which is not an added token of the tokenizer"
                    f"{did_you_mean(name, list(known))}"
                )
            for content in matching:
                if content in source:
                    raise ConfigError(
                        f"data.special_tokens names {content!r}, which the chat template writes around turns; anybody "
                        "who types it would forge a turn, so leave it out."
                    )
            found |= set(matching.values())
        return found

    # -- tokens --------------------------------------------------------------------------------------------------------

    def encode(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Returns the tokens of each segment.

        Raises:
            ConversationError: a typed text that the tokenizer turns into a mark in any case.
        """
        found = self._stock(["".join(text for text, _ in segment) for segment in segments])
        for number, (segment, ids) in enumerate(zip(segments, found, strict=True)):
            if self._is_forged(segment, ids):
                found[number] = self._encode_guarded(segment)
        return found

    def marks_in(self, text: str) -> list[int]:
        """Returns the marks in a text that the chat template wrote."""
        if text not in self._marks_of:
            if len(self._marks_of) > 1024:
                self._marks_of.clear()
            self._marks_of[text] = [token for token in self._stock([text])[0] if token in self.marks] if text else []
        return self._marks_of[text]

    def last_cut(self, text: str) -> int | None:
        """Returns the position of the last mark before which a text can be cut without an effect on its tokens."""
        return max((match.start() for match in self._cuts.finditer(text)), default=None)

    def _stock(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of texts as the tokenizer gives them.

        Fast tokenizers are called through their core, because transformers' wrapper costs as much as the tokens of a
        conversation, half of it for character offsets that nobody needs.
        """
        filled = [text for text in texts if text]
        if self._backend is None:
            found = iter([list(self.tokenizer(text, add_special_tokens=False).input_ids) for text in filled])
        else:
            # settings that an earlier call of the tokenizer may have left
            if self._backend.padding is not None:
                self._backend.no_padding()
            if self._backend.truncation is not None:
                self._backend.no_truncation()
            if self._backend.encode_special_tokens:
                self._backend.encode_special_tokens = False
            found = iter(each.ids for each in self._backend.encode_batch_fast(filled, add_special_tokens=False))
        return [next(found) if text else [] for text in texts]

    def _is_forged(self, segment: Segment, ids: list[int]) -> bool:
        """Returns whether the tokens of a segment hold a mark that the chat template did not write."""
        if self._unknown and any(self._unknown in text for text, structure in segment if not structure):
            return True
        return [token for token in ids if token in self.marks] != self._expected(segment)

    def _expected(self, segment: Segment) -> list[int]:
        return [token for text, structure in segment if structure for token in self.marks_in(text)]

    def _encode_guarded(self, segment: Segment) -> list[int]:
        if self._backend is None:
            raise ConversationError("only fast tokenizers keep a typed token of the chat template as text")
        if self._guarded is None:
            hidden = {number: self.name(number) for number in self.marks}
            if self._unknown:
                hidden[self.tokenizer.convert_tokens_to_ids(self._unknown)] = self._unknown
            self._guarded = _Renamed(self._backend, hidden)
        ids = self._guarded.encode(segment)
        if [token for token in ids if token in self.marks] != self._expected(segment):
            extra = [token for token in ids if token in self.marks] or [min(self.marks)]
            raise ConversationError(f"the tokenizer makes {self.name(extra[0])} of a typed text")
        return ids


class _Renamed:
    """A copy of a tokenizer in which some tokens have names that nobody types."""

    def __init__(self, backend: Any, hidden: dict[int, str]) -> None:
        from tokenizers import Tokenizer

        secret = secrets.token_hex(8)
        self._names = {name: f"\U000ff0f0{secret}{number}\U000ff0f1" for number, name in hidden.items()}
        content = json.loads(backend.to_str())
        content["post_processor"] = None
        for token in content["added_tokens"]:
            if token["content"] in self._names:
                token |= {"content": self._names[token["content"]], "normalized": False}
        self._rename_words(content["model"])
        self._backend = Tokenizer.from_str(json.dumps(content))
        self._backend.no_padding()
        self._backend.no_truncation()
        # a token outside the model's vocabulary gets its number from its place among the added tokens, as before
        numbers = {self._backend.token_to_id(self._names[name]): number for number, name in hidden.items()}
        self._numbers = {new: old for new, old in numbers.items() if new is not None and new != old}
        self._pattern = _any_of(hidden.values())

    def _rename_words(self, model: dict[str, Any]) -> None:
        """Renames the tokens among the model's own words, unless merges make them of shorter ones."""
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ())
        made = {"".join(pair) for pair in pairs}
        names = {old: new for old, new in self._names.items() if old not in made}
        vocabulary = model.get("vocab")
        if isinstance(vocabulary, dict):
            for old in names.keys() & vocabulary.keys():
                vocabulary[names[old]] = vocabulary.pop(old)
        elif isinstance(vocabulary, list):
            model["vocab"] = [[names.get(word, word), score] for word, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]

    def encode(self, segment: Segment) -> list[int]:
        text = "".join(
            self._pattern.sub(lambda match: self._names[match[0]], part) if structure else part
            for part, structure in segment
        )
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._numbers.get(token, token) for token in ids]


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Returns a pattern that finds any of the names, the longest where several begin."""
    longest_first = sorted((name for name in names if name), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
