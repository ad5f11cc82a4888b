"""Data sets that recipes call by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from zero_ds.config.yaml_files import read_yaml

PACKAGED = Path(__file__).parent / "datasets.yaml"
"""List of data sets in the package."""
LOCAL = Path("datasets.yaml")
"""The user's list in the working folder, which adds to the packaged one and wins over it."""


def registered_datasets() -> dict[str, dict[str, Any]]:
    """Returns the entries of `data.sources` that the registered names stand for, by name.

    Raises:
        ConfigError: A list that cannot be read.
    """
    entries: dict[str, Any] = {}
    for path in (PACKAGED, LOCAL):
        if path.is_file():
            entries |= read_yaml(path, what="list of data sets")
    return {name: entry if isinstance(entry, dict) else {"path": entry} for name, entry in entries.items()}
