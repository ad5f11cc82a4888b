"""Errors that a user can mend, and the words that help with it."""

from __future__ import annotations

import difflib


class ConfigError(ValueError):
    """What a user wrote cannot be run; the message is one sentence that names the key, the value and the remedy."""


def did_you_mean(word: str, known: list[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or the whole list if there is none and it is short."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(sorted(known))}." if len(known) <= 40 else "."


def one_line(error: BaseException) -> str:
    """Returns the type and the first 200 characters of a library's error, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
