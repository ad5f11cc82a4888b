"""Parses a record of a data file, in any of the common formats, into a checked row.

Formats are told apart by their keys: LLaVA's `conversations` of `{"from": "human"|"gpt", "value"}`, the `messages` of
`{"role", "content"}` that chat APIs use (the content is a text or a list of text and image parts), and GenQA's `text`,
a list of `{"role", "content"}`. Images are named by `image` or `images`, a path or a list of paths relative to the
source's root, or by `full_path`, the same with absolute paths.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from zero_ds.data.conversations import PLACEHOLDER, Role

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FORMATS = {"conversations": ("from", "value"), "messages": ("role", "content"), "text": ("role", "content")}
"""Key of the turns of each format, and the keys of a turn's role and text."""


class DataError(ValueError):
    """A data file or a sample that cannot be used; the message names file and sample."""


class TooLongError(DataError):
    """Raised for a sample without an answer within the length limit. It is always skipped and counted, never fatal."""


SHOWN = 80
"""Number of characters that a message shows of a value from data."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxother = 2, 3, 2, SHOWN


def quoted(value: Any, most: int = SHOWN) -> str:
    """Returns a value from data as messages show it: its repr without control characters, cut to `most` characters."""
    _SHORT.maxstring = most
    text = _SHORT.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def named(value: Any, most: int = SHOWN) -> str:
    """Returns an id or path as a message names it: unchanged if it is short and printable, otherwise quoted."""
    text = str(value) if isinstance(value, str | int | float) else ""
    return text if text and len(text) <= most and text.isprintable() else quoted(value, most)


class Row(NamedTuple):
    """A checked record."""

    id: str
    roles: tuple[Role, ...]
    texts: tuple[str, ...]
    images: tuple[str, ...]
    """Paths as in the file: relative to the root, or absolute if `full_path`."""
    full_path: bool


def parse(record: Any, where: str) -> Row:
    """Checks one record; `where` says in messages which one it is.

    Raises:
        DataError: A missing key, an unknown role, an empty turn, no question or no answer, placeholders that do not
            match the images, or an image outside the user's turns.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(record).__name__}")
    name = record.get("id", record.get("idx"))
    sample = f"{where}: sample {'?' if name is None else named(name)}"
    form = next((key for key in FORMATS if record.get(key) is not None), "conversations")
    turns = record.get(form)
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{sample} has no 'conversations'")
    roles: list[Role] = []
    texts: list[str] = []
    images_of_parts: list[Any] = []
    for number, turn in enumerate(turns):
        role, text, named_images = _turn(turn, *FORMATS[form], f"{sample}, turn {number}")
        roles.append(role)
        texts.append(text)
        images_of_parts += named_images
    for role, what in (("user", "question"), ("assistant", "answer to learn from")):
        if role not in roles:
            raise DataError(f"{sample} has no {what}")
    if not _writable(str(name)):
        raise DataError(f"{sample}: the id is not valid text")
    images, full_path = _images(record, images_of_parts, sample)
    placeholders = sum(t.count(PLACEHOLDER) for t, role in zip(texts, roles, strict=True) if role == "user")
    if images and placeholders == 0:
        first = roles.index("user")
        texts[first] = f"{PLACEHOLDER * len(images)}\n{texts[first]}"
        placeholders = len(images)
    if placeholders != len(images):
        raise DataError(f"{sample} has {len(images)} images for {placeholders} {PLACEHOLDER} placeholders")
    return Row(where if name is None else str(name), tuple(roles), tuple(texts), tuple(images), full_path)


def _turn(turn: Any, role_key: str, text_key: str, where: str) -> tuple[Role, str, list[Any]]:
    """Returns the role of a turn, its text with placeholders, and the images that parts of its content name."""
    role = turn.get(role_key) if isinstance(turn, dict) else None
    content = turn.get(text_key) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where}: unknown role {quoted(role)}; known: {', '.join(ROLES)}")
    images: list[Any] = []
    if isinstance(content, list) and text_key == "content":
        texts = []
        for text, named_images in _parts(content, where):
            texts.append(text)
            images += named_images
        content = "".join(texts)
        if ROLES[role] != "user" and any(part["type"] == "image" for part in turn[text_key]):
            raise DataError(f"{where}: role {role!r} shows an image; only a user's turn can, so move the image there")
    if not isinstance(content, str) or not content.strip():
        raise DataError(f"{where}: the text is empty")
    if not _writable(content):
        raise DataError(f"{where}: the text is not valid Unicode (half of a surrogate pair)")
    return ROLES[role], content, images


def _parts(content: list[Any], where: str) -> Iterator[tuple[str, list[Any]]]:
    """Yields the text of each part of a content, and the image that the part itself names, if any."""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"], []
        elif kind == "image":
            path = part.get("image", part.get("path"))
            yield PLACEHOLDER, [] if path is None else [path]
        else:
            raise DataError(f"{where}: a part of the content is neither text nor image: {quoted(part)}")


def _images(record: dict[str, Any], images_of_parts: list[Any], sample: str) -> tuple[list[str], bool]:
    """Returns the paths of the record's images, and whether they are absolute on purpose.

    `full_path` is the path or the paths themselves, or true if `image` holds them.
    """
    full_path = record.get("full_path")
    paths: Any = record.get("image") or record.get("images") or images_of_parts
    if full_path and full_path is not True:
        paths = full_path
    images = [paths] if isinstance(paths, str) else paths
    if record.get("image") == "" or not isinstance(images, list) or not all(_is_path(name) for name in images):
        raise DataError(f"{sample}: 'image' must be a path or a list of paths")
    return images, bool(full_path)


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and bool(name) and "\0" not in name and _writable(name)


def _writable(text: str) -> bool:
    """Returns whether the text can be written as UTF-8. JSON can hold half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
