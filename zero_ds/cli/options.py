"""Options that commands with a MODEL share, and completion of the names of recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.grafting.engines.options import DeviceOptions, load, precision
from zero_ds.runtime.trust import allow_code

__all__ = [
    "ChatTemplateOption",
    "DeviceMapOption",
    "DeviceOptions",
    "EngineOption",
    "MaxModelLenOption",
    "MemoryShareOption",
    "OffloadOption",
    "TensorParallelOption",
    "TrustRemoteCodeOption",
    "VerboseOption",
    "complete_recipe",
    "load",
    "precision",
]


def _trust(given: bool) -> bool:
    if given:
        allow_code(True)
    return given


TrustRemoteCodeOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        callback=_trust,
        help="Run the code that a model's folder brings, for a type that transformers does not know. Such code can do "
        "anything that you can do.",
    ),
]
ChatTemplateOption = Annotated[
    str | None, typer.Option("--chat-template", help="File with a chat template that replaces the model's own.")
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", help="Show the commands and all that they print, which else goes to OUT/logs.")
]
EngineOption = Annotated[str, typer.Option("--engine", help="Engine that runs the model: transformers or vllm.")]
TensorParallelOption = Annotated[
    int, typer.Option("--tensor-parallel", help="Number of GPUs that share the model, with vllm.")
]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Place of the decoder layers: auto (all GPUs, then host memory), cpu (host memory) or disk.",
    ),
]
OffloadOption = Annotated[
    Path | None, typer.Option("--offload-folder", help="Folder for the layers, with --device-map disk.")
]
MaxModelLenOption = Annotated[
    int | None,
    typer.Option("--max-model-len", help="Longest prompt with its answer in tokens, with vllm. Default: all that fit."),
]
MemoryShareOption = Annotated[
    float | None,
    typer.Option("--gpu-memory-share", help="Share of each GPU's memory for vllm, besides the encoder. Default: 0.85."),
]


def complete_recipe(incomplete: str) -> list[str]:
    """Returns the recipes of the package, and the YAML files of the folder, that begin with what has been typed."""
    from zero_ds.config.loading import recipe_names

    folder = Path(incomplete) if incomplete.endswith("/") else Path(incomplete).parent
    files = [
        str(path) + "/" * path.is_dir() for path in sorted(folder.glob("*")) if path.is_dir() or path.suffix == ".yaml"
    ]
    return [name for name in [*recipe_names(), *files] if name.startswith(incomplete)]
