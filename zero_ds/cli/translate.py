"""`zero-ds translate`: translators trained on one device, from hidden states of the target."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.runtime.errors import ConfigError


def translate(
    recipe: Annotated[
        str, typer.Argument(help="Recipe of stage translator, such as smollm2-135m/translator, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace the recipe's, such as translate.tokens=2000000 max_steps=500."),
    ] = None,
    replace: Annotated[
        list[str] | None,
        typer.Option(
            help="Cut the recipe's surrogate first: layers to replace, first:last. May be given several times."
        ),
    ] = None,
    translators: Annotated[
        int, typer.Option(help="With --replace: number of layers that take the place of each range.", min=1)
    ] = 1,
    sample: Annotated[
        int | None,
        typer.Option(help="Number of conversations that the target writes itself, besides data.sources.", min=0),
    ] = None,
) -> None:
    """Train translators on one device, from the target's hidden states; an option beyond the paper.

    The target is read one layer at a time, so it may be larger than the memory. Hidden states before and after the
    replaced layers are kept on disk (translate.states), and only translators and the layers after them are trained on.
    When it was interrupted, the same command goes on. Later stages start from the result by init_from.

    Example: zero-ds translate smollm2-135m/translator --replace 24:28 translate.lookups=runs/demo/data/lookups.json
    """
    from zero_ds.config.loading import load_run

    config = load_run(recipe, [*(overrides or []), *([f"translate.sample={sample}"] if sample is not None else [])])
    if translators > 1 and not replace:
        raise ConfigError(f"--translators {translators} belongs to --replace; give both, or neither.")
    if replace:
        _cut(config.target, config.surrogate, replace, translators)
    import json

    from zero_ds.surrogate.offline.translate import REPORT, lines, translate

    folder = translate(config)
    print("\n".join(lines(json.loads((folder / REPORT).read_text(encoding="utf-8")), folder)))


def _cut(target: str, surrogate: str | None, replace: list[str], translators: int) -> None:
    """Cuts the recipe's surrogate, unless it is there already."""
    from zero_ds.model.layer_plan import Replaced
    from zero_ds.runtime.hub import local_folder
    from zero_ds.surrogate.build import build_surrogate

    if surrogate is None:
        raise ConfigError("the recipe names no folder for the surrogate that --replace cuts; set surrogate=FOLDER.")
    build_surrogate(local_folder(target), [Replaced.parse(text, translators) for text in replace], Path(surrogate))
