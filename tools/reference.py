"""Writes docs/reference.md and docs/api.md: every command, every setting of a recipe, every public function.

    python tools/reference.py            # prints what differs, and fails if something does
    python tools/reference.py --write

The text is that of `--help`, of the descriptions in zero_ds/config/schema.py and of the functions' docstrings.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

import zero_ds
from zero_ds.cli.main import app
from zero_ds.config.schema import RunConfig

DOCS = Path(__file__).parents[1] / "docs"


def pages() -> dict[str, str]:
    """Returns the text of each generated page, by the name of its file."""
    return {"reference.md": reference(), "api.md": api()}


def reference() -> str:
    """Returns the page of all commands and all settings."""
    command: Any = typer.main.get_command(app)
    lines = [
        "# Reference",
        "Every command, and every setting of a recipe. `tools/reference.py --write` writes this page from the program.",
        "",
        "## Commands",
    ]
    for name, one in _commands(command, "zero-ds"):
        lines += _of_command(name, one)
    lines += [
        "## Settings of a recipe",
        "A recipe is a YAML file with these keys; `key=value` on the command line sets one of them, as in",
        "`optimizer.learning_rate=1e-4`. [configs.md](configs.md) describes how recipes extend each other.",
        "",
        "| key | default | meaning |",
        "|---|---|---|",
        *(f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _settings(RunConfig)),
    ]
    return "\n".join(lines) + "\n"


def api() -> str:
    """Returns the page of the public functions."""
    lines = [
        "# Python API",
        "The work of the commands can be called from Python: `from zero_ds import train`. torch is loaded when the",
        "first function is used. `tools/reference.py --write` writes this page from the docstrings.",
        "",
    ]
    for name in zero_ds.PUBLIC:
        function = getattr(zero_ds, name)
        lines += [f"## {name}", "```python", _signature(name, function), "```", inspect.getdoc(function) or "", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _commands(group: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, command in group.commands.items():
        if command.hidden:
            continue
        if hasattr(command, "commands"):
            yield from _commands(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def _of_command(name: str, command: Any) -> list[str]:
    lines = [f"### {name}", *_text(command.help or ""), ""]
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False) or parameter.name == "help":
            continue
        is_option = any(word.startswith("-") for word in parameter.opts)
        name_of_argument = parameter.metavar or parameter.name.upper()
        words = [*parameter.opts, *parameter.secondary_opts] if is_option else [name_of_argument]
        default = None if callable(parameter.default) or parameter.required else parameter.default
        shown = f"`{default}`" if isinstance(default, str | int | float | Path) and default is not False else ""
        rows.append(f"| {', '.join(f'`{word}`' for word in words)} | {shown} | {_cell(parameter.help or '')} |")
    if rows:
        lines += ["| argument or option | default | meaning |", "|---|---|---|", *rows, ""]
    return lines


def _text(help_text: str) -> list[str]:
    """Returns the paragraphs of a command's help, with its example as code."""
    lines = []
    for paragraph in inspect.cleandoc(help_text).replace("\f", "").split("\n\n"):
        before, example, command = paragraph.partition("Example: ")
        lines += [before.strip()] if before.strip() else []
        lines += [f"\n    {' '.join(command.split())}\n"] if example else []
    return lines


def _settings(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yields key, default and meaning of every field, those of nested sections under dotted keys."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        nested = next((one for one in _parts(field.annotation) if issubclass(one, BaseModel)), None)
        meaning = _cell(field.description or "")
        if nested is not None:
            repeated = "tuple" in str(field.annotation) or "list" in str(field.annotation)
            if meaning or repeated:
                yield key, _default(field), meaning
            yield from _settings(nested, f"{key}.{'N.' if repeated else ''}")
        else:
            yield key, _default(field), meaning


def _parts(annotation: Any) -> list[type]:
    """Returns the classes that an annotation names."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [found for inner in get_args(annotation) for found in _parts(inner)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or value == "" or isinstance(value, BaseModel):
        return ""
    return f"`{json.dumps(value, default=str)}`"


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _signature(name: str, function: Any) -> str:
    signature = inspect.signature(function)
    parameters = ",\n".join(f"    {parameter}" for parameter in _shown(signature))
    returns = str(signature.return_annotation).strip("'")
    return f"{name}(\n{parameters},\n) -> {returns}"


def _shown(signature: inspect.Signature) -> Iterator[str]:
    keyword_only = False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            yield "*"
        if callable(parameter.default) and parameter.default is not parameter.empty:
            parameter = parameter.replace(default=...)
        yield str(parameter).replace("'", "").replace("Ellipsis", "...")


def main(write: Annotated[bool, typer.Option("--write", help="Write the pages.")] = False) -> None:
    """Compare the generated pages with the files, or write them."""
    differs = False
    for name, text in pages().items():
        path = DOCS / name
        if write:
            path.write_text(text, encoding="utf-8")
            continue
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        difference = list(
            difflib.unified_diff(old.splitlines(), text.splitlines(), str(path), "generated", lineterm="")
        )
        sys.stdout.write("".join(f"{line}\n" for line in difference))
        differs = differs or bool(difference)
    if differs:
        raise SystemExit("the pages differ; write them with: python tools/reference.py --write")


if __name__ == "__main__":
    typer.run(main)
