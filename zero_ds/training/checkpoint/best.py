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
    """Returns the folder that the link leads to; None if there is none."""
    with contextlib.suppress(OSError):
        name = (run / LINK).readlink().name
        if FOLDER_NAME.fullmatch(name) and (run / name / "manifest.json").is_file():
            return run / name
    return None


def restore_best(run: Path, last: int | None = None) -> float | None:
    """Returns the lowest held-out loss that a checkpoint of the run was saved for; None if there is none.

    The link is set again if it does not lead there: a run may have ended between saving and setting it.

    last: step from which the run goes on. Later checkpoints will be replaced: the run may have ended before `latest`
    named them, or was set back, or they are another run's.
    """
    losses = {}
    for folder in run.glob("step-*"):
        found = FOLDER_NAME.fullmatch(folder.name)
        if found and (last is None or int(found[1]) <= last) and (loss := _loss(folder)) is not None:
            losses[folder] = loss
    if not losses:
        return None
    best = min(losses, key=lambda folder: (losses[folder], folder.name))
    if best_folder(run) != best:
        set_best(best)
    return losses[best]


def _loss(folder: Path) -> float | None:
    """Returns the held-out loss that a complete checkpoint was saved for."""
    try:
        progress = json.loads((folder / "resume" / "progress.json").read_text(encoding="utf-8"))
        loss = float(progress["validation_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return loss if math.isfinite(loss) and (folder / "manifest.json").is_file() else None


def set_best(folder: Path) -> None:
    """Makes a checkpoint the best one of its run."""
    temporary = folder.parent / f".{LINK}.{uuid.uuid4().hex[:12]}.tmp"
    try:
        temporary.symlink_to(folder.name)
        temporary.replace(folder.parent / LINK)
    except OSError as error:
        logger.warning("%s cannot be named as the best checkpoint: %s", folder, error.strerror or error)
        temporary.unlink(missing_ok=True)
