"""Parses a record of a data file, in any of the common formats, into a checked row.

The turns are under `conversations`, `messages` or `text`, as LLaVA, chat APIs and GenQA call them. A turn is `{"from":
"human"|"gpt", "value"}` or `{"role", "content"}`, and its content a text or a list of text and image parts. Images are
named by `image` or by one of its other names (IMAGE_KEYS): a path or a list of paths relative to the source's root, or
`data:` addresses. `full_path` has absolute paths.

A key whose meaning would be lost is refused by its name, so that no run silently trains on less than the data says. All
other keys that are not read are counted.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from zero_ds.data.conversations import PLACEHOLDER, Role
from zero_ds.data.stored import Span

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
FORMATS = ("conversations", "messages", "text")
"""Keys of the turns, by which the formats are told apart."""
ROLE_KEYS, TEXT_KEYS = ("from", "role"), ("value", "content")
"""Keys of a turn's role and text."""
LEARNED_KEYS = ("weight", "train", "loss", "loss_weight")
"""Keys of a turn that say whether an answer is learned: false or 0, true or 1."""
IMAGE_KEYS = (
    "image",
    "images",
    "image_path",
    "image_paths",
    "image_file",
    "image_files",
    "img",
    "imgs",
    "img_path",
    "image_url",
    "image_urls",
)
"""Keys of a record that name its images, the usual ones first."""
SYSTEM_KEYS = ("system", "system_prompt")
"""Keys of a record that hold its system message."""
RECORD_KEYS = {"id", "idx", "full_path", *IMAGE_KEYS, *SYSTEM_KEYS, *LEARNED_KEYS}
"""Keys of a record that are read, in addition to that of the turns."""
_RECORD_WIDE = {*SYSTEM_KEYS, *LEARNED_KEYS}
TURN_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *LEARNED_KEYS}
"""Keys of a turn that are read."""
_TOOLS, _MEDIA = "tool calls are not learned", "only images and text are learned"
_THOUGHTS = "thoughts are not learned; take the key out, and only the answer is"
_WEIGHTS = ("sample_weight",)
_PAIRS = "pairs of answers are not learned; keep the better one as the answer"
REFUSED = {
    **dict.fromkeys(("tools", "functions", "function_call", "tool_calls", "tool_call_id"), _TOOLS),
    **dict.fromkeys(("video", "videos", "video_path", "video_url", "video_file"), _MEDIA),
    **dict.fromkeys(("audio", "audios", "audio_path", "audio_url", "audio_file", "input_audio"), _MEDIA),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHTS),
    **dict.fromkeys(("rejected", "chosen", "rejected_response", "rejected_images", "kto_tag"), _PAIRS),
    **dict.fromkeys(("mask", "loss_mask"), "say train: false in the turns that are not to be learned"),
    **dict.fromkeys(_WEIGHTS, "call it 'weight'"),
    "system_message": "call it 'system'",
    **dict.fromkeys(("image_base64", "image_b64"), "call it 'image'"),
    **dict.fromkeys(("objects", "bbox", "bboxes"), "write places into the text"),
    "history": "write all turns into one list",
}
"""Keys whose meaning is not supported, and the remedy for each."""
_REFUSED_IN_TURNS = {**REFUSED, **dict.fromkeys(IMAGE_KEYS, "name images in the record, or in parts of the content")}
TWICE = "\0twice"
"""Key, which no data has, under which an object names a key that it has twice."""
_ALSO_WHEN_FALSE = {*LEARNED_KEYS, "mask", "loss_mask", *_WEIGHTS}
"""Keys that say something when they hold false or 0."""
_SPELLINGS = {re.sub(r"[\W_]", "", key): key for key in (*IMAGE_KEYS, *SYSTEM_KEYS, *LEARNED_KEYS, *REFUSED)}
"""Keys with a meaning by their letters."""
ADDRESSES = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
"""Beginnings of names that are not files."""


LONGEST_PATH = 4096
"""Number of characters from which a name in base64 is the image itself."""
SHORTEST_IMAGE = 64
"""Number of characters of an image in base64, at least."""
_BEGINNINGS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "SUkqA", "TU0AK")
"""First characters of JPEG, PNG, GIF, WebP and TIFF files in base64."""
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+=*\s*")


class DataError(ValueError):
    """A data file or a sample that cannot be used; the message names file and sample."""

    source: int = 0
    """Number of the sample's source, where a loader has met the error."""


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
    """Paths as in the file, relative to the root or absolute if `full_path`; or `data:` addresses, or spans as text."""
    full_path: bool
    learned: tuple[bool, ...]
    """Whether each turn, if it is an answer, is learned."""


@dataclass
class _Turns:
    """The turns of a record as they are read."""

    roles: list[Role] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    """Text of each turn, with placeholders."""
    learned: list[bool] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    """Images that parts of the contents name."""


def parse(record: Any, where: str, unread: Counter[str] | None = None) -> Row:
    """Checks one record; `where` says in messages which one it is. Keys that are not read are counted in `unread`.

    Raises:
        DataError: A missing key, a key whose meaning is not supported, an unknown role, an empty turn, no question or
            no answer, placeholders that do not match the images, or an image outside the user's turns.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: a sample must be an object, not {type(record).__name__}")
    name = next((record[key] for key in ("id", "idx") if _present(record.get(key))), None)
    sample = f"{where}: sample {'?' if name is None else named(name)}"
    ignored: set[str] = set()
    _refuse(record, REFUSED, sample)
    form = _form(record, sample)
    turns = _turns(record.get(form), sample, ignored)
    if record.keys() & _RECORD_WIDE:
        _add_system(record, turns, sample)
        if not _learned(record, sample):
            raise DataError(f"{sample}: 'weight', 'train' or 'loss' leaves it out; remove it from the data")
    _check_turns(turns, sample)
    if not _writable(str(name)):
        raise DataError(f"{sample}: the id is not valid text")
    images, full_path = _images(record, turns.images, sample, ignored)
    _place_images(turns, len(images), sample)
    if unread is not None:
        ignored.update(key for key in record if key not in RECORD_KEYS and key != form and holds(record[key]))
        unread.update(ignored)
    row_id = where if name is None else str(name)
    return Row(row_id, tuple(turns.roles), tuple(turns.texts), tuple(images), full_path, tuple(turns.learned))


# -- keys --------------------------------------------------------------------------------------------------------------


def _present(value: Any) -> bool:
    """Returns whether there is a value: tables have null, or not-a-number, where a record lacks a key."""
    return value is not None and value == value


def holds(value: Any) -> bool:
    """Returns whether a value says anything. Some tables have lists and objects as a text of JSON."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return _present(value) and value not in (False, [], {}, ())


def _refuse(content: Mapping[str, Any], refused: Mapping[str, str], where: str) -> None:
    if TWICE in content:
        raise DataError(f"{where} has the key {quoted(content[TWICE])} twice; keep one of them")
    for key, value in content.items():
        meant = _meant(key)
        if meant is None or not (holds(value) or (meant in _ALSO_WHEN_FALSE and value in (0, 1))):
            continue
        if meant != key and key not in refused:
            raise DataError(f"{where}: key {quoted(key)} is not read; write it '{meant}', or give it another name")
        if key in refused and not (key in _WEIGHTS and value == 1):
            raise DataError(f"{where}: key '{key}' is not supported: {refused[key]}")


@functools.lru_cache(maxsize=4096)
def _meant(key: str) -> str | None:
    """Returns the key with a meaning that has the same letters, such as `image` for `Image`; None if there is none."""
    return _SPELLINGS.get(re.sub(r"[\W_]", "", key).lower())


def _form(record: Mapping[str, Any], sample: str) -> str:
    """Returns the key of the turns."""
    forms = [key for key in FORMATS if as_turns(record.get(key))]
    if len(forms) > 1:
        raise DataError(f"{sample} has turns in '{forms[0]}' and in '{forms[1]}'; keep one of them")
    return forms[0] if forms else FORMATS[0]


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns an object of JSON; one that has a key twice says so, because its earlier value is lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        found[TWICE] = next(key for key in keys if keys.count(key) > 1)
    return found


def as_turns(value: Any) -> Any:
    """Returns a list of turns, also from the text of JSON or the object of lists that some tables have; or None."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value, object_pairs_hook=json_object)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            return None
        return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return value if isinstance(value, list) else None


def _learned(content: Mapping[str, Any], where: str) -> bool:
    """Returns whether the keys of a turn or record let it be learned."""
    learned = True
    for key in LEARNED_KEYS:
        value = content.get(key)
        if not _present(value):
            continue
        if value not in (0, 1):  # False and True among them
            raise DataError(f"{where}: {key} {quoted(value)} is neither 0 nor 1; other weights are not supported")
        learned = learned and bool(value)
    return learned


# -- turns -------------------------------------------------------------------------------------------------------------


def _turns(value: Any, sample: str, ignored: set[str]) -> _Turns:
    turns = as_turns(value)
    if not turns:
        what = (
            "turns are read from 'conversations', 'messages' or 'text', from pairs of keys such as 'question' and "
            "'answer', and from a caption beside an image; name other columns in columns of the source"
        )
        if holds(value):
            what = f"it is {quoted(value)}, not a list of turns"
        raise DataError(f"{sample} has no 'conversations'; {what}")
    found = _Turns()
    for number, turn in enumerate(turns):
        _add_turn(found, turn, f"{sample}, turn {number}", ignored)
    return found


def _add_turn(found: _Turns, turn: Any, where: str, ignored: set[str]) -> None:
    """Appends a turn, after checking it."""
    content: Mapping[str, Any] = turn if isinstance(turn, dict) else {}
    role_name = _one_of(content, ROLE_KEYS, where)
    role = ROLES.get(role_name) if isinstance(role_name, str) else None
    if role is None:
        raise DataError(f"{where}: unknown role {quoted(role_name)}; known: {', '.join(ROLES)}")
    text = _one_of(content, TEXT_KEYS, where)
    learned = True
    if len(content) > 2 or text is None:  # most turns have nothing else
        learned = _checked_keys(content, role, where, ignored)
    if isinstance(text, list):
        text = _joined(text, role, found.images, where, ignored)
    found.roles.append(role)
    found.texts.append(_text(text, where))
    found.learned.append(learned)


def _checked_keys(content: Mapping[str, Any], role: Role, where: str, ignored: set[str]) -> bool:
    """Checks the keys of a turn in addition to its role and text; returns whether it is learned if it is an answer."""
    _refuse(content, _REFUSED_IN_TURNS, where)
    learned = _learned(content, where)
    ignored.update(f"{key} (of a turn)" for key in content if key not in TURN_KEYS and holds(content[key]))
    if role == "assistant":
        return learned
    for key in ("train", "loss"):
        if _present(content.get(key)) and content[key]:
            raise DataError(f"{where}: '{key}' of role '{role}' is not supported: only answers are learned")
    return True


def _one_of(content: Mapping[str, Any], keys: tuple[str, str], where: str) -> Any:
    """Returns the value under one of two keys that mean the same; None if there is none."""
    one, other = content.get(keys[0]), content.get(keys[1])
    if not _present(one):
        return other if _present(other) else None
    if _present(other) and one != other:
        raise DataError(f"{where} has different values in {keys[0]!r} and {keys[1]!r}; keep one of them")
    return one


def _text(value: Any, where: str) -> str:
    """Returns the text of a turn; a number becomes one."""
    if not isinstance(value, str) and value is not None:
        if not _is_text(value):
            raise DataError(f"{where}: the text is {quoted(value)}, which is not a text")
        value = str(value)
    if not value or not value.strip():
        raise DataError(f"{where}: the text is empty")
    if not _writable(value):
        raise DataError(f"{where}: the text is not valid Unicode (half of a surrogate pair)")
    return value


def _is_text(value: Any) -> bool:
    """Returns whether a value is a text, or a number that stands for one."""
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _joined(parts: list[Any], role: Role, images: list[str], where: str, ignored: set[str]) -> str:
    """Returns the text of a content in parts, with placeholders; appends the images that the parts name."""
    texts = []
    for part in parts:
        kind = _kind(part)
        said = _one_of(part, ("text", "value"), where) if kind == "text" else None
        if kind == "text" and _is_text(said):
            texts.append(str(said))
            read = {"type", "text", "value"}
        elif kind in ("image", "image_url") and not holds(part.get("text")):
            if role != "user":
                raise DataError(f"{where}: role {role!r} shows an image; only a user's turn can, so move it there")
            texts.append(PLACEHOLDER)
            read = {"type", "image", "path", "url", "image_url"}
            images += _part_images(part, where)
        else:
            raise DataError(f"{where}: a part of the content is neither text nor image: {quoted(part)}")
        _refuse({key: value for key, value in part.items() if key not in read}, _REFUSED_IN_TURNS, where)
        ignored.update(f"{key} (of a part)" for key in part.keys() - read if holds(part[key]))
    return "".join(texts)


def _kind(part: Any) -> str | None:
    """Returns the type of a part, which it states or shows by its only content."""
    if not isinstance(part, dict):
        return None
    if _present(part.get("type")):
        return part["type"] if isinstance(part["type"], str) else None
    kinds = [kind for kind in ("text", "image", "image_url") if holds(part.get(kind))]
    return kinds[0] if len(kinds) == 1 else None


def _part_images(part: Mapping[str, Any], where: str) -> list[str]:
    """Returns the image that a part names; none if the record names it."""
    values = [part[key] for key in ("image", "path", "url", "image_url") if holds(part.get(key))]
    named_images = [_names(value, where) for value in values]
    if any(names != named_images[0] for names in named_images):
        raise DataError(f"{where}: a part names different images: {quoted(part)}")
    return named_images[0] if named_images else []


def _add_system(record: Mapping[str, Any], turns: _Turns, sample: str) -> None:
    """Makes a system turn of the record's own system message."""
    text = _one_of({key: record[key] for key in SYSTEM_KEYS if holds(record.get(key))}, SYSTEM_KEYS, sample)
    if text is None or (isinstance(text, str) and not text.strip()):
        return
    text = _text(text, f"{sample}, 'system'")
    if turns.roles[0] == "system":
        if turns.texts[0] != text:
            raise DataError(f"{sample} has a system message in 'system' and another one as turn 0; keep one of them")
        return
    turns.roles.insert(0, "system")
    turns.texts.insert(0, text)
    turns.learned.insert(0, True)


def _check_turns(turns: _Turns, sample: str) -> None:
    """Checks that there is a question, and an answer that is learned."""
    if "user" not in turns.roles:
        raise DataError(f"{sample} has no question")
    answers = turns.roles.count("assistant")
    if answers == turns.learned.count(False):
        why = "; 'weight', 'train' or 'loss' leaves out all of them" if answers else ""
        raise DataError(f"{sample} has no answer to learn from{why}")


# -- images ------------------------------------------------------------------------------------------------------------


def _images(record: Mapping[str, Any], of_parts: list[str], sample: str, ignored: set[str]) -> tuple[list[str], bool]:
    """Returns the names of the record's images, and whether they are absolute paths on purpose.

    `full_path` is the path or the paths themselves, or true if `image` holds them.
    """
    full_path = record.get("full_path") if holds(record.get("full_path")) else False
    if full_path and full_path is not True:
        return _names(full_path, sample), True
    if record.get("image") == "":
        raise DataError(f"{sample}: 'image' must be a path or a list of paths")
    found = {key: _names(record[key], sample, key) for key in IMAGE_KEYS if key in record and holds(record[key])}
    for key in [key for key in found if key.startswith("image_url")]:
        if len(found) > 1 and all(name.startswith(ADDRESSES) for name in found[key]):
            del found[key]  # it says where the file of the other key is from
            ignored.add(key)
    sources = [*found.items()]
    if of_parts:
        sources.append(("parts of its turns", of_parts))
    for where, names in sources[1:]:
        if names != sources[0][1]:
            raise DataError(f"{sample} names images in '{sources[0][0]}' and others in '{where}'; keep one of them")
    names = sources[0][1] if sources else []
    for name in names:
        if name.lower().startswith(ADDRESSES):
            raise DataError(
                f"{sample}: image {quoted(name)} is an address, and images are read from files; fetch it first, for "
                "example with img2dataset or `curl -o FILE ADDRESS`, and name the file"
            )
    return names, bool(full_path)


def _names(value: Any, where: str, key: str = "image") -> list[str]:
    """Returns the names of images: a path, an object with a path or with an image's bytes, or a list of them."""
    names = [_name(each) for each in (value if isinstance(value, list | tuple) else [value])]
    if any(name is None for name in names):
        raise DataError(f"{where}: '{key}' must be a path or a list of paths")
    return [name for name in names if name is not None]


def _name(value: Any) -> str | None:
    """Returns the name of an image; None for a value that names none."""
    if isinstance(value, Mapping):
        content = value.get("bytes")
        if isinstance(content, bytes | Span) and content:  # as tables of the library `datasets` have images
            return _name(content)
        value = next((value[key] for key in ("path", "url") if holds(value.get(key))), None)
    if isinstance(value, Span):
        return value.text()
    if isinstance(value, bytes) and value:
        return f"data:;base64,{base64.b64encode(value).decode()}"
    if not isinstance(value, str) or not value or "\0" in value or not _writable(value):
        return None
    if is_base64(value):
        return f"data:;base64,{value}"
    return value.removeprefix("file://")


def is_base64(text: str) -> bool:
    """Returns whether a text is an image in base64: one that is too long for a path, or begins like an image."""
    long = len(text) > LONGEST_PATH or (len(text) >= SHORTEST_IMAGE and text.startswith(_BEGINNINGS))
    return long and _BASE64.fullmatch(text) is not None


def is_image_key(key: str) -> bool:
    """Returns whether a key of a record, or of a part of its turns, names images."""
    return key in IMAGE_KEYS


def _place_images(turns: _Turns, images: int, sample: str) -> None:
    """Puts placeholders before the first question if there are images and none of them has one."""
    pairs = zip(turns.roles, turns.texts, strict=True)
    placeholders = sum(text.count(PLACEHOLDER) for role, text in pairs if role == "user")
    if images and placeholders == 0:
        first = turns.roles.index("user")
        turns.texts[first] = f"{PLACEHOLDER * images}\n{turns.texts[first]}"
        placeholders = images
    if placeholders != images:
        raise DataError(f"{sample} has {images} images for {placeholders} {PLACEHOLDER} placeholders")


def _writable(text: str) -> bool:
    """Returns whether the text can be written as UTF-8. JSON can hold half of a surrogate pair, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
