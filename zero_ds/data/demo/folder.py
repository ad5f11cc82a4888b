"""The demo's folder: images, records and vision encoder, each made once for the same settings."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from zero_ds.runtime.files import write_atomically

logger = logging.getLogger(__name__)

VERSION = 1
"""Version of the images and of the vision encoder. Raise it with every change after which the same seed and number of
steps give other files; folders of an earlier version are then made again."""

SOURCES_OF_VERSION_1 = (
    "d018d23e1d60eaaafffc2c7d765a6913dda8fdcb3b06979127f8079a290f076d",
    "35e012bdd41f53c1079a35d8250112a7e55d38c74e6cc9ea629d1d71efcf33b9",
)
"""SHA-256 of the source text that made the files of version 1 before there was a version number; demo.json then held
this hash as `code`."""

RECORD = "demo.json"
"""File that is written last and says with which settings the folder was made."""


def make_demo(out: Path, *, seed: int = 0, steps: int = 2000) -> None:
    """Draws the demo's images and warms up its vision encoder in `out`, unless `out` holds both for these settings.

    seed: of the images and of the encoder; steps: of the encoder's warm-up. A folder that was made with other settings,
    or that was interrupted, is made again as a whole.
    """
    record = out / RECORD
    settings = {"seed": seed, "steps": steps}
    if record.is_file() and _made_with(json.loads(record.read_text(encoding="utf-8")), settings):
        return
    from zero_ds.data.demo.dataset import write_demo
    from zero_ds.data.demo.warmup import warm_up

    for part in ("data", "encoder"):
        shutil.rmtree(out / part, ignore_errors=True)
    record.unlink(missing_ok=True)
    logger.info("drawing the demo's images in %s", out / "data")
    write_demo(out / "data", seed=seed)
    accuracies = warm_up(out / "data", out / "encoder", steps=steps, seed=seed)
    told_apart = ", ".join(f"{name} {share:.0%}" for name, share in accuracies.items())
    logger.info("the vision encoder tells apart %s", told_apart)
    write_atomically(record, json.dumps({"version": VERSION, **settings}))


def _made_with(content: Any, settings: dict[str, int]) -> bool:
    """Returns whether a demo.json says that its folder is of this version and was made with these settings."""
    if not isinstance(content, dict):
        return False
    if content == {"version": VERSION, **settings}:
        return True
    return VERSION == 1 and any(content == {"code": code, **settings} for code in SOURCES_OF_VERSION_1)
