"""Errors that a user can correct, and suggestions for a word that is not known."""

from __future__ import annotations

import difflib


class ConfigError(ValueError):
    """A mistake of the user; the message is one sentence that names the key, the value and the remedy."""


def may_pass(error: BaseException) -> bool:
    """Returns whether the next attempt may succeed without anybody's help, although the error has a sentence.

    An error says so by an attribute `may_pass` of its class or its own.
    """
    return bool(getattr(error, "may_pass", False))


def did_you_mean(word: str, known: list[str]) -> str:
    """Returns the end of a message about an unknown word: `; did you mean 'x'?`, or all known words if they are few."""
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(repr(n) for n in near)}?"
    return f"; known: {', '.join(sorted(known))}." if len(known) <= 40 else "."


def one_line(error: BaseException) -> str:
    """Returns the type and the first 200 characters of a library's error, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
