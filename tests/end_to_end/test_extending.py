"""Carries out docs/extending.md literally on a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

from places import ROOT


def blocks(section: str) -> dict[str, list[str]]:
    """Returns the fenced blocks of a section of the guide, by language."""
    text = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
    part = text.split(f"## {section}\n")[1].split("\n## ")[0]
    found: dict[str, list[str]] = {}
    for language, body in re.findall(r"^ *```(\w+)\n(.*?)^ *```$", part, re.MULTILINE | re.DOTALL):
        # editors remove the one space of a blank context line
        lines = [line if line or language != "diff" else " " for line in textwrap.dedent(body).splitlines()]
        found.setdefault(language, []).append("\n".join(lines) + "\n")
    return found


def test_a_new_family(tmp_path: Path) -> None:
    for name in ("zero_ds", "tests", "ds_configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    guide = blocks("A decoder family")
    (tmp_path / "zero_ds/model/decoders/mistral.py").write_text(guide["python"][0])
    for number, diff in enumerate(guide["diff"]):
        (tmp_path / f"{number}.diff").write_text(diff)
        # line numbers in the guide are hints, but its context lines must exist
        applied = subprocess.run(
            ["git", "apply", "--unidiff-zero", "--recount", f"{number}.diff"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert applied.returncode == 0, f"{applied.stderr}\n{diff}"
    command = guide["sh"][0].strip().split()
    assert command[:3] == ["python", "-m", "pytest"]
    done = subprocess.run(
        [sys.executable, *command[1:], "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 15, done.stdout[-3000:]
    assert "failed" not in done.stdout
