"""`zero-ds align`: a start in the space of words, without any decoder."""

from __future__ import annotations

from typing import Annotated

import typer


def align(
    recipe: Annotated[str, typer.Argument(help="Recipe with images, such as smollm2-135m/align, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the recipe's, such as max_steps=300 align.scale=30."),
    ] = None,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Train the vision encoder as well, and not the adapter alone.")
    ] = False,
) -> None:
    """Train the adapter against the target's word embeddings alone; an option beyond the paper.

    Image tokens are drawn to the words of the answers or captions of their images. Of the target one tensor is read, so
    that one small device is enough for a language model of any size. The result is a checkpoint that later stages start
    from by init_from; align.weight keeps the loss in these. Prints the words nearest to some images.

    Example: zero-ds align smollm2-135m/align max_steps=300
    """
    from zero_ds.config.loading import load_run

    stage = "words-encoder" if encoder else "words"
    config = load_run(recipe, [*(overrides or []), f"stage={stage}", "preview.every_steps=null"])
    from zero_ds.runtime import distributed
    from zero_ds.training.train import train
    from zero_ds.training.words import lines, nearest_words

    folder = train(config)
    found = nearest_words(config)
    if distributed.is_rank_zero():
        print("\n".join(["nearest words (capitals: in the answers)", *lines(found), f"result {folder}"]))
