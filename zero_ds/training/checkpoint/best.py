"""The best checkpoint of a run, by its held-out loss: the link `best` in the run folder leads to it."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import uuid
from pathlib import Path

from zero_ds.training.checkpoint.checkpoint import FOLDER_NAME

logger = logging.getLogger(__name__)

LINK = "best"
"""Name of the link."""


def best_folder(run: Path) -> Path | None:
    """Returns the folder of the best checkpoint; None if there is none."""
    link = run / LINK
    with contextlib.suppress(OSError):
        name = link.readlink().name
        if FOLDER_NAME.fullmatch(name) and (run / name / "manifest.json").is_file():
            return run / name
    return None


def best_loss(run: Path) -> float | None:
    """Returns the held-out loss of the best checkpoint; None if there is none."""
    folder = best_folder(run)
    if folder is None:
        return None
    try:
        loss = float(json.loads((folder / "resume" / "progress.json").read_text(encoding="utf-8"))["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) else None


def set_best(folder: Path) -> None:
    """Makes a checkpoint the best one of its run."""
    temporary = folder.parent / f".{LINK}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(folder.parent / LINK)
    except OSError as error:
        logger.warning("%s cannot be named as the best checkpoint: %s", folder, error.strerror or error)
        temporary.unlink(missing_ok=True)
