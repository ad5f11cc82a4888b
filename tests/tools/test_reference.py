"""The generated pages of the documentation are those of this program."""

from __future__ import annotations

import sys

import pytest
from places import ROOT

sys.path[:0] = [str(ROOT / "tools")]

import reference  # noqa: E402


@pytest.mark.parametrize("name", ["reference.md", "api.md"])
def test_the_page_is_up_to_date(name: str) -> None:
    text = (reference.DOCS / name).read_text(encoding="utf-8")
    assert text == reference.pages()[name], "write it again: python tools/reference.py --write"


def test_commands_and_settings_are_complete() -> None:
    page = reference.reference()
    for words in ("### zero-ds data show", "### zero-ds eval run", "| `--hostfile` |", "| `data.sources.N.root` |"):
        assert words in page
    assert "| `optimizer.learning_rate` |" in page and "| `seed` | `0` |" in page
