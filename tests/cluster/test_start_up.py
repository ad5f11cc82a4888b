"""Commands that compute nothing load none of the large libraries, so that they answer at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from zero_ds.runtime.environment import has_cuda

LARGE = ("torch", "transformers", "deepspeed", "datasets", "numpy", "peft", "matplotlib")

PROGRAM = """
import json, sys
from zero_ds.cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("LOADED", json.dumps(sorted(sys.modules)))
"""


def loaded_by(*words: str, folder: Path = ROOT) -> set[str]:
    """Returns the names of all modules that a command has loaded by its end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(words)], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.rsplit("LOADED ", 1)[1]))


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("recipes",),
        ("train", "smollm2-135m/encoder", "--dry-run"),
        ("train", "llama-3.1-70b/decoder", "zero=zero3_hpz", "--dry-run"),
        ("train", "smollm2-135m/encoder", "zero=zero3_offload", "--dry-run"),
        ("pipeline", "llama-3.1-8b", "--dry-run"),
        ("why", "smollm2-135m/encoder", "out=/nowhere"),
        ("trajectory", "--help"),
        ("eval", "run", "--help"),
    ],
    ids=" ".join,
)
def test_a_command_that_computes_nothing_loads_no_large_library(words: tuple[str, ...]) -> None:
    if words[0] == "train" and has_cuda():
        pytest.skip("with a GPU torch is asked whether it multiplies bfloat16 fast")
    assert not loaded_by(*words) & set(LARGE)


def test_a_second_plan_of_the_same_model_loads_no_large_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first plan builds the models of a stage and its routes; the second reads their numbers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    words = ("plan", "llama-3.1-70b/encoder", "data.max_length=1536")
    assert "torch" in loaded_by(*words)
    assert not loaded_by(*words) & set(LARGE)


def test_a_first_plan_of_the_paper_s_models_loads_no_large_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their numbers come with the package."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not loaded_by("plan", "llama-3.1-70b/encoder", "out=elsewhere", "log_every=3") & set(LARGE)
