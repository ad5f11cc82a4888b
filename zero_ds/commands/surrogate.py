"""`zero-ds surrogate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from zero_ds.config import ConfigError


def surrogate(
    target: Annotated[str, typer.Option(help="Full model: folder or hub id.")],
    out: Annotated[Path, typer.Option(help="New folder for the surrogate.")],
    replace: Annotated[
        list[str] | None, typer.Option(help="Layers to replace, first:last, both included; may be given several times.")
    ] = None,
    from_trajectory: Annotated[
        Path | None, typer.Option(help="Folder of `zero-ds trajectory`, whose proposal is taken.")
    ] = None,
    translators: Annotated[int, typer.Option(help="Trainable layers that take the place of each range.", min=1)] = 1,
) -> None:
    """Cut a surrogate: keep early and last layers, replace the range between by trainable translators.

    The result is an ordinary Hugging Face folder. Tensors are streamed from file to file; no model is loaded.
    """
    from zero_ds.hub import local_folder
    from zero_ds.surrogate import Replaced, build_surrogate, read_surrogate

    if bool(replace) == bool(from_trajectory):
        raise ConfigError("say what to replace: either --replace first:last or --from-trajectory FOLDER.")
    ranges = list(replace or ())
    if from_trajectory:
        ranges = [_proposal(from_trajectory)]
    wanted = [Replaced.parse(text, translators) for text in ranges]
    if (out / "surrogate.json").is_file() and sorted(read_surrogate(out).plan.replaced) == sorted(wanted):
        info = read_surrogate(out)
        print(f"{out} holds the surrogate {info.plan} already.")
        return
    info = build_surrogate(local_folder(target), wanted, out)
    share = info.kept_parameters / info.target_parameters
    print(
        f"{info.plan}: {info.plan.surrogate_depth} of {info.plan.depth} layers, {info.kept_parameters:,} of "
        f"{info.target_parameters:,} parameters ({share:.0%}), translators at {info.plan.translators} -> {out}"
    )


def _proposal(folder: Path) -> str:
    path = folder / "trajectory.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{folder} holds no readable trajectory.json; run `zero-ds trajectory` first.") from None
    proposed = content.get("proposed")
    if not proposed:
        raise ConfigError(f"{path} proposes no layers: {content.get('transition', {}).get('verdict')}; give --replace.")
    return str(proposed["replace"])
