"""Keeps what running small copies of models has shown, below ~/.cache/zero_ds.

A verdict follows from the config without its widths and from the installed packages, so it is kept under their hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from zero_ds.runtime.errors import ConfigError
from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)


class UnverifiedError(ConfigError):
    """A model whose structure cannot be verified; the text names the check that failed."""


def kept(
    kind: str, small: dict[str, Any], keys: Collection[str], inspect: Callable[[], dict[str, Any]], code: str = ""
) -> Any:
    """Returns the description of a model, from the cache or by `inspect`.

    kind: package of the code that inspects, `decoders` or `encoders`, and folder of its verdicts.
    small: config of the small copy, on which the description depends.
    keys: entries of a description; a file in the cache that has others is not read.
    code: hash of code that the model's folder brings.

    Raises:
        UnverifiedError: a check failed, now or when the verdict was kept.
    """
    text = json.dumps(small, sort_keys=True, default=str) + _versions(kind) + code
    path = _folder(kind) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    content = _read(path, keys)
    if content is None:
        try:
            content = inspect()
        except UnverifiedError as error:
            content = {"refused": str(error)}
        _write(path, content)
    if "refused" in content:
        raise UnverifiedError(content["refused"])
    return {name: _frozen(value) for name, value in content.items()}


def _folder(kind: str) -> Path:
    """Returns the folder of the cache, below $XDG_CACHE_HOME if that is set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zero_ds" / kind


@cache
def _versions(kind: str) -> str:
    """Returns everything that verdicts depend on besides the config: installed packages, and this package's code."""
    digest = hashlib.sha256()
    for file in sorted((Path(__file__).parent / kind).glob("*.py")):
        digest.update(file.read_bytes())
    return "".join(f"{name} {version(name)}," for name in ("torch", "transformers")) + digest.hexdigest()


def _read(path: Path, keys: Collection[str]) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    usable = isinstance(content, dict) and (set(content) == {"refused"} or set(content) == set(keys))
    return content if usable else None


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(content))
    except OSError as error:
        logger.debug("the description of a model is not kept in %s: %s", path, error)


def _frozen(value: Any) -> Any:
    """Returns lists of JSON as the tuples that they were."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
