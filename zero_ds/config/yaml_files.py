"""Reads YAML files with errors in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zero_ds.runtime.errors import ConfigError


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Returns the mapping in a YAML file; `what` says in messages what kind of file it is.

    Raises:
        ConfigError: A missing or unreadable file, or one that does not hold a mapping.
    """
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{what} {path} cannot be read: {str(error).splitlines()[0]}.") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{what} {path} must hold a mapping of keys to values.")
    return tree
