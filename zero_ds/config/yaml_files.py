"""Reads YAML as a person means it, with errors in one sentence.

PyYAML follows YAML 1.1, where 010 is eight, 1:30 is ninety, 2026-01-31 is a date, `off` is false, and of equal keys the
last one wins. Here 010 is ten, 1:30, 2026-01-31 and `off` are texts (all as in YAML 1.2), and equal keys are an error.
Keys that are true or false also take the words yes, no, on and off.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from zero_ds.runtime.errors import ConfigError

_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)")
_FLOAT = re.compile(
    r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_REPLACED = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp"))


class _Loader(yaml.SafeLoader):
    """Reads plain values as the module says, and refuses a key that appears twice."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Reads a mapping. Later, PyYAML adds the entries that `<<` merges, which may have the same keys."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(problem=f"the key '{key.value}' appears twice")
            seen.add(key.value)
        return node


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(f"^(?:{_BOOL.pattern})$"), list("tTfF"))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file; `what` says in messages what kind of file it is.

    Raises:
        ConfigError: A missing or unreadable file, or one that does not hold a mapping; a key that appears twice.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {_reason(error)}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} {path} must hold a mapping of keys to values.")
    return tree


def read_value(key: str, text: str) -> Any:
    """Returns the value in the text after `key=` of an override.

    A text that holds ` #` is read as a whole: an override is one line, in which nothing is a comment.

    Raises:
        ConfigError: The text is not YAML, or something follows after its value.
    """
    try:
        root = yaml.compose(text, _Loader)
        if root is None or not text[root.end_mark.index :].strip():
            return yaml.load(text, _Loader)
        if isinstance(root, yaml.ScalarNode) and root.style is None:
            return text.strip()
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(
            f"the value of {key} cannot be read: {text!r} ({_reason(error)}); put a text with special characters "
            "between quotes."
        ) from None
    rest = text[root.end_mark.index :].strip()
    raise ConfigError(f"the value of {key} ends before {rest!r}, which would be lost; put all of it between quotes.")


def _reason(error: Exception) -> str:
    """Returns the fault of a YAML text in a few words."""
    problem = getattr(error, "problem", None)
    return problem if problem and "appears twice" in problem else str(error).splitlines()[0]
