"""`zero-ds graft` and `zero-ds export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zero_ds.config import ConfigError

Weights = Annotated[Path, typer.Option(help="Run or commit folder with a trained encoder.")]
Target = Annotated[str, typer.Option(help="Full language model: folder or hub id.")]


def graft(
    weights: Weights,
    target: Target,
    surrogate: Annotated[str | None, typer.Option(help="Where its surrogate lies now, if it was moved.")] = None,
    accept: Annotated[
        list[str] | None, typer.Option(help="Accept a difference by its name in the report, such as tokenizer.")
    ] = None,
) -> None:
    """Check that a trained encoder belongs to a full language model; the graft itself needs no training and no copy."""
    from zero_ds.checkpoint import find_commit
    from zero_ds.graft import compatibility, refuse_differences
    from zero_ds.hub import local_folder

    commit = find_commit(weights)
    checks = compatibility(commit, local_folder(target), thorough=True, surrogate=surrogate)
    accepted = [check.name for check in checks if check.fits is False and check.name in (accept or ())]
    unknown = [check.name for check in checks if check.fits is None]
    for check in checks:
        verdict = {True: "fits", False: "DIFFERS", None: "unknown"}[check.fits]
        differs = check.fits is False or (check.fits is None and check.trained_with != check.here)
        print(
            f"{'accepted' if check.name in accepted else verdict:<10}{check.name:<13}{check.here}"
            + (f" (trained with: {check.trained_with})" if differs else "")
        )
    refuse_differences(commit, target, checks, accept or ())
    print(
        f"{weights} can be grafted into {target}"
        + (f", with another {', '.join(accepted)}, which was accepted" if accepted else "")
        + (f"; not compared: {', '.join(unknown)}." if unknown else ".")
    )


def export(
    weights: Weights,
    target: Target,
    out: Annotated[Path, typer.Option(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    """Write encoder, adapter and full model as transformers' own Llava, proved by loading it afresh without zero_ds."""
    import torch

    from zero_ds.export import export_llava

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in kinds:
        raise ConfigError(f"--dtype {dtype} is not known; choose {' or '.join(kinds)}.")
    proof = export_llava(weights, target, out, kinds[dtype])
    gap = max(prompt["largest_log_prob_difference"] for prompt in proof["prompts"])
    print(f"{out}: loads with transformers alone; log-probabilities within {gap:.1e} of the source.")
