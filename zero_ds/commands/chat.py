"""`zero-ds chat`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zero_ds.config import ConfigError

if TYPE_CHECKING:
    from zero_ds.chat import Conversation

HELP = "/image FILE shows a picture, /new begins anew, /quit ends."


def chat(
    model: Annotated[str, typer.Argument(help="Target, surrogate or export (folder or hub id), or a run folder.")],
    target: Annotated[str | None, typer.Option(help="Full language model that the run is plugged into.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Picture that the first question is about; repeatable.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
) -> None:
    """Talk to a model in the terminal, about any number of pictures."""
    from zero_ds.chat import Conversation
    from zero_ds.commands.models import loaded

    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {max_new_tokens}: an answer has at least 1 token.")

    _, found = loaded(model, target, dtype)

    def begin() -> Conversation:
        return Conversation(found, max_new_tokens=max_new_tokens, system=system)

    talk = begin()
    for path in image or ():
        _show(talk, str(path))
    if sys.stdin.isatty():
        print(HELP)
    while (line := _line()) is not None:
        if line == "/quit":
            break
        elif line == "/new":
            talk = begin()
        elif line.startswith("/image"):
            _show(talk, line.removeprefix("/image").strip())
        elif line.startswith("/"):
            print(f"{line.split()[0]} is not known. {HELP}", file=sys.stderr)
        elif line:
            _say(talk, line)


def _line() -> str | None:
    """What is typed next; None at the end of the input, or on Ctrl-C."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


def _show(talk: Conversation, path: str) -> None:
    """Adds a picture; one that is none costs a sentence, not the conversation."""
    from zero_ds.data.images import ImageError

    try:
        talk.show(path)
    except (ConfigError, ImageError) as error:
        print(f"zero-ds: {error}", file=sys.stderr)


def _say(talk: Conversation, question: str) -> None:
    """Prints the answer as it is made; Ctrl-C ends the answer."""
    from zero_ds.data.formats import DataError

    try:
        for piece in talk.ask(question):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" ...")
    except DataError as error:
        print(f"zero-ds: {error}", file=sys.stderr)
