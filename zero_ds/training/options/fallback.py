"""Recomputes more, once, if a run with `activation_checkpointing: auto` runs out of memory.

Ranks cannot go on after one of them has run out of memory: the others wait for it in a collective. So the rank that
failed leaves a note in the run folder, the job ends, and the next attempt, which launch/train.sh starts by itself,
resumes from the last checkpoint and recomputes all decoder layers. Loads no torch, because the launcher reads the note.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zero_ds.config.schema import RunConfig
from zero_ds.runtime.files import write_atomically

FILE = "out_of_memory.json"
"""Note in the run folder."""
NO_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "STATUS_ALLOC_FAILED")
"""Words of torch, CUDA and the system about memory. The last are those of libraries that allocate outside of torch,
such as cuBLAS and cuDNN."""


class NoMemoryError(ValueError):
    """A rank has run out of memory; the message is one sentence with the remedy."""

    def __init__(self, message: str, may_pass: bool) -> None:
        super().__init__(message)
        self.may_pass = may_pass
        """Whether the next attempt may succeed without anybody's help."""


def read_note(out: Path) -> str | None:
    """Returns the note in a run folder; None if there is none."""
    try:
        return (out / FILE).read_text(encoding="utf-8")
    except OSError:
        return None


def recomputes_all(config: RunConfig, ranks: int) -> bool:
    """Returns whether the run has run out of memory before with the same settings, and so recomputes all layers."""
    try:
        noted = json.loads(read_note(Path(config.out)) or "{}")
    except ValueError:
        return False
    return isinstance(noted, dict) and noted.get("settings") == _settings(config, ranks)


@contextmanager
def more_recomputation_if_out_of_memory(config: RunConfig, ranks: int, recomputed: int, depth: int) -> Iterator[None]:
    """Turns the error of a device or host without memory into a `NoMemoryError`, and leaves the note if that may help.

    recomputed: number of decoder layers that the run recomputes, of `depth`.

    Raises:
        NoMemoryError: memory has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        found = f"memory ran out with {recomputed} of {depth} decoder layers recomputed"
        if config.activation_checkpointing == "auto" and recomputed < depth:
            note = {"settings": _settings(config, ranks), "recomputed": recomputed, "error": str(error)[:500]}
            write_atomically(Path(config.out) / FILE, json.dumps(note, indent=2) + "\n")
            raise NoMemoryError(
                f"{found}; the next attempt, from the last checkpoint, recomputes all of them.", may_pass=True
            ) from error
        more = "" if recomputed == depth else "activation_checkpointing=auto, "
        raise NoMemoryError(
            f"{found}; set {more}a smaller micro_batch (it is {config.micro_batch}) or another zero= (`zero-ds plan` "
            "compares them).",
            may_pass=False,
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error of Python, torch or CUDA says that memory has run out, on a device or the host."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in text for words in NO_MEMORY)
    )


def _settings(config: RunConfig, ranks: int) -> dict[str, Any]:
    """Returns the settings on which the memory of a rank depends and that may differ when the run is resumed."""
    return {"micro_batch": config.micro_batch, "zero": config.zero, "ranks": ranks, "packing": config.data.packing}
